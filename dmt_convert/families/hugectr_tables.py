"""The tables of HugeCTR's embeddings: rows are found by key, and stand in any order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import ITEM_BYTES, TensorInfo, derived, gather_bytes, read_tensor
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import TableSpec

_BLOCK: Final = 1 << 20
"""Keys that are in memory at a time."""

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyedRows:
    """Rows of a matrix in the order of their keys; zeros where a key was never seen."""

    source: TensorInfo
    """The rows, in any order."""
    places: Index
    """For each row wanted, where it is in the source, -1 for nowhere; shape (rows,)."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The source alone."""
        return (self.source,)

    def gather(self, rows: Index) -> npt.NDArray[np.uint8]:
        """Look the rows up, shape (n, bytes per row)."""
        places = self.places[rows]
        width = self.source.shape[1] * ITEM_BYTES[self.source.dtype]
        out = np.zeros((len(rows), width), dtype=np.uint8)
        known = np.flatnonzero(places >= 0)
        # near to each other in the file, however far apart in keys
        known = known[np.argsort(places[known])]
        if len(known):
            out[known] = gather_bytes(self.source, places[known])
        return out


def _key_blocks(info: TensorInfo) -> Iterator[tuple[int, Index]]:
    """Yield the keys of a file, block by block, and where each block begins."""
    for begin in range(0, info.shape[0], _BLOCK):
        block = derived.slice_rows(info, begin, min(begin + _BLOCK, info.shape[0]))
        yield begin, read_tensor(block).astype(np.int64, copy=False)


def _key_range(info: TensorInfo) -> tuple[int, int]:
    ends = [(int(keys.min()), int(keys.max())) for _, keys in _key_blocks(info)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def read_tables(
    source: TrainerTensors, index: int, name: str, dim: int, sizes: Sequence[int] | None
) -> list[TableSpec]:
    """Take an embedding, as one table or as one per slot.

    Args:
        source: The tensors.
        index: Number of the embedding in the graph.
        name: Its name.
        dim: Its vectors' length.
        sizes: Rows of each slot, whose keys follow one another; None: one table for all.

    Raises:
        ArchitectureError: The keys are no row numbers.
    """
    vectors = source.take(f"sparse.{index}.emb_vector", None, dim)
    source.skip(f"sparse.{index}.key")
    info = source.tensors.get(f"sparse.{index}.key")
    if info is None or source.missing or source.wrong:
        return []
    lowest, highest = _key_range(info)
    count = info.shape[0]
    limit = int(sum(sizes)) if sizes is not None else highest + 1
    if lowest < 0 or highest >= limit or 2 * count < limit:
        raise source.refuse(
            f"{name} has {count} keys from {lowest} to {highest}",
            expected=f"keys that number the rows, from 0 to {limit - 1}, most of them present"
            if sizes is not None
            else "keys that number the rows from 0 on, most of them present",
            hint="hashed keys have no row number: map them to 0, 1, 2, ... and train or save anew",
        )
    places = np.full(limit, -1, dtype=np.int64)
    for begin, keys in _key_blocks(info):
        places[keys] = np.arange(begin, begin + len(keys), dtype=np.int64)
    if int(np.count_nonzero(places >= 0)) < count:
        raise source.refuse(
            f"{name} has keys that occur twice",
            expected="one row per key",
            hint="the files are damaged, or belong to different saves",
        )
    absent = limit - count
    source.fact(
        f"rows of {name}",
        f"{limit}, sorted by key" + (f", {absent} of zeros" if absent else ""),
        "read",
        "keys that training never saw have no vector, which counts as zeros",
    )
    bounds = np.cumsum([0, *(sizes if sizes is not None else [limit])]).tolist()
    tables = []
    for slot, (begin, end) in enumerate(itertools.pairwise(bounds)):
        derivation = KeyedRows(source=vectors, places=places[begin:end])
        own = name if len(bounds) == 2 else f"{name}_{slot}"
        shape = (end - begin, dim)
        tables.append(source.table(own, derived.describe(shape, derivation, name=own)))
    return tables
