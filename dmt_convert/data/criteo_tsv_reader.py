r"""Reader of Criteo click logs as text: label, 13 integers, 26 hexadecimal ids, tab-separated.

Lines of 39 fields (the Kaggle test file) have no label. The text may be compressed by gzip.
The convention is TorchRec's [torchrec, `datasets/criteo.py`, `tsv_to_npys`]: a missing value is
0, a dense input becomes log(x + 3), ids are taken modulo the table's rows (`hash_ids`). Newer
TorchRec subtracts the least value of the whole file instead of -1, which a stream cannot know;
here x below -2 counts as -2, so that the logarithm exists. A `schema.json` beside the file with
`"dense_transform": "log1p"` gives the DLRM trainer's log(max(x, 0) + 1) instead (that trainer's
ids come from a dictionary which only its processed npz holds).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from dmt_convert.data.batch import Bag, Batch
from dmt_convert.data.dlrm_npz_reader import log1p_dense
from dmt_convert.data.row_blocks import BlockDataset, TakeRows
from dmt_convert.data.row_selection import take_rows, uniform_offsets
from dmt_convert.data.schema import SCHEMA_NAME, read_schema
from dmt_convert.data.value_checks import AnyArray, RowPlace, check_ids, check_labels
from dmt_convert.errors import DataError

NUM_DENSE: Final = 13
NUM_FEATURES: Final = 26
FEATURE_NAMES: Final = tuple(f"cat_{i}" for i in range(NUM_FEATURES))
BLOCK_ROWS: Final = 1 << 15
"""Lines that are parsed at once."""
_CHUNK_BYTES: Final = 1 << 22
_READ_ERRORS: Final = (OSError, EOFError, zlib.error)


def log3_dense(values: AnyArray) -> AnyArray:
    """Return log(max(x, -2) + 3) in float32: TorchRec's transform of Criteo's integers."""
    shifted: AnyArray = np.maximum(values, -2).astype(np.float32) + np.float32(3)
    return np.log(shifted)


_TRANSFORMS: Final[Mapping[str, Callable[[AnyArray], AnyArray]]] = {
    "log3": log3_dense,
    "log1p": log1p_dense,
}


class CriteoTsvReader:
    """Reads one text file, plain or gzip."""

    format = "criteo-tsv"

    def can_read(self, path: Path) -> bool:
        """Tell by the number of tabs in the first line."""
        if not path.is_file():
            return False
        try:
            with _open_text(path) as file:
                line = file.readline(1 << 16)
        except _READ_ERRORS:
            return False
        return _count_fields(line) in (NUM_DENSE + NUM_FEATURES, 1 + NUM_DENSE + NUM_FEATURES)

    def open(self, path: Path) -> BlockDataset:
        """Find the lines: this reads the file once.

        Raises:
            DataError: The file is damaged.
        """
        with _reading(path) as file:
            has_labels = _count_fields(file.readline(1 << 16)) == 1 + NUM_DENSE + NUM_FEATURES
        offsets, num_rows = _index_lines(path)
        schema = read_schema(path.parent)
        transform = "log3" if schema is None else schema.dense_transform or "log3"
        if transform not in _TRANSFORMS:
            raise DataError(
                f"{path.parent / SCHEMA_NAME}: dense_transform is {transform!r}",
                expected=f"one of {', '.join(_TRANSFORMS)}",
                hint="log3 is TorchRec's, log1p the DLRM trainer's",
            )
        return BlockDataset(
            path=path,
            format=self.format,
            num_dense=NUM_DENSE,
            feature_names=FEATURE_NAMES,
            names_are_positional=True,
            has_labels=has_labels,
            hash_ids=True,
            source=TsvBlocks(
                file=path,
                offsets=offsets,
                num_rows=num_rows,
                has_labels=has_labels,
                transform=_TRANSFORMS[transform],
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TsvBlocks:
    """A `BlockSource` of lines."""

    file: Path
    """The text file."""
    offsets: tuple[int, ...]
    """Where every block begins in the (uncompressed) text, then its end, in bytes."""
    num_rows: int
    """Number of lines."""
    has_labels: bool
    """Whether lines begin with a label."""
    transform: Callable[[AnyArray], AnyArray]
    """What turns the 13 integers into dense inputs."""

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of every block."""
        count = len(self.offsets) - 1
        return tuple(min(BLOCK_ROWS, self.num_rows - b * BLOCK_ROWS) for b in range(count))

    @property
    def keeps_block_order(self) -> bool:
        """Gzip can only be read forward."""
        return _is_gzip(self.file)

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Parse the blocks asked for, one at a time."""
        ranges = list(pairwise(self.offsets))
        with _reading(self.file) as file:
            for block in blocks:
                first, last = ranges[block]
                file.seek(first)
                batch = self._parse(file.read(last - first), block * BLOCK_ROWS)
                yield partial(take_rows, batch)

    def _parse(self, text: bytes, first_row: int) -> Batch:
        lines = text.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
        width = self.has_labels + NUM_DENSE + NUM_FEATURES
        for i, line in enumerate(lines):
            if line.count(b"\t") != width - 1:
                raise DataError(
                    f"{self.file}: row {first_row + i} (from 0) has {_count_fields(line)} fields",
                    expected=f"{width} fields separated by tabs, as in the first row",
                    hint="check that the file was copied whole",
                )
        fields = b"\t".join(lines).split(b"\t")
        place = RowPlace(file=self.file, rows=slice(first_row, first_row + len(lines)))
        skip = int(self.has_labels)
        numbers = [
            _parse_column(fields[c::width], 10, place, f"int_{c - skip}")
            for c in range(skip, skip + NUM_DENSE)
        ]
        offsets = uniform_offsets(len(lines), 1)
        bags = []
        for i, name in enumerate(FEATURE_NAMES):
            ids = _parse_column(fields[skip + NUM_DENSE + i :: width], 16, place, name)
            bags.append(Bag(values=check_ids(ids, offsets, place, name), offsets=offsets))
        labels = _parse_column(fields[0::width], 10, place, "label") if skip else None
        return Batch(
            dense=self.transform(np.stack(numbers, axis=1)),
            feature_names=FEATURE_NAMES,
            bags=tuple(bags),
            labels=None if labels is None else check_labels(labels, place, "label"),
        )


def _parse_column(fields: Sequence[bytes], base: int, place: RowPlace, column: str) -> AnyArray:
    try:
        return np.array([int(field, base) if field else 0 for field in fields], dtype=np.int64)
    except (ValueError, OverflowError):
        index = next(i for i, field in enumerate(fields) if not _is_int64(field, base))
        raise DataError(
            f"{place.file}: column {column!r}, row {place.row(index)} (from 0): "
            f"{fields[index].decode('utf-8', 'replace')!r}",
            expected="a hexadecimal id" if base == 16 else "a whole number",
            hint="mend the line; an empty field counts as 0",
        ) from None


def _is_int64(field: bytes, base: int) -> bool:
    try:
        return not field or -(2**63) <= int(field, base) < 2**63
    except ValueError:
        return False


def _count_fields(line: bytes) -> int:
    return line.count(b"\t") + 1


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open_text(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Open the text; damage that shows while it is read becomes a DataError."""
    try:
        with _open_text(path) as file:
            yield file
    except _READ_ERRORS as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            expected="a whole text file, plain or gzip",
            hint="copy or download the file again; compare its size with the original's",
        ) from error


def _index_lines(path: Path) -> tuple[tuple[int, ...], int]:
    """Find where every block begins, in bytes of text, and count the lines."""
    offsets = [0]
    position = num_lines = 0
    is_ended = True
    with _reading(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            skipped = -num_lines % BLOCK_ROWS
            offsets += (ends[(skipped or BLOCK_ROWS) - 1 :: BLOCK_ROWS] + position + 1).tolist()
            num_lines += len(ends)
            position += len(chunk)
            is_ended = chunk.endswith(b"\n")
    if offsets[-1] != position:
        offsets.append(position)
    return tuple(offsets), num_lines + (not is_ended)
