"""What it costs to look rows up in a table on disk, and to compare them with digests.

Writes a table of 1 GiB below the folder that is named, and gathers random rows of it: unchecked,
and of a table that checks itself, with the checksums of its blocks and without (older bundles).
`cold` is after the file was dropped from the page cache.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmt_convert.checkpoint import TensorInfo, gather_bytes, holding, read_safetensors
from dmt_convert.errors import BundleError
from dmt_convert.files import TreeDigest, array_source, guarded, write_blocks
from dmt_convert.files.safetensors_writer import write_safetensors

ROWS, DIM = 1 << 22, 64


def write_table(path: Path) -> dict[str, str]:
    """Write the table and the checksums of its blocks; returns its digest by name."""
    values = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
    digests = write_safetensors(path, [array_source("table", values)], metadata={})
    digest = TreeDigest()
    seconds = clock(lambda: digest.update(values.reshape(-1).view(np.uint8)))
    assert digest.finish() == digests["table"]
    print(f"digest of {values.nbytes >> 20} MiB: {seconds:.2f} s")
    write_blocks(path, [digest.blocks])
    return digests


def opened(path: Path, digests: dict[str, str] | None) -> TensorInfo:
    """Open the table; it checks itself if its digest is given."""
    with holding(path):
        (info,) = read_safetensors(path).tensors
    if digests is None:
        return info
    tensors = guarded({"table": info}, digests, error=BundleError, what="it", hint="write it again")
    return tensors["table"]


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def clock(work: Callable[[], object]) -> float:
    """Return how long something takes, in seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Print one line per case."""
    path = Path(sys.argv[1]) / "table.safetensors"
    path.unlink(missing_ok=True)
    blocks = path.with_suffix(".blocks")
    blocks.unlink(missing_ok=True)
    digests = write_table(path)
    for kind in ("unchecked", "with blocks", "without blocks"):
        if kind == "without blocks":
            blocks.unlink()
        for count in (1024, 100_000):
            rows = np.unique(np.random.default_rng(count).integers(0, ROWS, count))
            for state in ("cold", "warm"):
                drop(path) if state == "cold" else gather_bytes(opened(path, None), rows)
                table = opened(path, None if kind == "unchecked" else digests)
                first, *later = (clock(lambda: gather_bytes(table, rows)) for _ in range(4))  # noqa: B023
                print(
                    f"{kind}, {count} rows, {state}: first {first * 1e3:.1f} ms, "
                    f"then {min(later) * 1e3:.1f} ms"
                )
    path.unlink()


if __name__ == "__main__":
    main()
