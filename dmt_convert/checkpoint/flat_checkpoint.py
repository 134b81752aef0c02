"""A checkpoint as data: which tensors it holds, and where their bytes lie. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dmt_convert.arrays import IntArray
from dmt_convert.checkpoint.held_files import HeldFile, hold

Scalar = str | int | float | bool | None
Keys = tuple[str, ...]
"""Keys of nested dicts around a tensor, outermost first; the last one is the tensor's name."""
ByteRows = npt.NDArray[np.uint8]
"""Bytes of elements: of rows, shape (n, bytes per row), or of a stream, shape (bytes,)."""

ITEM_BYTES: Final[Mapping[str, int]] = {
    "fp64": 8,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element of the dtypes that checkpoints hold."""
MAX_NAME_LENGTH: Final = 4096
"""Longest name of a tensor, in characters."""


class Guard(Protocol):
    """Knows what the bytes of a range in a file must be, and compares what is read of it."""

    def check_ranges(self, file: HeldFile, begins: IntArray, width: int) -> None:
        """Make sure of short ranges before they are read; what was looked at before is trusted.

        Args:
            file: The file.
            begins: Where they begin in it, in bytes, ascending.
            width: Bytes of each.
        """
        ...

    def check_stream(
        self, file: HeldFile, offset: int, length: int, chunks: Iterator[ByteRows]
    ) -> Iterator[ByteRows]:
        """Pass on the bytes from a position on, and compare them as they go by.

        Args:
            file: The file.
            offset: Where they begin in the file, in bytes.
            length: How many there are.
            chunks: The bytes, in pieces.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One block of a tensor in a file: raw elements, or a small archive written by `torch.save`.

    `tensor_bytes.resolve_pieces` looks into archives, so that only raw pieces are left.
    """

    path: Path
    """File that holds the piece."""
    offset: int
    """Where it begins in the file, in bytes."""
    length: int
    """How many bytes it takes."""
    starts: tuple[int, ...]
    """Index of the piece's first element in the whole tensor."""
    sizes: tuple[int, ...]
    """Shape of the piece."""
    encoding: Literal["raw", "torch-zip"] = "raw"
    """`raw`: the elements themselves; `torch-zip`: a `torch.save` archive of one tensor."""
    crc32: int | None = None
    """Checksum of the raw bytes, if the container stores one."""
    strides: tuple[int, ...] | None = None
    """Strides in elements if the piece is not row-major (a transposed view was saved)."""
    file: HeldFile | None = field(default=None, compare=False, repr=False)
    """The file, held since its header was read; set by itself while a checkpoint is opened."""
    guard: Guard | None = field(default=None, compare=False, repr=False)
    """Compares what is read with digests, if the file is one of ours."""

    def __post_init__(self) -> None:
        if self.file is None:
            object.__setattr__(self, "file", hold(self.path))

    @property
    def held(self) -> HeldFile:
        """The file to read from.

        Raises:
            CheckpointError: It is not a regular file.
            OSError: It cannot be opened.
        """
        return self.file or HeldFile(self.path)


class Derivation(Protocol):
    """How a tensor's elements come from those of others, any rows at a time; see `derived`."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The tensors that it is computed from."""
        ...

    def gather(self, rows: IntArray) -> ByteRows:
        """Compute some rows.

        Args:
            rows: Indices along the first axis, shape (n,).

        Returns:
            The bytes of these rows in the tensor's dtype, shape (n, bytes per row).
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What a header says about one tensor."""

    name: str
    """Its key in the dict that holds it."""
    container: tuple[str, ...] = ()
    """Keys of the dicts around that dict, outermost first."""
    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    """Its shape."""
    pieces: tuple[Piece, ...]
    """Where its bytes lie: several pieces if it was saved in shards, none if it is derived."""
    derivation: Derivation | None = None
    """How it is computed, if its bytes lie in no file."""

    @property
    def path(self) -> str:
        """Container and name, joined by dots, for people to read."""
        return ".".join((*self.container, self.name))

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """What a pickled module says about one of its tables and its tensors do not."""

    name: str
    """Name of the table."""
    features: tuple[str, ...]
    """Features that are looked up in it, in order."""
    pooling: Literal["sum", "mean"]
    """How a feature's rows become one vector."""
    data_type: str | None = None
    """Type of the table's elements, such as `fp16` or `int8`; None if the module does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatCheckpoint:
    """An opened checkpoint: headers are read, weights are not."""

    source: Path
    """What was opened."""
    format: str
    """Name of the container format."""
    tensors: tuple[TensorInfo, ...]
    """All tensors, in the order of the file."""
    ordered: bool
    """Whether that order is the order in which the model was built."""
    files: tuple[Path, ...]
    """All files that belong to the checkpoint."""
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    """Plain values stored beside the tensors (epoch, loss, ...), by dotted path."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Objects of other kinds, which are not read: what each one is, by dotted path."""
    documents: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's own descriptions of the model, by file name: dicts, lists and scalars."""
    table_configs: tuple[TableConfig, ...] = ()
    """Tables in the model's own order, if a pickled module lists them."""
    modules: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    """Keys of a state dict -> the names of all its modules in the order of construction, which
    `state_dict()` keeps beside the tensors and sorting does not change. A dict that was put
    together otherwise has no entry."""

    held: tuple[HeldFile, ...] = field(default=(), compare=False, repr=False)
    """Files with tensors, held since they were opened."""

    def check_unchanged(self) -> None:
        """Refuse a checkpoint that was saved over while it was read.

        Call it before what was made of the checkpoint is put in place. A single file that was
        replaced under its name is no harm: what was read is the old one, whole. Of several files,
        some may have been replaced before they were opened.

        Raises:
            CheckpointError: A file changed.
        """
        for file in self.held:
            file.check_unchanged(by_name=len(self.held) > 1, times=True)

    @property
    def nbytes(self) -> int:
        """Size of all files on disk, in bytes."""
        return sum(path.stat().st_size for path in self.files)
