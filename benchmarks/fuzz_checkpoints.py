"""Damage checkpoints of every container, and see that each is read or refused, soon and small.

    python benchmarks/fuzz_checkpoints.py --mutations 10000 --seed 0

Writes tiny checkpoints of all containers, hostile pickles among them, and mutates them: bytes are
flipped, cut out, repeated and overwritten, opcodes of pickles exchanged, fields of JSON replaced,
files removed and swapped. A worker opens each, infers the model and reads all tensors. It must end
in an answer or in a refusal (a DmtError with its three parts), within 10 seconds and 2 GB, without
starting a process, opening a connection, or writing or reading files elsewhere: an audit hook
watches. Every hundredth goes through `dmt inspect` and `dmt unshard` in a process of its own, whose
exit code must be 0 or 3. A case is repeated with `--only KIND:NUMBER`.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mutate_checkpoints import prepare, write_seeds

MAX_SECONDS, MAX_BYTES = 10.0, 2 << 30
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)


def outcome(path: Path) -> str:
    """Open, understand and read all of a checkpoint."""
    from dmt_convert.checkpoint import open_checkpoint, read_tensor
    from dmt_convert.errors import DmtError
    from dmt_convert.families import infer_model

    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.tensors:
            read_tensor(tensor)
        for tensor in infer_model(checkpoint).tensors.values():  # computed ones among them
            read_tensor(tensor)
    except DmtError as error:
        if "MemoryError" in str(error):
            return "FAILED: asks for too much memory"
        return "refused" if error.expected and error.hint else "FAILED: no expectation or hint"
    except BaseException:
        return "FAILED: " + traceback.format_exc(limit=-3).replace("\n", " | ")
    return "read"


def work(root: Path, seed: int, cases: Iterator[tuple[str, int]]) -> None:
    """Try cases one after the other, a line on stdout for each."""
    seeds = {
        kind: Path(path) for kind, path in json.loads((root / "seeds.json").read_text()).items()
    }
    for path in seeds.values():
        assert outcome(path) in ("read", "refused"), outcome(path)  # all imports are done
    folder = root / "work"
    logging.disable(logging.WARNING)
    seen: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            seen.append(event)
        elif event == "open" and isinstance(args[0], str) and active:
            path = Path(args[0]).resolve()
            inside = any(path.is_relative_to(top) for top in (root.resolve(), *libraries))
            if not inside or (isinstance(args[1], str) and args[1] not in ("r", "rb")):
                seen.append(f"open {args[0]}")

    active = False
    libraries = [Path(place).resolve() for place in (*sys.path, sys.base_prefix) if place]
    sys.addaudithook(watch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES,) * 2)
    for case in cases:
        path = prepare(seeds, root, folder, case, seed)
        begin = time.perf_counter()
        active = True
        said = outcome(path)
        active = False
        taken = time.perf_counter() - begin
        if seen:
            said = f"FAILED: did {seen}"
            seen.clear()
        print(json.dumps([*case, said, taken]), flush=True)


def supervise(root: Path, seed: int, cases: list[tuple[str, int]]) -> Iterator[list[Any]]:
    """Yield the result of every case; a worker that hangs or dies is replaced."""
    while cases:
        (root / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, __file__, "--worker", str(root), "--seed", str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            starting = 20.0
            while cases:
                ready, _, _ = select.select([worker.stdout], [], [], MAX_SECONDS + starting)
                line = worker.stdout.readline() if ready else ""
                if not line:
                    worker.kill()
                    yield [*cases.pop(0), "FAILED: hangs" if not ready else "FAILED: dies", 0.0]
                    break
                starting = 0.0
                cases.pop(0)
                yield json.loads(line)


def try_commands(seeds: dict[str, Path], root: Path, case: tuple[str, int], seed: int) -> str:
    """Run the commands on a case; return what went wrong."""
    path = prepare(seeds, root, root / "command", case, seed)
    for command in (["inspect"], ["unshard", "--out", str(root / "out.safetensors"), "--force"]):
        run = [sys.executable, "-m", "dmt_convert.cli.main", *command, str(path), "--json"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60)
        if done.returncode not in (0, 3) or "Traceback" in done.stderr:
            return f"FAILED: {command[0]} exits with {done.returncode}: {done.stderr[-300:]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one case, as KIND:NUMBER")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        cases = json.loads((options.worker / "cases.json").read_text())
        work(options.worker, options.seed, (tuple(case) for case in cases))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        seeds = write_seeds(root)
        (root / "seeds.json").write_text(json.dumps({k: str(p) for k, p in seeds.items()}))
        kinds = sorted(seeds)
        cases = [(kinds[i % len(kinds)], i) for i in range(options.mutations)]
        if options.only:
            kind, _, number = options.only.partition(":")
            cases = [(kind, int(number))]
        sampled, counts = cases[::100], Counter[str]()
        failures, slowest = [], 0.0
        for kind, number, said, taken in supervise(root, options.seed, cases):
            counts[said.partition(":")[0]] += 1
            slowest = max(slowest, taken)
            if said.startswith("FAILED") or taken > MAX_SECONDS:
                failures.append(f"{kind}:{number}: {said} ({taken:.1f} s)")
        for case in sampled:
            said = try_commands(seeds, root, case, options.seed)
            failures += [f"{case[0]}:{case[1]}: {said}"] if said else []
        ran = (root / "it_ran").exists()
    print(json.dumps({**counts, "commands": 2 * len(sampled), "slowest_s": slowest, "ran": ran}))
    for failure in failures[:50]:
        print(failure)
    sys.exit(1 if failures or ran else 0)


if __name__ == "__main__":
    main()
