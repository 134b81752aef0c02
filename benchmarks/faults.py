"""Let commands fail at many moments, and see what is left and whether a new run mends it.

    python benchmarks/faults.py --moments 40

`dmt convert`, `dmt export`, `dmt unshard` and a training over two ranks are run in forked
processes. A small library in C, preloaded, counts their file operations below one folder and
strikes at one of them: `kill -9`, SIGTERM, a read that fails with EIO, a disk that is full from
there on, or a bit that is flipped on the disk in what is read. The moments are spread evenly over
all operations of a whole run. Then the command is run again.

Per command and fault the table says how often the target was what it was before, absent, or new and
whole; how the command ended; and how often anything was lost: a target that is broken or wrong, an
old one that is gone, a refusal without its parts, a file left behind, or a new run that does not
come to the same. Exit code 1 if anything was. Needs a C compiler (`cc`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no pools of threads
sys.path.append(str(Path(__file__).parents[1] / "tests"))

FAULTS = {"kill -9": 1, "SIGTERM": 2, "EIO": 3, "full disk": 4, "flipped bit": 5}
"""Numbers of the actions in fault_shim.c."""
READS, WRITES, ALL = 0, 1, 3
COMMANDS = ("convert", "export", "unshard", "finetune")
SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What happens to a process, and at which of its file operations."""

    fault: str
    nth: int
    folder: Path
    file: Path
    at: int = 0

    def arm(self) -> None:
        shim().fault_arm(
            FAULTS.get(self.fault, 0),
            ctypes.c_long(self.nth),
            os.fsencode(self.folder),
            os.fsencode(self.file),
            ctypes.c_long(self.at),
        )


def shim() -> Any:
    return ctypes.CDLL(None)


@dataclass
class Ended:
    """How a process ended."""

    code: int
    said: str
    counts: dict[str, int] = field(default_factory=dict)


def beside(folder: Path, name: str) -> Path:
    """A file that no fault strikes."""
    return folder.with_name(f"{name}-{folder.name}")


def run_forked(work: Callable[[], object], strike: Strike | None, folder: Path) -> Ended:
    """Run `dmt` in a forked process, perhaps with a fault; count its file operations."""
    out, counted = beside(folder, "said"), beside(folder, "counted")
    counted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(2, 1)
        code = 1
        try:
            if strike is not None:
                strike.arm()
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if strike is not None and strike.fault == "none":
                library = shim()
                counts = {str(kind): library.fault_count(kind) for kind in (READS, WRITES, ALL)}
                shim().fault_arm(0, ctypes.c_long(0), b"/nowhere", b"", ctypes.c_long(0))
                counted.write_text(json.dumps(counts))
            os._exit(code)
    code = wait(child)
    counts = json.loads(counted.read_text()) if counted.exists() else {}
    return Ended(code=code, said=out.read_text(errors="replace"), counts=counts)


def wait(child: int) -> int:
    """Wait for a process; one that hangs is killed, and counts as code -99."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -99


def call_dmt(*arguments: object) -> Callable[[], object]:
    """`dmt ARGUMENTS`, as the command runs it, its exit code too."""

    def call() -> None:
        from dmt_convert.cli.main import main

        sys.argv = ["dmt", *map(str, arguments)]
        main()

    return call


class Job(ABC):
    """One command on inputs of its own, and what its target may look like."""

    name = ""
    has_old = True
    """Whether it can replace an older target."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.area = root / "area"
        self.inputs = root / "inputs"
        self.area.mkdir(parents=True)
        self.inputs.mkdir()
        self.make_inputs()
        self.kept = root / "kept"
        shutil.copytree(self.inputs, self.kept)
        self.old: dict[str, bytes] = {}
        self.new: dict[str, bytes] = {}

    @property
    def out(self) -> Path:
        return self.area / "target"

    @abstractmethod
    def make_inputs(self) -> None:
        """Write what the command reads."""

    @abstractmethod
    def work(self, *, older: bool = False) -> Callable[[], object]:
        """The command; `older` makes what it replaces."""

    @abstractmethod
    def source(self) -> list[Path]:
        """Files in which a bit may be flipped."""

    def content(self) -> dict[str, bytes]:
        """What counts of the target."""
        if self.out.is_file():
            return {"": self.out.read_bytes()}
        files = (
            p for p in self.out.rglob("*") if p.is_file() and p.suffix not in (".html", ".svg")
        )
        return {str(p.relative_to(self.out)): p.read_bytes() for p in files if p.suffix != ".json"}

    def prepare(self) -> dict[str, int]:
        """Make the old target and a new one, to compare with; count operations of a whole run."""
        if self.has_old:
            self.must(run_forked(self.work(older=True), None, self.root))
            self.old = self.content()
            shutil.copytree(self.area, beside(self.root, "old"))
            self.clear()
        strike = Strike(fault="none", nth=0, folder=self.root, file=self.root)
        ended = run_forked(self.work(), strike, self.root)
        self.must(ended)
        self.new = self.content()
        assert self.new and self.new != self.old
        self.after = leftovers(self.area)
        return ended.counts

    def must(self, ended: Ended) -> None:
        assert ended.code == 0, (self.name, ended.code, ended.said[-2000:])

    def clear(self) -> None:
        shutil.rmtree(self.area)
        self.area.mkdir()

    def restore_inputs(self) -> None:
        shutil.rmtree(self.inputs)
        shutil.copytree(self.kept, self.inputs)

    def reset(self, with_old: bool) -> None:
        """Put inputs and target back."""
        self.restore_inputs()
        self.clear()
        if with_old:
            shutil.copytree(beside(self.root, "old"), self.area, dirs_exist_ok=True)

    def state(self) -> str:
        """Say what the target is."""
        if not os.path.lexists(self.out):
            return "absent"
        content = self.content()
        if content == self.new:
            return "new"
        return "old" if self.old and content == self.old else "BROKEN"

    def run(self, strike: Strike) -> Ended:
        return run_forked(self.work(), strike, self.root)

    def run_again(self) -> Ended:
        return run_forked(self.work(), None, self.root)


def leftovers(area: Path) -> list[str]:
    return sorted(path.name for path in area.iterdir())


class Convert(Job):
    name = "convert"

    def make_inputs(self) -> None:
        from support.checkpoints.flat import make_flat

        for seed, name in ((0, "new"), (5, "old")):
            make_flat(self.inputs / f"{name}.pt", seed=seed, rows=(700, 5000, 1100, 60))

    def work(self, *, older: bool = False) -> Callable[[], object]:
        source = self.inputs / ("old.pt" if older else "new.pt")
        options = ("--towers", 2, "--distill-steps", 0, "--force", "--quiet")
        return call_dmt("convert", source, *options, "--out", self.out)

    def source(self) -> list[Path]:
        return [self.inputs / "new.pt"]


class Unshard(Job):
    name = "unshard"

    def make_inputs(self) -> None:
        import torch

        from support.checkpoints.containers import save_dcp
        from support.checkpoints.flat import flat_state

        for seed, name in ((0, "new"), (5, "old")):
            (self.inputs / name).mkdir()
            state = flat_state(seed=seed, rows=(700, 5000, 1100, 60))
            save_dcp(state, self.inputs / name)
        del torch

    @property
    def out(self) -> Path:
        return self.area / "target.safetensors"

    def work(self, *, older: bool = False) -> Callable[[], object]:
        source = self.inputs / ("old" if older else "new") / "dcp"
        return call_dmt("unshard", source, "--out", self.out, "--force")

    def source(self) -> list[Path]:
        return sorted((self.inputs / "new" / "dcp").glob("*.distcp"))


class Export(Job):
    name = "export"
    has_old = False

    def make_inputs(self) -> None:
        from support.checkpoints.flat import make_flat

        make_flat(self.root / "new.pt", rows=(700, 5000, 1100, 60))
        arguments = ("convert", self.root / "new.pt", "--towers", 2, "--distill-steps", 0)
        ended = run_forked(call_dmt(*arguments, "--out", self.inputs / "b"), None, self.root)
        self.must(ended)
        trace_once(self.inputs / "b", self.root / "traced")

    def work(self, *, older: bool = False) -> Callable[[], object]:
        options = ("--format", "onnx", "--copy-weights", "--quiet")
        return call_dmt("export", self.inputs / "b", *options, "--out", self.out)

    def source(self) -> list[Path]:
        return sorted((self.inputs / "b" / "weights").glob("*.safetensors"))

    def run_again(self) -> Ended:
        if self.state() == "new":  # there is no --force: it is already there
            return Ended(code=0, said="")
        return super().run_again()


def trace_once(bundle: Path, out: Path) -> None:
    """Trace the dense parts here, for all forked processes: it takes seconds, and no file."""
    import dmt_convert as dmt
    from dmt_convert.serving import onnx_dense

    traced, real = [], onnx_dense.trace_parts

    def trace(*arguments: Any, **options: Any) -> Any:
        if not traced:
            traced.append(real(*arguments, **options))
        return traced[0]

    onnx_dense.trace_parts = trace
    dmt.export(bundle, "onnx", out)


class Finetune(Job):
    """A training over two forked ranks, as torchrun starts them; the new run resumes it."""

    name = "finetune"
    has_old = False

    def make_inputs(self) -> None:
        from faulty_inputs.training import OPTIONS

        from support.checkpoints.flat import make_flat
        from support.rows import write_clicks

        self.options = OPTIONS
        make_flat(self.root / "new.pt")
        arguments = ("convert", self.root / "new.pt", "--towers", 2, "--distill-steps", 0)
        ended = run_forked(call_dmt(*arguments, "--out", self.inputs / "b"), None, self.root)
        self.must(ended)
        write_clicks(self.inputs / "rows", "train", 400, seed=0)
        write_clicks(self.inputs / "rows", "valid", 90, seed=1)

    def source(self) -> list[Path]:
        return sorted((self.inputs / "b" / "weights").glob("*.safetensors"))

    def prepare(self) -> dict[str, int]:
        counting = Strike(fault="none", nth=0, folder=self.root, file=self.root)
        self.must(self.train(counting))
        self.new = self.content()
        self.after = leftovers(self.area)
        return json.loads(beside(self.root, "counted").read_text())

    def run(self, strike: Strike) -> Ended:
        return self.train(strike)

    def run_again(self) -> Ended:
        if self.state() == "new":
            return Ended(code=0, said="")
        return self.train(None, "--resume")

    def train(self, strike: Strike | None, *more: str) -> Ended:
        """Train; the fault strikes the first rank."""
        jobs = beside(self.root, "jobs")
        shutil.rmtree(jobs, ignore_errors=True)
        jobs.mkdir()
        arguments = ["--bundle", self.inputs / "b", "--data", self.inputs / "rows"]
        job = {
            "hosts": 1,
            "ranks": 2,
            "arguments": [*map(str, [*arguments, "--out", self.out]), *self.options, *more],
        }
        answers, child = jobs / "answer", os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                answers.write_text(json.dumps(self.run_ranks(job, jobs, strike)))
            os._exit(0)
        wait(child)
        if not answers.exists():
            return Ended(code=-99, said="no answer")
        ranks = json.loads(answers.read_text())
        codes = [rank["code"] for rank in ranks]
        said = "\n".join(rank["stderr"] for rank in ranks)
        # an answer of 3 explains; the ranks that only lost the other end with another code
        code = next((c for c in (0, 3, 130) if c in codes and (c or not any(codes))), codes[0])
        return Ended(code=code, said=said)

    def run_ranks(self, job: dict[str, Any], jobs: Path, strike: Strike | None) -> Any:
        from support.cluster import cluster_server

        def arrange(_: object) -> None:
            assert strike is not None
            strike.arm()

        if strike is not None:
            cluster_server.arrange = arrange  # type: ignore[assignment]
            job["faults"] = [{"rank": 0}]
            if strike.fault == "none":
                job["environment"] = {"DMT_FAULT_COUNTS": str(beside(self.root, "counted"))}
                count_at_the_end(cluster_server)
        return cluster_server.run_job(job, jobs)["attempts"][-1]


def count_at_the_end(server: Any) -> None:
    """Let the first rank write how many file operations it did."""
    real = server.finetune_dmt.main

    def main(arguments: list[str]) -> None:
        real(arguments)
        if os.environ["RANK"] == "0":
            library = shim()
            counts = {str(kind): library.fault_count(kind) for kind in (READS, WRITES, ALL)}
            Path(os.environ["DMT_FAULT_COUNTS"]).write_text(json.dumps(counts))

    server.finetune_dmt.main = main


JOBS: dict[str, type[Job]] = {
    "convert": Convert,
    "export": Export,
    "unshard": Unshard,
    "finetune": Finetune,
}


@dataclass
class Outcomes:
    """What came of the runs of one command with one fault."""

    runs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    struck: int = 0
    left: int = 0
    again: int = 0
    lost: list[str] = field(default_factory=list)


def moments(total: int, count: int, rng: random.Random) -> list[int]:
    """Spread numbers evenly over 1 to `total`, each anywhere in its part."""
    edges = [1 + total * i // count for i in range(count + 1)]
    return [rng.randrange(a, max(b, a + 1)) for a, b in pairwise(edges)]


def attack(job: Job, counts: dict[str, int], fault: str, count: int, seed: int) -> Outcomes:
    """Run a command with one kind of fault at many moments."""
    rng = random.Random(f"{seed} {job.name} {fault}")
    kind = {"EIO": READS, "full disk": WRITES}.get(fault, ALL)
    outcomes = Outcomes()
    for number, nth in enumerate(moments(counts[str(kind)], count, rng)):
        with_old = job.has_old and number % 2 == 1
        job.reset(with_old)
        file = rng.choice(job.source())
        at = rng.randrange(file.stat().st_size)
        strike = Strike(fault=fault, nth=nth, folder=job.root, file=file, at=at)
        ended = job.run(strike)
        note(job, outcomes, strike, ended, with_old=with_old)
    return outcomes


def note(job: Job, outcomes: Outcomes, strike: Strike, ended: Ended, *, with_old: bool) -> None:
    """Judge one run, and the run after it."""
    state = job.state()
    where = f"{job.name}, {strike.fault} at operation {strike.nth}"
    outcomes.runs += 1
    outcomes.states[state] += 1
    outcomes.codes[ended.code] += 1
    outcomes.struck += ended.code != 0
    lost = outcomes.lost
    if state == "BROKEN":
        lost.append(f"{where}: the target is neither old nor new (code {ended.code})")
    if with_old and state == "absent":
        lost.append(f"{where}: the old target is gone")
    if ended.code == 0 and state != "new":
        lost.append(f"{where}: code 0, but the target is {state}")
    if ended.code in (1, -99) or "Traceback" in ended.said:
        lost.append(f"{where}: code {ended.code}: {ended.said[-400:]}")
    if ended.code == 3 and not ("expected:" in ended.said or "try:" in ended.said):
        lost.append(f"{where}: a refusal of one part: {ended.said[-300:]}")
    outcomes.left += leftovers(job.area) not in ([], job.after, ["target"])
    job.restore_inputs()
    again = job.run_again()
    if again.code != 0 or job.state() != "new":
        lost.append(f"{where}: run again: code {again.code}, {job.state()}: {again.said[-400:]}")
    elif leftovers(job.area) != job.after:
        lost.append(f"{where}: left behind: {leftovers(job.area)}")
    else:
        outcomes.again += 1


def prepare(folder: Path) -> None:
    """Import what the commands need, once, before processes are forked."""
    import torch

    torch.set_num_threads(1)
    from faulty_inputs.commands import be_quick

    import dmt_convert as dmt
    import dmt_convert.cli.main
    from support.checkpoints.containers import save_dcp
    from support.checkpoints.flat import flat_state, make_flat

    be_quick()
    assert dmt_convert.cli.main
    folder.mkdir()
    bundle = dmt.convert(make_flat(folder / "a.pt"), folder / "b", towers=2, distill_steps=0)
    dmt.export(bundle, "onnx", folder / "export")
    dmt.unshard(save_dcp(flat_state(), folder), folder / "plain.safetensors")


def table(results: Iterator[tuple[str, str, Outcomes]]) -> Iterator[str]:
    names = "command | fault | runs | ended before its end | target: old | absent | new, whole"
    yield f"| {names} | exit codes | left until the next run | next run comes to the same | lost |"
    yield "|---" * 11 + "|"
    for command, fault, got in results:
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(got.codes.items()))
        states = " | ".join(str(got.states[name]) for name in ("old", "absent", "new"))
        yield (
            f"| {command} | {fault} | {got.runs} | {got.struck} | {states} | {codes} | {got.left} "
            f"| {got.again} | {len(got.lost)} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--moments", type=int, default=40, help="per command and fault")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not hasattr(shim(), "fault_arm"):
        return start_with_shim(list(sys.argv[1:] if arguments is None else arguments))
    lost: list[str] = []

    def results() -> Iterator[tuple[str, str, Outcomes]]:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name) / "warm")
            for command in options.commands:
                if command == "finetune":
                    import torchrec  # noqa: F401
                job = JOBS[command](Path(name) / command)
                counts = job.prepare()
                for fault in options.faults:
                    outcomes = attack(job, counts, fault, options.moments, options.seed)
                    lost.extend(outcomes.lost)
                    yield command, fault, outcomes

    begin = time.monotonic()
    for line in table(results()):
        print(line, flush=True)
    print(f"\n{time.monotonic() - begin:.0f} s; {len(lost)} lost")
    for line in lost[:40]:
        print(line.replace("\n", " | "))
    return 1 if lost else 0


def start_with_shim(arguments: list[str]) -> int:
    """Build the library, and run this script anew with it."""
    with tempfile.TemporaryDirectory() as name:
        library = Path(name) / "fault_shim.so"
        source = Path(__file__).with_name("fault_shim.c")
        build = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        run = [sys.executable, str(Path(__file__)), *arguments]
        return subprocess.run(run, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
