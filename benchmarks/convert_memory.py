"""Peak memory and time of `dmt convert` by the number of features, beside what `--dry-run` says.

    python benchmarks/convert_memory.py --features 26 200 2000 5000

Makes random checkpoints under TorchRec's names (embedding dim 8, 50 rows per table, over_arch of 16
hidden units), DLRM with dot interaction and DCNv2, and converts each into 8 towers in a process of
its own. Peak memory is the largest resident set of that process, and the time is that of all its
threads. `dense` is the size of the flat
model's weights outside tables, `written` that of the bundle's. `said` is what `--dry-run` expects.
Takes a quarter of an hour on two cores; --features chooses the sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DENSE, HIDDEN, ROWS, TOWERS = 13, 16, 50, 8
CROSS_LAYERS, CROSS_RANK = 2, 16
TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"
DMT = [sys.executable, "-m", "dmt_convert.cli.main", "convert"]


def make_checkpoint(path: Path, interaction: str, features: int, dim: int) -> int:
    """Write a checkpoint; return the bytes of its dense part."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, scale: float) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= scale
        return values

    state = dict(_dense(draw, interaction, features, dim))
    size = sum(array.nbytes for array in state.values())
    for i in range(features):
        state[TABLE.format(i)] = draw(ROWS, dim, scale=0.5)
    save_file(state, path)
    return size


def _dense(draw, interaction: str, features: int, dim: int) -> Iterator[tuple[str, np.ndarray]]:  # type: ignore[no-untyped-def]
    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{name}.weight", draw(outputs, inputs, scale=inputs**-0.5)
        yield f"{name}.bias", draw(outputs, scale=0.1)

    for i, (inputs, outputs) in enumerate(pairwise((DENSE, 32, dim))):
        yield from linear(f"dense_arch.model._mlp.{i}._linear", inputs, outputs)
    width = (features + 1) * dim
    if interaction == "dcn":
        for layer in range(CROSS_LAYERS):
            name, scale = f"inter_arch.crossnet.{{}}.{layer}", width**-0.5
            yield name.format("W_kernels"), draw(width, CROSS_RANK, scale=scale)
            yield name.format("V_kernels"), draw(CROSS_RANK, width, scale=scale)
            yield name.format("bias"), draw(width, scale=0.1)
    else:
        width = dim + math.comb(features + 1, 2)
    yield from linear("over_arch.model.0._mlp.0._linear", width, HIDDEN)
    yield from linear("over_arch.model.1", HIDDEN, 1)


def measure(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; return its seconds of CPU and the bytes of its largest resident set."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def run_case(folder: Path, interaction: str, features: int, module: str, dim: int) -> list[str]:
    """Convert one checkpoint; return a row of the table."""
    source, out = folder / "ckpt.safetensors", folder / "bundle"
    dense = make_checkpoint(source, interaction, features, dim)
    command = [*DMT, str(source), "--towers", str(TOWERS), "--out", str(out)]
    command += ["--tower-module", module]
    said = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, check=True)
    expected = json.loads(said.stdout).get("memory_bytes", {})
    seconds, peak = measure([*command, "--quiet"])
    manifest = json.loads((out / "dmt.json").read_text())
    tables = sum(table["rows"] * table["dim"] * 4 for table in manifest["model"]["flat"]["tables"])
    written = sum(path.stat().st_size for path in (out / "weights").iterdir()) - tables
    r2 = [row["r2"] for row in manifest["quality"]["rows"]][1]
    shutil.rmtree(out)
    figures = [size / 2**20 for size in (dense, written, peak, sum(expected.values()))]
    return [
        {"dot": "DLRM", "dcn": "DCNv2"}[interaction],
        f"{features:,}",
        module,
        *(f"{mib:,.0f}" for mib in figures),
        f"{seconds:.0f}",
        f"{r2:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--features", type=int, nargs="+", default=[26, 200, 2000, 5000])
    parser.add_argument("--interactions", nargs="+", default=["dot", "dcn"])
    parser.add_argument("--modules", nargs="+", default=["auto", "passthrough"])
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    names = ["model", "features", "module", "dense MiB", "written MiB", "peak MiB", "said MiB"]
    print("| " + " | ".join([*names, "CPU s", "R^2"]) + " |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for interaction in options.interactions:
        for features in options.features:
            for module in options.modules:
                with tempfile.TemporaryDirectory(dir=options.folder) as name:
                    row = run_case(Path(name), interaction, features, module, options.dim)
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
