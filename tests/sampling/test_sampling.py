"""Which rows are drawn, and how they are pooled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmt_convert.data import Bag, Batch
from dmt_convert.errors import CheckpointError, DataError
from dmt_convert.sampling import draw_rows, draw_sample, pool_batch, sample, sample_size
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


def _rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("shape", ["vector", "matrix"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_rows_are_drawn_in_proportion_to_their_accumulator(vector, shape, dtype):
    weight = np.array([0, 1, 2, 0, 4, 3], dtype=dtype)
    state = weight if shape == "vector" else np.stack([weight, weight * 3, weight * 0], axis=1)
    drawn = draw_rows(6, vector(state), 20_000, _rng())
    counts = np.bincount(drawn, minlength=6)
    expected = 20_000 * weight.astype(float) / 10
    assert counts[0] == counts[3] == 0
    live = expected > 0
    # chi-square of 3 degrees of freedom: 16.3 is exceeded once in a thousand seeds
    assert (np.square(counts - expected)[live] / expected[live]).sum() < 16.3


def test_adams_average_only_tells_who_was_trained(vector):
    state = vector([[0.0, 0], [1e-9, 0], [5, 5]], name="exp_avg_sq")
    counts = np.bincount(draw_rows(3, state, 10_000, _rng()), minlength=3)
    assert counts[0] == 0 and abs(counts[1] - counts[2]) < 500


@pytest.mark.parametrize(
    "weight", [[0.0, 0, 0], [np.nan, np.nan, np.nan], [-1.0, 0, -3], [np.inf, 0, np.inf]]
)
def test_accumulators_that_tell_nothing_fall_back_to_uniform(vector, weight):
    counts = np.bincount(draw_rows(3, vector(weight), 9_000, _rng()), minlength=3)
    assert (np.abs(counts - 3000) < 300).all()


def test_rows_with_damaged_accumulators_are_passed_over(vector):
    drawn = draw_rows(4, vector([np.nan, 1.0, np.inf, -5.0]), 1000, _rng())
    assert set(drawn.tolist()) == {1}


def test_without_state_rows_are_uniform_over_the_whole_table():
    drawn = draw_rows(5, None, 5_000, _rng())
    assert drawn.dtype == np.int64
    assert (np.abs(np.bincount(drawn, minlength=5) - 1000) < 200).all()


@pytest.mark.parametrize("shape", ["vector", "matrix"])
def test_large_tables_are_weighed_on_candidates_only(vector, monkeypatch, shape):
    """Only the candidates' elements are read, whatever the accumulator's length."""
    monkeypatch.setattr(sample, "_MAX_CANDIDATES", 50)
    asked = []
    gather = sample.gather_rows

    def spy(info, rows):
        asked.append(len(rows))
        return gather(info, rows)

    monkeypatch.setattr(sample, "gather_rows", spy)
    weight = np.zeros(10_000, dtype=np.float32)
    weight[5000:] = 1
    state = vector(weight if shape == "vector" else weight[:, None])
    drawn = draw_rows(10_000, state, 2_000, _rng())
    assert asked and max(asked) <= 50
    assert drawn.min() >= 5000 and len(set(drawn.tolist())) <= 50


def test_a_vector_is_gathered_element_by_element(vector):
    values = _rng().standard_normal(1000)
    info = sample._as_column(vector(values))
    rows = np.array([0, 5, 999, 500])
    np.testing.assert_allclose(sample.gather_rows(info, rows)[:, 0], values[rows], rtol=1e-6)


def test_a_strided_vector_is_gathered(tmp_path):
    from dmt_convert.checkpoint import open_checkpoint

    values = torch.arange(40.0)
    torch.save({"state": {"sum": values[::2], "whole": values}}, tmp_path / "state.pt")
    tensors = open_checkpoint(tmp_path / "state.pt").tensors
    info = sample._as_column(next(t for t in tensors if t.name == "sum"))
    assert sample.gather_rows(info, np.array([0, 1, 19]))[:, 0].tolist() == [0, 2, 38]


def test_the_checkpoints_accumulators_decide(info):
    touched = {0: [3], 1: [0, 29], 2: [6]}
    names = [f"sparse_arch.embedding_bag_collection.embedding_bags.t_f{i}.weight" for i in range(3)]
    state = {}
    for i, rows in touched.items():
        accumulator = torch.zeros((20, 30, 7)[i])
        accumulator[rows] = 1.0
        state[names[i]] = {"momentum1": accumulator}
    found = draw_sample(info(state=state), rows=200)
    assert "how often they were trained" in found.description and found.source == "tables"
    for i, rows in touched.items():
        assert set(found.batch.bags[i].values.tolist()) == set(rows)


def test_a_sample_follows_its_seed(info):
    model = info()
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
def test_pooling_is_what_a_loop_gives(info, pooling, weighted, rows):
    model = info(pooling=pooling)
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


def test_rows_of_nan_are_refused_when_touched(info, tmp_path):
    model = info()
    content = torch.load(model.checkpoint.source)
    name = "sparse_arch.embedding_bag_collection.embedding_bags.t_f1.weight"
    content["model"][name][17, 2] = float("nan")
    torch.save(content, model.checkpoint.source)

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
        feature_names=np.array(["f0", "f1", "f2"]),
        **bags,
    )
    return path


def test_calibration_rows_are_a_random_choice_of_the_data(info, tmp_path):
    model = info()
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


def test_calibration_without_rows_is_refused(info, tmp_path):
    data = _write_data(tmp_path / "probe.npz", 0)
    with pytest.raises(DataError, match="rows"):
        draw_sample(info(), calibration=data)


def test_a_sample_splits_into_fit_and_held_out_rows(info):
    model = info()
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
