"""Memory and time that exporting and loading a large bundle takes.

    python benchmarks/export_memory.py --gb 40 --quantize none --out figures.json

Makes a checkpoint whose tables are holes of a sparse file, converts it, exports the bundle to ONNX
(the check against the model included), loads the whole graph in a fresh process and asks it.
Peak memory is the largest resident set of any process of the step. After the first batch, 1024
rows with up to 4 ids of every table, it is split: memory of the process's own, and pages of files
that it has mapped, which grow with the rows it has touched and which the kernel takes back when
memory is short. Nothing of the size given is ever on the disk, so times are without the disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TABLES, DIM, DENSE = 4, 64, 5
NAMES = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"
LOAD = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from dmt_convert.serving.checks import generate_batch
from dmt_convert.serving import ExportedModel, open_graph
folder = Path(sys.argv[1])
exported = ExportedModel(folder)
import onnxruntime
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
graph = open_graph(folder / exported.manifest.parts["whole"], threads=1)
loaded = time.perf_counter() - begin
after_load = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inputs = exported.manifest.inputs
batch = generate_batch(exported.spec.flat, inputs, 1024, seed=0)
begin = time.perf_counter()
logits = graph.run(inputs.feeds(batch))
answered = time.perf_counter() - begin
assert logits.shape == (1024, 1) and np.isfinite(logits).all()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
own, mapped = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
print(json.dumps({"load_s": loaded, "before_mb": before / 1024, "loaded_mb": after_load / 1024,
    "first_batch_s": answered, "own_mb": own, "mapped_mb": mapped}))
"""


def make_checkpoint(path: Path, size: int) -> None:
    """Write a DLRM whose tables, of `size` bytes together, are holes."""
    rng = np.random.default_rng(0)
    layers = {
        "dense_arch.model._mlp.0._linear": (DENSE, 16),
        "dense_arch.model._mlp.1._linear": (16, DIM),
        "over_arch.model.0._mlp.0._linear": (DIM + (TABLES + 1) * TABLES // 2, 16),
        "over_arch.model.1": (16, 1),
    }
    small = {}
    for name, (inputs, outputs) in layers.items():
        small[f"{name}.weight"] = rng.standard_normal((outputs, inputs)).astype("f4")
        small[f"{name}.bias"] = rng.standard_normal(outputs).astype("f4")
    rows = size // (TABLES * DIM * 4)
    shapes = {name: array.shape for name, array in small.items()}
    shapes |= {NAMES.format(i): (rows, DIM) for i in range(TABLES)}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + int(np.prod(shape)) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in small.values():
            file.write(array.tobytes())
        file.truncate(8 + len(text) + position)


def run(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its seconds and its peak memory, its children's included."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - begin, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=40, help="size of all tables, in 10^9 bytes")
    parser.add_argument("--quantize", default="none", help="none, fp16, int8 or int4")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_checkpoint(folder / "ckpt.safetensors", int(options.gb * 1e9))
        dmt = ["-m", "dmt_convert.cli.main"]
        bundle, export = str(folder / "bundle"), str(folder / "export")
        converted = run(
            [*dmt, "convert", str(folder / "ckpt.safetensors"), "--towers", "2", "--out", bundle]
        )
        command = [*dmt, "export", bundle, "--format", "onnx", "--out", export]
        exported = run([*command, "--quantize", options.quantize])
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, export], capture_output=True, text=True
        )
        if loaded.returncode != 0:
            raise SystemExit(loaded.stderr)
        figures = {
            "tables_gb": options.gb,
            "quantize": options.quantize,
            "convert": converted,
            "export": exported,
            "load": json.loads(loaded.stdout),
        }
    print(json.dumps(figures, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
