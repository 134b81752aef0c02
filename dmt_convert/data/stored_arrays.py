"""Numpy arrays in files, and blocks of rows over them.

An array's shape and dtype come from its header at once, its values when asked for. Pickled (object)
arrays are refused: reading one would run code from the file.

Letters: n rows of a file, D dense inputs, F features, L ids per row of a feature.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np

from dmt_convert.arrays import AnyArray, Float32Array, IntArray
from dmt_convert.data.batch import Bag, Batch, Rows, uniform_offsets
from dmt_convert.data.dataset import TakeRows
from dmt_convert.data.value_checks import RowPlace, check_dense, check_ids, check_labels
from dmt_convert.errors import DataError
from dmt_convert.zip_members import member_offset

_READ_ERRORS: Final = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, RuntimeError),
    *(NotImplementedError, OverflowError, MemoryError),
    *(SyntaxError, tokenize.TokenError),  # numpy parses headers as Python literals
)


class StoredArray:
    """One array in a file.

    An array of a compressed npz is decompressed whole when first read and then kept; arrays of
    uncompressed npz files and npy files are memory-mapped.
    """

    def __init__(
        self,
        *,
        file: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[np.generic],
        load: Callable[[], AnyArray],
    ) -> None:
        self.file = file
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._load = load
        self._values: AnyArray | None = None

    def read(self) -> AnyArray:
        """Return the values.

        Raises:
            DataError: The file is damaged.
        """
        if self._values is None:
            try:
                self._values = self._load()
            except _READ_ERRORS as error:
                raise _damaged(self.file, f"array {self.name!r}: {error}") from error
        return self._values


def npz_names(path: Path) -> frozenset[str]:
    """Names of the arrays in an npz file; empty for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return frozenset()
    return frozenset(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def open_npz(path: Path) -> dict[str, StoredArray]:
    """Open an npz file, reading headers only.

    Raises:
        DataError: The file is damaged, or holds pickled objects.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    array = _open_member(path, archive, info)
                    if array.name in arrays:
                        raise ValueError(f"array {array.name!r} is there twice")
                    arrays[array.name] = array
    except _READ_ERRORS as error:
        raise _damaged(path, str(error)) from error
    return arrays


def open_npy(path: Path) -> StoredArray:
    """Open an npy file, memory-mapped.

    Raises:
        DataError: The file is damaged, or holds pickled objects.
    """
    try:
        with path.open("rb") as file:
            shape, _, dtype = _read_header(path, path.name, file)
            if file.tell() + math.prod(shape) * dtype.itemsize > path.stat().st_size:
                raise EOFError(f"the file is shorter than its array of shape {shape}")
        values: AnyArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except _READ_ERRORS as error:
        raise _damaged(path, str(error)) from error
    return StoredArray(file=path, name=path.name, shape=shape, dtype=dtype, load=lambda: values)


def _open_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        shape, order, dtype = _read_header(path, name, member)
        header_size = member.tell()
    offset = None
    if header_size + math.prod(shape) * dtype.itemsize > info.file_size:
        raise zipfile.BadZipFile(f"array {name!r} is longer than its member")
    if info.compress_type == zipfile.ZIP_STORED and 0 not in shape:
        offset = member_offset(archive, info) + header_size

    def load() -> AnyArray:
        if offset is not None:
            return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order=order)
        with np.load(path, allow_pickle=False) as arrays:
            values: AnyArray = arrays[name]
        return values

    return StoredArray(file=path, name=name, shape=shape, dtype=dtype, load=load)


def _read_header(
    path: Path, name: str, file: IO[bytes]
) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        raise ValueError(f"array {name!r} claims the shape {shape}")
    if dtype.hasobject:
        raise DataError(
            f"{path}: array {name!r} holds pickled Python objects",
            expected="arrays of numbers or fixed-width strings",
            hint="write the array with a numeric dtype; pickles are never loaded",
        )
    return shape, "F" if is_fortran else "C", dtype


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        f"{path} cannot be read: {found}",
        expected="a whole numpy file",
        hint="copy or download the file again; compare its size with the original's",
    )


BLOCK_ROWS: Final = 1 << 22
"""Rows per block: smaller data sets are shuffled as a whole, 32 MiB of row numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPart:
    """The arrays of one set of n rows; shapes are checked when it is made."""

    dense: StoredArray | None
    """Dense inputs, shape (n, D), or None for D = 0."""
    ids: tuple[StoredArray, ...]
    """One matrix (n, F) of single ids, or one array (n, L) per feature."""
    is_matrix: bool
    """Whether `ids` is the one matrix."""
    labels: StoredArray | None
    """Labels, shape (n,) or (n, 1)."""

    def __post_init__(self) -> None:
        arrays = [array for array in (self.dense, *self.ids, self.labels) if array is not None]
        shapes = [f"{array.name}: {array.shape}" for array in arrays]
        file = arrays[0].file
        flat = self.labels is None or (
            len(self.labels.shape) >= 1 and self.labels.shape[1:] in ((), (1,))
        )
        matrices = (*(() if self.dense is None else (self.dense,)), *self.ids)
        if not flat or any(len(array.shape) != 2 for array in matrices):
            raise DataError(
                f"{file}: arrays of unexpected shapes",
                expected="dense inputs (n, D), ids (n, F), labels (n,)",
                details=shapes,
            )
        if len({array.shape[0] for array in arrays}) > 1:
            raise DataError(
                f"{file}: arrays whose lengths disagree",
                expected="the same number of rows in all arrays",
                hint="check that the files belong together and were written whole",
                details=shapes,
            )
        for array in self.ids:
            _check_kind(array, "iuf", "ids")
        for other in (self.dense, self.labels):
            if other is not None:
                _check_kind(other, "biuf", "numbers")

    @property
    def num_rows(self) -> int:
        """Number of rows n."""
        return self.ids[0].shape[0]

    @property
    def num_dense(self) -> int:
        """Number of dense inputs D."""
        return 0 if self.dense is None else self.dense.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return self.ids[0].shape[1] if self.is_matrix else len(self.ids)


def _check_kind(array: StoredArray, kinds: str, noun: str) -> None:
    if array.dtype.kind not in kinds:
        raise DataError(
            f"{array.file}: array {array.name!r} of dtype {array.dtype}",
            expected=f"an array of {noun}",
            hint="write the array with a numeric dtype",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayBlocks:
    """A `BlockSource` over parts that follow each other."""

    parts: tuple[ArrayPart, ...]
    """All with the same D, F and kind of ids."""
    feature_names: tuple[str, ...]
    """Names of the features."""
    dense_names: tuple[str, ...]
    """Names of the dense inputs, for messages."""
    transform: Callable[[AnyArray], AnyArray] | None = None
    """What turns stored dense inputs into what the model is fed."""
    allow_negative: bool = False
    """Whether negative ids pass (they are hashed later)."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold the rows."""
        arrays = [a for part in self.parts for a in (part.dense, *part.ids, part.labels)]
        return tuple(array.file for array in arrays if array is not None)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of every block."""
        return tuple(last - first for _, first, last in self._blocks())

    @property
    def keeps_block_order(self) -> bool:
        """Arrays can be read in any order."""
        return False

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Yield the blocks asked for; rows are read when taken."""
        ranges = self._blocks()
        for block in blocks:
            part, first, _ = ranges[block]
            yield partial(self._take, part, first)

    def _blocks(self) -> list[tuple[ArrayPart, int, int]]:
        blocks = []
        for part in self.parts:
            edges = [*range(0, part.num_rows, BLOCK_ROWS), part.num_rows]
            blocks += [(part, first, last) for first, last in pairwise(edges)]
        return blocks

    def _take(self, part: ArrayPart, first: int, rows: Rows) -> Batch:
        if isinstance(rows, slice):
            rows = slice(first + rows.start, first + rows.stop)
        else:
            rows = first + rows
        return Batch(
            dense=self._dense(part, rows),
            feature_names=self.feature_names,
            bags=self._matrix_bags(part, rows) if part.is_matrix else self._bags(part, rows),
            labels=_labels(part, rows),
        )

    def _dense(self, part: ArrayPart, rows: Rows) -> Float32Array:
        if part.dense is None:
            return np.zeros((_count(rows), 0), dtype=np.float32)
        values = part.dense.read()[rows]
        if self.transform is not None:
            values = self.transform(values)
        return check_dense(values, RowPlace(file=part.dense.file, rows=rows), self.dense_names)

    def _matrix_bags(self, part: ArrayPart, rows: Rows) -> tuple[Bag, ...]:
        (stored,) = part.ids
        columns = np.ascontiguousarray(stored.read()[rows].T)
        offsets = uniform_offsets(columns.shape[1], 1)
        place = RowPlace(file=stored.file, rows=rows)
        return tuple(
            self._bag(column, offsets, place, name)
            for name, column in zip(self.feature_names, columns, strict=True)
        )

    def _bags(self, part: ArrayPart, rows: Rows) -> tuple[Bag, ...]:
        return tuple(
            self._bag(
                stored.read()[rows].reshape(-1),
                uniform_offsets(_count(rows), stored.shape[1]),
                RowPlace(file=stored.file, rows=rows),
                name,
            )
            for name, stored in zip(self.feature_names, part.ids, strict=True)
        )

    def _bag(self, ids: AnyArray, offsets: IntArray, place: RowPlace, name: str) -> Bag:
        values = check_ids(ids, offsets, place, name, allow_negative=self.allow_negative)
        return Bag(values=values, offsets=offsets)


def _labels(part: ArrayPart, rows: Rows) -> Float32Array | None:
    if part.labels is None:
        return None
    place = RowPlace(file=part.labels.file, rows=rows)
    return check_labels(part.labels.read()[rows], place, part.labels.name)


def _count(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)
