"""Training: what one process does is the truth; ranks must do the same, also after a loss."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import numpy as np

import dmt_convert as dmt
from dmt_convert.arrays import AnyArray
from dmt_convert.bundle import open_bundle
from dmt_convert.checkpoint import read_tensor
from dmt_convert.child import python_command, python_environment
from dmt_convert.errors import DmtError
from dmt_convert.selftest.model import write_data, write_flat
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.ranks import run_ranks
from dmt_convert.selftest.report import Outcome

RECIPE: Final = "dmt_convert.recipes.finetune_dmt"
STEPS: Final = 20
BATCH: Final = 256
BUNDLE, DATA, ALONE, RANKS = "bundle", "data", "alone", "ranks"
STEP_COSTS: Final = "steps.json"
LIMIT: Final = 1e-4
"""Largest difference of weights that are about 1, after 20 steps: ranks add gradients in another
order than one process, and Adagrad divides by sums that are small at first."""
_KILL_AT: Final = 13


def check_one_process(context: Context) -> Outcome:
    """Convert a made-up model, compare it with the flat one, and train it in one process."""
    folder = context.folder
    write_flat(folder / "flat.pt")
    write_data(folder / DATA)
    dmt.convert(folder / "flat.pt", folder / BUNDLE, towers=2, tower_module="passthrough")
    report = dmt.verify(folder / "flat.pt", folder / BUNDLE, data=folder / DATA / "valid.npz")
    worst = max(check.max_abs_diff for check in report.checks)
    details = {"flat_against_bundle": worst}
    if not report.same:
        line = f"the converted model differs from the flat one by {worst:.2g}"
        return Outcome(status="differs", line=line, details=details)
    command = python_command("-m", RECIPE, *arguments(folder, ALONE, backend=None))
    done = subprocess.run(
        command, env=python_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DmtError(f"training in one process failed: {done.stderr.strip()[-300:]}")
    moved = difference(folder / ALONE, folder / BUNDLE)
    if moved < 100 * LIMIT:
        line = f"training in one process moved the weights by {moved:.2g} only"
        return Outcome(status="differs", line=line, details=details)
    line = f"the bundle scores like the flat model; {STEPS} steps moved weights by {moved:.2g}"
    return Outcome(status="ok", line=line, details={**details, "moved": moved})


def arguments(folder: Path, out: str, *more: str, backend: str | None) -> list[str]:
    """Return the arguments of the fine-tuning recipe."""
    return [
        *("--bundle", str(folder / BUNDLE), "--data", str(folder / DATA)),
        *("--out", str(folder / out), "--max-steps", str(STEPS), "--batch-size", str(BATCH)),
        *("--eval-every", str(STEPS), "--teacher", "none", "--quiet"),
        *("--matmul-precision", "highest"),  # the same products on CPUs and GPUs
        *("--table-lr", "0.05", "--dense-lr", "0.005"),  # large ones, so that differences show
        *([] if backend is None else ["--backend", backend]),
        *more,
    ]


def check_ranks(context: Context) -> Outcome:
    """Train over ranks, and compare the result with that of one process."""
    folder = context.folder
    backend = "nccl" if context.device == "cuda" else "gloo"
    hooks = {"measure": str(folder / STEP_COSTS)}
    run_ranks(context.nproc, RECIPE, arguments(folder, RANKS, backend=backend), hooks)
    return compare(folder, RANKS, ALONE, LIMIT, f"{context.nproc} ranks ({backend})")


def check_resume(context: Context) -> Outcome:
    """Kill a rank, go on from the checkpoint, and compare with the training that nothing ended."""
    folder = context.folder
    backend = "nccl" if context.device == "cuda" else "gloo"
    given = arguments(folder, "resumed", "--checkpoint-every", "5", backend=backend)
    ended = run_ranks(context.nproc, RECIPE, given, {"kill_at": _KILL_AT}, may_die=True)
    if ended is not None:
        return Outcome(status="differs", line="training did not end although a rank was killed")
    run_ranks(context.nproc, RECIPE, [*given, "--resume"])
    what = f"killed before step {_KILL_AT} and resumed"
    return compare(folder, "resumed", RANKS, 0.0, what)


def compare(folder: Path, mine: str, theirs: str, limit: float, what: str) -> Outcome:
    """Compare two trained bundles."""
    worst = difference(folder / mine, folder / theirs)
    details = {"largest_difference": worst, "limit": limit, "steps": STEPS}
    if not worst <= limit:
        line = f"{what}: {STEPS} steps end {worst:.2g} from where they should, {limit:g} allowed"
        return Outcome(status="differs", line=line, details=details)
    close = "to the bit" if worst == 0 else f"up to {worst:.1g} (limit {limit:g})"
    return Outcome(status="ok", line=f"{what}: as it should be, {close}", details=details)


def difference(mine: Path, theirs: Path) -> float:
    """Return the largest difference of any weight; inf if one is not finite."""
    a, b = tensors_of(mine), tensors_of(theirs)
    assert a.keys() == b.keys()
    gaps = [float(np.abs(a[name] - b[name]).max(initial=0)) for name in a]
    return max(gaps) if np.isfinite(gaps).all() else float("inf")


def tensors_of(path: Path) -> dict[str, AnyArray]:
    """Read all weights of a bundle."""
    bundle = open_bundle(path)
    groups = [bundle.dense, *bundle.towers]
    return {
        f"{i} {name}": np.asarray(read_tensor(info), dtype=np.float32)
        for i, tensors in enumerate(groups)
        for name, info in tensors.items()
    }
