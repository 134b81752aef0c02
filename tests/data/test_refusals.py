"""Whatever is not a whole, sound data set is refused: found, expected, what to try."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmt_convert.data import open_data
from dmt_convert.errors import DataError
from support.data_files import WRITERS


def refusal(path: Path) -> str:
    """Open and read all; return the refusal's text."""
    with pytest.raises(DataError) as caught:
        for _ in open_data(path).batches(2):
            pass
    assert caught.value.expected
    return str(caught.value)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def probe(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "feature_names": np.array(["a", "b"]),
        "values_0": np.arange(4),
        "offsets_0": np.array([0, 1, 4]),
        "values_1": np.arange(2),
        "offsets_1": np.array([0, 1, 2]),
    }
    return save(path, **{k: v for k, v in (arrays | changes).items() if v is not None})


def test_missing_path(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.parquet", "a.tsv"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty" in refusal(tmp_path / name)


def test_unknown_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00\x01" * 50)
    assert "unknown format" in refusal(tmp_path / "a.bin")
    assert "with the arrays x, y" in refusal(save(tmp_path / "a.npz", x=[1], y=[2]))


def test_directory_without_data(tmp_path: Path) -> None:
    assert "do not form a data set" in refusal(tmp_path)
    probe(tmp_path / "probe.npz")
    assert str(tmp_path / "probe.npz") in refusal(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train.npz", "valid.npz", "test.npz"),
        ("train_dense.npy", "train_sparse.npy", "val_dense.npy", "val_sparse.npy"),
        ("train-0.parquet", "train-1.parquet", "test-0.parquet"),
    ],
)
def test_directory_of_splits_names_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    text = refusal(tmp_path)
    assert "several splits" in text
    assert str(tmp_path / names[0]) in text.splitlines()[-1]
    assert str(tmp_path / names[-2 if names[-1].startswith("val_s") else -1]) in text


def test_no_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", sparse=np.zeros((0, 2), dtype=int), label=np.zeros(0))
    assert "holds no rows" in refusal(path)


@pytest.mark.parametrize(
    "variant", ["repository-npz", "dlrm-npz", "probe-npz", "criteo-npy multi-hot"]
)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_npz(tmp_path: Path, variant: str, keep: float) -> None:
    path = WRITERS[variant](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "whole" in refusal(path)


def test_damaged_npz_member(tmp_path: Path) -> None:
    path = WRITERS["repository-npz"](tmp_path)
    content = bytearray(path.read_bytes())
    content[150:170] = bytes(20)
    path.write_bytes(content)
    assert "cannot be read" in refusal(path)


def test_truncated_npy(tmp_path: Path) -> None:
    folder = WRITERS["criteo-npy"](tmp_path)
    file = folder / "day_2_sparse.npy"
    file.write_bytes(file.read_bytes()[:-8])
    assert "day_2_sparse.npy cannot be read" in refusal(folder)


def test_truncated_parquet(tmp_path: Path) -> None:
    folder = WRITERS["parquet"](tmp_path)
    file = folder / "part-10.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert "part-10.parquet cannot be read" in refusal(folder)


def test_truncated_gzip(tmp_path: Path) -> None:
    path = WRITERS["criteo-tsv gzip"](tmp_path)
    path.write_bytes(path.read_bytes()[:-12])
    assert "cannot be read" in refusal(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([[1], [2]], dtype=object)
    assert "pickled" in refusal(save(tmp_path / "a.npz", sparse=objects))
    np.save(tmp_path / "a_dense.npy", objects)
    np.save(tmp_path / "a_sparse.npy", np.ones((2, 1), dtype=int))
    assert "pickled" in refusal(tmp_path / "a_dense.npy")


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"dense": [[1.0], [np.nan], [1.0]]}, "column 'dense[0]', row 1 (from 0): nan"),
        ({"dense": [[1.0], [1.0], [np.inf]]}, "column 'dense[0]', row 2 (from 0): inf"),
        ({"dense": [[1.0], [1.0], [1e300]]}, "row 2 (from 0): 1e+300"),
        ({"sparse": [[0, 1], [2, -3], [4, 5]]}, "column 'f1', row 1 (from 0): id -3"),
        ({"sparse": [[0.0], [1.5], [2.0]]}, "column 'f0', row 1 (from 0): id 1.5"),
        (
            {"sparse": np.array([[0], [1], [2**64 - 1]], dtype=np.uint64)},
            "column 'f0', row 2 (from 0): id 18446744073709551615",
        ),
        ({"label": [0, 1, 2]}, "column 'label', row 2 (from 0): label 2"),
        ({"label": [0.0, 0.5, 1.0]}, "column 'label', row 1 (from 0): label 0.5"),
        ({"label": [0, 1]}, "lengths disagree"),
        ({"dense": [[1.0]]}, "lengths disagree"),
        ({"sparse": [0, 1, 2]}, "unexpected shapes"),
        ({"label": [[0, 1]] * 3}, "unexpected shapes"),
        ({"sparse": [["a"], ["b"], ["c"]]}, "of dtype <U1"),
        ({"dense": [["a"], ["b"], ["c"]]}, "of dtype <U1"),
    ],
)
def test_bad_values_in_npz(tmp_path: Path, arrays: dict[str, Any], found: str) -> None:
    good = {"dense": np.zeros((3, 1)), "sparse": np.zeros((3, 1), dtype=int), "label": [0, 1, 1]}
    path = save(tmp_path / "a.npz", **good)
    for _ in open_data(path).batches(2):
        pass
    path = save(path, **(good | arrays))
    text = refusal(path)
    assert found in text
    assert str(path) in text


def test_bad_value_is_found_under_shuffle(tmp_path: Path) -> None:
    ids = np.zeros((50, 1), dtype=int)
    ids[17] = -1
    dataset = open_data(save(tmp_path / "a.npz", sparse=ids))
    for seed in range(5):
        with pytest.raises(DataError, match=r"row 17 \(from 0\)"):
            list(dataset.batches(7, shuffle_seed=seed))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "schema.json"),
        ("[]", "a list at the top"),
        ('{"dense_features": 3}', "dense_features is a int"),
        ('{"sparse_features": [{"cardinality": 3}]}', "without a name"),
        ('{"dense_transform": 3}', "dense_transform is 3"),
        ('{"sparse_features": ["a"]}', "features: 2 in train.npz, 1 in schema.json"),
        ('{"dense_features": ["a"]}', "dense columns: 3 in train.npz, 1 in schema.json"),
        ('{"sparse_features": ["a", "a"]}', "appear twice: a"),
    ],
)
def test_bad_schema(tmp_path: Path, content: str, found: str) -> None:
    path = WRITERS["repository-npz"](tmp_path)
    (tmp_path / "schema.json").write_text(content)
    assert found in refusal(path)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"offsets_0": np.array([1, 1, 4])}, "column 'a': offsets begin at 1"),
        ({"offsets_1": np.array([0, 3, 2])}, "column 'b': offsets fall from 3 to 2 at row 1"),
        ({"offsets_0": np.array([0, 1, 3])}, "column 'a': offsets end at 3 (row 1) for 4 values"),
        ({"offsets_0": np.array([], dtype=int)}, "offsets of shape (0,)"),
        ({"offsets_1": np.array([0, 2])}, "offsets_1: 1 rows"),
        ({"values_0": np.array([0, -1, 2, 3])}, "column 'a', row 1 (from 0): id -1"),
        ({"values_0": np.arange(4.0)}, "values_0 (a) has dtype float64"),
        ({"values_1": None}, "values_1 (b)"),
        ({"weights_0": np.ones(3)}, "column 'a': 3 weights for 4 ids"),
        ({"weights_0": np.array([1, 1, np.nan, 1])}, "column 'a', row 1 (from 0): weight nan"),
        ({"dense": np.zeros((3, 2))}, "dense: 3 rows"),
        ({"dense": np.zeros(2)}, "dense has dtype float64 and shape (2,)"),
        ({"dense": np.array([[0.0], [np.nan]])}, "column 'dense[0]', row 1 (from 0): nan"),
        ({"logits": np.zeros(3)}, "logits: 3 rows"),
        ({"logits": np.zeros((2, 2))}, "logits has dtype float64 and shape (2, 2)"),
        ({"logits": np.array([0.0, np.inf])}, "column 'logits', row 1 (from 0): inf"),
        ({"feature_names": np.array(["a", "a"])}, "appear twice: a"),
        ({"feature_names": np.array([1, 2])}, "feature_names has dtype int64"),
    ],
)
def test_bad_probes(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    assert open_data(probe(tmp_path / "p.npz")).num_rows == 2
    assert found in refusal(probe(tmp_path / "p.npz", **changes))


def test_criteo_npy_sets_that_do_not_fit(tmp_path: Path) -> None:
    folder = WRITERS["criteo-npy"](tmp_path)
    np.savez(folder / "day_2_sparse_multi_hot.npz", **{"0": np.zeros((4, 1), dtype=int)})
    assert "several files of ids for 'day_2'" in refusal(folder)
    chosen = open_data(folder / "day_2_sparse_multi_hot.npz")
    assert chosen.feature_names == ("cat_0",)
    (folder / "day_2_sparse.npy").unlink()
    assert "sets of files with different columns" in refusal(folder)
    np.savez(folder / "day_2_sparse_multi_hot.npz", **{"1": np.zeros((4, 1), dtype=int)})
    assert "arrays 1" in refusal(folder / "day_2_sparse_multi_hot.npz")


def test_criteo_npy_lengths(tmp_path: Path) -> None:
    folder = WRITERS["criteo-npy"](tmp_path)
    np.save(folder / "day_2_labels.npy", np.zeros((3, 1)))
    assert "lengths disagree" in refusal(folder)
    np.save(folder / "day_2_labels.npy", np.full((4, 1), -1))
    assert "day_2_labels.npy: column 'day_2_labels.npy', row 0 (from 0): label -1" in refusal(
        folder
    )


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"1\t-2\t", b"3\t-2\t", "column 'label', row 1 (from 0): label 3"),
        (b"1\t-2\t", b"1\tx\t", "column 'int_0', row 1 (from 0): 'x'"),
        (b"00000002", b"0000zz02", "column 'cat_0', row 2 (from 0): '0000zz02'"),
        (b"00000002", b"f" * 17, "column 'cat_0', row 2 (from 0)"),
        (b"00000002", b"-2", "column 'cat_0', row 2 (from 0): id -2"),
        (b"\t00000002", b"", "row 2 (from 0) has 39 fields"),
    ],
)
def test_bad_lines(tmp_path: Path, old: bytes, new: bytes, found: str) -> None:
    path = WRITERS["criteo-tsv"](tmp_path)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    assert found in refusal(path)


def test_unknown_dense_transform(tmp_path: Path) -> None:
    path = WRITERS["criteo-tsv"](tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps({"dense_transform": "sqrt"}))
    assert "dense_transform is 'sqrt'" in refusal(path)


def test_gzip_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"hello\n"))
    assert "unknown format" in refusal(tmp_path / "a.gz")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"f": [1, -2]}, "column 'f', row 1 (from 0): id -2"),
        ({"f": [[1], [2, None]]}, "column 'f', row 1 (from 0): a null inside a list"),
        ({"f": [1, 2], "x": [1.0, None]}, "column 'x', row 1 (from 0): nan"),
        ({"f": [1, 2], "label": [0, 3]}, "column 'label', row 1 (from 0): label 3"),
        ({"f": [1, 2], "label": [0, None]}, "column 'label', row 1 (from 0): label nan"),
        ({"f": [1, 2], "label": ["0", "1"]}, "column 'label' has type string"),
        ({"f": [1, 2], "f__weights": ["a", "b"]}, "hold floats: f__weights"),
        (
            {"f": [[1], [2, 3]], "f__weights": [[0.5], [0.5]]},
            "column 'f__weights', row 1 (from 0): 1 weights for 2 ids",
        ),
        (
            {"f": [[1], [2]], "f__weights": [[0.5], [float("nan")]]},
            "column 'f__weights', row 1 (from 0): weight nan",
        ),
        ({"x": [1.0, 2.0]}, "column of ids"),
        ({"f": [1, 2], "x": [1.0, 1e300]}, "column 'x', row 1 (from 0): 1e+300"),
        (
            {"f": [[1], [2]], "f__weights": [[0.5], [1e300]]},
            "column 'f__weights', row 1 (from 0): weight inf",
        ),
        ({"f": [1, 2], "label": [0.0, 1e300]}, "column 'label', row 1 (from 0): label 1e+300"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], found: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1)
    assert found in refusal(tmp_path / "a.parquet")


def test_parquet_files_that_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"f": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"g": [1]}), tmp_path / "b.parquet")
    assert "different columns" in refusal(tmp_path)


def test_parquet_schema_names_a_missing_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"f": [1], "s": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "schema.json").write_text(json.dumps({"dense_features": ["x", "s"]}))
    assert "dense x (missing), dense s (string)" in refusal(tmp_path / "a.parquet")


def test_an_array_that_claims_the_bytes_of_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (9, 1)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sparse.npy", header.getvalue() + bytes(8))
        archive.writestr("next.npy", np.lib.format.magic(1, 0) + bytes(500))
    assert "'sparse' is longer than its member" in refusal(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS["parquet"](tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install '.[parquet]'" in refusal(path)


def npy(header: str, data: bytes = bytes(64)) -> bytes:
    """An npy file of version 1.0 with a header of one's own."""
    text = header.ljust(117).encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


BAD_HEADERS = [
    "{'descr': '<i4', 'fortran_order': False, 'shape': (40, 1\xff\xff",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (4, ",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (True, 2), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387903, 4), }",
    "{'descr': None, 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<i4', 'fortran_order': 7, 'shape': (2,), }",
    "'''",
    "((((((((",
    "[1, 2]",
]


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_damaged_headers_of_arrays(tmp_path: Path, header: str) -> None:
    np.save(tmp_path / "a_dense.npy", np.zeros((4, 1), dtype=np.float32))
    (tmp_path / "a_sparse.npy").write_bytes(npy(header))
    assert "a_sparse.npy" in refusal(tmp_path / "a_sparse.npy")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
            archive.writestr("sparse.npy", npy(header))
        assert "a.npz" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["sparse", "dense", "label"])
def test_arrays_without_dimensions(tmp_path: Path, name: str) -> None:
    arrays: dict[str, Any] = {
        "sparse": np.zeros((2, 1), dtype=int),
        "dense": np.zeros((2, 1)),
        "label": np.zeros(2),
    }
    text = refusal(save(tmp_path / "a.npz", **(arrays | {name: np.float64(1)})))
    assert f"{name}: ()" in text or f"{name!r}" in text


def test_an_array_that_is_there_twice(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros((2, 1), dtype=int))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("sparse.npy", content.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("sparse.npy", content.getvalue())
    assert "'sparse' is there twice" in refusal(tmp_path / "a.npz")


def test_rows_without_labels_name_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"f": [1], "click": [0]}), tmp_path / "a.parquet")
    dataset = open_data(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no labels; its columns are f, click") as caught:
        dataset.require_labels("or do something else")
    assert "rename the column of labels to `label`; or do" in caught.value.hint


def test_counts_that_float32_does_not_hold(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz", X_int=np.full((1, 1), 1e300), X_cat=np.ones((1, 1)), y=np.ones(1)
    )
    assert "column 'X_int[0]', row 0 (from 0): inf" in refusal(path)


def test_decimal_ids_are_not_read_as_hexadecimal(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        "\t".join(map(str, [row % 2, *range(13), *rng.integers(0, 10**6, 26)])) for row in range(9)
    ]
    (tmp_path / "day_0").write_text("\n".join(lines) + "\n")
    text = refusal(tmp_path / "day_0")
    assert "hold decimal ids" in text and "docs/data.md" in text


def test_a_folder_of_two_formats(tmp_path: Path) -> None:
    pq.write_table(pa.table({"f": [1]}), tmp_path / "rows.parquet")
    save(tmp_path / "more.npz", sparse=np.zeros((2, 1), dtype=int))
    text = refusal(tmp_path)
    assert "parquet and numpy files: rows.parquet, more.npz" in text
    assert str(tmp_path / "more.npz") in text
