"""Count what runs of `dmt` touch of a checkout; used by `measure_house.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAKE_INPUTS = """
import numpy as np, torch
torch.manual_seed(0)
rng = np.random.default_rng(0)
rows, dim, dense = (7, 50, 11, 6), 8, 5
state = {}
def linear(name, inputs, outputs):
    state[name + ".weight"] = torch.randn(outputs, inputs) / inputs**0.5
    state[name + ".bias"] = torch.randn(outputs) * 0.1
for i, count in enumerate(rows):
    key = f"sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight"
    state[key] = torch.randn(count, dim) * 0.3
linear("dense_arch.model._mlp.0._linear", dense, 16)
linear("dense_arch.model._mlp.1._linear", 16, dim)
linear("over_arch.model.0._mlp.0._linear", dim + 10, 16)
linear("over_arch.model.1", 16, 1)
torch.save(state, "flat.pt")
np.savez("clicks.npz", dense=rng.standard_normal((300, dense)).astype(np.float32),
         sparse=np.stack([rng.integers(0, n, size=300) for n in rows], axis=1).astype(np.int32),
         label=rng.integers(0, 2, size=300, dtype=np.uint8))
names = ", ".join('{"name": "cat_%d"}' % i for i in range(len(rows)))
open("schema.json", "w").write('{"sparse_features": [' + names + ']}')
"""

# Python imports `sitecustomize` when it starts, in children too. Every function is written down
# when it is first called, since some processes end without any farewell.
TRACER = """
import os, sys, threading
root, log = os.environ["HOUSE_ROOT"] + os.sep, os.environ["HOUSE_LOG"]
seen = set()
def note(frame, event, _):
    code = frame.f_code
    if event != "call" or code in seen:
        return
    seen.add(code)
    path = os.path.abspath(code.co_filename) if code.co_filename.startswith((root, ".")) else ""
    if not path.startswith(tuple(root + part + os.sep for part in PARTS)):
        return
    if code.co_flags & 1 and (code.co_name[0] != "<" or code.co_name == "<lambda>"):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\t{path[len(root):]}\\t{code.co_qualname}\\n")
sys.setprofile(note)
threading.setprofile(note)
"""

_CLI = ("-m", "dmt_convert.cli.main")
_TUNE = ("--data", "clicks.npz", "--out", "tuned", "--max-steps", "4", "--batch-size", "32")
RUNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "inspect": ((*_CLI, "inspect", "flat.pt"),),
    "convert": ((*_CLI, "convert", "flat.pt", "--towers", "2", "--out", "bundle"),),
    "finetune": (
        ("-m", "dmt_convert.recipes.finetune_dmt", "--bundle", "bundle", *_TUNE),
        ("-m", "dmt_convert.recipes.finetune_dmt", "bundle", *_TUNE),
        (*_CLI, "finetune", "bundle", *_TUNE),
    ),
    "export": ((*_CLI, "export", "bundle", "--format", "onnx", "--out", "served"),),
}
"""Command -> the ways to run it, of which the first that the checkout knows is taken."""


def measure_runs(repo: Path, python: Path, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run the commands one after the other, and count the files and functions that they run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trace").mkdir()
        tracer = TRACER.replace("PARTS", repr(tuple(parts)))
        (folder / "trace" / "sitecustomize.py").write_text(tracer)
        subprocess.run([python, "-c", MAKE_INPUTS], cwd=folder, check=True)
        return {what: run_traced(repo, python, folder, ways) for what, ways in RUNS.items()}


def run_traced(
    repo: Path, python: Path, folder: Path, ways: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Run the first way that works, under the tracer."""
    told = ""
    for way in ways:
        log = folder / "calls.tsv"
        log.write_text("")
        environment = os.environ | {
            "HOUSE_ROOT": str(repo),
            "HOUSE_LOG": str(log),
            "PYTHONPATH": str(folder / "trace"),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [python, *way], cwd=folder, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        told = process.communicate()[0]
        if process.returncode == 0:
            calls = [line.split("\t") for line in log.read_text().splitlines()]
            own = [call for call in calls if call[0] == str(process.pid)]
            if not own:
                sys.exit(f"{python} does not run the code of {repo}; name another with --python")
            return {"command": " ".join(way[1:]), **count(own), "with_children": count(calls)}
    sys.exit(f"`{' '.join(ways[-1])}` failed in {repo}:\n{told}")


def count(calls: Sequence[Sequence[str]]) -> dict[str, int]:
    """Count the files and functions of calls, each once."""
    return {
        "files": len({path for _, path, _ in calls}),
        "functions": len({(path, name) for _, path, name in calls}),
    }
