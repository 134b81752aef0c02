"""Killed, interrupted or raced, a conversion leaves the old bundle, the new one, or nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from dmt_convert.bundle import check_digests, open_bundle
from support.checkpoints.flat import make_flat
from support.cluster.client import environment

QUICKLY = ("--towers", 2, "--distill-steps", 0)
TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_1.weight"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 48 MiB, so that writing takes a while."""

    def edit(state: dict[str, Any]) -> None:
        state[TABLE] = torch.full((3 << 19, 8), 0.5)

    return make_flat(tmp_path_factory.mktemp("large") / "ckpt.safetensors", edit=edit)


@pytest.mark.slow
def test_kill_at_many_moments(tmp_path: Path, large: Path) -> None:
    running = {}
    for mode in ("new", "replaced"):
        (tmp_path / mode).mkdir()
        command = [
            sys.executable,
            "-m",
            "support.kill_points",
            str(large),
            str(tmp_path / mode),
            mode,
        ]
        running[mode] = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment()
        )
    for mode, process in running.items():
        stdout, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        results = [json.loads(line) for line in stdout.splitlines()]
        rerun = results.pop()
        assert rerun["status"] == 0
        assert rerun["after"].isdecimal()
        assert rerun["names"] == ["out"]
        assert len(results) == 8
        for result in results:
            # what was there before, or a whole new bundle; never a mixture
            assert not result["after"].startswith("BROKEN"), result
            if mode == "replaced":
                assert result["after"] != "absent", result
        killed = [result for result in results if result["killed"]]
        # five moments are certain; of those drawn from the clock some may come after the end
        assert len(killed) >= 6
        assert any(result["leftovers"] for result in killed)
        assert max(result["leftovers"] for result in results) == 1  # the next one tidies up
        (swapped,) = (r for r in killed if r["kill"] == "after the swap")
        assert swapped["after"].isdecimal()
        assert swapped["after"] != swapped["before"]
        (kept,) = (r for r in killed if r["kill"] == "before the swap")
        assert kept["after"] == kept["before"]


def start(*args: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dmt_convert.cli.main", *map(str, args)]

    def heed_interrupts() -> None:  # what a shell starts in the background ignores them
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"preexec_fn": heed_interrupts, **options},
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(tmp_path: Path, large: Path, number: int) -> None:
    process = start("convert", large, *QUICKLY, "--out", tmp_path / "out", "--json")
    end = time.monotonic() + 60
    while not any(tmp_path.iterdir()):  # until the staging folder is there
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"] == "Interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_conversions_at_once(tmp_path: Path, large: Path) -> None:
    both = [
        start("convert", large, *QUICKLY, "--out", tmp_path / "out", "--json") for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 3], outputs
    refusal = json.loads(outputs[codes.index(3)][0])
    assert refusal["error"] == "BundleError"
    assert "exists" in refusal["found"] or "another conversion" in refusal["found"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_digests(open_bundle(tmp_path / "out"))


@pytest.mark.slow
def test_a_limit_on_file_sizes(tmp_path: Path, large: Path) -> None:
    """RLIMIT_FSIZE stops writes just as a full disk does."""
    limit = 20 << 20
    process = start(
        "convert",
        large,
        *QUICKLY,
        "--out",
        tmp_path / "out",
        "--json",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert "is full (File too large)" in json.loads(stdout)["found"]
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@contextmanager
def as_another_user() -> Iterator[None]:
    """Give up root's right to write anywhere; other users never had it."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.usefixtures("few_rows")
def test_a_folder_that_may_not_be_written(call_dmt: Callable[..., Any]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = make_flat(folder / "ckpt.pt")
        assert call_dmt("convert", source, *QUICKLY).code == 0  # imports all it needs
        closed = folder / "closed"
        closed.mkdir(mode=0o555)
        with as_another_user():
            run = call_dmt("convert", source, *QUICKLY, "--out", closed / "out", "--json")
        assert run.code == 3, run
        value = json.loads(run.stdout)
        assert value["found"].endswith("(Permission denied)")
        assert str(closed) in value["found"]
        assert "--out" in value["hint"]
        assert "Traceback" not in run.stderr
        assert list(closed.iterdir()) == []
        source.chmod(0)
        with as_another_user():
            run = call_dmt("inspect", source, "--json")
        assert run.code == 3
        assert str(source) in json.loads(run.stdout)["found"]
        assert "Permission denied" in json.loads(run.stdout)["found"]
