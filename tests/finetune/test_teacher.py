"""The flat model as a teacher: it is found, it is the right one, and what it says is learnt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dmt_convert as dmt
from dmt_convert.bundle import open_bundle
from dmt_convert.cluster import ClusterJob
from dmt_convert.config import FinetuneConfig, TrainingConfig
from dmt_convert.data import Batch, adapt_batches, open_data
from dmt_convert.errors import ConfigError, DmtError
from dmt_convert.training import (
    Teacher,
    choose_teacher,
    load_bundle,
    open_teacher,
    open_training_data,
    train,
)
from support.bundles import convert_quickly, make_bundle
from support.checkpoints.flat import make_flat


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpt.pt and ckpt-dmt2, which was made from it."""
    folder = tmp_path_factory.mktemp("scene")
    make_bundle(folder, compression=4)
    return folder


@pytest.fixture
def copied(scene: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scene, tmp_path / "copy"))


def open_chosen(folder: Path, weight: float = 0.5) -> Teacher:
    bundle = open_bundle(folder / "ckpt-dmt2")
    teacher = open_teacher(choose_teacher(bundle, "auto", weight), bundle)
    assert teacher is not None
    return teacher


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def read_batches(scene: Path, path: Path, size: int) -> list[Batch]:
    rows, spec = open_data(path), open_bundle(scene / "ckpt-dmt2").manifest.model.flat
    return [*adapt_batches(rows, spec, rows.batches(size))]


def test_its_logits_are_those_of_dmt_score(scene: Path, clicks: Path) -> None:
    """To the bit, as rows come in the batches of scoring; else but for the order of sums."""
    teacher, path = open_chosen(scene), clicks / "valid.npz"
    scored = dmt.score(scene / "ckpt.pt", path).logits
    found = [teacher.logits(batch) for batch in read_batches(scene, path, 4096)]
    assert np.array_equal(np.concatenate(found), scored)
    found = [teacher.logits(batch) for batch in read_batches(scene, path, 37)]
    np.testing.assert_allclose(np.concatenate(found), scored, rtol=1e-5, atol=1e-5)
    converted = dmt.score(scene / "ckpt-dmt2", path).logits  # the check can fail
    assert not np.allclose(converted, scored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_the_loss_is_that_of_labels_and_teacher(scene: Path, clicks: Path, weight: float) -> None:
    """Value and gradient: one cross entropy with mixed labels is the weighted sum of two."""
    teacher = open_chosen(scene, weight)
    (batch,) = read_batches(scene, clicks / "valid.npz", 500)
    assert batch.labels is not None
    soft = sigmoid(dmt.score(scene / "ckpt.pt", clicks / "valid.npz").logits)
    z = np.random.default_rng(0).standard_normal(500)

    def entropy(target: Any) -> float:
        p = sigmoid(z)
        return float(-np.mean(target * np.log(p) + (1 - target) * np.log(1 - p)))

    logits = torch.from_numpy(z).requires_grad_()
    mixed = torch.from_numpy(teacher.mix(batch).labels).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, mixed)
    loss.backward()
    expected = (1 - weight) * entropy(batch.labels) + weight * entropy(soft)
    # mixed labels are float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    target = (1 - weight) * batch.labels + weight * soft
    np.testing.assert_allclose(logits.grad, (sigmoid(z) - target) / 500, atol=1e-9)
    shuffled = np.random.default_rng(1).permutation(soft)  # the check can fail
    wrong = (1 - weight) * entropy(batch.labels) + weight * entropy(shuffled)
    assert abs(loss.item() - wrong) > 1e-3


def test_teachers_that_are_sure_overflow_nothing(scene: Path, clicks: Path, monkeypatch) -> None:
    teacher = open_chosen(scene, 1.0)
    (batch,) = read_batches(scene, clicks / "valid.npz", 500)
    monkeypatch.setattr(teacher, "logits", lambda batch: np.float32([-1e30, -50, 0, 50, 1e30]))
    with np.errstate(all="raise"):
        found = teacher.mix(replace(batch, labels=np.ones(5, dtype=np.float32))).labels
    assert found is not None and found.tolist() == [0, 0, 0.5, 1, 1]


class Shuffled(Teacher):
    """Gives every row what it should give another."""

    def logits(self, batch: Batch) -> Any:
        return np.random.default_rng(0).permutation(super().logits(batch))


def test_what_it_knows_is_learnt(scene: Path, clicks: Path) -> None:
    """The towers come closer to a teacher than its shuffled answers or labels alone let them."""
    bundle = open_bundle(scene / "ckpt-dmt2")
    choice = choose_teacher(bundle, "auto", 1.0)
    data = open_training_data(clicks, None, bundle.manifest)
    (valid,) = read_batches(scene, clicks / "valid.npz", 500)
    truth = dmt.score(scene / "ckpt.pt", clicks / "valid.npz").logits

    def distance(teacher: Teacher | None) -> float:
        model = load_bundle(bundle)
        config = TrainingConfig(
            max_steps=60, batch_size=64, eval_every=60, dense_lr=3e-3, table_lr=0.05
        )
        last = {}

        def keep(step: int, loss: float) -> None:
            if step == 60:
                with torch.no_grad():
                    last["logits"] = model(valid).numpy()

        train(model, data.train, data.valid, config, teacher=teacher, on_step=keep)
        return float(np.mean(np.abs(sigmoid(last["logits"]) - sigmoid(truth))))

    taught = distance(open_teacher(choice, bundle))
    assert choice.path is not None
    info = dmt.inspect(choice.path)
    assert taught < 0.7 * distance(None)
    assert taught < 0.7 * distance(Shuffled(info, 1.0))  # type: ignore[arg-type]


def test_auto_takes_the_checkpoint_beside_the_bundle(copied: Path) -> None:
    bundle = open_bundle(copied / "ckpt-dmt2")
    found = choose_teacher(bundle, "auto", 0.5)
    assert (found.path, found.digest) == (copied / "ckpt.pt", bundle.manifest.source.digest)
    assert f"the flat model {copied / 'ckpt.pt'}, weight 0.5" in found.line
    (copied / "ckpt.pt").rename(copied / "moved.pt")
    gone = choose_teacher(bundle, "auto", 0.5)
    assert gone.path is None and gone.record is None
    assert "ckpt.pt is not beside the bundle; name it with --teacher" in gone.line
    named = choose_teacher(bundle, copied / "moved.pt", 0.5)
    assert named.digest == bundle.manifest.source.digest


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"seed": 1}, "holds other tables"),
        ({"rows": (7, 50, 11, 9)}, "other names or sizes|holds another model"),
        ({"hidden": 24}, "other names or sizes|holds another model"),
    ],
)
def test_another_checkpoint_is_set_aside_or_refused(copied: Path, change, found) -> None:
    make_flat(copied / "ckpt.pt", **change)
    bundle = open_bundle(copied / "ckpt-dmt2")
    aside = choose_teacher(bundle, "auto", 0.5)
    assert aside.path is None
    assert "is set aside as a teacher: " in aside.line
    with pytest.raises(ConfigError, match=found) as refused:
        choose_teacher(bundle, copied / "ckpt.pt", 0.5)
    assert "--teacher none" in refused.value.hint
    with pytest.raises(DmtError):
        choose_teacher(bundle, copied / "nothing.pt", 0.5)


def change_dense(path: Path) -> None:
    """Change one weight outside the tables; the file keeps its size."""
    state = torch.load(path)
    name = next(name for name in state if name.startswith("over_arch"))
    state[name].view(-1)[0] += 0.5
    torch.save(state, path)


def test_other_dense_weights_are_another_teacher(copied: Path) -> None:
    change_dense(copied / "ckpt.pt")
    bundle = open_bundle(copied / "ckpt-dmt2")
    aside = choose_teacher(bundle, "auto", 0.5)
    assert aside.path is None
    assert "ckpt.pt holds other dense weights than the bundle was made from" in aside.line
    with pytest.raises(ConfigError, match="holds other dense weights"):
        choose_teacher(bundle, copied / "ckpt.pt", 0.5)


def test_a_training_resumes_with_the_same_dense_weights_alone(copied: Path, clicks: Path) -> None:
    bundle = open_bundle(copied / "ckpt-dmt2")
    found = choose_teacher(bundle, "auto", 0.5).record
    assert found is not None
    ranks: Any = SimpleNamespace(rank=0, size=1, on_all=lambda work: [work()])
    changed = [
        ClusterJob(
            bundle=bundle,
            plan=None,  # type: ignore[arg-type]
            data=open_training_data(clicks, None, bundle.manifest),
            config=TrainingConfig(),
            out=copied / "out",
            checkpoints=copied / "checkpoints",
            teacher=teacher,
        ).must_match(ranks)
        for teacher in (found, replace(found, dense_digest="sha256:0"), None)
    ]
    differ = {name for name in changed[0] if changed[0][name] != changed[1][name]}
    assert differ == {"teacher's dense weights"}
    assert "teacher's dense weights" not in changed[2]


def test_bundles_of_earlier_versions_say_what_was_not_compared(copied: Path) -> None:
    bundle = open_bundle(copied / "ckpt-dmt2")
    told = choose_teacher(bundle, "auto", 0.5)
    assert "only the tables" not in told.line
    source = replace(bundle.manifest.source, dense_digest="")
    older = replace(bundle, manifest=replace(bundle.manifest, source=source))
    found = choose_teacher(older, "auto", 0.5)
    assert "only the tables could be compared" in found.line
    assert found.record == told.record  # what it resumes with is known from now on


def test_tables_that_were_recoded_are_compared_as_they_were_written(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    bundle = convert_quickly(source, tmp_path / "b", dtype="fp16", compression=4)
    assert choose_teacher(bundle, "auto", 0.5).path == source


def test_labels_alone_where_that_is_asked_for_or_nothing_is_lost(copied: Path) -> None:
    bundle = open_bundle(copied / "ckpt-dmt2")
    for asked, weight in (("none", 0.5), ("auto", 0.0)):
        assert choose_teacher(bundle, asked, weight).path is None
    same = convert_quickly(copied / "ckpt.pt", copied / "same", tower_module="passthrough")
    assert "computes what the flat model computes" in choose_teacher(same, "auto", 0.5).line
    assert choose_teacher(same, copied / "ckpt.pt", 0.5).path is not None


def test_the_option_takes_a_path_or_a_word(tmp_path: Path) -> None:
    for text, value in (("auto", "auto"), ("none", "none"), ("a.pt", Path("a.pt"))):
        assert FinetuneConfig(data=tmp_path, teacher=text).teacher == value
    with pytest.raises(ConfigError, match="teacher_weight must be a number <= 1"):
        FinetuneConfig(data=tmp_path, teacher_weight=2)
