"""Readers of Criteo click logs: TorchRec's binary files, and the text that they are made from.

`criteo-npy`: `*_dense.npy`, `*_labels.npy`, and ids in `*_sparse.npy` (n, F),
`*_sparse_contig_freq.npy`, or the MLPerf multi-hot `*_sparse_multi_hot.npz` with one array (n, L)
per feature under the keys `0`, `1`, ... Files of several days follow each other in natural order.
Dense inputs are already transformed in the files. Ids may be unhashed: TorchRec's loader takes them
modulo the table's rows [torchrec, `datasets/criteo.py`, `InMemoryBinaryCriteoIterDataPipe`], so
`hash_ids` is set.

`criteo-tsv`: label, 13 integers, 26 hexadecimal ids, tab-separated. Lines of 39 fields (the Kaggle
test file) have no label. The text may be compressed by gzip. The convention is TorchRec's
[torchrec, `datasets/criteo.py`, `tsv_to_npys`]: a missing value is 0, a dense input becomes
log(x + 3), ids are taken modulo the table's rows (`hash_ids`). Newer TorchRec subtracts the least
value of the whole file instead of -1, which a stream cannot know; here x below -2 counts as -2, so
that the logarithm exists. A note says so; a `schema.json` beside the file with
`"dense_transform": "log1p"` gives the DLRM trainer's log(max(x, 0) + 1) instead (that trainer's ids
come from a dictionary which only its processed npz holds).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from dmt_convert.arrays import AnyArray
from dmt_convert.data.array_names import made_up, name_columns, open_arrays
from dmt_convert.data.batch import Bag, Batch, take_rows, uniform_offsets
from dmt_convert.data.column_names import read_schema
from dmt_convert.data.data_files import natural_key
from dmt_convert.data.dataset import Dataset, TakeRows
from dmt_convert.data.dense_transforms import (
    TRANSFORMS,
    Transform,
    choose_transform,
    states_form,
)
from dmt_convert.data.stored_arrays import ArrayPart, StoredArray, open_npy, open_npz
from dmt_convert.data.value_checks import RowPlace, check_dense, check_ids, check_labels
from dmt_convert.errors import DataError

_FILE_NAME: Final = re.compile(
    r"(?:(?P<stem>.*)_)?"
    r"(?P<kind>dense|labels|sparse|sparse_contig_freq|sparse_multi_hot)\.(?:npy|npz)"
)
_SPARSE_KINDS: Final = ("sparse", "sparse_contig_freq", "sparse_multi_hot")


def is_criteo_npy(path: Path) -> bool:
    """Tell by file names: a set has at least its dense and one sparse file."""
    return any(_is_complete(files) for _, files in _find_sets(path))


def read_criteo_npy(path: Path) -> Dataset:
    """Memory-map the files of a directory, or of the set that one of them belongs to.

    Raises:
        DataError: Files are damaged, missing, ambiguous, or do not fit each other.
    """
    sets = _find_sets(path)
    broken = [
        f"{stem or 'files'}: only {_list(files)}" for stem, files in sets if not _is_complete(files)
    ]
    if broken:
        raise DataError(
            f"{path}: {len(broken)} sets of files are not whole",
            expected="*_dense.npy and one file of ids in every set",
            hint="copy the missing files, or move the others away",
            details=broken,
        )
    parts = [_open_part(path, stem, files) for stem, files in sets]
    shapes = {(part.num_dense, part.num_features, part.labels is None) for part in parts}
    if len(shapes) > 1:
        raise DataError(
            f"{path}: sets of files with different columns",
            expected="the same dense columns, features and labels in all sets",
            hint="give one set, by one of its files",
            details=[
                f"{part.ids[0].file.name}: {part.num_dense} dense, {part.num_features} "
                f"features, {'no labels' if part.labels is None else 'labels'}"
                for part in parts
            ],
        )
    return open_arrays(
        path,
        "criteo-npy",
        tuple(parts),
        feature_name="cat_{}",
        dense_name="int_{}",
        # Older TorchRec wrote 32-bit hashes as int32: some are negative, and hashed later.
        hash_ids=True,
    )


def _find_sets(path: Path) -> list[tuple[str, dict[str, Path]]]:
    """Find the sets of files, by stem, in natural order (day_2 before day_10)."""
    is_directory = path.is_dir()
    given = None if is_directory else _FILE_NAME.fullmatch(path.name)
    if not is_directory and (given is None or not path.is_file()):
        return []
    sets: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in (path if is_directory else path.parent).iterdir():
        match = _FILE_NAME.fullmatch(file.name)
        if match is not None and not file.name.startswith("."):
            sets[match["stem"] or ""][match["kind"]] = file
    if given is not None:
        files = sets[given["stem"] or ""]
        if given["kind"] in _SPARSE_KINDS:
            files = {kind: f for kind, f in files.items() if kind not in _SPARSE_KINDS}
            files[given["kind"]] = path
        sets = defaultdict(dict, {given["stem"] or "": files})
    return sorted(sets.items(), key=lambda item: natural_key(item[0]))


def _is_complete(files: Mapping[str, Path]) -> bool:
    return "dense" in files and any(kind in files for kind in _SPARSE_KINDS)


def _list(files: Mapping[str, Path]) -> str:
    return ", ".join(sorted(file.name for file in files.values()))


def _open_part(path: Path, stem: str, files: dict[str, Path]) -> ArrayPart:
    sparse = [files[kind] for kind in _SPARSE_KINDS if kind in files]
    if len(sparse) > 1:
        raise DataError(
            f"{path}: several files of ids for {stem!r}",
            expected="one of *_sparse.npy, *_sparse_contig_freq.npy, *_sparse_multi_hot.npz",
            hint="give the file of ids instead of the directory",
            details=[file.name for file in sparse],
        )
    labels = files.get("labels")
    is_matrix = sparse[0].suffix == ".npy"
    ids = (open_npy(sparse[0]),) if is_matrix else _multi_hot(sparse[0], open_npz(sparse[0]))
    return ArrayPart(
        dense=open_npy(files["dense"]),
        ids=ids,
        is_matrix=is_matrix,
        labels=None if labels is None else open_npy(labels),
    )


def _multi_hot(file: Path, arrays: dict[str, StoredArray]) -> tuple[StoredArray, ...]:
    keys: Sequence[str] = [str(i) for i in range(len(arrays))]
    if not arrays or set(keys) != set(arrays):
        raise DataError(
            f"{file}: arrays {', '.join(sorted(arrays)) or '(none)'}",
            expected="one array (n, L) per feature under the keys 0, 1, ...",
            hint="write the file as TorchRec's multi-hot materialisation does",
        )
    return tuple(arrays[key] for key in keys)


NUM_DENSE: Final = 13
NUM_FEATURES: Final = 26
FEATURE_NAMES: Final = made_up("cat_{}", NUM_FEATURES)
DENSE_NAMES: Final = made_up("int_{}", NUM_DENSE)
_MANY_IDS: Final = 128
"""Ids of two digits or more, none with a letter: hexadecimal ids would have some."""
BLOCK_ROWS: Final = 1 << 15
"""Lines that are parsed at once."""
_CHUNK_BYTES: Final = 1 << 22
_READ_ERRORS: Final = (OSError, EOFError, zlib.error)


def is_criteo_tsv(path: Path) -> bool:
    """Tell by the number of tabs in the first line."""
    if not path.is_file():
        return False
    try:
        with _open_text(path) as file:
            line = file.readline(1 << 16)
    except _READ_ERRORS:
        return False
    return _count_fields(line) in (NUM_DENSE + NUM_FEATURES, 1 + NUM_DENSE + NUM_FEATURES)


def read_criteo_tsv(path: Path) -> Dataset:
    """Find the lines: this reads the file, plain or gzip, once.

    Raises:
        DataError: The file is damaged.
    """
    with _reading(path) as file:
        has_labels = _count_fields(file.readline(1 << 16)) == 1 + NUM_DENSE + NUM_FEATURES
    offsets, num_rows = _index_lines(path)
    schema = read_schema(path.parent)
    transform = choose_transform(schema, "log3")
    names = name_columns(path, schema, NUM_FEATURES, NUM_DENSE)
    features = names.sparse_features or FEATURE_NAMES
    return Dataset(
        path=path,
        format="criteo-tsv",
        num_dense=NUM_DENSE,
        feature_names=features,
        names_are_positional=names.sparse_features is None,
        has_labels=has_labels,
        hash_ids=True,
        dense_names=names.dense_features or DENSE_NAMES,
        dense_order="array" if names.dense_features is None else "listed",
        dense_form=transform,
        form_is_stated=states_form(schema),
        source=TsvBlocks(
            file=path,
            offsets=offsets,
            num_rows=num_rows,
            has_labels=has_labels,
            feature_names=features,
            transform=TRANSFORMS[transform],
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
    feature_names: tuple[str, ...]
    """Names of the features."""
    transform: Transform | None
    """What turns the 13 integers into dense inputs."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold the rows."""
        return (self.file,)

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
        self._check_hexadecimal(fields, place)
        offsets = uniform_offsets(len(lines), 1)
        bags = []
        for i, name in enumerate(self.feature_names):
            ids = _parse_column(fields[skip + NUM_DENSE + i :: width], 16, place, name)
            bags.append(Bag(values=check_ids(ids, offsets, place, name), offsets=offsets))
        labels = _parse_column(fields[0::width], 10, place, "label") if skip else None
        dense = np.stack(numbers, axis=1)
        return Batch(
            dense=check_dense(
                dense if self.transform is None else self.transform(dense), place, DENSE_NAMES
            ),
            feature_names=self.feature_names,
            bags=tuple(bags),
            labels=None if labels is None else check_labels(labels, place, "label"),
        )

    def _check_hexadecimal(self, fields: Sequence[bytes], place: RowPlace) -> None:
        """Refuse decimal ids: read as hexadecimal, they would be others."""
        width, skip = self.has_labels + NUM_DENSE + NUM_FEATURES, int(self.has_labels)
        ids = [fields[c::width] for c in range(skip + NUM_DENSE, width)]
        long = [field for column in ids for field in column if len(field) > 1]
        if len(long) >= _MANY_IDS and all(field.isdigit() for field in long):
            raise DataError(
                f"{self.file}: rows {place.row(0)} to {place.row(len(fields) // width - 1)} (from "
                "0) hold decimal ids",
                expected="hexadecimal ids, as in Criteo's files",
                hint="write the rows as parquet: docs/data.md shows how",
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
            hint="correct the line; an empty field counts as 0",
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
