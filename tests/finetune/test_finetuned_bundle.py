"""A fine-tuned bundle: the trained model, whole, and what it says of itself."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import check_digests, open_bundle, open_bundle_model
from dmt_convert.config import TrainingConfig
from dmt_convert.data import adapt_batches, open_data
from dmt_convert.documents import ParentRecord, QualityRow
from dmt_convert.errors import BundleError, CheckpointError, ConfigError
from dmt_convert.metrics import measure_accuracy
from dmt_convert.scoring import open_model, score_data
from dmt_convert.training import (
    check_memory,
    load_bundle,
    load_tables,
    open_training_data,
    train,
    write_finetuned,
)
from dmt_convert.training.finetuned import Finetuned, bundle_digest
from dmt_convert.training.in_memory import needed_bytes, table_infos
from support.bundles import make_bundle

CONFIG = TrainingConfig(epochs=2, batch_size=64, dense_lr=3e-3, table_lr=0.05)
SPOIL = TrainingConfig(max_steps=4, batch_size=64, dense_lr=1.0, table_lr=5.0, eval_every=1)


def tune(path: Path, clicks: Path, out: Path, config: TrainingConfig = CONFIG, **options: Any):
    parent = open_bundle(path)
    data = open_training_data(clicks)
    model = load_bundle(parent)
    result = train(model, data.train, data.valid, config)
    done = write_finetuned(parent, out, model, result, config=config, data=data, **options)
    return model, result, done


@pytest.fixture(scope="module")
def tuned(bundle_path, clicks, tmp_path_factory) -> tuple[Any, Any, Finetuned]:
    return tune(bundle_path, clicks, tmp_path_factory.mktemp("tuned") / "tuned")


def test_the_bundle_holds_the_trained_model_to_the_bit(tuned, clicks) -> None:
    model, _, done = tuned
    rows = open_data(clicks / "valid.npz")
    stored = open_bundle_model(done.bundle)
    with torch.no_grad():
        for batch in adapt_batches(rows, model.spec, rows.batches(256)):
            assert torch.equal(stored(batch), model(batch))


def test_it_is_a_bundle_like_any_other(tuned, clicks, bundle_path, call_dmt) -> None:
    _, result, done = tuned
    path = done.bundle.path
    files = [{p.relative_to(top) for p in top.rglob("*")} for top in (path, bundle_path)]
    summed = {Path(f"weights/accumulators_{t:03d}.safetensors") for t in range(2)}
    assert files[0] == files[1] | summed
    check_digests(open_bundle(path))
    run = call_dmt("evaluate", path, "--data", clicks / "valid.npz", "--json")
    value = json.loads(run.stdout)
    assert run.code == 0
    assert value["ne"] == pytest.approx(result.best.ne, abs=1e-6)
    assert value["auc"] == pytest.approx(result.best.auc, abs=1e-6)
    assert value["ne"] < result.start.ne
    assert call_dmt("verify", path, path, "--quiet").code == 0
    assert call_dmt("verify", bundle_path, path, "--quiet").code == 4


def test_the_manifest_says_how_it_came_to_be(tuned, bundle_path) -> None:
    _, result, done = tuned
    parent, manifest = open_bundle(bundle_path), done.bundle.manifest
    record = manifest.initialisation.finetune
    assert record.parent == ParentRecord(name="ckpt-dmt2", digest=bundle_digest(parent))
    assert record.parent.digest != bundle_digest(done.bundle)
    assert (record.steps, record.best_step) == (result.steps, result.best_step)
    assert record.settings["table_lr"] == 0.05
    assert record.before.ne == result.start.ne
    assert record.after.ne == result.best.ne
    assert [entry.step for entry in record.history] == [e.step for e in result.history]
    assert record.data.train_rows == 2000
    assert record.previous is None
    # what was known before stays
    assert replace(manifest.initialisation, finetune=None) == parent.manifest.initialisation
    assert manifest.source == parent.manifest.source
    assert manifest.facts == parent.manifest.facts


def test_the_quality_table_gains_a_row(tuned, bundle_path) -> None:
    _, result, done = tuned
    before = open_bundle(bundle_path).manifest.quality.rows
    rows = done.bundle.manifest.quality.rows
    assert rows[:-1] == before
    assert rows[-1] == QualityRow(
        name="fine-tuned", auc=result.best.auc, log_loss=result.best.log_loss, ne=result.best.ne
    )


def plain(path: Path) -> str:
    text = (path / "report.html").read_text("utf-8")
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text.split("<body>")[1])))


def test_the_report_shows_the_gain(tuned, bundle_path) -> None:
    _, result, done = tuned
    text = plain(done.bundle.path)
    assert "Fine-tuned, so its logits are no longer" in text
    assert f"AUC {result.start.auc:.5f} → {result.best.auc:.5f}" in text
    assert "fine-tuned this bundle" in text
    assert "closed form this bundle" in plain(bundle_path)
    assert "closed form this bundle" not in text
    assert "None" not in text and "nan" not in text
    figures = [(path / "partition.svg").read_text() for path in (done.bundle.path, bundle_path)]
    assert figures[0] == figures[1]


def test_a_fine_tuned_passthrough_is_not_called_exact(clicks, tmp_path) -> None:
    path = make_bundle(tmp_path, tower_module="passthrough")
    _, _, done = tune(path, clicks, tmp_path / "tuned")
    text = plain(done.bundle.path)
    assert "Exact" in plain(path)
    assert "Exact" not in text and "exact model" not in text


def test_where_nothing_beats_the_start_the_start_is_written(bundle_path, clicks, tmp_path) -> None:
    _, result, done = tune(bundle_path, clicks, tmp_path / "tuned", SPOIL)
    assert not result.improved and "nothing beat the start" in done.notes[0]
    assert done.after == done.before
    assert bundle_digest(done.bundle) == bundle_digest(open_bundle(bundle_path))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tables_in_fewer_bits_are_trained_in_fp32(clicks, tmp_path, dtype) -> None:
    path = make_bundle(tmp_path, dtype=dtype)
    _, result, done = tune(path, clicks, tmp_path / "tuned")
    tables = [i for t in done.bundle.towers for n, i in t.items() if n.startswith("tables.")]
    assert {info.dtype for info in tables} == {dtype}
    assert "stored in " + dtype in done.notes[0]
    # what is said is what is stored
    scores = score_data(open_model(done.bundle.path), clicks / "valid.npz")
    stored = measure_accuracy(scores.logits, scores.labels)
    assert done.after.ne == pytest.approx(stored.ne, abs=1e-6)
    assert done.after.ne != result.best.ne
    assert done.after.ne < done.before.ne


@pytest.mark.slow
def test_rounding_that_spoils_the_gain_is_undone(clicks, tmp_path) -> None:
    path = make_bundle(tmp_path, dtype="bf16")
    parent, data = open_bundle(path), open_training_data(clicks)
    model = load_bundle(parent)
    result = train(model, data.train, data.valid, CONFIG)
    start = replace(result.start, ne=result.best.ne, auc=0.5)  # a gain smaller than the rounding
    near = replace(result, history=(start, *result.history[1:]))
    for group in model.store.groups:
        group.weight.mul_(1.003)
    done = write_finetuned(parent, tmp_path / "t", model, near, config=CONFIG, data=data)
    assert done.after == start and "rounded to bf16" in done.notes[0]
    assert bundle_digest(done.bundle) == bundle_digest(parent)


def test_a_second_round_keeps_the_first(tuned, clicks, tmp_path) -> None:
    first = tuned[2].bundle
    _, _, done = tune(first.path, clicks, tmp_path / "again", CONFIG.replace(max_steps=3))
    record = done.bundle.manifest.initialisation.finetune
    assert record.parent.digest == bundle_digest(first)
    assert record.previous == first.manifest.initialisation.finetune
    names = [row.name for row in done.bundle.manifest.quality.rows]
    assert names[-2:] == ["fine-tuned", "fine-tuned (2)"]
    assert "fine-tuned (2) this bundle" in plain(done.bundle.path)


def test_old_bundles_without_quality_or_figure_can_be_tuned(bundle_path, clicks, tmp_path) -> None:
    old = tmp_path / "old"
    shutil.copytree(bundle_path, old)
    (old / "partition.svg").unlink()
    value = json.loads((old / "dmt.json").read_text())
    value |= {"quality": {}, "initialisation": {}, "partition": {}, "facts": []}
    (old / "dmt.json").write_text(json.dumps(value))
    _, _, done = tune(old, clicks, tmp_path / "tuned")
    assert [row.name for row in done.bundle.manifest.quality.rows] == ["fine-tuned"]
    assert "fine-tuned this bundle" in plain(done.bundle.path)
    assert (done.bundle.path / "partition.svg").read_text().startswith("<svg")


def test_a_weight_that_is_not_finite_is_not_written(bundle_path, clicks, tmp_path) -> None:
    parent, data = open_bundle(bundle_path), open_training_data(clicks)
    model = load_bundle(parent)
    result = train(model, data.train, data.valid, CONFIG.replace(max_steps=2))
    model.store.groups[0].weight[3, 1] = float("nan")
    with pytest.raises(CheckpointError, match="after training"):
        write_finetuned(parent, tmp_path / "t", model, result, config=CONFIG, data=data)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_target_is_refused(tuned, bundle_path, clicks, tmp_path) -> None:
    model, result, done = tuned
    parent, data = open_bundle(bundle_path), open_training_data(clicks)
    write: Callable[..., Any] = write_finetuned
    for out, force in ((done.bundle.path, False), (bundle_path, True), (bundle_path / "x", False)):
        with pytest.raises(BundleError):
            write(parent, out, model, result, config=CONFIG, data=data, force=force)
    taken = tmp_path / "taken"
    shutil.copytree(bundle_path, taken)
    write(parent, taken, model, result, config=CONFIG, data=data, force=True)
    assert bundle_digest(open_bundle(taken)) == bundle_digest(done.bundle)


def test_what_does_not_fit_into_memory_is_refused(bundle_path, monkeypatch) -> None:
    spec = open_bundle(bundle_path).manifest.model.flat
    needed = needed_bytes(spec, CONFIG, 10_000)
    rows = sum(table.rows for table in spec.tables)
    assert needed == {
        "tables": rows * (8 * 4 + 5),
        "optimizer state": rows * 4,
        "best rows": rows * (8 + 1) * 4,
    }
    adam = needed_bytes(spec, CONFIG.replace(table_optimizer="adam"), 10_000)
    assert adam["optimizer state"] == 2 * rows * 8 * 4
    assert adam["best rows"] == rows * 8 * 4
    wide = needed_bytes(spec, CONFIG.replace(table_optimizer="adagrad"), 10_000)
    assert wide["optimizer state"] == rows * 8 * 4
    assert wide["best rows"] == 2 * rows * 8 * 4
    few = needed_bytes(spec, TrainingConfig(max_steps=1, batch_size=2), 10_000)
    assert few["best rows"] == 4 * 2 * (8 + 1) * 4
    total = sum(needed.values())
    module = "dmt_convert.training.in_memory.available_bytes"
    monkeypatch.setattr(module, lambda: total)
    check_memory(spec, CONFIG, 10_000)
    monkeypatch.setattr(module, lambda: total - 1)
    with pytest.raises(ConfigError, match=r"GiB of memory \(tables .* optimizer state"):
        check_memory(spec, CONFIG, 10_000)


def test_loaded_tables_are_the_bundles(bundle_path, clicks) -> None:
    bundle = open_bundle(bundle_path)
    expected, model = open_bundle_model(bundle), load_bundle(bundle)
    rows = open_data(clicks / "valid.npz")
    batch = next(adapt_batches(rows, model.spec, rows.batches(64)))
    with torch.no_grad():
        assert np.array_equal(model(batch).numpy(), expected(batch).numpy())


def test_tables_are_loaded_under_a_model_that_is_in_no_bundle(bundle_path, clicks) -> None:
    bundle = open_bundle(bundle_path)
    infos, expected = table_infos(bundle), open_bundle_model(bundle)
    rows = open_data(clicks / "valid.npz")
    batch = next(adapt_batches(rows, bundle.manifest.model.flat, rows.batches(64)))
    model = load_tables(expected, infos)
    assert model.module is expected
    assert {name: tuple(model.store.table(name).shape) for name in infos} == {
        name: info.shape for name, info in infos.items()
    }
    with torch.no_grad():
        before = expected(batch).numpy()
        assert np.array_equal(model(batch).numpy(), before)
        model.store.groups[0].weight += 1.0
        assert np.array_equal(expected(batch).numpy(), before), "its own lookups stay on disk"
        assert not np.array_equal(model(batch).numpy(), before)
