"""The adapter matches columns to features and lets no id past its table."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.data import Dataset, adapt_batches, match_inputs, open_data
from dmt_convert.data.column_names import are_positional, count_columns
from dmt_convert.errors import DataError
from dmt_convert.spec import ModelSpec
from support.data_files import WRITERS
from support.specs import build_spec


def write_npz(path: Path, num_features: int, *, num_dense: int = 1, num_rows: int = 8) -> Path:
    ids = np.arange(num_rows)[:, None] * 10 + np.arange(num_features)
    np.savez(path, sparse=ids, dense=np.zeros((num_rows, num_dense)), label=np.zeros(num_rows))
    return path


def columns(dataset: Dataset, spec: ModelSpec) -> list[str]:
    """Match, and return the column of every feature."""
    inputs = match_inputs(dataset, spec).inputs
    assert inputs is not None
    return [inputs.features[name] for name in spec.feature_names]


def test_bags_follow_the_model_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_data(WRITERS["probe-npz"](tmp_path))
    spec = build_spec(["b"], dense=(2,), rows=100)
    with caplog.at_level(logging.INFO, "dmt_convert"):
        batches = list(adapt_batches(dataset, spec, dataset.batches(4)))
    assert len(batches) == 3
    assert [batch.feature_names for batch in batches] == [("b",)] * 3
    assert batches[1].bags[0].values.tolist() == [4, 5, 6, 7]
    assert batches[1].logits is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"{dataset.path}: columns that feed nothing: a"
    ]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(order=st.permutations(["f0", "f1", "f2", "f3"]))
def test_any_order_of_names(tmp_path_factory: pytest.TempPathFactory, order: list[str]) -> None:
    dataset = open_data(write_npz(tmp_path_factory.mktemp("data") / "a.npz", 4))
    spec = build_spec(order, dense=(1,), rows=100)
    assert columns(dataset, spec) == order
    (batch,) = adapt_batches(dataset, spec, dataset.batches(8))
    assert [int(bag.values[1]) for bag in batch.bags] == [10 + int(name[1]) for name in order]


@pytest.mark.parametrize("names", [["0", "1"], ["cat_0", "cat_1"], ["C1", "C2"]])
def test_names_of_the_model_that_count_take_an_array_in_its_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str]
) -> None:
    dataset = open_data(WRITERS["repository-npz"](tmp_path))
    assert not dataset.names_are_positional
    with caplog.at_level(logging.INFO, "dmt_convert"):
        assert columns(dataset, build_spec(names, dense=(3,), rows=100)) == ["user", "item"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{dataset.path}: columns -> features: user -> {names[0]}, item -> {names[1]}",
        f"{dataset.path}: dense inputs, in this order: I1..I3",
    ]


def test_an_array_without_names_is_not_matched_to_names_that_mean_something(
    tmp_path: Path,
) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 2))
    with pytest.raises(DataError, match="lacks 2 of the model's 2") as caught:
        match_inputs(dataset, build_spec(["user", "item"], dense=(1,), rows=100))
    assert 'schema.json beside the data: {"features": ["user", "item"]}' in caught.value.hint


def test_an_array_without_names_has_as_many_columns_as_the_model(tmp_path: Path) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 3))
    with pytest.raises(DataError, match="3 columns of ids without names, the model has 2"):
        match_inputs(dataset, build_spec(["f0", "f1"], dense=(1,), rows=100))


@pytest.mark.parametrize(
    "names",
    [
        ["user", "price"],  # one matches, so names mean something
        ["color", "price"],  # neither side only counts
        ["f0", "f1", "f2"],  # the counts differ
        ["f1", "f0"],  # not in order
    ],
)
def test_missing_features_are_refused(tmp_path: Path, names: list[str]) -> None:
    dataset = open_data(WRITERS["repository-npz"](tmp_path))
    with pytest.raises(DataError, match=r"lacks \d of the model's") as caught:
        match_inputs(dataset, build_spec(names, dense=(3,), rows=100))
    missing = [name for name in names if name != "user"]
    assert caught.value.details[0] == f"missing: {', '.join(missing)}"


def test_positional_names_that_overlap_are_not_shifted(tmp_path: Path) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 2))
    with pytest.raises(DataError, match="lacks 1 of the model's 2"):
        match_inputs(dataset, build_spec(["f1", "f2"], dense=(1,), rows=100))


def test_numbers_in_another_order_say_the_column(tmp_path: Path) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 3))
    spec = build_spec(["t2", "t0", "t1"], dense=(1,), rows=100)
    assert columns(dataset, spec) == ["f2", "f0", "f1"]


def test_columns_that_names_count() -> None:
    assert count_columns(["f10", "f9", "f8"] + [f"f{i}" for i in range(8)])[:3] == (10, 9, 8)
    assert count_columns(["C2", "C1"]) == (1, 0)
    for names in (["f1", "f1"], ["f0", "f2"], ["f0", "g1"], ["f2", "f3"], ["f"], []):
        assert count_columns(names) is None


def test_positional_names() -> None:
    assert are_positional(["0", "1", "2"])
    assert are_positional(["C1", "C2"])
    assert are_positional(["t_cat_0", "t_cat_1"])
    assert not are_positional(["C2", "C3"])
    assert not are_positional(["a0", "b1"])
    assert not are_positional(["f0", "f2"])
    assert not are_positional(["f0", "g"])
    assert not are_positional([])


def test_no_dense_inputs_feed_the_constant(tmp_path: Path) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 2, num_dense=0))
    spec = build_spec(["f0", "f1"], dense=(1,), rows=100)
    batches = list(adapt_batches(dataset, spec, dataset.batches(5)))
    assert [batch.dense.tolist() for batch in batches] == [[[1.0]] * 5, [[1.0]] * 3]


@pytest.mark.parametrize(("found", "taken"), [(0, 2), (1, 2), (3, 1)])
def test_dense_width_is_checked(tmp_path: Path, found: int, taken: int) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 2, num_dense=found))
    with pytest.raises(DataError, match=f"has {found} dense inputs, the model takes {taken}"):
        adapt_batches(
            dataset, build_spec(["f0", "f1"], dense=(taken,), rows=100), dataset.batches(4)
        )


def test_id_past_the_table_is_refused_with_its_row(tmp_path: Path) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 2))
    fits = build_spec(["f0", "f1"], dense=(1,), rows=72)
    assert len(list(adapt_batches(dataset, fits, dataset.batches(3)))) == 3
    spec = build_spec(["f0", "f1"], dense=(1,), rows=71)
    for seed in (None, 0, 1):
        adapted = adapt_batches(dataset, spec, dataset.batches(3, shuffle_seed=seed))
        with pytest.raises(DataError) as caught:
            list(adapted)
        assert "feature 'f1', row 7 (from 0): id 71, but table 't1' has 71" in caught.value.found
        assert caught.value.expected == "ids in [0, 71)"


def test_row_of_a_wrapped_iterator_counts_what_was_read(tmp_path: Path) -> None:
    dataset = open_data(write_npz(tmp_path / "a.npz", 2))
    spec = build_spec(["f0", "f1"], dense=(1,), rows=65)
    with pytest.raises(DataError, match=r"row 7 of those read \(from 0\): id 70"):
        list(adapt_batches(dataset, spec, iter(list(dataset.batches(3)))))


def test_hashed_ids_are_taken_modulo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_data(WRITERS["criteo-tsv"](tmp_path))
    spec = build_spec([f"cat_{i}" for i in range(26)], dense=(13,), rows=7)
    with caplog.at_level(logging.INFO, "dmt_convert"):
        batches = list(adapt_batches(dataset, spec, dataset.batches(4)))
    assert [i for batch in batches for i in batch.bags[0].values.tolist()] == [
        row % 7 for row in range(11)
    ]
    assert set(batches[0].bags[2].values.tolist()) == {(2**32 - 1) % 7}
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "dense inputs, in this order: int_0..int_12",
        "dense inputs are fed as log(x + 3) of the raw counts; `dense_transform` in schema.json "
        "can say otherwise",
        "ids are taken modulo the tables' rows",
    ]
    assert max(bag.values.max() for batch in batches for bag in batch.bags) == 6


def test_wrapped_hashes_become_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "a_dense.npy", np.zeros((2, 1), dtype=np.float32))
    np.save(tmp_path / "a_sparse.npy", np.array([[-7], [9]], dtype=np.int32))
    dataset = open_data(tmp_path)
    spec = build_spec(["cat_0"], dense=(1,), rows=5)
    (batch,) = adapt_batches(dataset, spec, dataset.batches(2))
    assert batch.bags[0].values.tolist() == [3, 4]
