"""A digest of the rows of a data set, cheap enough to be taken whenever a training starts.

It covers the number of rows, the inputs they have, and the content of rows as the model is fed
them: dense inputs, ids, weights and labels, in their order.

- Up to 262,144 rows: all of them. The digest depends on the rows alone, not on how they are stored.
- Above: 16 runs of 16,384 rows, from the first row to the last at even distances (of gzip, which is
  only read forward: the first 262,144). And of every file, its size and its end: the directory of
  an npz with the CRC-32 of every array, the footer of a parquet file with the sizes and statistics
  of its column chunks, the CRC-32 of a gzip file. What is left is a change of rows between the runs
  that keeps all of these: in npy and plain text, one that keeps the size of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.arrays import AnyArray
from dmt_convert.data import Batch, Dataset, take_range
from dmt_convert.errors import DataError

PREFIX: Final = "rows1:"
RUN_ROWS: Final = 1 << 14
RUNS: Final = 16
_TAIL_BYTES: Final = 1 << 16
_MAX_FOOTER_BYTES: Final = 1 << 26
_PARQUET_MAGIC: Final = b"PAR1"
_BATCH_ROWS: Final = 4096


def digest_rows(rows: Dataset) -> str:
    """Return the digest of a data set.

    Raises:
        DataError: A file cannot be read, or a row is not what its format promises.
    """
    return join_digests(rows, digest_share(rows, 0, 1))


def digest_share(rows: Dataset, part: int, parts: int) -> dict[int, str]:
    """Digest some of the runs of a data set, so that processes may share the work.

    Args:
        rows: The data set.
        part: Which share, from 0.
        parts: How many shares there are.

    Returns:
        First row of each run -> its digest.
    """
    return {
        first: _digest_run(take_range(rows, first, last))
        for first, last in [*_runs(rows)][part::parts]
    }


def join_digests(rows: Dataset, runs: dict[int, str]) -> str:
    """Return the digest of a data set from those of all its runs."""
    outer = hashlib.sha256()
    names = (*rows.feature_names, *rows.dense_names)
    for text in (rows.num_rows, rows.num_dense, len(rows.feature_names), *names):
        outer.update(f"{text}\0".encode("utf-8", "surrogatepass"))
    for first, digest in sorted(runs.items()):
        outer.update(f"{first}\0{digest}\0".encode())
    if not _covers_all(rows):
        for line in _describe_files(rows.files):
            outer.update(line)
    return PREFIX + outer.hexdigest()[:32]


def _covers_all(rows: Dataset) -> bool:
    return rows.num_rows <= RUNS * RUN_ROWS


def _runs(rows: Dataset) -> Iterator[tuple[int, int]]:
    """First and last row of every run."""
    count = rows.num_rows
    if _covers_all(rows) or rows.source.keeps_block_order:
        for first in range(0, min(count, RUNS * RUN_ROWS), RUN_ROWS):
            yield first, min(count, first + RUN_ROWS)
    else:
        for run in range(RUNS):
            first = (count - RUN_ROWS) * run // (RUNS - 1)
            yield first, first + RUN_ROWS


def _digest_run(rows: Dataset) -> str:
    """Digest rows one after the other, whatever the batches they come in."""
    parts: dict[str, hashlib.blake2b] = {}

    def update(name: str, values: AnyArray | None) -> None:
        if values is not None:
            part = parts.setdefault(name, hashlib.blake2b(digest_size=16))
            part.update(np.ascontiguousarray(values).data)

    for batch in rows.batches(_BATCH_ROWS):
        for name, values in _arrays(batch):
            update(name, values)
    return ",".join(f"{name}={part.hexdigest()}" for name, part in sorted(parts.items()))


def _arrays(batch: Batch) -> Iterable[tuple[str, AnyArray | None]]:
    yield "dense", batch.dense
    yield "labels", batch.labels
    for number, bag in enumerate(batch.bags):
        yield f"ids {number}", bag.values
        yield f"lengths {number}", np.diff(bag.offsets)
        yield f"weights {number}", bag.weights


def _describe_files(files: Iterable[Path]) -> Iterator[bytes]:
    """The size and the end of every file; names and times do not count."""
    for path in files:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 8))
                end = file.read(8)
                tail = _TAIL_BYTES
                if end[4:] == _PARQUET_MAGIC:
                    footer = int.from_bytes(end[:4], "little") + 8
                    tail = min(max(tail, footer), _MAX_FOOTER_BYTES)
                file.seek(max(0, size - tail))
                yield f"{size}\0".encode() + hashlib.blake2b(file.read(tail)).digest()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror or error})",
                expected="the files of the data set, while a training runs",
                hint="check the file and its permissions",
            ) from None
