"""Which rows are drawn, and how they are pooled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion import draw_sample, pool_batch, sample_size
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import CheckpointError, DataError
from dmt_convert.families import infer_model
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec
from support.sampled import flat_info


def _rng(seed=0):
    return np.random.default_rng(seed)


def test_the_checkpoints_accumulators_decide(tmp_path):
    touched = {0: [3], 1: [0, 29], 2: [6]}
    names = [
        f"sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight" for i in range(3)
    ]
    state = {}
    for i, rows in touched.items():
        accumulator = torch.zeros((20, 30, 7)[i])
        accumulator[rows] = 1.0
        state[names[i]] = {"momentum1": accumulator}
    found = draw_sample(flat_info(tmp_path, state=state), rows=200)
    assert "how often they were trained" in found.description and found.source == "tables"
    for i, rows in touched.items():
        assert set(found.batch.bags[i].values.tolist()) == set(rows)


def test_a_sample_follows_its_seed(tmp_path):
    model = flat_info(tmp_path)
    one, two, three = (draw_sample(model, rows=64, seed=seed) for seed in (0, 0, 1))
    assert "uniformly" in one.description and one.batch.num_rows == 64
    assert np.array_equal(one.pooled, two.pooled)
    assert np.array_equal(one.batch.dense, two.batch.dense)
    assert not np.array_equal(one.pooled, three.pooled)
    assert one.batch.dense.shape == (64, 2) and np.isfinite(one.batch.dense).all()
    # features draw on their own: equal ids in all rows would be a shared stream
    assert not np.array_equal(one.batch.bags[0].values, one.batch.bags[1].values)


def _naive(table, bag, pooling):
    out = np.zeros((len(bag.offsets) - 1, table.shape[1]))
    for row in range(len(out)):
        begin, end = bag.offsets[row], bag.offsets[row + 1]
        for i in range(begin, end):
            out[row] += table[bag.values[i]] * (1 if bag.weights is None else bag.weights[i])
        if pooling == "mean" and end > begin:
            out[row] /= end - begin
    return out


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 2500])
def test_pooling_is_what_a_loop_gives(tmp_path, pooling, weighted, rows):
    model = flat_info(tmp_path, pooling=pooling)
    tables = torch.load(model.checkpoint.source)["model"]
    rng = _rng(rows)
    bags = []
    for feature in model.spec.features:
        lengths = rng.integers(0, 4, rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = rng.integers(0, model.spec.table_of(feature.name).rows, offsets[-1])
        weights = rng.random(len(values)).astype(np.float32) if weighted else None
        bags.append(Bag(values=values, offsets=offsets, weights=weights))
    bags[2] = Bag(values=np.zeros(0, np.int64), offsets=np.zeros(rows + 1, np.int64))
    batch = Batch(
        dense=np.zeros((rows, 2), np.float32),
        feature_names=model.spec.feature_names,
        bags=tuple(bags),
    )
    expected = [
        _naive(
            tables[f"sparse_arch.embedding_bag_collection.embedding_bags.{f.table}.weight"].numpy(),
            bag,
            pooling,
        )
        for f, bag in zip(model.spec.features, bags, strict=True)
    ]
    np.testing.assert_allclose(pool_batch(model, batch), np.concatenate(expected, 1), atol=1e-5)
    assert not pool_batch(model, batch)[:, 8:].any()


def test_rows_of_nan_are_refused_when_touched(tmp_path):
    model = flat_info(tmp_path)
    content = torch.load(model.checkpoint.source)
    name = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_1.weight"
    content["model"][name][17, 2] = float("nan")
    torch.save(content, model.checkpoint.source)
    model = infer_model(open_checkpoint(model.checkpoint.source))

    def batch(row):
        bag = Bag(values=np.array([row]), offsets=np.array([0, 1]))
        return Batch(
            dense=np.zeros((1, 2), np.float32),
            feature_names=model.spec.feature_names,
            bags=(Bag(values=np.array([0]), offsets=np.array([0, 1])), bag,
                  Bag(values=np.array([0]), offsets=np.array([0, 1]))),
        )  # fmt: skip

    assert np.isfinite(pool_batch(model, batch(16))).all()
    with pytest.raises(CheckpointError, match="row 17"):
        pool_batch(model, batch(17))


def _write_data(path, rows):
    bags = {}
    for i in range(3):
        bags[f"values_{i}"] = np.arange(rows, dtype=np.int64) % (20, 30, 7)[i]
        bags[f"offsets_{i}"] = np.arange(rows + 1, dtype=np.int64)
    np.savez(
        path,
        dense=np.arange(2 * rows, dtype=np.float32).reshape(rows, 2),
        feature_names=np.array(["cat_0", "cat_1", "cat_2"]),
        **bags,
    )
    return path


def test_calibration_rows_are_a_random_choice_of_the_data(tmp_path):
    model = flat_info(tmp_path)
    data = _write_data(tmp_path / "probe.npz", 500)
    one, two, three = (
        draw_sample(model, calibration=data, rows=60, seed=seed) for seed in (0, 0, 1)
    )
    assert one.source == "calibration" and "60 random rows of probe.npz" in one.description
    rows = (one.batch.dense[:, 0] / 2).astype(int)
    assert len(set(rows.tolist())) == 60 and rows.max() > 60
    assert np.array_equal(one.batch.bags[1].values, rows % 30)
    assert np.array_equal(one.pooled, two.pooled)
    assert not np.array_equal(one.pooled, three.pooled)
    everything = draw_sample(model, calibration=data, rows=5000)
    assert sorted(everything.batch.dense[:, 0]) == list(range(0, 1000, 2))


def test_calibration_without_rows_is_refused(tmp_path):
    data = _write_data(tmp_path / "probe.npz", 0)
    with pytest.raises(DataError, match="rows"):
        draw_sample(flat_info(tmp_path), calibration=data)


def test_a_sample_splits_into_fit_and_held_out_rows(tmp_path):
    model = flat_info(tmp_path)
    whole = draw_sample(model, rows=100)
    fit, held = whole.split(0.25)
    assert (fit.batch.num_rows, held.batch.num_rows) == (75, 25)
    assert np.array_equal(np.concatenate([fit.pooled, held.pooled]), whole.pooled)
    for part in (fit, held):
        assert np.array_equal(pool_batch(model, part.batch), part.pooled)
    widths = [part.shape for part in whole.per_feature(model.spec)]
    assert widths == [(100, 4)] * 3


@pytest.mark.parametrize(
    ("features", "dim", "rows"), [(1, 4, 16_384), (26, 128, 5041), (800, 128, 1024)]
)
def test_sample_size_is_bounded(features, dim, rows):
    spec = ModelSpec(
        family="test",
        tables=tuple(TableSpec(name=f"t{i}", rows=1, dim=dim) for i in range(features)),
        features=tuple(FeatureSpec(name=f"f{i}", table=f"t{i}") for i in range(features)),
        dense_arch=MlpSpec(widths=(1, dim), final_relu=True),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=(dim * (features + 1), 1), final_relu=False),
    )
    assert sample_size(spec) == rows
