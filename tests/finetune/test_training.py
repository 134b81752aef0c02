"""The loop: the best state stays, training ends in time, the same seed gives the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Dataset, open_data
from dmt_convert.errors import ConfigError, DataError
from dmt_convert.metrics import Accuracy, compare_losses, measure_accuracy
from dmt_convert.model import FlatModel
from dmt_convert.training import (
    judge,
    loss_blocks,
    make_trainable,
    measure_rows,
    name_absurd,
    train,
)
from dmt_convert.training.data import open_training_data, training_batches, training_shares
from dmt_convert.training.loop import Progress, Schedule, TrainingParts, run_loop, take_step
from dmt_convert.training.optimizers import DenseOptimizer
from support.models import build_model
from support.rows import build_batch, write_clicks
from support.specs import click_spec


@pytest.fixture
def rows(clicks: Path) -> tuple[Dataset, Dataset]:
    return open_data(clicks / "train.npz"), open_data(clicks / "valid.npz")


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


SETTINGS = TrainingConfig(epochs=4, batch_size=64, dense_lr=3e-3, table_lr=0.05, eval_every=16)


def test_training_from_scratch_learns(rows) -> None:
    model = build_model()
    told = []
    result = train(model, *rows, SETTINGS, on_evaluation=told.append)
    assert result.start.auc < 0.6 < 0.72 < result.best.auc
    assert result.best.ne < 0.95 < result.start.ne
    assert tuple(told) == result.history
    assert [found.step for found in told[:3]] == [0, 16, 32]
    # the model is in its best state, and its own lookups see it
    best = measure_rows(make_trainable(model), rows[1])
    assert (best.auc, best.ne) == (result.best.auc, result.best.ne)
    assert not any(p.grad is not None for p in model.parameters())


def test_the_same_seed_gives_the_same_bits(rows) -> None:
    states = []
    for seed in (3, 3, 4):
        model = build_model()
        train(model, *rows, TrainingConfig(max_steps=20, batch_size=64, seed=seed))
        states.append(state_of(model))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_what_only_gets_worse_ends_as_it_began(rows) -> None:
    model = build_model()
    train(model, *rows, SETTINGS)
    before = state_of(model)
    spoil = TrainingConfig(
        epochs=9, batch_size=64, dense_lr=1.0, table_lr=5.0, eval_every=2, patience=3
    )
    result = train(model, *rows, spoil)
    assert not result.improved
    assert result.best_step == 0
    assert result.steps == 6
    assert result.history[-1].ne > result.start.ne
    assert same(before, state_of(model))


def test_a_flat_model_is_trained_as_well(rows) -> None:
    torch.manual_seed(0)
    result = train(FlatModel(click_spec()), *rows, SETTINGS)
    assert result.best.auc > 0.72


def test_frozen_parts_stay(rows) -> None:
    for frozen in ("dense_lr", "table_lr"):
        model = build_model()
        before = state_of(model)
        train(model, *rows, TrainingConfig(max_steps=10, batch_size=64, **{frozen: 0}))
        after = state_of(model)
        moved = {".tables." in n for n in after if not torch.equal(before[n], after[n])}
        assert moved == {frozen == "dense_lr"}


class Fakes:
    """Parts whose measurements are a given sequence of NE."""

    def __init__(self, scores: list[float | None], loss: Callable[[int], float] = float) -> None:
        self.scores, self.log = iter(scores), list[str]()
        self.factors = list[float]()

    def measure(self) -> Accuracy:
        score = next(self.scores)
        return Accuracy(auc=score and 1 - score, log_loss=abs(score or 0.5), ne=score)

    def keep(self) -> None:
        self.log.append("keep")

    def restore(self) -> None:
        self.log.append("restore")

    def zero_grad(self) -> None:
        pass

    def step(self, lr_factor: float) -> None:
        self.log.append("step")
        self.factors.append(lr_factor)


def run_fakes(fakes: Fakes, config: TrainingConfig, clicks: Path, **schedule: Any) -> Any:
    data = open_data(clicks / "train.npz")
    model = make_trainable(build_model())
    batches = training_batches(data, model.spec, config)
    parts = TrainingParts(
        step=lambda lr_factor: take_step(model, (fakes,), next(batches), lr_factor),
        measure=fakes.measure,
        best_state=fakes,
    )
    return run_loop(parts, config, Schedule(**{"total_steps": 50, "eval_every": 1, **schedule}))


def test_patience_counts_evaluations_since_the_best(clicks) -> None:
    fakes = Fakes([0.9, 0.95, 0.8, 0.85, 0.8, 0.81, 0.1])
    config = TrainingConfig(batch_size=8, patience=3)
    result = run_fakes(fakes, config, clicks)
    assert (result.steps, result.best_step, result.best.ne) == (5, 2, 0.8)
    assert fakes.log == ["keep", "step", "step", "keep", "step", "step", "step", "restore"]


def test_validation_rows_of_one_class_are_refused(clicks) -> None:
    """Of these the log loss is best for a model that says the same of every row."""
    config = TrainingConfig(batch_size=8, patience=1)
    with pytest.raises(DataError, match="all validation rows have the same label") as refused:
        run_fakes(Fakes([None, None]), config, clicks)
    assert "--valid" in refused.value.hint


@pytest.mark.parametrize("value", [1e30, -1e30, np.inf, np.nan])
def test_weights_behind_an_absurd_loss_are_named(rows, value) -> None:
    """Before the first step, and after one that spoilt them."""
    model = build_model()
    table = next(iter(model.state_dict()))
    assert "tables" in table or "emb" in table
    with torch.no_grad():
        model.state_dict()[table][5, 1] = value
    with pytest.raises(ConfigError, match="before the first step") as refused:
        train(model, *rows, SETTINGS)
    assert len(refused.value.details) == 1
    assert f", row 5: {value:.4g}" in refused.value.details[0]
    assert "damaged" in refused.value.hint


def test_a_step_that_spoils_a_row_is_stopped_with_its_name(rows) -> None:
    model = make_trainable(build_model())

    def spoil(step: int, loss: float) -> None:
        if step == 3:
            model.store.table(model.spec.tables[1].name)[2, 0] = 1e30

    with pytest.raises(ConfigError, match=r"diverged: the (validation )?loss is .* at step") as got:
        train(model, *rows, SETTINGS, on_step=spoil)
    assert any(f"table {model.spec.tables[1].name!r}, row" in line for line in got.value.details)


def test_absurd_weights_are_found_in_any_tensor() -> None:
    good = torch.linspace(-3, 3, 60).reshape(20, 3)
    assert [*name_absurd([("a", good), ("b", good.long()), ("c", torch.zeros(0, 3))])] == []
    assert [*name_absurd([("large", good * 1e7)])] == []  # but all of one size
    for value in (1e9, -3e38, np.nan, np.inf):
        bad = good.clone()
        bad[7, 2] = value
        (line,) = name_absurd([("a", good), ("t", bad)], first_row=100)
        assert line == f"t, row 107: {value:.4g}"
    bias = torch.tensor([0.1, np.nan])
    assert [*name_absurd([("bias", bias)])] == ["bias, row 1: nan"]


def test_no_patience_means_all_steps(clicks) -> None:
    config = TrainingConfig(batch_size=8, patience=None)
    fakes = Fakes([0.5] * 100)
    assert run_fakes(fakes, config, clicks).steps == 50


def test_evaluations_come_when_asked_for(clicks) -> None:
    config = TrainingConfig(batch_size=8, patience=None)
    steps = {"eval_every": 20, "eval_at": frozenset({3, 7}), "total_steps": 45}
    result = run_fakes(Fakes([0.9] * 9), config, clicks, **steps)
    assert [found.step for found in result.history] == [0, 3, 7, 20, 40, 45]
    until = {**steps, "stop_at": lambda found: found.ne < 0.5}
    result = run_fakes(Fakes([0.9, 0.8, 0.4, 0.3]), config, clicks, **until)
    assert (result.steps, result.best.ne) == (7, 0.4)


def test_learning_rates_rise_and_fall(clicks) -> None:
    for decay, last, middle in (
        ("constant", 1.0, 1.0),
        ("linear", 0.025, 0.5),
        ("cosine", 0.0, 0.5),
    ):
        fakes = Fakes([0.9] * 99)
        config = TrainingConfig(batch_size=8, warmup_steps=10, lr_decay=decay, patience=None)
        run_fakes(fakes, config, clicks)
        assert fakes.factors[:10] == pytest.approx(np.arange(1, 11) / 10)
        assert fakes.factors[30] == pytest.approx(middle, abs=0.05)
        assert fakes.factors[-1] == pytest.approx(last, abs=0.01)
        assert sorted(fakes.factors[10:], reverse=True) == fakes.factors[10:]


def test_a_loss_that_is_not_finite_ends_training(rows) -> None:
    model = build_model()
    with pytest.raises(ConfigError, match=r"diverged: the .*loss is (nan|inf)") as refused:
        train(model, *rows, TrainingConfig(max_steps=50, dense_lr=1e30, batch_size=64))
    assert "nothing was written" in refused.value.expected
    trained = make_trainable(build_model())
    trained.store.groups[0].weight.fill_(float("nan"))
    fakes = Fakes([])
    assert np.isnan(take_step(trained, (fakes,), build_batch(click_spec())))
    assert fakes.log == []


def test_gradients_are_clipped() -> None:
    trained = make_trainable(build_model())
    parameters = list(trained.dense_parameters().values())
    optimizer = DenseOptimizer(parameters, TrainingConfig(clip_norm=1e-3))
    (trained(build_batch(click_spec())) * 1e3).sum().backward()
    optimizer.step(1.0)
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_every_pass_has_an_order_of_its_own_and_all_rows(clicks) -> None:
    data, spec = open_data(clicks / "train.npz"), build_model().spec.flat

    def dense(seed: int) -> Iterator[np.ndarray]:
        config = TrainingConfig(batch_size=500, seed=seed)
        batches = itertools.islice(training_batches(data, spec, config), 8)
        parts = [batch.dense[:, 0] for batch in batches]
        return np.concatenate(parts[:4]), np.concatenate(parts[4:])

    first, second = dense(0)
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))
    assert np.array_equal(dense(0)[1], second)
    assert not np.array_equal(dense(1)[0], second)


def test_ranks_share_the_rows_of_a_step(clicks) -> None:
    data, spec = open_data(clicks / "train.npz"), build_model().spec.flat
    config = TrainingConfig(batch_size=500)
    parts = [
        next(training_shares(data, spec, config, rank=rank, world_size=3)) for rank in range(3)
    ]
    assert [part.counted for part in parts] == [167, 167, 166]
    assert [part.batch.num_rows for part in parts] == [167, 167, 167]
    together = np.concatenate([part.batch.dense[: part.counted] for part in parts])
    assert np.array_equal(together, next(training_batches(data, spec, config)).dense)


def test_shares_go_on_where_batches_were(clicks) -> None:
    data, spec = open_data(clicks / "train.npz"), build_model().spec.flat
    config = TrainingConfig(batch_size=300)
    whole = training_shares(data, spec, config, rank=1, world_size=2)
    later = training_shares(data, spec, config, rank=1, world_size=2, start_step=9)
    for expected, found in zip(itertools.islice(whole, 9, 16), later, strict=False):
        assert np.array_equal(expected.rows, found.rows)
        assert expected.total == found.total


def test_a_folder_is_trained_on_train_and_measured_on_valid(clicks) -> None:
    data = open_training_data(clicks)
    assert (data.train.num_rows, data.valid.num_rows) == (2000, 500)
    assert (data.train_name, data.valid_name) == ("train.npz", "valid.npz")
    other = open_training_data(clicks, clicks / "train.npz")
    assert other.valid.num_rows == 2000


def test_without_validation_rows_the_last_tenth_is_held_out(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_clicks(tmp_path / "d", "train", 1000, seed=0)
    with caplog.at_level("INFO", "dmt_convert"):
        data = open_training_data(path.parent)
    assert "the last 100 rows" in caplog.text
    whole = np.load(path)["dense"]
    held = np.concatenate([batch.dense for batch in data.valid.batches(64)])
    assert np.array_equal(held, whole[900:])
    for seed in (None, 0, 1):
        rest = np.concatenate([b.dense for b in data.train.batches(64, shuffle_seed=seed)])
        assert np.array_equal(np.sort(rest[:, 0]), np.sort(whole[:900, 0]))
    few = write_clicks(tmp_path / "few", "train", 9, seed=0)
    with pytest.raises(DataError, match="too few"):
        open_training_data(few)


def test_rows_without_labels_are_refused(tmp_path, clicks) -> None:
    path = write_clicks(tmp_path / "d", "rows", 100, seed=0, label=None)
    for arguments in ((path,), (clicks, path)):
        with pytest.raises(DataError, match="no labels"):
            open_training_data(*arguments)


def test_a_gain_within_its_noise_leaves_the_start() -> None:
    """What counts is the error of the paired difference, not that of the loss itself."""
    rng = np.random.default_rng(0)
    start = rng.random(200) + 0.5

    def take(gains: np.ndarray) -> tuple[bool, Progress]:
        progress = Progress()
        for step, losses in ((0, start), (8, start - gains)):
            progress.step = step
            mean = float(losses.mean())
            accuracy = Accuracy(auc=0.7, log_loss=mean, ne=mean, losses=tuple(losses))
            is_best = progress.note_accuracy(accuracy, None)
        return is_best, progress

    noise = rng.standard_normal(200)
    noise -= noise.mean()
    error = noise.std(ddof=1) / 200**0.5
    for gain, wins in ((1.5 * error, False), (1.8 * error, True), (-1.8 * error, False)):
        is_best, progress = take(noise + gain)
        assert is_best == wins == (progress.best.step == 8) == progress.best.beats_start
        last = progress.history[-1]
        assert (last.gain, last.gain_error) == pytest.approx((gain, error))
        assert Progress.from_json(progress.to_json()).start_losses == list(start)
    # a hundredth of the noise of the loss itself, but the same for every row
    assert take(np.full(200, start.std() / 200**0.5 / 100))[0]


def test_a_start_that_stays_says_how_little_was_gained(rows) -> None:
    """A learning rate that moves almost nothing gains almost nothing."""
    config = TrainingConfig(max_steps=4, batch_size=8, dense_lr=0, table_lr=1e-6, seed=5)
    result = train(build_model(), *rows, config)
    assert [found.gain_error is not None for found in result.history] == [False] + [True] * 4
    _, (note,) = judge(replace(result, best=result.start), {}, lambda: None)
    assert "by more than noise" in note


def test_losses_by_block_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal(1000), rng.integers(0, 2, 1000)
    each = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    order = rng.permutation(1000)  # ranks bring rows in another order
    blocks = loss_blocks(order)
    found = measure_accuracy(logits[order], labels[order], blocks=blocks).losses
    assert len(found) == 200
    assert found == pytest.approx([each[block::200].mean() for block in range(200)])
    assert compare_losses(found, found) == (0, 0)


def test_notes_on_columns_are_said_once(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """Not again for the validation rows; what is new there is said."""
    flat = click_spec()
    manifest = SimpleNamespace(model=SimpleNamespace(flat=flat), inputs=None)
    for name, seed in (("train", 0), ("valid", 1)):
        write_clicks(tmp_path, name, 100, seed=seed)
    with caplog.at_level("INFO", "dmt_convert"):
        open_training_data(tmp_path, None, manifest)
    notes = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert notes and len(notes) == len(set(notes))


def test_one_host_is_not_hosts() -> None:
    common = {"rank": 0, "local_rank": 0, "backend": "gloo"}
    shown = [
        str(RankLayout(world_size=size, ranks_per_host=ranks, **common))
        for size, ranks in ((2, 2), (2, 1), (1, 1))
    ]
    assert shown == [
        "1 host x 2 ranks on CPUs, gloo",
        "2 hosts x 1 rank on CPUs, gloo",
        "1 host x 1 rank on CPUs, gloo",
    ]
    on_gpus = RankLayout(world_size=8, ranks_per_host=4, rank=0, local_rank=0, backend="nccl")
    assert str(on_gpus) == "2 hosts x 4 ranks on GPUs, nccl"


def test_a_loss_that_is_read_later_names_its_step() -> None:
    progress = Progress(step=60)
    progress.note_loss(0.5, step=11)
    with pytest.raises(ConfigError, match="nan at step 12"):
        progress.note_loss(float("nan"), step=12)
    assert progress.losses == [0.5]
