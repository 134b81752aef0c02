"""Launching ranks: one clear error and the right exit code, whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.cluster.launcher import (
    LaunchConfig,
    Launched,
    default_out,
    launch,
)
from dmt_convert.cluster.rank_process import (
    ERROR_FILE,
    LostRankError,
    read_error,
    training_process,
    write_error,
)
from dmt_convert.errors import BundleError, ConfigError, DmtError

pytestmark = pytest.mark.exhaustive  # real processes, and times that a busy machine misses


RECIPE = """
    import json, os, signal, sys, time
    from pathlib import Path
    from dmt_convert.errors import BundleError
    from dmt_convert.cluster.rank_process import die_with_parent, write_error

    die_with_parent()
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    (folder / f"started-{rank}-{attempt}").write_text(str(os.getpid()))

    def refuse(name, code=3):
        error = BundleError(f"rank {rank} found {name}", expected="none", hint="mend it")
        if not write_error(error):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(code)

    def done(**result):
        print(json.dumps(result, indent=1), flush=True)

    def interrupted(*_):
        (folder / f"interrupted-{rank}").touch()
        sys.exit(130)

    def wait_long():
        signal.signal(signal.SIGTERM, interrupted)
        (folder / f"waiting-{rank}").touch()
        time.sleep(60)

    what = arguments[0]
    if what == "done":
        if rank == 0:
            print("printed by rank 0", flush=True)
            done(steps=3, arguments=arguments)
    elif what == "print":
        if rank == 0:
            print('{"steps": 4}')
    elif what == "refuse":
        refuse("a fault")
    elif what == "refuse on 1":
        refuse("a fault") if rank == 1 else wait_long()
    elif what == "usage":
        sys.exit(2)
    elif what == "bug":
        raise ValueError("a bug") if rank == 1 else wait_long()
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else wait_long()
    elif what == "killed once":
        if attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else wait_long()
        elif rank == 0:
            done(attempt=attempt)
    elif what == "one host is lost once":
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        for step in range(3):
            dist.all_reduce(torch.ones(1))
            if step == 1 and rank == 3 and attempt == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            done(world=int(os.environ["WORLD_SIZE"]))
    elif what == "stalls":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        time.sleep(60) if rank == 1 else refuse("nothing of rank 1 for 15 s", code=1)
    elif what == "wait":
        wait_long()
    elif what == "stop":
        from dmt_convert.cluster.rank_process import STOP_REQUEST, InterruptError, training_process

        with training_process(json_errors=False, quiet=False, timeout=60), STOP_REQUEST.watch():
            (folder / f"waiting-{rank}").touch()
            while STOP_REQUEST.signal is None:
                time.sleep(0.01)
            raise InterruptError(f"stopped by {STOP_REQUEST.signal.name}; its checkpoint is there")
    elif what == "stop too late":
        from dmt_convert.cluster.rank_process import STOP_REQUEST, training_process

        with training_process(json_errors=False, quiet=False, timeout=60), STOP_REQUEST.watch():
            (folder / f"waiting-{rank}").touch()
            time.sleep(60)
    elif what == "deaf":
        wait_long()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
Start = Callable[..., Launched]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(textwrap.dedent(RECIPE))
    return path


@pytest.fixture
def start(recipe: Path, tmp_path: Path) -> Start:
    def run(*arguments: str, capture: bool = False, **config: Any) -> Launched:
        settings = LaunchConfig(**({"nproc": 2} | config))
        return launch(settings, [str(tmp_path), *arguments], recipe=recipe, capture=capture)

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_run_to_their_end(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("done", "--batch-size", "3") == Launched(code=0, error=None, result=None)
    assert names(tmp_path) == ["started-0-0", "started-1-0"]
    printed = capfd.readouterr()
    assert printed.out.startswith("printed by rank 0\n{")
    assert printed.err == ""


def test_a_captured_recipe_prints_nothing(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    done = start("done", "--batch-size", "3", capture=True)
    assert done == Launched(
        code=0, error=None, result={"steps": 3, "arguments": ["done", "--batch-size", "3"]}
    )
    assert start("print", capture=True).result == {"steps": 4}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("what", "found"), [("refuse", 0), ("refuse on 1", 1)])
def test_a_refusal_is_told_once_and_never_tried_again(
    start: Start, tmp_path: Path, what: str, found: int, capfd: pytest.CaptureFixture[str]
) -> None:
    done = start(what, max_restarts=3)
    assert done.code == 3
    assert isinstance(done.error, BundleError)
    assert str(done.error) == f"rank {found} found a fault\nexpected: none\ntry: mend it"
    assert capfd.readouterr() == ("", "")
    assert [name for name in names(tmp_path) if name.endswith("-1")] == []  # no second attempt
    assert not any(alive(int(p.read_text())) for p in tmp_path.glob("started-*"))


def test_what_a_rank_printed_itself_is_not_told_again(start: Start) -> None:
    assert start("usage", max_restarts=2) == Launched(code=2, error=None, result=None)


def test_a_bug_leaves_its_traceback_and_no_other(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("bug") == Launched(code=1, error=None, result=None)
    errors = capfd.readouterr().err
    assert errors.count("Traceback") == 1
    assert errors.endswith("ValueError: a bug\n")


def test_a_killed_rank_is_told(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    done = start("killed")
    assert done.code == 3
    assert done.error is not None
    assert done.error.found == "rank 1 was killed (SIGKILL)"
    assert "--max-restarts" in done.error.hint
    assert capfd.readouterr().err == ""


def test_a_killed_rank_is_started_again(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    done = start("killed once", max_restarts=2, capture=True)
    assert (done.code, done.result) == (0, {"attempt": 1})
    assert capfd.readouterr().err == (
        "note: rank 1 was killed (SIGKILL); starting the ranks of this host again (2 more times "
        "at most)\n"
    )


def test_a_rank_that_stalls_is_told_as_a_stall(start: Start) -> None:
    """This program kills it in the end; that says nothing of memory."""
    done = start("stalls", shutdown_timeout=1)
    assert done.code == 3
    assert done.error is not None
    assert done.error.found.startswith("rank 1 stalled")
    assert done.error.details == ("the others saw: rank 0 found nothing of rank 1 for 15 s",)
    assert "memory" not in str(done.error)


@pytest.fixture
def launcher(recipe: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that launches two ranks which wait until they are told to end."""
    with waiting_ranks(recipe, tmp_path, "wait") as process:
        yield process


@contextmanager
def waiting_ranks(recipe: Path, tmp_path: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from dmt_convert.cluster.launcher import LaunchConfig, launch\n"
        "config = LaunchConfig(nproc=2, shutdown_timeout=2)\n"
        "done = launch(config, sys.argv[2:], recipe=Path(sys.argv[1]))\n"
        "print(done.error or '', file=sys.stderr, end='')\n"
        "sys.exit(done.code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe), str(tmp_path), what],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        end = time.monotonic() + 90
        while len(list(tmp_path.glob("waiting-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_ranks_once(
    launcher: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    launcher.send_signal(number)
    launcher.send_signal(number)  # an impatient user
    assert launcher.wait(timeout=90) == 130
    assert launcher.stderr is not None
    assert launcher.stderr.read() == ""
    assert len(list(tmp_path.glob("interrupted-*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_what_a_stopped_training_says_is_told_once(
    recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Through torchrun, which would report a signal and nothing else."""
    with waiting_ranks(recipe, tmp_path, "stop") as process:
        process.send_signal(number)
        assert process.wait(timeout=90) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "stopped by SIGTERM; its checkpoint is there"


def test_a_training_that_does_not_stop_in_time_is_ended(recipe: Path, tmp_path: Path) -> None:
    with waiting_ranks(recipe, tmp_path, "stop too late") as process:
        process.terminate()
        assert process.wait(timeout=90) == 130
        assert process.stderr is not None
        assert "no checkpoint could be written within the grace time" in process.stderr.read()


def test_stores_of_one_host_hear_this_host_only(launcher: subprocess.Popen[str]) -> None:
    children = [launcher.pid]
    for pid in children:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, task.read_text().split())
    inodes = {
        str(fd.readlink())[8:-1]
        for pid in children
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if str(fd.readlink()).startswith("socket:")
    }
    listening = [
        fields[1]
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        if fields[3] == "0A" and fields[9] in inodes
    ]
    assert listening
    assert all(address.startswith("0100007F:") for address in listening)


def test_nothing_outlives_a_killed_launcher(
    launcher: subprocess.Popen[str], tmp_path: Path
) -> None:
    launcher.kill()
    pids = [int(path.read_text()) for path in tmp_path.glob("started-*")]
    assert len(pids) == 2
    end = time.monotonic() + 90
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_nothing_outlives_a_killed_torchrun(
    launcher: subprocess.Popen[str], tmp_path: Path
) -> None:
    pids = [int(path.read_text()) for path in tmp_path.glob("started-*")]
    status = Path(f"/proc/{pids[0]}/status").read_text()
    (agent,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid")]
    os.kill(agent, signal.SIGKILL)
    assert launcher.wait(timeout=90) == 3
    end = time.monotonic() + 90
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


@pytest.mark.parametrize("node_rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_host_that_never_comes_is_an_error(start: Start, node_rank: int) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    done = start("done", nnodes=2, node_rank=node_rank, rdzv_endpoint=endpoint, rdzv_timeout=2)
    assert done.code == 3
    assert isinstance(done.error, ConfigError)
    assert done.error.found.startswith(f"the 2 hosts did not meet at {endpoint}")
    assert "--node-rank" in done.error.hint


def start_two_hosts(
    recipe: Path, folder: Path, what: str, **config: int
) -> list[tuple[int, str, str]]:
    """Launch on two hosts, which are processes here; returns code, result and stderr of each."""
    settings = {"nnodes": 2, "rdzv_endpoint": f"127.0.0.1:{free_port()}", **config}
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from dmt_convert.cluster.launcher import LaunchConfig, launch\n"
        f"config = LaunchConfig(node_rank=int(sys.argv[2]), local_addr='127.0.0.1', **{settings})\n"
        "done = launch(config, sys.argv[3:], recipe=Path(sys.argv[1]), capture=True)\n"
        "print(json.dumps([done.code, done.result, done.error and done.error.found]))"
    )
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(recipe), str(host), str(folder), what],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    outputs = [host.communicate(timeout=60) for host in hosts]
    return [(*json.loads(printed.splitlines()[-1])[:2], errors) for printed, errors in outputs]


def test_two_hosts_run_one_training(recipe: Path, tmp_path: Path) -> None:
    hosts = start_two_hosts(recipe, tmp_path, "done", nproc=1)
    assert [host[0] for host in hosts] == [0, 0]
    results = [host[1] for host in hosts if host[1] is not None]
    assert results == [{"steps": 3, "arguments": ["done"]}]
    assert names(tmp_path) == ["started-0-0", "started-1-0"]


def test_two_hosts_go_on_together_when_one_lost_a_rank(recipe: Path, tmp_path: Path) -> None:
    """With a store that attempts share, ranks would look for those of the attempt before."""
    hosts = start_two_hosts(recipe, tmp_path, "one host is lost once", nproc=2, max_restarts=2)
    assert [host[0] for host in hosts] == [0, 0], hosts
    assert [host[1] for host in hosts if host[1] is not None] == [{"world": 4}]
    assert any("note: rank 3 was killed (SIGKILL)" in host[2] for host in hosts)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"nproc": 0}, "--nproc 0"),
        ({"nnodes": 2}, "--nnodes 2 without --rdzv-endpoint"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "h:1"}, "--node-rank 2"),
        ({"node_rank": -1}, "--node-rank -1"),
        ({"rdzv_endpoint": "host"}, "--rdzv-endpoint host"),
        ({"rdzv_endpoint": "host:0"}, "--rdzv-endpoint host:0"),
        ({"rdzv_timeout": 0}, "--rdzv-timeout 0"),
        ({"max_restarts": -1}, "--max-restarts -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LaunchConfig(**settings)
    assert refused.value.found == found


def test_the_tuned_bundle_lies_beside_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_out(Path("models/ckpt-dmt4")) == Path("models/ckpt-dmt4-tuned")
    monkeypatch.chdir(tmp_path)
    assert default_out(Path()) == tmp_path.with_name(f"{tmp_path.name}-tuned")
    assert default_out(Path("models/..")) == tmp_path.with_name(f"{tmp_path.name}-tuned")


def test_errors_travel_in_torchelastics_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    error = BundleError("found", expected="expected", hint="hint", details=["a"])
    monkeypatch.delenv(ERROR_FILE, raising=False)
    assert not write_error(error)
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "gone" / "error.json"))
    assert not write_error(error)
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    assert write_error(error)
    failure = ProcessFailure(0, 1, 3, str(tmp_path / "error.json"))
    read = read_error(failure.error_file_data)
    assert type(read) is BundleError
    assert str(read) == str(error)
    assert read_error({"message": "of another program"}) is None
    for lost in (DmtError("found"), LostRankError("found")):
        assert write_error(lost)
        read = read_error(json.loads((tmp_path / "error.json").read_text()))
        assert (type(read), read and read.exit_code) == (type(lost), lost.exit_code)


@pytest.mark.parametrize("asks_first", [0, 1])
def test_one_rank_of_a_host_prints_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asks_first: int,
) -> None:
    """Under plain torchrun, whose summary no user reads."""
    codes = []
    monkeypatch.setattr("dmt_convert.cluster.rank_process._ABORT_SECONDS", 0)
    monkeypatch.setattr("dmt_convert.cluster.rank_process._on_signals", lambda end: None)
    monkeypatch.setattr("dmt_convert.cluster.rank_process.os._exit", codes.append)
    for rank in (asks_first, 1 - asks_first):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv(ERROR_FILE, str(tmp_path / str(rank) / "error.json"))
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(rank))
        with training_process(json_errors=False, quiet=False, timeout=1):
            raise BundleError(f"found by rank {rank}")
    assert codes == [3, 3]
    assert capsys.readouterr().err == f"error: found by rank {asks_first}\n"
