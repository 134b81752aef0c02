"""Where the parts of one table lie.

Letters: N embedding dim, L ranks of the hosts that a tower lies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, get_args

ShardingType = Literal["table_row_wise", "table_column_wise"]
SHARDING_TYPES: Final[tuple[str, ...]] = get_args(ShardingType)

COMPUTE_KERNEL: Final = "fused"
"""TorchRec's kernel that looks up and updates all tables of a rank at once."""

OPTIMIZER: Final = "rowwise_adagrad"
"""The sparse optimizer that memory is counted for."""

OPTIMIZER_BYTES_PER_ROW: Final = 4
"""Row-wise Adagrad keeps one float32 per row of every shard. A table cut into n column shards
therefore keeps n of them per row."""


COLS_MULTIPLE: Final = 4
"""The lookup kernels read rows in vectors of four elements."""


def padded_dim(dim: int) -> int:
    """Return the columns that a rank keeps of a table of this dim: the next multiple of four."""
    return -(-dim // COLS_MULTIPLE) * COLS_MULTIPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A rectangle of a table on one rank."""

    rank: int
    """Global rank that holds it."""
    row_offset: int
    """First row."""
    col_offset: int
    """First column."""
    rows: int
    """Number of rows; 0 where a row-wise table has fewer rows than ranks."""
    cols: int
    """Number of columns."""

    def nbytes(self, element_bytes: int) -> int:
        """Memory with the optimizer's state, in bytes, columns padded as they are in memory.

        Args:
            element_bytes: Size of one element of the table, in bytes.
        """
        return self.rows * (padded_dim(self.cols) * element_bytes + OPTIMIZER_BYTES_PER_ROW)


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlacement:
    """One table, on the ranks of its tower."""

    table: str
    """Table name."""
    tower: int
    """Index of the tower whose features are looked up in it."""
    sharding_type: ShardingType
    """table_row_wise: equal blocks of rows on every rank of the tower's hosts;
    table_column_wise: equal blocks of columns on some ranks (one block: the table is whole)."""
    compute_kernel: str = COMPUTE_KERNEL
    """TorchRec's compute kernel."""
    shards: tuple[Shard, ...]
    """All parts, by ascending offset."""

    @property
    def rows(self) -> int:
        """Rows of the whole table."""
        return max((shard.row_offset + shard.rows for shard in self.shards), default=0)

    @property
    def cols(self) -> int:
        """N, columns of the whole table."""
        return max((shard.col_offset + shard.cols for shard in self.shards), default=0)

    def problems(self, ranks: Sequence[int]) -> list[str]:
        """Say what keeps this from being a placement that TorchRec accepts.

        Args:
            ranks: The L ranks of the tower's hosts, ascending.

        Returns:
            One line per problem, empty when there is none.
        """
        name = f"table {self.table!r}"
        if not self.shards:
            return [f"{name} has no shards"]
        problems = []
        if self.sharding_type not in SHARDING_TYPES:
            problems.append(f"{name} has sharding type {self.sharding_type!r}")
        if self.compute_kernel != COMPUTE_KERNEL:
            problems.append(f"{name} has compute kernel {self.compute_kernel!r}")
        row_wise = self.sharding_type == "table_row_wise"
        expected = row_blocks(self.rows, len(ranks)) if row_wise else self._column_blocks()
        found = [(s.row_offset, s.col_offset, s.rows, s.cols) for s in self.shards]
        wanted = [
            (offset, 0, size, self.cols) if row_wise else (0, offset, self.rows, size)
            for offset, size in expected
        ]
        if found != wanted or self.rows < 1 or self.cols < 1:
            problems.append(
                f"the {len(found)} shards of {name} do not tile its {self.rows} x {self.cols} "
                "elements in equal blocks"
            )
        mine = [shard.rank for shard in self.shards]
        outside = sorted(set(mine) - set(ranks))
        if outside:
            problems.append(f"{name} is on ranks {outside}, outside the hosts of its tower")
        elif row_wise and mine != list(ranks):
            problems.append(f"{name} is row-wise on ranks {mine}, not on {list(ranks)} in order")
        elif len(set(mine)) < len(mine):
            problems.append(f"{name} has two shards on one rank: {mine}")
        return problems

    def _column_blocks(self) -> list[tuple[int, int]]:
        width = self.cols // len(self.shards)
        return [(i * width, width) for i in range(len(self.shards))]


def row_blocks(rows: int, num_ranks: int) -> list[tuple[int, int]]:
    """Cut rows into (offset, size) blocks, one per rank.

    Every block has ceil(rows / num_ranks) rows until none are left, so later blocks can be
    smaller or empty; TorchRec computes a row's rank from that block size.

    Source: `_calculate_rw_shard_sizes_and_offsets` in torchrec/distributed/sharding_plan.py.
    """
    block = -(-rows // num_ranks)
    starts = [min(i * block, rows) for i in range(num_ranks + 1)]
    return [(start, end - start) for start, end in pairwise(starts)]
