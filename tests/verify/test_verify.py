"""Verification finds what differs, and says where it first does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dmt_convert.data import Bag
from dmt_convert.errors import ConfigError
from dmt_convert.families import ModelConfig
from dmt_convert.scoring import open_model, score_data, verify
from dmt_convert.scoring.verify import verify_models
from support.scored import write_model, write_rows

TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"
DENSE = "dense_arch.model._mlp.0._linear"
FIRST = "over_arch.model.0._mlp.0._linear"
LAST = "over_arch.model.1"


@pytest.fixture
def damaged(scored_checkpoint, tmp_path):
    """Open a copy of the checkpoint after a change of its tensors."""

    def build(change):
        tensors = torch.load(scored_checkpoint)
        change(tensors)
        torch.save(tensors, tmp_path / "damaged.pt")
        return open_model(tmp_path / "damaged.pt")

    return build


def test_a_model_is_the_same_as_itself(scored_checkpoint):
    report = verify_models(open_model(scored_checkpoint), open_model(scored_checkpoint))
    assert report.same and report.first_difference is None and not report.skipped
    assert [check.stage for check in report.checks] == [
        *(f"pooled embedding of cat_{i}" for i in range(4)),
        "dense_arch", "interaction", "over_arch layer 0", "logit",
    ]  # fmt: skip
    for check in report.checks:
        assert check.identical and check.max_abs_diff == 0 and check.scale > 0
        assert check.rows == verify.GENERATED_ROWS
    assert report.data == "4096 generated rows"


def test_a_passthrough_bundle_is_the_same_to_the_bit(scored_checkpoint, scored_bundles):
    flat, bundle = open_model(scored_checkpoint), open_model(scored_bundles["passthrough"])
    for a, b in ((flat, bundle), (bundle, flat)):
        report = verify_models(a, b)
        assert report.same and all(check.identical for check in report.checks)
        assert report.checks[-1].stage == "logit"
        assert set(report.skipped) == {"output of tower 0", "output of tower 1"}


def test_a_compressed_bundle_differs_behind_its_towers(scored_checkpoint, scored_bundles):
    report = verify_models(open_model(scored_checkpoint), open_model(scored_bundles["dlrm"]))
    assert not report.same
    stage = report.first_difference.stage
    assert stage in ("over_arch layer 0", "logit")
    assert "interaction" in report.skipped and "output of tower 0" in report.skipped
    assert all(check.identical for check in report.checks[:5])


def _swap(tensors, a, b):
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _row(tensors, value):
    tensors[TABLE.format(2)][6, 1] = value


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (lambda t: _row(t, 9.0), "pooled embedding of cat_2"),
        (lambda t: t[TABLE.format(1)][0].mul_(1.001), "pooled embedding of cat_1"),
        (
            lambda t: t[TABLE.format(1)].copy_(t[TABLE.format(1)].flip(0)),
            "pooled embedding of cat_1",
        ),
        (lambda t: t[f"{DENSE}.weight"].copy_(t[f"{DENSE}.weight"].flip(1)), "dense_arch"),
        (lambda t: t[f"{FIRST}.bias"][0].add_(1e-2), "over_arch layer 0"),
        (lambda t: t[f"{LAST}.bias"].add_(1e-2), "logit"),
        (lambda t: t[f"{LAST}.weight"][0, 0].neg_(), "logit"),
    ],
)
def test_the_first_stage_that_differs_is_named(scored_checkpoint, damaged, change, stage):
    flat, other = open_model(scored_checkpoint), damaged(change)
    for a, b in ((flat, other), (other, flat)):
        report = verify_models(a, b)
        assert not report.same and report.first_difference.stage == stage


def test_swapped_tables_are_found_in_the_first_of_them(tmp_path):
    tensors = torch.load(write_model(tmp_path / "a.pt"))
    tensors[TABLE.format(3)] = tensors[TABLE.format(1)].flip(0).clone()
    torch.save(tensors, tmp_path / "a.pt")
    _swap(tensors, TABLE.format(1), TABLE.format(3))
    torch.save(tensors, tmp_path / "b.pt")
    report = verify_models(open_model(tmp_path / "a.pt"), open_model(tmp_path / "b.pt"))
    assert report.first_difference.stage == "pooled embedding of cat_1"


def test_a_transposed_weight_is_found(tmp_path):
    """A square dense_arch weight, transposed: every shape still fits."""
    tensors = torch.load(write_model(tmp_path / "a.pt"))
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(4, 4, generator=generator)
    tensors["dense_arch.model._mlp.1._linear.weight"] = square
    tensors["dense_arch.model._mlp.1._linear.bias"] = torch.zeros(4)
    torch.save(tensors, tmp_path / "a.pt")
    tensors["dense_arch.model._mlp.1._linear.weight"] = square.T.contiguous()
    torch.save(tensors, tmp_path / "b.pt")
    report = verify_models(open_model(tmp_path / "a.pt"), open_model(tmp_path / "b.pt"))
    assert report.first_difference.stage == "dense_arch"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("both", [False, True])
def test_values_that_are_not_finite_count_as_a_difference(
    scored_checkpoint, monkeypatch, value, both
):
    a, b = open_model(scored_checkpoint), open_model(scored_checkpoint)
    with torch.no_grad():
        for model in (a, b) if both else (b,):
            model.module.over_arch[0].bias[0] = value
    for x, y in ((a, b), (b, a)):
        report = verify_models(x, y, max_rows=20)
        assert not report.same
        assert report.first_difference.stage == "over_arch layer 0"


def test_nan_in_a_later_batch_is_not_forgotten():
    running = verify._Running()
    for part in ([1.0], [float("nan")], [2.0]):
        running.update(torch.tensor(part), torch.ones(1))
    assert np.isnan(running.diff) and not running.identical


def test_tolerances_are_kept(scored_checkpoint, damaged):
    flat = open_model(scored_checkpoint)
    other = damaged(lambda t: t[f"{LAST}.bias"].add_(1e-2))
    assert verify_models(flat, other, atol=2e-2).same
    assert verify_models(flat, other, rtol=1e-2, atol=0).same
    assert not verify_models(flat, other, atol=5e-3, rtol=0).same


def test_truth_in_the_data_is_compared_with_the_first_model(scored_checkpoint, tmp_path):
    flat = open_model(scored_checkpoint)
    data = write_rows(tmp_path / "probe.npz", 40)
    logits = score_data(flat, data).logits
    stage = "logit of the original model (from the data), against A"
    for shift, same in ((0.0, True), (0.1, False)):
        wrong = logits.copy()
        wrong[17] += shift * max(1, np.abs(logits).max())
        path = write_rows(tmp_path / f"truth{same}.npz", 40, logits=wrong)
        report = verify_models(flat, flat, data=path)
        assert report.same is same and report.checks[-1].stage == stage
        assert report.checks[-1].rows == 40
        if not same:
            assert report.first_difference.stage == stage
    report = verify_models(flat, flat, data=path, max_rows=10)
    assert report.same and report.checks[-1].rows == 10


def test_models_of_other_inputs_are_refused(scored_checkpoint, tmp_path):
    flat = open_model(scored_checkpoint)
    tensors = torch.load(scored_checkpoint)
    renamed = {name.replace("t_cat_2", "t_other"): value for name, value in tensors.items()}
    torch.save(renamed, tmp_path / "renamed.pt")
    longer = dict(tensors)
    longer[TABLE.format(0)] = torch.zeros(21, 4)
    torch.save(longer, tmp_path / "longer.pt")
    wider = dict(tensors)
    wider[f"{DENSE}.weight"] = torch.zeros(4, 3)
    torch.save(wider, tmp_path / "wider.pt")
    names = [name for name in tensors if "embedding_bags" in name]
    order = [*reversed(names), *(name for name in tensors if name not in names)]
    torch.save({name: tensors[name] for name in order}, tmp_path / "order.pt")
    for name, match in (
        ("renamed", "cat_2"), ("longer", "20 and 21"), ("wider", "dense inputs: 2 and 3"),
        ("order", "another order"),
    ):  # fmt: skip
        listed = ModelConfig(features=[f"cat_{i}" for i in (3, 2, 1, 0)])
        other = open_model(tmp_path / f"{name}.pt", listed if name == "order" else None)
        with pytest.raises(ConfigError) as caught:
            verify_models(flat, other)
        assert match in str(caught.value)


def test_generated_rows_reach_both_ends_of_every_table(scored_checkpoint):
    small = open_model(scored_checkpoint).spec
    # tables so large that no draw hits an end by chance
    tables = tuple(dataclasses.replace(table, rows=10**9) for table in small.tables)
    spec = dataclasses.replace(small, tables=tables)
    batches = list(verify._generated(spec, 2500, 0))
    assert [batch.num_rows for batch in batches] == [1024, 1024, 452]
    for batch in batches:
        for feature, bag in zip(spec.features, batch.bags, strict=True):
            last = spec.table_of(feature.name).rows - 1
            assert bag.values.min() == 0 and bag.values.max() == last
            lengths = np.diff(bag.offsets)
            assert set(lengths.tolist()) == {0, 1, 2, 3, 4}
            assert lengths.sum() == len(bag.values)
    assert not np.array_equal(batches[0].dense[:452], batches[2].dense)
    again = next(iter(verify._generated(spec, 2500, 0)))
    assert np.array_equal(again.dense, batches[0].dense)


@pytest.mark.parametrize("rows", [1, 2])
def test_even_one_generated_row_is_a_valid_batch(scored_checkpoint, rows):
    model = open_model(scored_checkpoint)
    report = verify_models(model, model, max_rows=rows)
    assert report.same and report.checks[-1].rows == rows
    batch = next(iter(verify._generated(model.spec, 1, 0)))
    assert all(isinstance(bag, Bag) and len(bag.values) == bag.offsets[-1] for bag in batch.bags)
