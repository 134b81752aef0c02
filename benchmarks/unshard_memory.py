"""Memory and time that `dmt inspect` and `dmt unshard` take for a large sharded checkpoint.

    python benchmarks/unshard_memory.py --gb 20 --out figures.json

Makes a torchsnapshot directory and a DCP directory whose tables are holes of sparse files, but for
a few rows: sharded by rows over two ranks, one table by columns. Each is inspected and unsharded in
a process of its own; peak memory is that process's largest resident set. Rows are compared
afterwards. Holes stay holes in what is written (all but the columns, which are interleaved), so
times are without the disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from dmt_convert.checkpoint import gather_rows, open_checkpoint

TABLES, DIM, DENSE = 5, 128, 13
NAMES = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"

# what the kernel counts for a child (ru_maxrss) begins with the memory of its parent
MEASURED = """
import sys
from pathlib import Path
from dmt_convert.cli.main import main
try:
    main()
finally:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(status["VmHWM"].split()[0], file=sys.stderr)
"""


@dataclass(frozen=True)
class Shard:
    """A block of a tensor, and the values of its first and last row."""

    name: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    value: float

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.sizes))

    def write(self, path: Path, begin: int) -> None:
        """Write the first and the last row; what lies between stays a hole."""
        row = np.full(self.sizes[-1], self.value, "f4").tobytes()
        with path.open("r+b") as file:
            for at in (begin, begin + self.nbytes - len(row)):
                file.seek(at)
                file.write(row)


def layers() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the dense parts of a DLRM with dot interaction."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs) in {
        "dense_arch.model._mlp.0._linear": (DENSE, 16),
        "dense_arch.model._mlp.1._linear": (16, DIM),
        "over_arch.model.0._mlp.0._linear": (DIM + (TABLES + 1) * TABLES // 2, 16),
        "over_arch.model.1": (16, 1),
    }.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return shapes


def shards(size: int) -> Iterator[Shard]:
    """Yield the shards of all tensors, tables by rows and the last one by columns."""
    for name, shape in layers().items():
        yield Shard(name, (0,) * len(shape), shape, 0.5)
    # the table in columns is a tenth of the others: it is written out
    rows = size // (DIM * 4) * 10 // (10 * TABLES - 9)
    for i in range(TABLES - 1):
        for part in range(2):
            begin = part * (rows // 2)
            sizes = (rows - begin if part else begin or rows // 2, DIM)
            yield Shard(NAMES.format(i), (begin, 0), sizes, i + part / 2 + 1)
    for part in range(2):
        sizes = (rows // 10, DIM // 2)
        yield Shard(NAMES.format(TABLES - 1), (0, part * DIM // 2), sizes, 9 + part)


def make_snapshot(folder: Path, parts: Sequence[Shard]) -> None:
    """Write what torchsnapshot writes: one file per shard, and a manifest."""
    entries: dict[str, Any] = {}
    for shard in parts:
        location = f"sharded/model/{shard.name}_{'_'.join(map(str, shard.starts))}"
        path = folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(shard.nbytes)
        shard.write(path, 0)
        tensor = {
            "type": "Tensor",
            "location": location,
            "serializer": "buffer_protocol",
            "dtype": "torch.float32",
            "shape": list(shard.sizes),
            "replicated": False,
            "byte_range": None,
        }
        entry = entries.setdefault(f"0/model/{shard.name}", {"type": "ShardedTensor", "shards": []})
        entry["shards"].append(
            {"offsets": list(shard.starts), "sizes": list(shard.sizes), "tensor": tensor}
        )
    manifest = {
        "0/model": {"type": "OrderedDict", "keys": [*{s.name: 0 for s in parts}]},
        **entries,
    }
    document = {"version": "0.1.0", "world_size": 2, "manifest": manifest}
    (folder / ".snapshot_metadata").write_text(json.dumps(document))


class _Storage:
    """Stands for a storage; pickled as a reference to a record of the archive."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, numel: int) -> None:
        super().__init__(file, protocol=2)
        self._numel = numel

    def persistent_id(self, value: object) -> object:
        if isinstance(value, _Storage):
            return ("storage", torch.FloatStorage, "0", "cpu", self._numel)
        return None


class _Tensor:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(int(np.prod(self._shape[i + 1 :])) for i in range(len(self._shape)))
        build = torch._utils._rebuild_tensor_v2
        return build, (_Storage(), 0, self._shape, strides, False, OrderedDict())


def append_archive(path: Path, shard: Shard) -> tuple[int, int]:
    """Append what `torch.save` writes for one tensor, its storage a hole; return its place."""
    begin = path.stat().st_size
    with path.open("r+b") as raw:
        raw.seek(begin)
        with zipfile.ZipFile(raw, "w") as archive:  # offsets count from where the archive begins
            assert archive.fp is not None
            with archive.open("archive/data.pkl", "w") as file:
                _Pickler(file, shard.nbytes // 4).dump(_Tensor(shard.sizes))
            archive.filelist[0].CRC = 0  # as with torch.serialization.set_crc32_options(False)
            record = zipfile.ZipInfo("archive/data/0")
            record.file_size = record.compress_size = shard.nbytes
            record.CRC = 0
            record.header_offset = archive.fp.tell()
            archive.fp.write(record.FileHeader(zip64=True))
            data = archive.fp.tell()
            archive.fp.seek(shard.nbytes, os.SEEK_CUR)
            archive.filelist.append(record)
            archive.NameToInfo[record.filename] = record
            archive.start_dir = archive.fp.tell()
        end = raw.seek(0, os.SEEK_END)
    shard.write(path, begin + data if data < begin else data)
    return begin, end - begin


def make_dcp(folder: Path, parts: Sequence[Shard]) -> None:
    """Write what torch.distributed.checkpoint writes on two ranks."""
    folder.mkdir()
    chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    ends: dict[str, tuple[int, ...]] = {}
    for rank in range(2):
        (folder / f"__{rank}_0.distcp").touch()
    for shard in parts:
        rank = int(any(shard.starts))
        name = f"__{rank}_0.distcp"
        offset, length = append_archive(folder / name, shard)
        starts, sizes = torch.Size(shard.starts), torch.Size(shard.sizes)
        chunks.setdefault(shard.name, []).append(dcp.ChunkStorageMetadata(starts, sizes))
        places[dcp.MetadataIndex(shard.name, starts)] = _StorageInfo(name, offset, length)
        ends[shard.name] = tuple(a + n for a, n in zip(starts, sizes, strict=True))
    properties = dcp.TensorProperties(dtype=torch.float32)
    entries = {
        name: dcp.TensorStorageMetadata(properties, torch.Size(ends[name]), blocks)
        for name, blocks in chunks.items()
    }
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(dcp.Metadata(entries, None, places), file)


def run(*arguments: str) -> dict[str, float]:
    """Run a command; return its seconds and its peak memory."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"dmt {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    peak = int(done.stderr.splitlines()[-1])
    return {"seconds": time.perf_counter() - begin, "peak_mb": peak / 1024}


def compare(path: Path, parts: Sequence[Shard]) -> int:
    """Compare the rows that hold something, and some between; return how many."""
    tensors = {info.name: info for info in open_checkpoint(path).tensors}
    compared = 0
    for shard in parts:
        if "embedding_bags" not in shard.name:
            continue
        first, col = shard.starts
        rows = np.array([first, first + shard.sizes[0] // 2, first + shard.sizes[0] - 1])
        found = gather_rows(tensors[shard.name], rows)[:, col : col + shard.sizes[1]]
        expected = np.array([shard.value, 0, shard.value])[:, None]
        if not (found == expected).all():
            raise SystemExit(f"{path}: rows {rows} of {shard.name} are not what was saved")
        compared += len(rows)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=20, help="size of all tables, in 10^9 bytes")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    parts = [*shards(int(options.gb * 1e9))]
    figures: dict[str, Any] = {"tables_gb": sum(s.nbytes for s in parts) / 1e9}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for kind, make in (("torchsnapshot", make_snapshot), ("dcp", make_dcp)):
            source, out = Path(name) / kind, Path(name) / f"{kind}.safetensors"
            make(source, parts)
            figures[kind] = {
                "inspect": run("inspect", str(source)),
                "unshard": run("unshard", str(source), "--out", str(out)),
                "written_gb": out.stat().st_size / 1e9,
                "rows_compared": compare(out, parts),
            }
            out.unlink()
    print(json.dumps(figures, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
