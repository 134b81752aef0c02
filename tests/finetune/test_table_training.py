"""Tables trained row by row, against plain torch on whole tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmt_convert.data import Batch
from dmt_convert.errors import ConfigError
from dmt_convert.model import FlatModel
from dmt_convert.spec import ModelSpec
from dmt_convert.training import FinetuneConfig, make_trainable, table_store
from dmt_convert.training.loop import take_step
from dmt_convert.training.optimizers import DenseOptimizer, TableOptimizer
from dmt_convert.training.table_store import sum_by_row
from support.models import build_model
from support.rows import build_batch
from support.specs import build_spec, click_spec

STEPS = 4
LR = 0.1


def rowwise_reference(parameters: list[nn.Parameter], start: float) -> Iterator[None]:
    """Row-wise Adagrad on whole tables, from dense gradients."""
    states = [torch.full((len(p), 1), start) for p in parameters]
    while True:
        for parameter, state in zip(parameters, states, strict=True):
            assert parameter.grad is not None
            state += parameter.grad.square().mean(dim=1, keepdim=True)
            parameter.data -= LR * parameter.grad / (state.sqrt() + 1e-8)
        yield


def run_reference(model: Any, batches: list[Batch], kind: str, start: float) -> None:
    tables = [bag.weight for bag in model.modules() if isinstance(bag, nn.EmbeddingBag)]
    stepped: Any
    if kind == "rowwise-adagrad":
        stepped = rowwise_reference(tables, start)
    elif kind == "adagrad":
        stepped = torch.optim.Adagrad(tables, lr=LR, initial_accumulator_value=start, eps=1e-8)
    else:
        stepped = torch.optim.SGD(tables, lr=LR)
    for batch in batches:
        model.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(batch), torch.from_numpy(batch.labels)
        )
        loss.backward()
        next(stepped) if kind == "rowwise-adagrad" else stepped.step()


def train_tables(model: Any, batches: list[Batch], config: FinetuneConfig) -> None:
    trained = make_trainable(model)
    optimizers = (
        DenseOptimizer(trained.dense_parameters().values(), config),
        TableOptimizer(trained.store, config),
    )
    for batch in batches:
        take_step(trained, optimizers, batch)


def tables_of(model: Any) -> list[torch.Tensor]:
    return [bag.weight.detach() for bag in model.modules() if isinstance(bag, nn.EmbeddingBag)]


@pytest.mark.parametrize("kind", ["rowwise-adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize(
    ("pooling", "bags"),
    [
        ("sum", {}),
        ("sum", {"multi": True}),
        ("mean", {"multi": True}),
        ("mean", {"multi": True, "weighted": True}),
    ],
)
def test_tables_move_as_with_dense_gradients(
    kind: str, pooling: str, bags: dict[str, bool]
) -> None:
    # sums of up to 16 gradients are taken in another order: a few 1e-7 of values of about 1
    spec = click_spec(pooling=pooling)
    batches = [build_batch(spec, seed=seed, **bags) for seed in range(STEPS)]
    expected, model = build_model(spec), build_model(spec)
    run_reference(expected, batches, kind, start=0.01)
    config = FinetuneConfig(table_optimizer=kind, table_lr=LR, dense_lr=0, initial_accumulator=0.01)
    before = [table.clone() for table in tables_of(model)]
    train_tables(model, batches, config)
    for ours, theirs, old in zip(tables_of(model), tables_of(expected), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        assert (ours - old).abs().max() > 100 * 2e-6


def test_adam_moves_touched_rows_as_sparse_adam() -> None:
    from dmt_convert.training.optimizers import make_rule
    from dmt_convert.training.table_store import TableStore

    rng = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 8, generator=rng))
    reference = torch.optim.SparseAdam([weight], lr=LR)
    store = TableStore(one_table(20))
    store.groups[0].weight.copy_(weight.detach())
    rule = make_rule(store, FinetuneConfig(table_optimizer="adam"))
    for step in range(STEPS):
        rows = torch.randperm(20, generator=rng)[: 5 + step]
        gradient = torch.randn(len(rows), 8, generator=rng)
        weight.grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0), gradient, (20, 8), check_invariants=True
        )
        reference.step()
        rule.update(0, store.groups[0].weight, rows, gradient, LR)
    # the epsilon enters before or after the bias correction
    torch.testing.assert_close(store.groups[0].weight, weight.detach(), rtol=1e-5, atol=1e-5)


def one_table(rows: int, features: int = 1) -> ModelSpec:
    shared = dict.fromkeys(range(1, features), 0)
    return build_spec(features, rows=rows, dense=(3,), hidden=(), shared=shared)


def test_duplicates_are_summed_before_the_update() -> None:
    ids = np.array([3, 1, 3, 3, 0], dtype=np.int64)
    gradients = torch.arange(10, dtype=torch.float32).reshape(5, 2)
    rows, summed = sum_by_row(ids, gradients, np.empty(6, dtype=np.int32))
    assert sorted(rows.tolist()) == [0, 1, 3]
    found = dict(zip(rows.tolist(), summed.tolist(), strict=True))
    assert found == {0: [8.0, 9.0], 1: [2.0, 3.0], 3: [0 + 4 + 6.0, 1 + 5 + 7.0]}


def test_unsummed_duplicates_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_only(ids, gradients, slots):
        rows, firsts = np.unique(ids, return_index=True)
        return torch.from_numpy(rows), gradients[torch.from_numpy(firsts)]

    monkeypatch.setattr(table_store, "sum_by_row", last_only)
    with pytest.raises(AssertionError, match="not close"):
        test_tables_move_as_with_dense_gradients("rowwise-adagrad", "sum", {})


def test_a_shared_table_exists_once_and_gets_all_gradients() -> None:
    spec = one_table(10, features=3)
    batches = [build_batch(spec, seed=seed) for seed in range(STEPS)]
    torch.manual_seed(0)
    expected = FlatModel(spec)
    torch.manual_seed(0)
    model = FlatModel(spec)
    assert make_trainable(model).store.groups[0].weight.shape == (10, 8)
    run_reference(expected, batches, "rowwise-adagrad", start=0.01)
    config = FinetuneConfig(table_lr=LR, dense_lr=0, initial_accumulator=0.01)
    train_tables(model, batches, config)
    torch.testing.assert_close(tables_of(model)[0], tables_of(expected)[0], rtol=1e-5, atol=2e-6)


def test_rows_that_no_batch_touches_stay() -> None:
    spec = click_spec(rows=(7, 5000, 11, 6))
    model = build_model(spec)
    before = [table.clone() for table in tables_of(model)]
    batch = build_batch(spec)
    train_tables(model, [batch] * 3, FinetuneConfig())
    names = [name for tower in model.tower_list for name in tower.features]
    for name, old, new in zip(names, before, tables_of(model), strict=True):
        touched = np.unique(batch.bags[spec.feature_names.index(name)].values)
        moved = np.flatnonzero((old != new).any(dim=1).numpy())
        assert np.array_equal(moved, touched)


class WholeTableOps(TorchDispatchMode):
    """Records which operators are given a tensor as large as a table."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.found = rows, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, torch.Tensor) and value.ndim and len(value) >= self.rows:
                self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ROW_OPS = {"index_select", "index_copy_", "index_fill_"}


@pytest.mark.parametrize("kind", ["rowwise-adagrad", "adagrad", "sgd", "adam"])
def test_a_step_costs_the_rows_it_touches(kind: Any) -> None:
    spec = click_spec(rows=(7, 1_000_000, 11, 6))
    trained = make_trainable(build_model(spec))
    config = FinetuneConfig(table_optimizer=kind)
    optimizers = (TableOptimizer(trained.store, config),)
    take_step(trained, optimizers, build_batch(spec))  # the first one fills accumulators
    with WholeTableOps(1_000_000) as ops:
        take_step(trained, optimizers, build_batch(spec, seed=1))
    assert {"index_select", "index_copy_"} <= ops.found <= ROW_OPS
    with WholeTableOps(1_000_000) as ops:
        trained.store.groups[0].weight.mul(2)
    assert not ops.found <= ROW_OPS


def test_accumulators_start_at_what_the_first_batch_shows():
    spec = click_spec()
    trained = make_trainable(build_model(spec))
    optimizer = TableOptimizer(trained.store, FinetuneConfig(table_lr=LR))
    batch = build_batch(spec)
    trained.store.forget_gradients()
    trained(batch).sum().backward()
    means = {}
    for group, rows, gradient in trained.store.gradients():
        for name, start in trained.store.groups[group].starts.items():
            own = (rows >= start) & (rows < start + spec.table(name).rows)
            means[name] = float(gradient[own].square().mean(dim=1).mean())
    optimizer.step(1.0)
    for group in trained.store.groups:
        for name, start in group.starts.items():
            ids = batch.bags[int(name[1:])].values
            untouched = np.setdiff1d(np.arange(spec.table(name).rows), ids) + start
            state = group.sums
            assert state[untouched].flatten().tolist() == pytest.approx(
                [means[name]] * len(untouched), rel=1e-5
            )


def test_the_journal_brings_the_kept_state_back() -> None:
    spec = click_spec()
    trained = make_trainable(build_model(spec))
    store, optimizers = trained.store, (TableOptimizer(trained.store, FinetuneConfig()),)
    for seed in range(3):
        take_step(trained, optimizers, build_batch(spec, seed=seed))
    store.keep()
    kept = [group.weight.clone() for group in store.groups]
    for seed in range(3, 6):
        take_step(trained, optimizers, build_batch(spec, seed=seed))
    assert any(not torch.equal(a, g.weight) for a, g in zip(kept, store.groups, strict=True))
    store.restore()
    assert all(torch.equal(a, g.weight) for a, g in zip(kept, store.groups, strict=True))
    take_step(trained, optimizers, build_batch(spec, seed=9))
    store.restore()
    assert all(torch.equal(a, g.weight) for a, g in zip(kept, store.groups, strict=True))


def test_lookups_agree_with_the_model_to_the_bit() -> None:
    spec = click_spec()
    batch = build_batch(spec)
    expected = build_model(spec)(batch)
    model = build_model(spec)
    assert torch.equal(make_trainable(model)(batch), expected)
    assert torch.equal(model(batch), expected)  # it stays usable


def test_a_model_with_tables_on_disk_is_refused(bundle_path) -> None:
    from dmt_convert.bundle import open_bundle, open_bundle_model

    with pytest.raises(ConfigError, match="not in memory"):
        make_trainable(open_bundle_model(open_bundle(bundle_path)))


def test_gradients_of_two_batches_add_up() -> None:
    spec = click_spec()
    trained = make_trainable(build_model(spec))
    batches = [build_batch(spec, seed=seed) for seed in range(2)]
    for batch in batches:
        trained(batch).sum().backward()
    both = {g: (r.tolist(), v) for g, r, v in trained.store.gradients()}
    dense = build_model(spec)
    for batch in batches:
        dense(batch).sum().backward()
    rows, values = both[0]
    wide = torch.zeros_like(trained.store.groups[0].weight)
    wide[rows] = values
    names = [name for tower in dense.tower_list for name in tower.features]
    bags = [bag for bag in dense.modules() if isinstance(bag, nn.EmbeddingBag)]
    for name, bag in zip(names, bags, strict=True):
        table = f"t{name[-1]}"
        if table in trained.store.groups[0].starts:
            start = trained.store.groups[0].starts[table]
            torch.testing.assert_close(wide[start : start + len(bag.weight)], bag.weight.grad)
