"""Training goes on from a bundle as it would have gone on from the flat checkpoint.

The flat side is plain torch on whole tables: nn.EmbeddingBag, autograd, and Adagrad in three lines.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dmt_convert as dmt
from dmt_convert.bundle import Bundle, check_digests, open_bundle
from dmt_convert.checkpoint import gather_rows, open_checkpoint, read_tensor
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Batch
from dmt_convert.documents import OptimizerState
from dmt_convert.errors import BundleError
from dmt_convert.families import infer_model
from dmt_convert.model import FlatModel
from dmt_convert.training import (
    TrainableModel,
    load_bundle,
    open_training_data,
    train,
    write_finetuned,
)
from dmt_convert.training.data import training_batches
from dmt_convert.training.finetuned import Finetuned
from dmt_convert.training.optimizers import TableOptimizer
from support.checkpoints.flat import make_flat
from support.rows import write_clicks

LR, STEPS = 0.1, 12
CONFIG = TrainingConfig(
    max_steps=STEPS, batch_size=64, eval_every=STEPS, dense_lr=0, table_lr=LR, lr_decay="constant"
)
# gradients of rows that several samples share are summed in another order: a few 1e-7 per step
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SPOIL = CONFIG.replace(table_lr=50.0)
SPARSE = (7, 400, 11, 6)
"""Rows of tables; some of the second are looked up never or once."""


class FlatTrainer:
    """A flat model and the sums of squared gradients of its tables, trained on whole tables."""

    def __init__(self, checkpoint: Path, *, rowwise: bool = True) -> None:
        self.info = infer_model(open_checkpoint(checkpoint))
        self.model = FlatModel(self.info.spec)
        state = {n: torch.from_numpy(read_tensor(t).copy()) for n, t in self.info.tensors.items()}
        self.model.load_state_dict(state)
        tables = self.info.spec.tables
        self.tables = {t.name: self.model.tables[t.name].weight for t in tables}
        self.sums = {t.name: torch.zeros(t.rows, 1 if rowwise else t.dim) for t in tables}

    def take_steps(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.model.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(
                self.model(batch), torch.from_numpy(batch.labels)
            )
            loss.backward()
            for name, weight in self.tables.items():
                squared, sums = weight.grad.square(), self.sums[name]
                sums += squared.mean(dim=1, keepdim=True) if sums.shape[1] == 1 else squared
                weight.data -= LR * weight.grad / (sums.sqrt() + 1e-8)

    def save(self, path: Path) -> Path:
        """Save as TorchRec does, with the state of the fused optimizer."""
        names = {canonical: tensor.name for canonical, tensor in self.info.tensors.items()}
        model = {names[n]: v.detach() for n, v in self.model.state_dict().items()}
        fused = {}
        for name, sums in self.sums.items():
            own = sums.squeeze(1) if sums.shape[1] == 1 else sums
            fused[names[f"tables.{name}.weight"]] = {f"{name}.momentum1": own}
        torch.save({"model": model, "optimizer": {"state": fused}}, path)
        return path


@pytest.fixture
def rows(tmp_path) -> Path:
    write_clicks(tmp_path / "rows", "train", 2000, seed=0)
    write_clicks(tmp_path / "rows", "valid", 500, seed=1)
    return tmp_path / "rows"


@pytest.fixture
def make_trainer(tmp_path, rows) -> Callable[..., FlatTrainer]:
    """A flat model that was trained for a while, from a random one."""

    def make(**options: Any) -> FlatTrainer:
        flat = make_flat(tmp_path / "start.pt", rows=SPARSE)
        trainer = FlatTrainer(flat, **options)
        trainer.take_steps(itertools.islice(batches_of(trainer, rows, seed=9), 40))
        return trainer

    return make


def batches_of(trainer: FlatTrainer, rows: Path, *, seed: int = 0) -> Iterator[Batch]:
    """The batches that fine-tuning with this seed sees."""
    data, config = open_training_data(rows), CONFIG.replace(seed=seed)
    return training_batches(data.train, trainer.info.spec, config)


@pytest.fixture
def convert(tmp_path, few_rows, no_report) -> Callable[..., Bundle]:
    """Make the passthrough bundle of a trainer's state, which computes what it computes."""

    def run(trainer: FlatTrainer, name: str = "bundle", **options: Any) -> Bundle:
        source = trainer.save(tmp_path / f"{name}.pt")
        options = {"partition": "round-robin", "tower_module": "passthrough", **options}
        return dmt.convert(source, tmp_path / name, towers=2, **options)

    return run


def go_on(bundle: Bundle, rows: Path, config: TrainingConfig = CONFIG) -> Any:
    data, model = open_training_data(rows), load_bundle(bundle)
    return model, train(model, data.train, data.valid, config)


def tune(bundle: Bundle, rows: Path, out: Path, config: TrainingConfig = CONFIG) -> Finetuned:
    model, result = go_on(bundle, rows, config)
    data = open_training_data(rows)
    return write_finetuned(bundle, out, model, result, config=config, data=data)


def values_of(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(gather_rows(info, np.arange(info.shape[0])))
        for name, info in bundle.accumulators.items()
    }


def distance(model: TrainableModel, trainer: FlatTrainer) -> float:
    return max(
        float((model.store.table(name) - weight.detach()).abs().max())
        for name, weight in trainer.tables.items()
    )


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach(), **CLOSE)


def test_training_goes_on_as_the_flat_models(make_trainer, convert, rows) -> None:
    trainer = make_trainer()
    kept = convert(trainer)
    dropped = convert(trainer, "dropped", optimizer_state="drop")
    assert (trainer.sums["t_cat_1"] == 0).any(), "some rows were never touched"
    trainer.take_steps(itertools.islice(batches_of(trainer, rows), STEPS))
    model, result = go_on(kept, rows)
    assert result.best_step == STEPS, "else the start would be compared"
    check_close({n: model.store.table(n) for n in trainer.tables}, trainer.tables)
    check_close({n: model.store.sums(n) for n in trainer.sums}, trainer.sums)
    # without the state, measured or from zero, training goes elsewhere
    others = [go_on(dropped, rows), go_on(kept, rows, CONFIG.replace(initial_accumulator=0.0))]
    for other, result in others:
        assert result.best_step == STEPS
        assert distance(other, trainer) > 1000 * distance(model, trainer)


def test_the_fine_tuned_bundle_goes_on_as_well(make_trainer, convert, rows, tmp_path) -> None:
    trainer = make_trainer()
    first = tune(convert(trainer), rows, tmp_path / "first")
    batches = batches_of(trainer, rows)
    trainer.take_steps(itertools.islice(batches, STEPS))
    assert first.after.step == STEPS
    check_digests(first.bundle)
    check_close(values_of(first.bundle), trainer.sums)
    assert first.bundle.manifest.optimizer_state == OptimizerState(
        accumulators=4, notes=("as it was after training with rowwise-adagrad",)
    )
    model, _ = go_on(first.bundle, rows)
    trainer.take_steps(itertools.islice(batches_of(trainer, rows), STEPS))
    check_close({n: model.store.table(n) for n in trainer.tables}, trainer.tables)


def test_a_number_per_element_starts_as_its_rows_mean(make_trainer, convert, rows) -> None:
    trainer = make_trainer(rowwise=False)
    bundle = convert(trainer)
    means = {n: s.double().mean(dim=1, keepdim=True).float() for n, s in trainer.sums.items()}
    for kind, width in (("rowwise-adagrad", 1), ("adagrad", 8)):
        model = load_bundle(bundle)
        TableOptimizer(model.store, CONFIG.replace(table_optimizer=kind))
        for name, mean in means.items():
            assert torch.equal(model.store.sums(name), mean.expand(-1, width))


def test_a_number_per_element_goes_on_nearly(make_trainer, convert, rows) -> None:
    """Element by element the mean is not exact, but nearer than no state."""
    trainer = make_trainer(rowwise=False)
    config = CONFIG.replace(table_optimizer="adagrad")
    bundles = [convert(trainer), convert(trainer, "dropped", optimizer_state="drop")]
    trainer.take_steps(itertools.islice(batches_of(trainer, rows), STEPS))
    off = []
    for bundle in bundles:
        model, _ = go_on(bundle, rows, config)
        errors = [model.store.table(n) - w.detach() for n, w in trainer.tables.items()]
        off.append(float(torch.cat(errors).square().mean().sqrt()))
    assert off[0] < off[1] / 2


def test_a_start_that_is_asked_for_goes_before(make_trainer, convert) -> None:
    bundle = convert(make_trainer())
    for kind in ("rowwise-adagrad", "adagrad"):
        model = load_bundle(bundle)
        config = CONFIG.replace(table_optimizer=kind, initial_accumulator=0.25)
        TableOptimizer(model.store, config)
        for table in bundle.accumulators:
            assert (model.store.sums(table) == 0.25).all()


def test_a_table_without_any_is_measured_beside_those_that_have(
    make_trainer, convert, rows
) -> None:
    trainer = make_trainer()
    trainer.sums["t_cat_1"][3] = -1.0  # damaged: left out
    bundle = convert(trainer)
    before = values_of(bundle)
    assert set(before) == {"t_cat_0", "t_cat_2", "t_cat_3"}
    model = load_bundle(bundle)
    optimizer = TableOptimizer(model.store, CONFIG)
    assert model.store.sums("t_cat_1") is None
    batch = next(batches_of(trainer, rows))
    model(batch).sum().backward()
    optimizer.step(1.0)
    measured = model.store.sums("t_cat_1")
    ids = dict(zip(batch.feature_names, batch.bags, strict=True))["cat_1"].values
    untouched = np.setdiff1d(np.arange(400), ids)
    assert measured[untouched].unique().numel() == 1 and float(measured[untouched[0]]) > 0
    for name, values in before.items():
        looked_up = dict(zip(batch.feature_names, batch.bags, strict=True))[f"cat_{name[-1]}"]
        rest = np.setdiff1d(np.arange(len(values)), looked_up.values)
        assert torch.equal(model.store.sums(name)[rest], values[rest])
        assert (model.store.sums(name)[looked_up.values] > values[looked_up.values]).all()


def test_the_sums_are_those_of_the_best_state(make_trainer, convert, rows, tmp_path) -> None:
    """They go back with the rows: training beyond the best state leaves no trace."""
    trainer = make_trainer()
    bundle = convert(trainer)
    short = tune(bundle, rows, tmp_path / "short", CONFIG.replace(max_steps=4, eval_every=4))
    data, model = open_training_data(rows), load_bundle(bundle)
    evaluated = 0

    def spoil(evaluation: Any) -> None:
        nonlocal evaluated
        evaluated += 1
        if evaluation.step == 4:  # from here on, nothing is better
            model.module.over_arch[-1].bias.data += 50

    config = CONFIG.replace(max_steps=8, eval_every=4)
    result = train(model, data.train, data.valid, config, on_evaluation=spoil)
    assert (result.steps, result.best_step, evaluated) == (8, 4, 3)
    done = write_finetuned(bundle, tmp_path / "l", model, result, config=config, data=data)
    for name, values in values_of(short.bundle).items():
        assert torch.equal(values_of(done.bundle)[name], values)
        assert not torch.equal(values_of(bundle)[name], values)


@pytest.mark.parametrize(
    "config",
    [SPOIL, CONFIG.replace(table_lr=0, dense_lr=1e-3, table_optimizer="sgd")],
    ids=["nothing beat the start", "frozen tables"],
)
def test_tables_that_stay_keep_their_state(config, make_trainer, convert, rows, tmp_path) -> None:
    bundle = convert(make_trainer())
    done = tune(bundle, rows, tmp_path / "tuned", config)
    assert (done.after.step == 0) == (config is SPOIL)
    assert done.bundle.manifest.optimizer_state == bundle.manifest.optimizer_state
    check_digests(done.bundle)
    for name, values in values_of(bundle).items():
        assert torch.equal(values_of(done.bundle)[name], values)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_other_optimizers_drop_it_and_say_so(kind, make_trainer, convert, rows, tmp_path) -> None:
    bundle = convert(make_trainer())
    lr = 1.0 if kind == "sgd" else 0.01
    config = CONFIG.replace(table_optimizer=kind, table_lr=lr, dense_lr=1e-4)
    done = tune(bundle, rows, tmp_path / "tuned", config)
    assert done.after.step > 0
    assert done.bundle.accumulators == {}
    assert "were dropped" in done.notes[-1]
    assert done.bundle.manifest.optimizer_state.notes == (done.notes[-1],)
    assert done.bundle.manifest.initialisation.finetune.notes == done.notes


def test_adagrads_sums_are_stored_as_their_rows_means(
    make_trainer, convert, rows, tmp_path
) -> None:
    bundle = convert(make_trainer())
    config = CONFIG.replace(table_optimizer="adagrad")
    model, result = go_on(bundle, rows, config)
    data = open_training_data(rows)
    done = write_finetuned(bundle, tmp_path / "t", model, result, config=config, data=data)
    assert done.bundle.manifest.optimizer_state.averaged == 4
    for name, values in values_of(done.bundle).items():
        sums = model.store.sums(name)
        assert sums.shape[1] == 8
        mean = sums.numpy().mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
        assert np.array_equal(values.numpy(), mean)


def test_what_overflowed_is_left_out(make_trainer, convert, rows, tmp_path) -> None:
    bundle = convert(make_trainer())
    data, (model, result) = open_training_data(rows), go_on(bundle, rows)
    model.store.sums("t_cat_2")[1] = float("inf")
    done = write_finetuned(bundle, tmp_path / "t", model, result, config=CONFIG, data=data)
    assert set(done.bundle.accumulators) == {"t_cat_0", "t_cat_1", "t_cat_3"}
    state = done.bundle.manifest.optimizer_state
    assert state.accumulators == 3 and "'t_cat_2' after training holds Inf" in state.notes[-1]


def test_every_training_starts_from_what_the_bundle_holds(make_trainer, convert, rows) -> None:
    """A model in memory that is trained twice starts twice from the same state."""
    model, result = go_on(convert(make_trainer()), rows)
    assert result.improved
    TableOptimizer(model.store, CONFIG)
    for name, info in model.store.accumulators.items():
        stored = gather_rows(info, np.arange(info.shape[0]))
        assert np.array_equal(model.store.sums(name).numpy(), stored)
    TableOptimizer(model.store, CONFIG.replace(table_optimizer="sgd"))
    assert all(model.store.sums(name) is None for name in model.store.accumulators)


def test_numbers_that_changed_on_disk_are_refused(make_trainer, convert, tmp_path) -> None:
    bundle = convert(make_trainer())
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    path = copy / "weights/accumulators_000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] |= 0x80  # the sign of the last number
    path.write_bytes(data)
    changed = open_bundle(copy)
    model = load_bundle(changed)
    with pytest.raises(BundleError, match="holds negative numbers"):
        TableOptimizer(model.store, CONFIG)
    TableOptimizer(model.store, CONFIG.replace(initial_accumulator=0.0))


def test_the_recipe_goes_on_too(make_trainer, convert, rows, tmp_path, capsys) -> None:
    from dmt_convert.recipes.finetune_dmt import main

    trainer = make_trainer()
    bundle = convert(trainer)
    trainer.take_steps(itertools.islice(batches_of(trainer, rows), STEPS))
    arguments = ["--bundle", bundle.path, "--data", rows, "--out", tmp_path / "tuned", "--json"]
    arguments += ["--max-steps", STEPS, "--batch-size", 64, "--eval-every", STEPS]
    arguments += ["--dense-lr", 0, "--table-lr", LR, "--lr-decay", "constant"]
    main([str(word) for word in arguments])
    assert json.loads(capsys.readouterr().out)["best_step"] == STEPS
    check_close(values_of(open_bundle(tmp_path / "tuned")), trainer.sums)
