"""Give every command inputs that are almost right, and see that none answers wrongly in silence.

    python benchmarks/almost_right.py --inputs 600 --seed 0

Every input has one plausible fault: a shard is missing, two saves are mixed, columns come in
another order, a bit is flipped, a file is rewritten while it is read. What the model without the
fault says is known. Each command that takes the input ends in one of:

    right    it answers as the model without the fault does
    refused  it says what it found (a DmtError, or an error of the system that names the file)
    asked    it refuses, and gives the line with which the user can say what is meant
    SILENT   it ends well, and the answer is wrong
    CRASH    it ends in any other way: a traceback, more than 60 seconds of computing or 2 GB

Prints a table of faults and verdicts, and every SILENT and CRASH with how to see it again. Exit
code 1 if there is any. Commands are run in forked processes through the public functions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no pools of threads
sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for the writers in tests/support

from faulty_inputs import KINDS
from faulty_inputs.case import VERDICTS, Case, Outcome, where
from faulty_inputs.commands import be_quick, try_checkpoint
from faulty_inputs.containers import save_any
from faulty_inputs.documents import prepare_exports
from faulty_inputs.models import plain_model
from faulty_inputs.training import prepare_training

MAX_CPU_SECONDS, MAX_SECONDS, MAX_BYTES = 60, 300.0, 2 << 30


@dataclass(frozen=True, kw_only=True)
class Task:
    """One input to make and to try."""

    kind: str
    number: int


def tasks(inputs: int, kinds: Sequence[str]) -> list[Task]:
    """Deal inputs out to kinds, by their shares; a few are spread over all kinds."""
    order = [name for name in kinds for _ in range(KINDS[name].share)]
    if inputs < len(order):
        order = [order[i * len(order) // inputs] for i in range(inputs)]
    numbers = Counter[str]()
    dealt = []
    for i in range(inputs):
        kind = order[i % len(order)]
        dealt.append(Task(kind=kind, number=numbers[kind]))
        numbers[kind] += 1
    return dealt


def attempt(task: Task, seed: int, folder: Path, shared: Path) -> list[Outcome]:
    """Make an input and run the commands, in this process."""
    case = Case(kind=task.kind, number=task.number, seed=seed, folder=folder, shared=shared)
    KINDS[task.kind].make(case)
    assert case.outcomes, f"{task.kind} runs no command"
    return case.outcomes


def work(task: Task, seed: int, root: Path, keep: bool, out: int) -> None:
    """Try one input in a forked process; write what came of it to a pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes() + 2 * MAX_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    warnings.simplefilter("ignore")
    folder = root / f"{task.kind.replace(' ', '-').replace(chr(39), '')}-{task.number}"
    folder.mkdir(parents=True)
    try:
        outcomes = attempt(task, seed, folder, root / "shared")
    except BaseException as error:
        outcomes = [Outcome(command="(the input)", verdict="CRASH", said=where(error))]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    if grown > MAX_BYTES:
        said = f"took {grown >> 20} MiB"
        outcomes.append(Outcome(command="(memory)", verdict="CRASH", said=said))
    with os.fdopen(out, "w") as pipe:
        pipe.write(json.dumps([outcome.to_json() for outcome in outcomes]))
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


def used_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def supervise(
    given: Sequence[Task], seed: int, root: Path, *, jobs: int, keep: bool
) -> Iterator[tuple[Task, list[Outcome]]]:
    """Fork a process per input, some at a time; yield what came of each."""
    waiting, running = list(reversed(given)), dict[int, tuple[Task, int, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            receive, send = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(receive)
                silence()
                work(task, seed, root, keep, send)
                os._exit(0)
            os.close(send)
            running[receive] = (task, child, time.monotonic())
        ready, _, _ = select.select(list(running), [], [], 1.0)
        late = [p for p, (_, _, began) in running.items() if time.monotonic() - began > MAX_SECONDS]
        for pipe in {*ready, *late}:
            task, child, _ = running.pop(pipe)
            if pipe not in ready:
                os.kill(child, signal.SIGKILL)
            with os.fdopen(pipe) as file:
                text = file.read()
            _, status = os.waitpid(child, 0)
            yield task, read_outcomes(text, status, hung=pipe not in ready)


def silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def read_outcomes(text: str, status: int, *, hung: bool) -> list[Outcome]:
    if text and not hung:
        return [Outcome(**value) for value in json.loads(text)]
    said = f"no answer in {MAX_SECONDS:.0f} s" if hung else f"died: wait status {status}"
    return [Outcome(command="(process)", verdict="CRASH", said=said)]


def show_table(results: Sequence[tuple[Task, list[Outcome]]]) -> str:
    """A row per kind of fault: inputs, and how often commands came to each verdict."""
    lines = [f"| fault | inputs | {' | '.join(VERDICTS)} |", "|---" * (2 + len(VERDICTS)) + "|"]
    for name, kind in KINDS.items():
        mine = [outcomes for task, outcomes in results if task.kind == name]
        if mine:
            counts = Counter(outcome.verdict for outcomes in mine for outcome in outcomes)
            cells = " | ".join(str(counts[verdict] or "") for verdict in VERDICTS)
            lines.append(f"| {kind.area}: {name} | {len(mine)} | {cells} |")
    counts = Counter(outcome.verdict for _, outcomes in results for outcome in outcomes)
    cells = " | ".join(str(counts[verdict]) for verdict in VERDICTS)
    return "\n".join([*lines, f"| **all** | {len(results)} | {cells} |"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--area", help="kinds of this area")
    parser.add_argument("--only", help="kinds whose name contains this")
    parser.add_argument("--number", type=int, help="with --only: one input of the kind")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the inputs in this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--list", action="store_true", help="print the kinds of faults")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    kinds = [
        name
        for name, kind in KINDS.items()
        if (options.only or "") in name and options.area in (None, kind.area)
    ]
    if options.list or not kinds:
        print("\n".join(f"{KINDS[name].area}: {name}" for name in kinds or KINDS))
        return 0 if kinds else 2
    given = tasks(options.inputs, kinds)
    if options.number is not None:
        given = [Task(kind=kind, number=options.number) for kind in kinds]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = options.keep or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        (root / "shared").mkdir(exist_ok=True)
        prepare(root / "shared", {KINDS[task.kind].area for task in given})
        results = list(
            supervise(given, options.seed, root, jobs=options.jobs, keep=options.keep is not None)
        )
    return report(results, options, time.monotonic() - begin)


def prepare(root: Path, areas: Container[str]) -> None:
    """Import what the commands need, and make what cases share, before processes are forked."""
    import torch

    torch.set_num_threads(1)
    be_quick()
    case = Case(kind="warm up", number=0, seed=0, folder=root / "warm", shared=root)
    case.folder.mkdir()
    model = plain_model(case)
    for container in ("dcp", "safetensors"):
        path = save_any(model.state, case.folder / container, container)
        try_checkpoint(case, path, model, **model.settings)
    assert all(outcome.verdict == "right" for outcome in case.outcomes), case.outcomes
    if "documents" in areas:
        in_a_fork(lambda: prepare_exports(root))
    if "training" in areas:
        import torchrec  # noqa: F401

        in_a_fork(lambda: prepare_training(root))


def in_a_fork(work: Callable[[], None]) -> None:
    """Call a function in a forked process, so that this one gets no threads."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(where(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, "what cases share could not be made"


def report(
    results: Sequence[tuple[Task, list[Outcome]]], options: argparse.Namespace, seconds: float
) -> int:
    """Print the table and what went wrong; return the exit code."""
    bad = [
        {"kind": task.kind, "number": task.number, **outcome.to_json()}
        for task, outcomes in results
        for outcome in outcomes
        if outcome.verdict in ("SILENT", "CRASH")
    ]
    if options.json:
        every = [
            {"kind": task.kind, "number": task.number, **outcome.to_json()}
            for task, outcomes in results
            for outcome in outcomes
        ]
        print(json.dumps({"seconds": round(seconds, 1), "outcomes": every}, indent=1))
        return 1 if bad else 0
    print(show_table(results))
    for entry in bad:
        print(f"\n{entry['verdict']}: {entry['command']}: {entry['said'][:1500]}")
        print(
            f"  python benchmarks/almost_right.py --only {str(entry['kind'])!r} --number "
            f"{entry['number']} --seed {options.seed} --keep DIR"
        )
    commands = sum(len(outcomes) for _, outcomes in results)
    print(f"\n{len(results)} inputs, {commands} commands, {seconds:.0f} s; {len(bad)} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
