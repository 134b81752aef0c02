"""The benchmark on an emulated cluster: real runs, and that nothing is left of them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster import namespaces
from benchmarks.cluster.launch import run_topology
from benchmarks.cluster.network import GOODPUT
from benchmarks.cluster.settings import Settings, Topology
from dmt_convert.errors import DmtError
from support.paths import REPOSITORY

pytestmark = pytest.mark.exhaustive  # real processes, and times that a busy machine misses


MARK = 918_273_645
"""A seed that no other process has on its command line."""


# Refusals of the machine


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DmtError, match="no unshare, ip, tc on this machine's PATH"):
        namespaces.find_mode()


def test_a_kernel_without_namespaces_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("unshare", "ip", "tc"):
        (tmp_path / tool).write_text("#!/bin/sh\necho not permitted >&2; exit 1\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DmtError, match="no network namespaces") as refused:
        namespaces.find_mode()
    assert refused.value.details[-1] == "rootless: not permitted"
    assert "run it as root" in refused.value.hint


# The real thing


@pytest.fixture(scope="module")
def mode() -> namespaces.Mode:
    """How hosts can be built here."""
    if importlib.util.find_spec("torchrec") is None:
        pytest.skip("trains with torchrec, which is not installed")
    try:
        return namespaces.find_mode()
    except DmtError as error:
        pytest.skip(f"hosts cannot be built here: {error}")


def processes() -> dict[int, str]:
    """Command lines of the benchmark's processes, by id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended
        if str(MARK) in command:
            found[int(folder.name)] = command
    return found


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def held_namespaces() -> str:
    """What could keep a network namespace without a process: mounts of one."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return "\n".join(line for line in lines if " nsfs " in line)


@contextmanager
def running(folder: Path, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Run the benchmark; at the end nothing of it is left."""
    before = interfaces(), held_namespaces()
    assert processes() == {}
    arguments = ["--quick", "--seed", MARK, "--out", folder / "out", *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cluster", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has it ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 120
    while (left := processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == {}
    assert (interfaces(), held_namespaces()) == before


def wait_for_turns(process: subprocess.Popen[str]) -> None:
    """Return in the middle of a turn, after the first."""
    assert process.stderr is not None
    for line in process.stderr:
        if "round 1" in line:
            time.sleep(0.2)
            return
    pytest.fail(f"it ended with code {process.wait()} before the first turn was over")


def endless(folder: Path) -> Any:
    return running(folder, "--rounds", 100_000)


@pytest.mark.slow
def test_a_quick_run(mode: namespaces.Mode, tmp_path: Path) -> None:
    with running(tmp_path) as process:
        printed, progress = process.communicate(timeout=60)
    assert process.returncode == 0, progress
    assert all(word in printed for word in ("x flat", "cannot show", "dmt-c4", mode))
    assert "Wrong" not in printed
    out = tmp_path / "out"
    document = json.loads((out / "results.json").read_text("utf-8"))
    (launch,) = document["topologies"]
    assert launch["loss_faults"] == []
    assert {row["variant"] for row in launch["rows"]} == set(document["settings"]["variants"])
    assert len(launch["turns"]) == len(launch["rows"])
    assert printed.startswith((out / "report.md").read_text("utf-8"))
    assert (out / "speedup.svg").stat().st_size and (out / "speedup.png").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["root", pytest.param("rootless", marks=pytest.mark.exhaustive)])
def test_the_link_carries_what_crosses_hosts_and_nothing_else(
    mode: namespaces.Mode, tmp_path: Path, kind: namespaces.Mode
) -> None:
    """Flat, 2 hosts of 2 ranks: a quarter of the bytes goes to a rank of the same host."""
    if kind == "root" and mode != "root":
        pytest.skip("not run as root")
    trial = namespaces.seal(kind, ["true"])
    if subprocess.run(trial, check=False, capture_output=True).returncode:
        pytest.skip(f"no {kind} namespaces here")
    settings = Settings(
        topologies=(Topology(hosts=2, ranks_per_host=2),),
        rates=(200.0, 20.0),
        variants=("flat",),
        rounds=1,
        steps=2,
        batch=64,
        rows=100,
    )
    built, fast, slow = run_topology(settings, kind, tmp_path)
    assert set(built["first_losses"]) == {"flat"}
    # per host and step: 13 of 26 features for 2 * 64 samples elsewhere, and the gradients back
    payload = 2 * 13 * 128 * 4 * 128
    for turn in (fast, slow):
        for host in turn["hosts"]:
            for way in ("link_rx_bytes", "link_tx_bytes"):
                assert 1.0 < host[way] / settings.steps / payload < 1.2
            # rank to rank on loopback: as many bytes again, to one of the three others, not two
            assert 0.45 < host["loopback_bytes"] / settings.steps / payload < 0.7
    link_s = payload * 8 / (GOODPUT * 20e6)
    assert min(slow["step_s"]) > 0.95 * link_s  # the limit holds
    assert min(fast["step_s"]) < link_s  # and was another before


@pytest.mark.slow
@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    "sent", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGTERM]
)
def test_an_interrupted_run_writes_what_it_has_and_leaves_nothing(
    tmp_path: Path, sent: signal.Signals
) -> None:
    with endless(tmp_path) as process:
        wait_for_turns(process)
        process.send_signal(sent)
        _, progress = process.communicate(timeout=120)
        assert process.returncode == 130
        assert processes() == {}
    assert "error: interrupted" in progress
    (launch,) = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["topologies"]
    assert launch["turns"]


@pytest.mark.slow
@pytest.mark.usefixtures("mode")
def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    with endless(tmp_path) as process:
        wait_for_turns(process)
        found = processes()
        assert sum("benchmarks.cluster.worker" in command for command in found.values()) == 2
        hosts = {os.readlink(f"/proc/{rank}/ns/net") for rank in found}  # noqa: PTH115
        assert len(hosts) == 4  # ours, the bridge's, and two hosts
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("mode")
def test_a_crashed_rank_is_named_and_ends_the_run(tmp_path: Path) -> None:
    with endless(tmp_path) as process:
        wait_for_turns(process)
        rank = max(
            pid for pid, command in processes().items() if "benchmarks.cluster.worker" in command
        )
        os.kill(rank, signal.SIGKILL)
        _, progress = process.communicate(timeout=120)
        assert process.returncode == 3
        assert processes() == {}
    assert "rank 1 was killed by SIGKILL" in progress
    assert "error: rank 1 ended while asked to turn" in progress
