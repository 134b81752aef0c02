"""Damage everything but checkpoints, and see that each is read or refused, soon and small.

    python benchmarks/fuzz_inputs.py --mutations 10000 --seed 0

Mutates bundles, plans, exports, data sets (npz, npy, parquet, TSV, schema.json), settings and facts
in YAML, partition files and adapters: bytes are flipped, cut out and repeated, values of documents
replaced, files removed and swapped, text rewritten. The commands that take the input are run on it,
as `dmt` runs them, in forked processes. Each must end in an answer or in a refusal with its parts
(exit code 0, 2, 3 or 4), within 20 seconds and 2 GB. A case is repeated with `--only KIND:NUMBER`.
Checkpoints are damaged by fuzz_checkpoints.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no pools of threads

import mutate_checkpoints
from faulty_inputs.commands import be_quick

MAX_SECONDS, MAX_BYTES = 20.0, 2 << 30
Arguments = list[object]


@dataclass(frozen=True, kw_only=True)
class Seed:
    """Something to damage, and what takes it."""

    folder: Path
    """Copied for every case."""
    commands: Sequence[Callable[[Path], Arguments]]
    """Arguments of `dmt` for a copy; one of them is run on each case."""
    files: str = "*"
    """Which files of the copy are damaged."""
    is_text: bool = False
    """Whether they are text, to be rewritten by words."""


YAML_FACTS = """\
# what the checkpoint does not say
family: torchrec-dlrm
interaction: dot
self_pairs: false
pooling: {cat_0: mean, cat_2: sum}
features:
  - {name: cat_0, table: t_cat_0, pooling: sum}
  - cat_1
  - cat_2
  - cat_3
"""
YAML_SETTINGS = """\
towers: 2
partition: diverse
affinity: cosine
size_ratio: 1.5
together: [[cat_0, cat_1]]
group: {user: [cat_2]}
tower_module: passthrough
distill_steps: 0
hosts: 2
ranks_per_host: 1
seed: 3
dtype: fp16
"""
YAML_TRAINING = """\
epochs: 2
batch_size: 16
dense_lr: 1e-3
table_optimizer: rowwise-adagrad
lr_decay: cosine
clip_norm: 1.5
nproc: 2
"""
WORDS = (
    "1e999", "-1", "0", "1" * 400, "0x" + "f" * 5000, "&a [*a]", "*a", "&a", "null", "true", "- ",
    "!!python/name:os.system", "[" * 300, "{a: {b: ", "'", '"', "\t", "\0", "\ufeff", "é" * 50,
    "? ", ":",
    "<<: *a", ".nan", ".inf", "2026-11-30", "1_000", "0o17", "|", ">", "%YAML 9", "---", "~", "..",
    "/dev/zero", "cat_0", "t_cat_0", "x" * 10_000, "[[[]]]", "{}", "[]", "1.5", "\u202e", "\r\n",
)  # fmt: skip


def make_seeds(root: Path) -> dict[str, Seed]:
    """Write one small input per kind."""
    seeds = {}
    for make in (_bundle_seeds, _export_seeds, _data_seeds, _text_seeds):
        seeds |= make(root)
    return seeds


def _model(root: Path) -> Path:
    from support.checkpoints.flat import make_flat

    path = root / "model.pt"
    return path if path.exists() else make_flat(path)


def _rows(root: Path) -> Path:
    from support.rows import write_clicks

    path = root / "rows" / "train.npz"
    return path if path.exists() else write_clicks(root / "rows", "train", 20, seed=0)


def _bundle(root: Path) -> Path:
    import dmt_convert as dmt

    path = root / "made"
    if not path.exists():
        dmt.convert(_model(root), path, towers=2, distill_steps=0)
    return path


def _bundle_seeds(root: Path) -> dict[str, Seed]:
    rows, model = _rows(root), _model(root)
    place = root / "bundle"
    shutil.copytree(_bundle(root), place / "b")
    cluster: Arguments = ["--hosts", 2, "--ranks-per-host", 1]
    commands: list[Callable[[Path], Arguments]] = [
        lambda folder: ["inspect", folder / "b"],
        lambda folder: ["score", folder / "b", "--data", rows],
        lambda folder: ["plan", folder / "b", *cluster],
        lambda folder: ["verify", model, folder / "b", "--data", rows],
        lambda folder: ["plan", folder / "b", *cluster, "--predict"],
        lambda folder: ["export", folder / "b", "--format", "onnx", "--out", folder / "out"],
        lambda folder: ["convert", model, "--config", folder / "b" / "dmt.json", "--dry-run"],
        lambda folder: ["finetune", folder / "b", "--data", rows, "--dry-run"],
    ]
    return {
        "bundle": Seed(folder=place, commands=commands),
        "manifest": Seed(folder=place, commands=commands, files="dmt.json"),
        "plan": Seed(folder=place, commands=[_read_plan(_bundle(root))], files="plan.json"),
    }


def _read_plan(bundle: Path) -> Callable[[Path], Arguments]:
    return lambda folder: ["(plan)", bundle, folder / "b" / "plan.json"]


def _export_seeds(root: Path) -> dict[str, Seed]:
    import dmt_convert as dmt

    place, rows = root / "export", _rows(root)
    place.mkdir()
    dmt.export(_bundle(root), "onnx", place / "e")
    commands: list[Callable[[Path], Arguments]] = [
        lambda folder: ["score", folder / "e", "--data", rows],
        lambda folder: ["inspect", folder / "e"],
        lambda folder: ["verify", _bundle(root), folder / "e", "--data", rows, "--checksums"],
    ]
    return {
        "export": Seed(folder=place, commands=commands),
        "export.json": Seed(folder=place, commands=commands[:2], files="export.json"),
    }


def _data_seeds(root: Path) -> dict[str, Seed]:
    from support.data_files import WRITERS

    seeds = {}
    clicks = root / "clicks"
    shutil.copytree(_rows(root).parent, clicks / "d")
    seeds["npz"] = _data_seed(clicks, "d/train.npz", root, fits=True)
    for name, write in WRITERS.items():
        place = root / f"data {name}"
        place.mkdir()
        path = write(place)
        seeds[name] = _data_seed(place, str(path.relative_to(place)), root)
    place = root / "own parquet"
    place.mkdir()
    _write_parquet(place / "p", root)
    seeds["parquet of the model"] = _data_seed(place, "p", root, fits=True)
    seeds["schema.json"] = Seed(
        folder=place, commands=seeds["parquet of the model"].commands, files="schema.json"
    )
    return seeds


def _write_parquet(folder: Path, root: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    with np.load(_rows(root)) as arrays:
        columns = {"label": pa.array(arrays["label"])}
        columns |= {f"I{i}": pa.array(arrays["dense"][:, i]) for i in range(5)}
        columns |= {f"cat_{i}": pa.array(arrays["sparse"][:, i]) for i in range(4)}
    pq.write_table(pa.table(columns), folder / "part-0.parquet", row_group_size=7)
    names = {"dense_features": [f"I{i}" for i in range(5)]}
    (folder / "schema.json").write_text(json.dumps(names))


def _data_seed(place: Path, name: str, root: Path, *, fits: bool = False) -> Seed:
    """Rows to read; if they fit the model, commands read them, too."""
    commands: list[Callable[[Path], Arguments]] = [lambda folder: ["(data)", folder / name]]
    if fits:
        from dmt_convert.config import COMMANDS

        commands += [
            lambda folder: ["score", _bundle(root), "--data", folder / name],
            lambda folder: ["evaluate", _model(root), "--data", folder / name],
        ]
        if any(kind.command == "data" for kind in COMMANDS):
            commands.append(lambda folder: ["data", _model(root), folder / name])
    return Seed(folder=place, commands=commands)


def _text_seeds(root: Path) -> dict[str, Seed]:
    model, rows = _model(root), _rows(root)
    texts = root / "texts"
    texts.mkdir()
    (texts / "facts.yaml").write_text(YAML_FACTS)
    (texts / "settings.yaml").write_text(YAML_SETTINGS)
    (texts / "training.yaml").write_text(YAML_TRAINING)
    towers = [["cat_0", "cat_1"], ["cat_2", "cat_3"]]
    (texts / "towers.json").write_text(json.dumps({"towers": towers}))
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "model.py").write_text(ADAPTER)
    (adapter / "model.py").with_name("weights.pt").write_bytes(b"")
    _adapter_model(adapter / "weights.pt")
    start: Arguments = ["convert", model]
    end: Arguments = ["--towers", 2, "--dry-run"]
    tuning: Arguments = ["finetune", _bundle(root), "--data", rows, "--dry-run", "--config"]
    return {
        "facts": Seed(
            folder=texts,
            commands=[
                lambda folder: ["inspect", model, "--model-config", folder / "facts.yaml"],
                lambda folder: [*start, "--model-config", folder / "facts.yaml", *end],
            ],
            files="facts.yaml",
            is_text=True,
        ),
        "settings": Seed(
            folder=texts,
            commands=[
                lambda folder: [*start, "--config", folder / "settings.yaml", "--dry-run"],
            ],
            files="settings.yaml",
            is_text=True,
        ),
        "training settings": Seed(
            folder=texts,
            commands=[lambda folder: [*tuning, folder / "training.yaml"]],
            files="training.yaml",
            is_text=True,
        ),
        "partition": Seed(
            folder=texts,
            commands=[
                lambda folder: [*start, "--partition", folder / "towers.json", "--dry-run"],
                lambda folder: ["partition", model, "--partition", folder / "towers.json"],
            ],
            files="towers.json",
        ),
        "adapter": Seed(
            folder=adapter,
            commands=[
                lambda folder: ["inspect", folder / "weights.pt", "--model", folder / "model.py"]
            ],
            files="model.py",
            is_text=True,
        ),
    }


ADAPTER = """\
from torch import cat, nn

from dmt_convert.adapter import Adapter, Feature


class Dense(nn.Module):
    def __init__(self, dims, num_dense):
        super().__init__()
        self.top = nn.Linear(sum(dims) + num_dense, 1)

    def forward(self, dense, pooled):
        return self.top(cat([dense, *pooled], dim=1)).squeeze(1)


ADAPTER = Adapter(
    network=lambda dims, num_dense: Dense(list(dims), num_dense),
    num_dense=3,
    features=[Feature("user", table="t_user"), Feature("item", table="t_item", pooling="mean")],
    prefix="dense.",
    name="small",
)
"""


def _adapter_model(path: Path) -> None:
    import torch

    state = {
        "ebc.embedding_bags.t_user.weight": torch.randn(7, 4),
        "ebc.embedding_bags.t_item.weight": torch.randn(5, 4),
        "dense.top.weight": torch.randn(1, 11),
        "dense.top.bias": torch.randn(1),
    }
    torch.save(state, path)


def rewrite_text(path: Path, rng: random.Random) -> None:
    """Exchange, repeat and remove words and lines, or put others in."""
    text = path.read_text(encoding="utf-8")
    for _ in range(rng.choice((1, 1, 2, 4))):
        parts = (
            re.split(r"(\s+|[,:\[\]{}()])", text) if rng.random() < 0.7 else text.splitlines(True)
        )
        if not parts:
            break
        at = rng.randrange(len(parts))
        kind = rng.randrange(6)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif kind == 2:
            parts[at] = parts[rng.randrange(len(parts))]
        elif kind == 3:
            parts = parts[:at]
        else:
            parts[at] = rng.choice(WORDS)
        text = "".join(parts)
    path.write_text(text, encoding="utf-8")


def prepare(seed: Seed, folder: Path, rng: random.Random) -> None:
    """Write a damaged copy."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed.folder, folder)
    if seed.files == "*":
        mutate_checkpoints.mutate(folder, rng)
        return
    for path in sorted(folder.rglob(seed.files)):
        if path.suffix == ".json" and rng.random() < 0.6:
            drop_digest(path)  # else it refuses nearly everything
        if seed.is_text and rng.random() < 0.9:
            rewrite_text(path, rng)
        elif rng.random() < 0.02:
            path.write_text("[" * rng.choice((1000, 100_000)) + "]" * 1000)
        else:
            mutate_checkpoints.change_file(path, rng)


def drop_digest(path: Path) -> None:
    """Take the digest of the document itself out of it, as somebody who edits it would."""
    content = json.loads(path.read_text())
    if "digest" in content:
        del content["digest"]
        path.write_text(json.dumps(content))


def outcome(arguments: Arguments) -> str:
    """Run a command in this process; say how it ended."""
    from dmt_convert.errors import DmtError

    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            run(arguments)
    except DmtError as error:
        if "MemoryError" in str(error) and "--model" not in arguments:  # else by the user's code
            return "FAILED: asks for too much memory"
        return "refused" if error.expected or error.hint else f"FAILED: one part: {error}"
    except OSError as error:
        if error.strerror:
            return "refused"
        return failure()
    except SystemExit as stop:
        return "answered" if stop.code in (0, 2, 3, 4, None) else failure()
    except BaseException as error:
        import typer

        return "refused" if isinstance(error, typer.TyperException) else failure()
    return "answered"


def failure() -> str:
    return "FAILED: " + traceback.format_exc(limit=-3).replace("\n", " | ")


def run(arguments: Arguments) -> None:
    """Run `dmt`, or read what no command reads alone."""
    if arguments[0] == "(plan)":
        from dmt_convert.bundle import open_bundle
        from dmt_convert.cluster import RankLayout, choose_plan
        from dmt_convert.placement import read_plan

        bundle, plan = open_bundle(Path(str(arguments[1]))), read_plan(Path(str(arguments[2])))
        layout = RankLayout(rank=0, world_size=16, local_rank=0, ranks_per_host=8, backend="gloo")
        choose_plan(bundle, layout, plan)
        return
    if arguments[0] == "(data)":
        from dmt_convert.data import open_data

        for batch in open_data(Path(str(arguments[1]))).batches(8):
            batch.num_rows  # noqa: B018 (all of a batch is read)
        return
    from dmt_convert.cli.main import app

    code = app([str(argument) for argument in arguments], standalone_mode=False)
    if code not in (0, 2, 3, 4, None):
        raise AssertionError(f"exit code {code}")


def work(
    seeds: dict[str, Seed], root: Path, seed: int, cases: Sequence[tuple[str, int]], out: int
) -> None:
    """Try cases one after the other, a line for each."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES,) * 2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    folder = root / f"work{os.getpid()}"
    with os.fdopen(out, "w") as lines:
        for kind, number in cases:
            rng = random.Random(f"{seed} {kind} {number}")
            prepare(seeds[kind], folder, rng)
            commands = seeds[kind].commands
            arguments = commands[rng.randrange(len(commands))](folder)
            begin = time.perf_counter()
            said = outcome(arguments)
            taken = time.perf_counter() - begin
            lines.write(json.dumps([kind, number, str(arguments[0]), said, taken]) + "\n")
            lines.flush()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Worker:
    """A forked process, and the cases that it has yet to answer."""

    pid: int
    pipe: int
    cases: list[tuple[str, int]]
    since: float
    text: bytes = b""


def supervise(
    seeds: dict[str, Seed], root: Path, seed: int, cases: Sequence[tuple[str, int]], jobs: int
) -> Iterator[list[Any]]:
    """Yield the result of every case; a worker that hangs or dies is replaced."""
    size = 250  # a fresh process after so many: what one leaves in memory does not add up
    waiting = [list(cases[i : i + size]) for i in range(0, len(cases), size)][::-1]
    running: list[Worker] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(start_worker(seeds, root, seed, waiting.pop()))
        ready, _, _ = select.select([worker.pipe for worker in running], [], [], 1.0)
        for worker in list(running):
            ended = False
            if worker.pipe in ready:
                piece = os.read(worker.pipe, 1 << 16)
                worker.text += piece
                ended = not piece
                *lines, worker.text = worker.text.split(b"\n")
                for line in lines:
                    worker.cases.pop(0)
                    worker.since = time.monotonic()
                    yield json.loads(line)
            hangs = bool(worker.cases) and time.monotonic() - worker.since > MAX_SECONDS
            if not ended and not hangs:
                continue
            running.remove(worker)
            if hangs:
                os.kill(worker.pid, signal.SIGKILL)
            os.close(worker.pipe)
            _, status = os.waitpid(worker.pid, 0)
            if worker.cases:
                said = "hangs" if hangs else f"dies (wait status {status})"
                yield [*worker.cases.pop(0), "?", f"FAILED: {said}", MAX_SECONDS]
                if worker.cases:
                    waiting.append(worker.cases)


def start_worker(
    seeds: dict[str, Seed], root: Path, seed: int, cases: list[tuple[str, int]]
) -> Worker:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            work(seeds, root, seed, cases, send)
        finally:
            os._exit(0)
    os.close(send)
    return Worker(pid=child, pipe=receive, cases=cases, since=time.monotonic())


def warm_up(seeds: dict[str, Seed], root: Path) -> None:
    """Run all commands once on what is whole, where no runtime starts threads."""
    for kind, seed in seeds.items():
        folder = root / "warm" / kind
        shutil.copytree(seed.folder, folder)
        for command in seed.commands:
            arguments = command(folder)
            if arguments[0] not in ("export", "finetune") and "export" not in kind:
                said = outcome(arguments)
                assert said == "answered", (kind, arguments, said)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", help="one case as KIND:NUMBER, or all of a KIND")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with KIND:NUMBER: leave it here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        import torch

        torch.set_num_threads(1)
        be_quick()
        seeds = make_seeds(root)
        kinds = sorted(seeds)
        cases = [(kinds[i % len(kinds)], i) for i in range(options.mutations)]
        if options.only:
            kind, _, number = options.only.partition(":")
            cases = [(kind, int(number))] if number else [(kind, i) for i in range(len(cases))]
        if options.keep:
            prepare(seeds[kind], options.keep, random.Random(f"{options.seed} {kind} {number}"))
        warm_up(seeds, root)
        return report(supervise(seeds, root, options.seed, cases, options.jobs))


def report(results: Iterator[list[Any]]) -> int:
    """Print a table of kinds and what failed; return the exit code."""
    counts: dict[str, Counter[str]] = {}
    failures, slowest, begin = [], 0.0, time.monotonic()
    for kind, number, command, said, taken in results:
        counts.setdefault(kind, Counter())[said.partition(":")[0]] += 1
        slowest = max(slowest, taken)
        if said.startswith("FAILED") or taken > MAX_SECONDS:
            failures.append(f"{kind}:{number}: {command}: {said} ({taken:.1f} s)")
    names = ("answered", "refused", "FAILED")
    print(f"| input | mutations | {' | '.join(names)} |\n|---|---|---|---|---|")
    for kind, each in sorted(counts.items()):
        cells = " | ".join(str(each[name]) for name in names)
        print(f"| {kind} | {each.total()} | {cells} |")
    total = sum(counts.values(), Counter[str]())
    print(f"| **all** | {total.total()} | {' | '.join(str(total[name]) for name in names)} |")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"\n{time.monotonic() - begin:.0f} s; slowest {slowest:.1f} s; peak {peak} MiB a process")
    for failure in failures[:60]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
