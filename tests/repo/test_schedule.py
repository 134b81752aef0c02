"""Tests of a file share a worker, and what they build."""

import re
import subprocess
import sys
from collections import defaultdict

import pytest

from support.paths import REPOSITORY
from support.schedule import group_of


def workers_of(printed: str) -> dict[str, set[str]]:
    """Return group -> workers, from what `pytest -v` prints."""
    found = defaultdict(set)
    for worker, test in re.findall(r"^\[(gw\d)\] \[ *\d+%\] PASSED (\S+)", printed, re.MULTILINE):
        found[group_of(test)].add(worker)
    return found


@pytest.mark.slow
def test_a_file_has_one_worker_and_both_work() -> None:
    files = ["tests/repo/test_changelog.py", "tests/repo/test_schedule.py"]
    options = [
        "--numprocesses",
        "2",
        "--dist",
        "loadgroup",
        "-v",
        "--fast",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    workers = workers_of(done.stdout)
    assert len(workers) == 2 and all(len(names) == 1 for names in workers.values()), workers
    assert len(set.union(*workers.values())) == 2


def test_a_file_of_two_workers_is_noticed() -> None:
    line = "[gw{}] [ 50%] PASSED tests/plan/test_plan.py::test_it[{}] \n"
    assert workers_of(line.format(0, "a") + line.format(1, "b")) == {
        "plan/test_plan.py": {"gw0", "gw1"}
    }


@pytest.mark.parametrize(
    ("test", "group"),
    [
        ("tests/engine/test_ranks.py::test_it", "processes"),
        ("tests/export/triton/test_triton_server.py::test_it[a::b]", "processes"),
        ("tests/export/test_networks.py::test_it[tests/x]", "export/test_networks.py"),
        ("tests/verify/test_verify.py::test_it", "scored"),
    ],
)
def test_what_takes_turns_or_shares_bundles_is_one_group(test: str, group: str) -> None:
    assert group_of(test) == group
