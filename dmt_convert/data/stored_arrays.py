"""Numpy arrays in files: shape and dtype from the header at once, values when asked.

Pickled (object) arrays are refused: reading one would run code from the file.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np

from dmt_convert.data.value_checks import AnyArray
from dmt_convert.errors import DataError

_READ_ERRORS: Final = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)


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
        values: AnyArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except _READ_ERRORS as error:
        raise _damaged(path, str(error)) from error
    return StoredArray(file=path, name=path.name, shape=shape, dtype=dtype, load=lambda: values)


def _open_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        shape, order, dtype = _read_header(path, name, member)
        header_size = member.tell()

    def load() -> AnyArray:
        if info.compress_type == zipfile.ZIP_STORED and 0 not in shape:
            offset = _data_offset(path, info) + header_size
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
    if dtype.hasobject:
        raise DataError(
            f"{path}: array {name!r} holds pickled Python objects",
            expected="arrays of numbers or fixed-width strings",
            hint="write the array with a numeric dtype; pickles are never loaded",
        )
    return shape, "F" if is_fortran else "C", dtype


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, name and extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    name_size, extra_size = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return info.header_offset + 30 + name_size + extra_size


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        f"{path} cannot be read: {found}",
        expected="a whole numpy file",
        hint="copy or download the file again; compare its size with the original's",
    )
