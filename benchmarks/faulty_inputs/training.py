"""Trainings that are resumed after something changed: checkpoints, rows, the bundle."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, Outcome, fault
from .files import flip_bit

AREA = "training"
RANKS, STEPS, KILLED_AT = 2, 12, 10
OPTIONS = (
    "--batch-size", "64", "--eval-every", "4", "--checkpoint-every", "3", "--max-steps", str(STEPS),
    "--keep-checkpoints", "2",
    # weights move enough to tell all steps apart, and the last state is the best one: if the best
    # one is damaged, another takes its place, which is said
    "--dense-lr", "0.0005", "--table-lr", "0.02",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that was killed at a step, and what it would have come to."""

    bundle: Path
    data: Path
    out: Path
    """Where the new bundle goes; checkpoints lie beside it."""
    reference: Path
    """The new bundle of the same training, not killed."""

    @property
    def checkpoints(self) -> Path:
        return Path(f"{self.out}.checkpoints")

    def steps(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step_*"))


def prepare_training(shared: Path) -> None:
    """Make the bundle, the rows, and a training that was killed; once for all cases."""
    import torch

    import dmt_convert as dmt
    from support.checkpoints.flat import flat_state
    from support.rows import write_clicks

    root = shared / "training"
    root.mkdir()
    for seed, name in ((0, "bundle"), (9, "other")):
        torch.save(flat_state(seed=seed), root / f"{name}.pt")
        dmt.convert(root / f"{name}.pt", root / name, towers=2, distill_steps=0)
    write_clicks(root / "data", "train", 400, seed=0)
    write_clicks(root / "data", "valid", 90, seed=1)
    common = ["--bundle", root / "bundle", "--data", root / "data", *OPTIONS]
    run_ranks(root, [*common, "--out", root / "reference"])
    fault = {"rank": 1, "moment": "step", "time": KILLED_AT}
    run_ranks(root, [*common, "--out", root / "out"], faults=[fault])
    assert (root / "reference" / "dmt.json").is_file()
    assert len(list((root / "out.checkpoints").glob("step_*"))) >= 2


def run_ranks(folder: Path, arguments: list[Any], *, faults: Any = ()) -> list[dict[str, Any]]:
    """Train over ranks in forked processes; returns what each rank ended with and printed."""
    from support.cluster import cluster_server

    name = f"job{len(list(folder.glob('job*')))}"
    (folder / name).mkdir()
    job = {
        "hosts": 1,
        "ranks": RANKS,
        "arguments": [str(argument) for argument in arguments],
        "faults": list(faults),
    }
    answer = cluster_server.run_job(job, folder / name)
    ranks: list[dict[str, Any]] = answer["attempts"][-1]
    return ranks


def copy_training(case: Case) -> Training:
    root = case.folder / "training"
    shutil.copytree(case.shared / "training", root)
    return Training(
        bundle=root / "bundle", data=root / "data", out=root / "out", reference=root / "reference"
    )


def resume(case: Case, training: Training, *, never: bool = False, **changes: Any) -> None:
    """Go on with the training, and compare what it comes to with the one that was not killed."""
    arguments = {"--bundle": training.bundle, "--data": training.data, "--out": training.out}
    arguments |= {f"--{name}": value for name, value in changes.items()}
    before = {path.name for path in training.steps()}
    listed = [str(part) for pair in arguments.items() for part in pair]
    ranks = run_ranks(case.folder, [*listed, *OPTIONS, "--resume"])
    codes = [rank["code"] for rank in ranks]
    said = "\n".join(str(rank["stderr"])[-600:] for rank in ranks)
    printed = "".join(str(rank["stdout"]) for rank in ranks)
    if 3 in codes and set(codes) <= {3, 130, -15}:  # the others were told to end
        case.outcomes.append(Outcome(command="finetune --resume", verdict="refused", said=said))
        return
    if any(codes):
        said = f"codes {codes}: {said}"
        case.outcomes.append(Outcome(command="finetune --resume", verdict="CRASH", said=said))
        return

    def check() -> str | None:
        if never:
            return f"went on: {printed[-300:]}"
        if before and "going on from" not in printed + said:
            return f"began anew, and said nothing of it: {printed[:300]}"
        return unlike(training.out, training.reference)

    case.run("finetune --resume", check)


def unlike(got: Path, want: Path) -> str | None:
    from safetensors.numpy import load_file

    for file in sorted((want / "weights").glob("*.safetensors")):
        theirs, ours = load_file(file), load_file(got / "weights" / file.name)
        for name, value in theirs.items():
            if not np.array_equal(value, ours[name]):
                return f"{file.name} {name} differs by {np.abs(value - ours[name]).max():.3g}"
    return None


@fault(AREA, "a bit flipped in a checkpoint", share=4)
def checkpoint_flipped(case: Case) -> None:
    training = copy_training(case)
    step = training.steps()[-1 if case.number % 3 else 0]
    pattern = case.turn("*.distcp", "*.distcp", ".metadata", "progress.json", "manifest.json")
    file = case.choose(*sorted(step.glob(pattern)))
    size = file.stat().st_size
    at = case.rng.randrange(size // 8, size) if file.suffix == ".distcp" else None
    flip_bit(file, case.rng.randrange(size) if at is None else at, case.rng.randrange(7))
    resume(case, training)


@fault(AREA, "a tensor of a checkpoint flipped", share=3)
def tensor_flipped(case: Case) -> None:
    """Inside the bytes of a weight: an exponent or a mantissa."""
    from dmt_convert.checkpoint import open_checkpoint

    training = copy_training(case)
    step = training.steps()[-1]
    tensors = [t for t in open_checkpoint(step).tensors if t.pieces]
    tensor = case.choose(*[t for t in tensors if "embedding_bags" in t.name or case.number % 2])
    piece = case.choose(*tensor.pieces)
    raw = bytearray(piece.path.read_bytes())
    begin = raw.find(b"PK\x03\x04", piece.offset)
    at = (begin if begin >= 0 else piece.offset) + case.rng.randrange(200, 600)
    flip_bit(piece.path, min(at, len(raw) - 1), case.choose(0, 3, 6))
    resume(case, training)


@fault(AREA, "a checkpoint's files missing, cut or mixed", share=4)
def checkpoint_files(case: Case) -> None:
    training = copy_training(case)
    old, new = training.steps()[0], training.steps()[-1]
    how = case.turn("mixed", "missing", "cut", "progress", "metadata", "zeros")
    file = case.choose(*sorted(new.glob("*.distcp")))
    if how == "mixed":
        shutil.copy(old / file.name, file)
    elif how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 8)
    elif how == "progress":
        shutil.copy(old / "progress.json", new / "progress.json")
    elif how == "metadata":
        shutil.copy(old / ".metadata", new / ".metadata")
    else:
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
    resume(case, training)


@fault(AREA, "every checkpoint damaged")
def all_damaged(case: Case) -> None:
    """Nothing is left to go on from: to begin anew in silence is to lose the work."""
    training = copy_training(case)
    for step in training.steps():
        for file in sorted(step.glob("*.distcp")):
            os.truncate(file, file.stat().st_size - 100)
    resume(case, training, never=True)


@fault(AREA, "other rows on resume", share=6)
def other_rows(case: Case) -> None:
    """As many rows, but not those: training or validation, one label, their order."""
    from support.rows import write_clicks

    training = copy_training(case)
    how = case.turn("valid", "train", "valid label", "train label", "train order", "valid fewer")
    name = how.split()[0]
    path = training.data / f"{name}.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    count = len(arrays["label"])
    if how.endswith("label"):
        at = case.rng.randrange(count)
        arrays["label"][at] = 1 - arrays["label"][at]
        np.savez(path, **arrays)
    elif how.endswith("order"):
        np.savez(path, **{key: values[::-1] for key, values in arrays.items()})
    else:
        fewer = 20 if "fewer" in how else 0
        write_clicks(training.data, name, count - fewer, seed=5)
    resume(case, training, never=True)


@fault(AREA, "another bundle on resume", share=2)
def other_bundle(case: Case) -> None:
    """Of the same shapes: its checkpoints do not go on from it."""
    training = copy_training(case)
    other = training.bundle.with_name("other")
    if case.number % 2:
        shutil.rmtree(training.bundle)
        other.rename(training.bundle)
        other = training.bundle
    resume(case, training, never=True, bundle=other)


@fault(AREA, "a checkpoint of another training", share=2)
def foreign_checkpoint(case: Case) -> None:
    """A folder of a later step, from a training of another bundle or seed, was copied in."""
    training = copy_training(case)
    new = training.steps()[-1]
    foreign = new.with_name("step_000000011")
    shutil.copytree(new, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    if case.number % 2:
        manifest["step"] = 11
        (foreign / "manifest.json").write_text(json.dumps(manifest))
    resume(case, training)


@fault(AREA, "a damaged bundle trained over ranks", share=2)
def damaged_bundle(case: Case) -> None:
    training = copy_training(case)
    shutil.rmtree(training.checkpoints)
    file = case.choose(*sorted((training.bundle / "weights").glob("*.safetensors")))
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    flip_bit(file, case.rng.randrange(begin, len(raw)), case.rng.randrange(8))
    resume(case, training, never=True)
