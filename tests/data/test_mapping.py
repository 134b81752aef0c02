"""Columns meet a model's inputs by name or by number; what neither settles is asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmt_convert.data import Dataset, match_inputs, open_data
from dmt_convert.data.column_names import compress_names, compress_pairs
from dmt_convert.documents import InputRecord
from dmt_convert.errors import DataError
from support.data_files import WRITERS
from support.specs import build_spec

ROWS = 6
NAMES = tuple(f"cat_{i}" for i in range(12))


def write_parquet(
    path: Path, columns: list[str], schema: dict[str, Any] | None = None, **extra: Any
) -> Path:
    """Columns C.. and cat_.. hold ids, all others floats; values are the number in the name."""
    data = {}
    for name in columns:
        number = int("".join(filter(str.isdigit, name)) or 7)
        is_id = name[0] in "Cc" or name.startswith("f")
        data[name] = pa.array([number] * ROWS, pa.int32() if is_id else pa.float32())
    pq.write_table(pa.table(data | extra), path)
    if schema is not None:
        (path.parent / "schema.json").write_text(json.dumps(schema))
    return path


def refuse(path: Path, *args: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        match_inputs(open_data(path), *args)
    return caught.value


def fed(dataset: Dataset) -> tuple[list[int], list[float]]:
    """Ids and dense inputs of the first row."""
    batch = next(iter(dataset.batches(2)))
    return [int(bag.values[0]) for bag in batch.bags], batch.dense[0].tolist()


def counted(prefix: str, count: int, first: int = 1) -> list[str]:
    return [f"{prefix}{i}" for i in range(first, first + count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("first", [0, 1])
def test_names_that_count_are_put_in_order_whatever_the_files(
    tmp_path: Path, seed: int, first: int
) -> None:
    columns = counted("C", 12, first) + counted("I", 13, first)
    random.Random(seed).shuffle(columns)
    path = write_parquet(tmp_path / "a.parquet", columns)
    dataset = match_inputs(open_data(path), build_spec(NAMES, dense=(13,)))
    ids, dense = fed(dataset)
    assert ids == [*range(first, 12 + first)]
    assert dense == [*range(first, 13 + first)]


def test_the_whole_mapping_is_said_once_and_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_parquet(tmp_path / "a.parquet", sorted(counted("C", 12) + counted("I", 13)))
    with caplog.at_level("INFO", "dmt_convert"):
        dataset = match_inputs(open_data(path), build_spec(NAMES, dense=(13,)))
        for _ in range(2):
            fed(dataset)
    assert [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records] == [
        "columns -> features: C1..C12 -> cat_0..cat_11",
        "dense inputs, in this order: I1..I13",
    ]


@pytest.mark.parametrize(
    ("columns", "found", "line"),
    [
        # a gap, a stranger among the ids, names that do not count
        ([f"C{i}" for i in range(1, 14) if i != 5], "lacks 12 of the model's 12", '"features"'),
        ([*counted("C", 12), "c_index"], "lacks 12", '{"features": ["C1", "C2", "C3"'),
        ([f"c_{x}" for x in "abcdefghijkl"], "lacks 12 of", '{"features": ["...", ...]}'),
        ([*counted("C", 11), "f12"], "lacks 12", '"features"'),
    ],
)
def test_ids_that_names_do_not_settle_are_asked_for(
    tmp_path: Path, columns: list[str], found: str, line: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*columns, "I1", "I2"])
    error = refuse(path, build_spec(NAMES, dense=(2,)))
    assert found in error.found
    assert line in error.hint


@pytest.mark.parametrize(
    ("columns", "wanted", "found", "line"),
    [
        (["price", "age"], 2, "in which order its 2 float columns", '["price", "age"]'),
        (["rating"], 1, "whether its float column is the dense input: rating", "[]"),
        (["I1"], 1, "whether its float column is the dense input: I1", "[]"),
        (["bid", "ts"], 1, "has 2 float columns, the model takes 1", "[]"),
        ([*counted("I", 3), "sample_weight"], 3, "I1..I3, sample_weight", '["I1", "I2", "I3"]'),
        (["I1", "I2", "I4"], 3, "in which order", '["I1", "I2", "I4"]'),
        (["I1", "I2"], 3, "has 2 float columns, the model takes 3", "schema.json"),
    ],
)
def test_dense_inputs_that_names_do_not_settle_are_asked_for(
    tmp_path: Path, columns: list[str], wanted: int, found: str, line: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["cat_0", *columns])
    error = refuse(path, build_spec(["cat_0"], dense=(wanted,)))
    assert found in error.found
    assert line in error.hint
    assert "schema.json" in error.hint


def test_the_line_that_is_asked_for_settles_it(tmp_path: Path) -> None:
    spec = build_spec(["cat_0"], dense=(1,))
    path = write_parquet(tmp_path / "a.parquet", ["cat_0", "rating"], {"dense_features": []})
    assert fed(match_inputs(open_data(path), spec)) == ([0], [1.0])
    path = write_parquet(tmp_path / "a.parquet", ["cat_0", "x2"], {"dense_features": ["x2"]})
    assert fed(match_inputs(open_data(path), spec)) == ([0], [2.0])
    columns = [*sorted(counted("C", 12)), "c_index", "I9", "w1"]
    schema = {"features": counted("C", 12), "dense_features": ["w1", "I9"]}
    path = write_parquet(tmp_path / "a.parquet", columns, schema)
    dataset = match_inputs(open_data(path), build_spec(NAMES, dense=(2,)))
    assert fed(dataset) == ([*range(1, 13)], [1.0, 9.0])


def test_a_list_in_text_order_contradicts_its_numbers(tmp_path: Path) -> None:
    schema = {"features": sorted(counted("C", 12)), "dense_features": []}
    path = write_parquet(tmp_path / "a.parquet", counted("C", 12), schema)
    assert "lacks 12" in refuse(path, build_spec(NAMES, dense=(1,))).found


def test_integer_dense_columns_lead_to_the_schema(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["cat_0", "c_9", *counted("f", 2)])
    error = refuse(path, build_spec(["cat_0"], dense=(2,)))
    assert '{"dense_features": ["f1", "f2"]}' in error.hint
    assert "c_9, f1, f2" in error.details[0]


@pytest.mark.parametrize(
    ("values", "kind", "way"),
    [
        (pa.array([1.0, None] * 3), "double", 'df["cat_3"].astype("Int64")'),
        (pa.array(["a"] * ROWS), "string", "map its values to the 40 rows"),
        (pa.array([["a"]] * ROWS), "list<element: string>", "map its values"),
        (pa.array(["a"] * ROWS).dictionary_encode(), "dictionary<", "map its values"),
        (pa.array([True] * ROWS), "bool", "map its values"),
        (pa.nulls(ROWS), "null", "int64"),
    ],
)
def test_a_feature_of_the_wrong_type_is_named(
    tmp_path: Path, values: Any, kind: str, way: str
) -> None:
    columns = [*NAMES[:3], *NAMES[4:], *counted("I", 3)]
    path = write_parquet(tmp_path / "a.parquet", columns, cat_3=values)
    error = refuse(path, build_spec(NAMES, dense=(3,)))
    assert f"do not hold ids: cat_3 ({kind}" in error.found
    assert way in error.hint


def test_all_faults_are_listed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*NAMES[1:], "price", "age"])
    error = refuse(path, build_spec(NAMES, dense=(3,)))
    assert "2 faults" in error.found
    text = "\n".join(error.details)
    assert "missing: cat_0" in text and "price, age" in text


def record(tmp_path: Path, columns: list[str], **schema: Any) -> InputRecord:
    folder = tmp_path / "before"
    folder.mkdir()
    path = write_parquet(folder / "a.parquet", columns, schema or None)
    wanted = sum(name[0] not in "Cc" for name in columns)
    inputs = match_inputs(open_data(path), build_spec(NAMES[:2], dense=(wanted,))).inputs
    assert inputs is not None
    return inputs


def test_what_fed_the_model_before_feeds_it_again(tmp_path: Path) -> None:
    known = record(tmp_path, ["C1", "C2", "price", "age"], dense_features=["price", "age"])
    assert known.features == {"cat_0": "C1", "cat_1": "C2"}
    assert known.dense == ("price", "age")
    spec = build_spec(NAMES[:2], dense=(2,))
    path = write_parquet(tmp_path / "a.parquet", ["age", "rating", "price", "C2", "c_9", "C1"])
    dataset = match_inputs(open_data(path), spec, known)
    assert dataset.inputs is not None
    assert dataset.inputs.dense == ("price", "age")
    assert fed(dataset)[0] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "schema", "found"),
    [
        (["price", "years"], None, "has the dense inputs price, years"),
        (["age", "price"], {"dense_features": ["age", "price"]}, "dense inputs age, price"),
        (["I1", "I2"], None, "dense inputs I1, I2"),
    ],
)
def test_other_dense_inputs_than_before_are_refused(
    tmp_path: Path, columns: list[str], schema: dict[str, Any] | None, found: str
) -> None:
    known = record(tmp_path, ["C1", "C2", "price", "age"], dense_features=["price", "age"])
    path = write_parquet(tmp_path / "a.parquet", ["C1", "C2", *columns], schema)
    error = refuse(path, build_spec(NAMES[:2], dense=(2,)), known)
    assert found in error.found
    assert "price, age" in error.found
    assert '{"dense_features": ["price", "age"]}' in error.hint


def test_two_columns_for_one_feature_are_refused(tmp_path: Path) -> None:
    known = record(tmp_path, ["C1", "C2", "I1", "I2"])
    path = write_parquet(tmp_path / "a.parquet", ["C1", "C2", "cat_0", "cat_1", "I1", "I2"])
    error = refuse(path, build_spec(NAMES[:2], dense=(2,)), known)
    assert "two columns for 2" in error.found


def test_arrays_without_names_and_columns_that_count_are_the_same(tmp_path: Path) -> None:
    known = record(tmp_path, ["C1", "C2", "I2", "I1"])
    np.savez(tmp_path / "a.npz", sparse=np.ones((2, 2), int), dense=np.array([[1, 2], [1, 2]]))
    spec = build_spec(NAMES[:2], dense=(2,))
    assert fed(match_inputs(open_data(tmp_path / "a.npz"), spec, known))[1] == [1, 2]


def test_an_array_without_names_is_asked_for_those_of_before(tmp_path: Path) -> None:
    known = record(tmp_path, ["C1", "C2", "price", "age"], dense_features=["price", "age"])
    np.savez(tmp_path / "a.npz", sparse=np.ones((2, 2), int), dense=np.array([[1, 2], [1, 2]]))
    spec = build_spec(NAMES[:2], dense=(2,))
    error = refuse(tmp_path / "a.npz", spec, known)
    assert "dense[0], dense[1]" in error.found
    assert '"dense_features": ["price", "age"]' in error.hint
    (tmp_path / "schema.json").write_text(json.dumps({"dense_features": ["age", "price"]}))
    assert fed(match_inputs(open_data(tmp_path / "a.npz"), spec, known))[1] == [2, 1]


def tsv(tmp_path: Path, form: str | None) -> Path:
    if form is not None:
        (tmp_path / "schema.json").write_text(json.dumps({"dense_transform": form}))
    return WRITERS["criteo-tsv"](tmp_path)


@pytest.mark.parametrize(
    ("form", "known", "refused"),
    [
        (None, None, False),
        (None, "log3", False),
        ("log3", "log3", False),
        ("log3", "stored", False),  # the user says that it is the same
        (None, "stored", True),
        (None, "log1p", True),
        ("log1p", "log3", True),
        ("none", "log3", True),
    ],
)
def test_the_form_of_dense_inputs_is_compared(
    tmp_path: Path, form: str | None, known: str | None, refused: bool
) -> None:
    path = tsv(tmp_path, form)
    spec = build_spec([f"cat_{i}" for i in range(26)], dense=(13,))
    args = (spec, InputRecord(dense_form=known))
    if refused:
        error = refuse(path, *args)
        assert "fed as log(x + " in error.found or "fed as x" in error.found
        assert '{"dense_transform": ' in error.hint
    else:
        assert match_inputs(open_data(path), *args).inputs is not None


def test_stored_dense_inputs_of_unknown_form_are_asked_about(tmp_path: Path) -> None:
    spec, known = build_spec(["cat_0"], dense=(2,)), InputRecord(dense_form="log3")
    path = write_parquet(tmp_path / "a.parquet", ["cat_0", "I1", "I2"])
    assert '{"dense_transform": "log3"}' in refuse(path, spec, known).hint
    (tmp_path / "schema.json").write_text(json.dumps({"dense_transform": "log3"}))
    dataset = match_inputs(open_data(path), spec, known)
    assert fed(dataset)[1] == [1, 2]  # stored so: nothing is computed


def test_ids_are_not_taken_modulo_by_a_model_that_was_fed_others(tmp_path: Path) -> None:
    path = tsv(tmp_path, None)
    spec = build_spec([f"cat_{i}" for i in range(26)], dense=(13,))
    assert match_inputs(open_data(path), spec).hash_ids
    assert not match_inputs(open_data(path), spec, InputRecord(hashed=False)).hash_ids


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"dense_features": ["a", "a"]}, "appear twice: a"),
        ({"dense_features": ["label"]}, "dense_features names the label"),
        ({"features": ["label"]}, "features names the label"),
        ({"dense_features": ["a"], "features": ["a"]}, "both dense and categorical: a"),
        ({"features": ["a"], "sparse_features": ["a"]}, "mean the same"),
        ({"dense_feature": ["a"]}, "did you mean dense_features?"),
    ],
)
def test_a_schema_that_contradicts_itself(
    tmp_path: Path, schema: dict[str, Any], found: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["cat_0", "a1"], schema)
    with pytest.raises(DataError, match=r"schema\.json") as caught:
        open_data(path)
    assert found in str(caught.value)


def test_a_key_that_stands_twice_in_a_schema(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["cat_0"])
    (tmp_path / "schema.json").write_text('{"dense_features": [], "dense_features": ["a"]}')
    with pytest.raises(DataError, match="appear twice: dense_features"):
        open_data(path)


def test_names_are_listed_in_full_but_short() -> None:
    assert compress_names(["a", "I1", "I2", "I3", "I5", "I6"]) == "a, I1..I3, I5, I6"
    assert compress_names([f"dense[{i}]" for i in range(4)]) == "dense[0]..dense[3]"
    pairs = [(f"C{i + 1}", f"cat_{i}") for i in range(3)]
    assert compress_pairs([*pairs, ("x", "y")]) == "C1..C3 -> cat_0..cat_2, x -> y"
    assert compress_pairs([("C1", "f2"), ("C2", "f1"), ("C3", "f0")]).count("->") == 3
