"""Accumulators of squared gradients on their way into a bundle, and back out of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dmt_convert.bundle import (
    AccumulatorSource,
    Bundle,
    accumulator_file,
    check_digests,
    open_bundle,
)
from dmt_convert.bundle.accumulators import find_damage, read_rows, write_accumulators
from dmt_convert.checkpoint import TensorInfo, gather_rows, read_safetensors
from dmt_convert.documents import OptimizerState
from dmt_convert.errors import BundleError

FILE = accumulator_file(0)
TABLES = {"t_cat_0": 7, "t_cat_2": 11}
METADATA = {"format": "pt"}


def source(table: str, values: np.ndarray, *, step: int = 3) -> AccumulatorSource:
    def pieces() -> Iterator[np.ndarray]:
        for first in range(0, len(values), step):
            yield values[first : first + step]

    return AccumulatorSource(table=table, rows=len(values), pieces=pieces, origin=table)


def values_of(table: str, width: int = 1) -> np.ndarray:
    rows = TABLES[table]
    return np.random.default_rng(rows).random((rows, width), dtype=np.float32)


@pytest.fixture(scope="module")
def summed(tmp_path_factory, write: Callable[..., Bundle]) -> Path:
    """A bundle whose first tower has accumulators; the second has none."""
    sources = [source(name, values_of(name)) for name in TABLES]
    folder = tmp_path_factory.mktemp("summed")
    return write(folder / "ckpt-dmt2", accumulators={FILE: sources}).path


def test_a_bundle_gives_them_by_table(summed: Path) -> None:
    bundle = open_bundle(summed)
    check_digests(bundle)
    assert list(bundle.accumulators) == list(TABLES)
    for name, info in bundle.accumulators.items():
        rows = np.arange(len(values_of(name)))[::-1]
        assert np.array_equal(gather_rows(info, rows), values_of(name)[rows])
    official = load_file(summed / FILE)
    assert {name: tuple(value.shape) for name, value in official.items()} == {
        f"tables.{name}.accumulator": (rows, 1) for name, rows in TABLES.items()
    }


def test_bundles_of_before_still_open(bundle_path: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(bundle_path, tmp_path / "old"))
    value = json.loads((old / "dmt.json").read_text("utf-8"))
    del value["optimizer_state"]
    (old / "dmt.json").write_text(json.dumps(value), "utf-8")
    bundle = open_bundle(old)
    check_digests(bundle)
    assert bundle.accumulators == {} and bundle.manifest.optimizer_state == OptimizerState()


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / "dmt.json").read_text("utf-8"))
    edit(value)
    (folder / "dmt.json").write_text(json.dumps(value), "utf-8")


def resave(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the file, and let the manifest know its size and its tensors."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)
    entry = {"bytes": (folder / FILE).stat().st_size, "digests": dict.fromkeys(tensors, "")}
    edit_manifest(folder, lambda value: value["weights"].update({FILE: entry}))


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["tables.t_cat_1.accumulator"] = tensors.pop("tables.t_cat_2.accumulator")


def change(value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({"tables.t_cat_0.accumulator": value})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / FILE).unlink(), f"{FILE} is missing"),
    "cut": (
        lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-4]),
        "bytes, the manifest says",
    ),
    "no such table in the tower": (lambda f: resave(f, rename), "t_cat_1.accumulator of tower 0"),
    "another number of rows": (
        lambda f: resave(f, change(torch.zeros(8, 1))),
        "fp32 of shape [8, 1]",
    ),
    "a number per element": (
        lambda f: resave(f, change(torch.zeros(7, 8))),
        "fp32 of shape [7, 8]",
    ),
    "no column": (lambda f: resave(f, change(torch.zeros(7))), "fp32 of shape [7]"),
    "another type": (
        lambda f: resave(f, change(torch.zeros(7, 1, dtype=torch.float64))),
        "fp64 of shape [7, 1]",
    ),
    "a tensor that the manifest does not list": (
        lambda f: edit_manifest(f, lambda v: v["weights"][FILE].update(digests={})),
        "does not hold the tensors",
    ),
    "what became of it is a list": (
        lambda f: edit_manifest(f, lambda v: v.update(optimizer_state=[])),
        "optimizer_state is [], not an object",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_when_the_bundle_is_opened(
    summed: Path, tmp_path: Path, kind: str
) -> None:
    copy = Path(shutil.copytree(summed, tmp_path / "copy"))
    damage, found = DAMAGES[kind]
    damage(copy)
    with pytest.raises(BundleError) as refused:
        open_bundle(copy)
    assert found in str(refused.value)


def test_changed_numbers_are_found_by_their_digest(summed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(summed, tmp_path / "copy"))
    data = bytearray((copy / FILE).read_bytes())
    data[-1] ^= 1
    (copy / FILE).write_bytes(data)
    with pytest.raises(BundleError, match="1 tensors have other bytes") as refused:
        check_digests(open_bundle(copy))
    assert refused.value.details == (f"{FILE}: tables.t_cat_2.accumulator",)


def read_file(path: Path) -> dict[str, np.ndarray]:
    tensors = read_safetensors(path).tensors
    return {t.name: gather_rows(t, np.arange(t.shape[0])) for t in tensors}


def test_a_number_per_element_becomes_its_rows_mean(tmp_path: Path) -> None:
    values = values_of("t_cat_2", width=5)
    write_accumulators(tmp_path / "a", [source("t", values)], metadata=METADATA)
    (found,) = read_file(tmp_path / "a").values()
    exact = values.astype(np.float64).mean(axis=1).astype(np.float32)
    assert np.array_equal(found[:, 0], exact)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(1, 9),
    st.data(),
)
def test_damaged_ones_are_left_out_wherever_the_damage_is(
    tmp_path_factory, sizes: list[int], width: int, step: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.random((n, width), dtype=np.float32) for i, n in enumerate(sizes)}
    spoilt = data.draw(st.sets(st.sampled_from(sorted(arrays))))
    for name in spoilt:
        place = data.draw(st.integers(0, arrays[name].size - 1))
        arrays[name].flat[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0]))
    path = tmp_path_factory.mktemp("spoilt") / "a"
    sources = [source(name, array, step=step) for name, array in arrays.items()]
    digests = write_accumulators(path, sources, metadata=METADATA)
    kept = [f"tables.{name}.accumulator" for name in arrays if name not in spoilt]
    assert list(digests) == kept
    assert {s.table for s in sources if s.damage is not None} == spoilt
    assert path.exists() == bool(kept)
    for name, found in (read_file(path) if kept else {}).items():
        array = arrays[name.split(".")[1]].astype(np.float64)
        assert np.array_equal(found[:, 0], array.mean(axis=1).astype(np.float32))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0.0, 1.0, 3e5], None),
        ([0.0, 1.0, 3e38], "an absurd value, 3e+38 (the RMS of the others is 1)"),
        ([-0.0], None),
        ([], None),
        ([1.0, np.nan, -1.0], "NaN"),
        ([1.0, -1e-45], "negative numbers"),
        ([1.0, -np.inf], "negative numbers"),
        ([np.inf], "Inf"),
    ],
)
def test_what_no_sum_of_squares_can_be(values: list[float], found: str | None) -> None:
    assert find_damage(np.array(values, dtype=np.float32).reshape(-1, 1)) == found


@given(st.integers(1, 20), st.integers(1, 5), st.lists(st.integers(1, 60), max_size=8))
def test_rows_are_whole_whatever_the_chunks(rows: int, width: int, cuts: list[int]) -> None:
    values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    info = TensorInfo(name="s", dtype="fp32", shape=(rows, width), pieces=())
    chunks = iter(np.split(values.reshape(-1).view(np.uint8), np.cumsum([4 * cut for cut in cuts])))
    pieces = [*read_rows(info, chunks)]
    assert all(len(piece) for piece in pieces)
    assert np.array_equal(np.concatenate(pieces), values)


MEASURE = """
import resource, sys
from pathlib import Path
from dmt_convert.bundle.accumulators import _checkpoint_source, write_accumulators
from dmt_convert.checkpoint import Piece, TensorInfo
path, rows, columns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
shape = (rows, columns)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
piece = Piece(path=path, offset=0, length=4 * rows * columns, starts=(0, 0), sizes=shape)
state = TensorInfo(name="sum", dtype="fp32", shape=shape, pieces=(piece,))
write_accumulators(Path(sys.argv[4]), [_checkpoint_source("t", state)], metadata={})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("columns", [1, 64])
def test_memory_stays_small(tmp_path: Path, columns: int) -> None:
    """Half a GiB passes through some buffers; the file is sparse."""
    size = 1 << 29
    with (tmp_path / "flat").open("wb") as file:
        file.truncate(size)
    rows = size // (4 * columns)
    command = [sys.executable, "-c", MEASURE, tmp_path / "flat", str(rows), str(columns)]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < size / 3
    assert (tmp_path / "out").stat().st_size >= 4 * rows
