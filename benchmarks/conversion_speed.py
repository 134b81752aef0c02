"""How long a conversion takes against `cp -r` of the same checkpoint, and what memory it needs.

    python benchmarks/conversion_speed.py --gib 8 --repeats 4

Writes a TorchRec-named DLRM checkpoint of that size with random tables, then runs, interleaved,
`cp -r`, `cp -r` with `sync`, and `dmt convert` (compressed, and passthrough). A conversion brings
its bundle to the disk before it renames it; plain `cp` leaves that to the kernel, so both are
shown. Page caches are dropped before every run where the process may (root); else the source
is warm for all. On a virtual machine what ran before decides how fast memory is found: every turn
has an order of its own, drawn by seed, and after one untimed copy. Times of `dmt inspect` and
`--dry-run` follow.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DIM, FEATURES, DENSE = 128, 26, 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("speed-benchmark"))
    parser.add_argument("--format", choices=("safetensors", "torch"), default="safetensors")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_all(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(folder: Path, options: argparse.Namespace) -> None:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    source = write_checkpoint(checkpoint, options.gib, options.format)
    size = source.stat().st_size
    print(f"{options.format}, {size / 2**30:.2f} GiB, {os.cpu_count()} cores\n")
    dmt = [sys.executable, "-m", "dmt_convert.cli.main"]
    convert = [*dmt, "convert", str(source), "--towers", "4", "--quiet", "--json", "--out"]
    jobs = {
        "cp -r": ["cp", "-r", str(checkpoint), "{out}"],
        "cp -r, then sync": ["sh", "-c", f"cp -r '{checkpoint}' '{{out}}' && sync -f '{{out}}'"],
        "dmt convert": [*convert, "{out}"],
        "dmt convert --tower-module passthrough": [
            *convert,
            "{out}",
            "--tower-module",
            "passthrough",
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    peaks: dict[str, float] = dict.fromkeys(jobs, 0.0)
    out = folder / "out"
    measure([word.replace("{out}", str(out)) for word in jobs["cp -r"]])
    shutil.rmtree(out)
    rng = np.random.default_rng(0)
    for turn in range(options.repeats):
        for name in rng.permutation(list(jobs)):
            command = jobs[name]
            drop_caches()
            words = [word.replace("{out}", str(out)) for word in command]
            taken, peak = measure(words)
            seconds[name].append(taken)
            peaks[name] = max(peaks[name], peak)
            shutil.rmtree(out)
            print(f"  turn {turn}: {name}: {taken:.1f} s", file=sys.stderr)
    base = statistics.median(seconds["cp -r"])
    synced = statistics.median(seconds["cp -r, then sync"])
    print("| command | median s | spread s | of cp -r | of cp -r and sync | peak RSS MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"| `{name}` | {median:.1f} | {max(times) - min(times):.1f} | {median / base:.2f} | "
            f"{median / synced:.2f} | {peaks[name]:.0f} |"
        )
    for name, words in (
        ("inspect", [*dmt, "inspect", str(source), "--json"]),
        ("convert --dry-run", [*convert, str(folder / "none"), "--dry-run"]),
    ):
        taken = [measure(words)[0] for _ in range(3)]
        print(f"\n`dmt {name}`: {statistics.median(taken):.2f} s")


def measure(words: list[str]) -> tuple[float, float]:
    """Run a command; returns seconds and the peak resident MiB of the process itself."""
    begin = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}")
    assert isinstance(usage, resource.struct_rusage)
    return taken, usage.ru_maxrss / 1024


def drop_caches() -> None:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def write_checkpoint(folder: Path, gib: float, kind: str) -> Path:
    """Write random tables of Criteo-like sizes, streamed, and small dense parts."""
    rng = np.random.default_rng(0)
    shares = np.geomspace(1, 1e-5, FEATURES)
    rows = np.maximum(3, shares / shares.sum() * gib * 2**30 / (4 * DIM)).astype(int)
    shapes: dict[str, tuple[int, ...]] = {
        f"model.sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight": (int(n), DIM)
        for i, n in enumerate(rows)
    }
    shapes |= mlp("model.dense_arch.model._mlp.{}._linear", (DENSE, 512, 256, DIM))
    pairs = DIM + (FEATURES + 1) * FEATURES // 2
    shapes |= mlp("model.over_arch.model.0._mlp.{}._linear", (pairs, 1024, 1024, 512, 256))
    shapes |= {"model.over_arch.model.1.weight": (1, 256), "model.over_arch.model.1.bias": (1,)}
    if kind == "torch":
        import torch

        path = folder / "model.pt"
        torch.save({name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}, path)
        return path
    path = folder / "model.safetensors"
    header: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        length = 4 * int(np.prod(shape))
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [position, position + length],
        }
        position += length
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, 1 << 22)
                block = rng.standard_normal(count, dtype=np.float32) * np.float32(0.05)
                file.write(block.tobytes())
                left -= count
    return path


def mlp(stem: str, widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        shapes[f"{stem.format(i)}.weight"] = (fan_out, fan_in)
        shapes[f"{stem.format(i)}.bias"] = (fan_out,)
    return shapes


if __name__ == "__main__":
    main()
