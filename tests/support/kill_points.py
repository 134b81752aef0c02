"""Convert in child processes that are killed at many moments; say what each left behind.

Run as `python -m support.kill_points SOURCE FOLDER new|replaced`. The parent never runs torch, so
that its children may be forked. Prints one JSON line per kill.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch  # noqa: F401  imported once, for all children

import dmt_convert as dmt
from dmt_convert.bundle import check_digests, open_bundle
from dmt_convert.errors import BundleError
from dmt_convert.files import staging
from support.shortcuts import sample_few, skip_report


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(module: object, name: str, nth: int) -> Callable[[], None]:
    """Have a process die where it calls a function for the nth time."""

    def arm() -> None:
        real, calls = getattr(module, name), 0

        def call(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                die()
            return real(*args, **options)

        setattr(module, name, call)

    return arm


def kill_behind(module: object, name: str) -> Callable[[], None]:
    """Have a process die when a function has done its work."""

    def arm() -> None:
        real = getattr(module, name)

        def call(*args: object, **options: object) -> None:
            real(*args, **options)
            die()

        setattr(module, name, call)

    return arm


def kill_after(seconds: float) -> Callable[[], None]:
    def arm() -> None:
        timer = threading.Timer(seconds, die)
        timer.daemon = True
        timer.start()

    return arm


def run_child(source: Path, out: Path, force: bool, seed: int, arm: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            arm()
            dmt.convert(source, out, towers=2, distill_steps=0, force=force, seed=seed)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(child, 0)[1]


def describe(out: Path) -> str:
    if not out.exists():
        return "absent"
    try:
        bundle = open_bundle(out)
        check_digests(bundle)
    except BundleError as error:
        return f"BROKEN {error}"
    notes = bundle.manifest.initialisation.notes
    assert notes
    return str((out / "dmt.json").stat().st_ino)


def main() -> None:
    source, folder, replaced = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "replaced"
    patch = pytest.MonkeyPatch()  # for as long as this process lives
    sample_few(patch)
    skip_report(patch)
    out = folder / "out"
    begin = time.perf_counter()
    assert run_child(source, out, False, 0, lambda: None) == 0
    whole = time.perf_counter() - begin
    rng = random.Random(0)
    kills = {
        **{f"before sync {n}": kill_before(os, "fsync", n) for n in (1, 4, 7)},
        "before the swap": kill_before(staging, "_put_in_place", 1),
        "after the swap": kill_behind(staging, "_put_in_place"),
        **{f"at {x:.3f}": kill_after(x) for x in (rng.uniform(0, 1.1 * whole) for _ in range(3))},
    }
    for name, arm in kills.items():
        if not replaced:
            shutil.rmtree(out, ignore_errors=True)
        before = describe(out)
        status = run_child(source, out, replaced, 1, arm)
        result = {"kill": name, "killed": os.WIFSIGNALED(status), "before": before}
        result["after"] = describe(out)
        result["leftovers"] = sum(".dmt-tmp" in path.name for path in folder.iterdir())
        print(json.dumps(result), flush=True)
    status = run_child(source, out, out.exists(), 0, lambda: None)
    names = sorted(path.name for path in folder.iterdir())
    print(json.dumps({"status": status, "after": describe(out), "names": names}))


if __name__ == "__main__":
    main()
