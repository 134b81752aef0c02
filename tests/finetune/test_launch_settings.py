"""What a launch is given: the options decide, whatever a job system left in the environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

from dmt_convert.cluster import agent, launcher, requirements
from dmt_convert.cluster.demands import Demand, Demands
from dmt_convert.cluster.launcher import (
    LaunchConfig,
    _environment,
    torchrun_arguments,
    torchrun_command,
)
from dmt_convert.cluster.rank_process import StopRequest
from dmt_convert.cluster.requirements import lacking_error, missing_packages
from dmt_convert.config import FinetuneConfig
from dmt_convert.config.values import NumaBinding
from dmt_convert.errors import ConfigError

TWO_HOSTS = LaunchConfig(nnodes=2, node_rank=1, rdzv_endpoint="host0:29400")


def test_one_host_meets_on_its_loopback() -> None:
    """Its name may not resolve, and PET_NNODES may name more hosts."""
    command = torchrun_command(LaunchConfig(nproc=4), ["--bundle", "b"])
    assert command[:2] == ("env", "PYTHONSAFEPATH=1")
    assert command[2:5] == (sys.executable, "-m", "torch.distributed.run")
    assert command[5:] == (
        "--nnodes=1",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=4",
        "--max-restarts=0",
        "--shutdown-timeout=30",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        *("-m", "dmt_convert.recipes.finetune_dmt", "--bundle", "b"),
    )


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with GPUs, numactl and two NUMA nodes; returns their folder."""
    for name in ("node0", "node1", "possible"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(launcher, "has_gpus", lambda: True)
    monkeypatch.setattr(launcher.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(launcher, "_NUMA_NODES", tmp_path)
    return tmp_path


def bindings(config: LaunchConfig) -> list[str]:
    return [part for part in torchrun_arguments(config, []) if part.startswith("--numa")]


def test_ranks_on_gpus_stay_on_near_cores(gpu_host: Path) -> None:
    assert bindings(LaunchConfig()) == ["--numa-binding=node"]
    assert bindings(FinetuneConfig(data=Path("d"), backend="gloo")) == []
    assert bindings(LaunchConfig(numa_binding="none")) == []
    assert bindings(LaunchConfig(numa_binding="core-complex")) == ["--numa-binding=core-complex"]
    (gpu_host / "node1").rmdir()
    assert bindings(LaunchConfig()) == []
    assert bindings(LaunchConfig(numa_binding="node")) == ["--numa-binding=node"]


@pytest.mark.parametrize(
    ("lacking", "told"), [("numactl", "numactl is not installed"), ("GPUs", "have no GPUs here")]
)
def test_what_cannot_be_bound_is_refused(
    gpu_host: Path, lacking: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "numactl":
        monkeypatch.setattr(launcher.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(launcher, "has_gpus", lambda: False)
    assert bindings(LaunchConfig()) == []
    with pytest.raises(ConfigError, match=told):
        bindings(LaunchConfig(numa_binding="node"))


@pytest.mark.parametrize("usable", [True, False])
def test_ranks_are_bound_only_if_torch_can_use_the_gpus(
    usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise torchrun would fail before a rank can say why it cannot."""
    run, api = map(import_module, ("torch.distributed.run", "torch.distributed.launcher.api"))
    ran: list[str | None] = []
    monkeypatch.setenv("DMT_TRACEBACK", "1")
    monkeypatch.setattr(agent, "die_with_parent", lambda number: None)
    monkeypatch.setattr(agent.signal, "signal", lambda *_: None)
    monkeypatch.setattr(api, "LocalElasticAgent", api.LocalElasticAgent)  # undone afterwards
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    monkeypatch.setattr(run, "run", lambda options: ran.append(options.numa_binding))
    assert agent.main(["--nnodes=2", "--numa-binding=node", "x.py"]) == 0
    assert ran == ["node" if usable else None]


def test_torchrun_is_given_what_it_knows() -> None:
    """Every binding that the option offers; further arguments come before the recipe."""
    run = import_module("torch.distributed.run")
    for kind in get_args(NumaBinding)[1:]:
        assert run.parse_args([f"--numa-binding={kind}", "x.py"]).numa_binding == kind
    given = torchrun_arguments(LaunchConfig(torchrun_args="--tee 3 --log-dir 'my logs'"), ["--x"])
    options = run.parse_args(list(given))
    assert (options.tee, options.log_dir) == ("3", "my logs")
    assert options.training_script_args == ["--x"]
    with pytest.raises(ConfigError, match="torchrun_args cannot be split"):
        LaunchConfig(torchrun_args="--log-dir 'logs")


def test_an_address_that_is_given_is_taken() -> None:
    assert "--local-addr=10.0.0.7" in torchrun_command(LaunchConfig(local_addr="10.0.0.7"), [])
    several = torchrun_command(TWO_HOSTS, [])
    assert "--nnodes=2" in several
    assert not any(argument.startswith("--local-addr") for argument in several)


def test_a_recipe_of_ones_own_may_import_what_lies_beside_it() -> None:
    command = torchrun_command(LaunchConfig(), ["--bundle", "b"], Path("mine.py"))
    assert command[0] == sys.executable
    assert command[-3:] == ("mine.py", "--bundle", "b")


def test_torchrun_reads_no_option_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("PET_NNODES", "PET_NODE_RANK", "PET_RDZV_CONF"):
        monkeypatch.setenv(name, "3")
    caplog.set_level("INFO")
    environment = _environment(LaunchConfig(), Path("error.json"), None)
    assert not [name for name in environment if name.startswith("PET_")]
    assert "PET_NNODES, PET_NODE_RANK, PET_RDZV_CONF" in caplog.text


def test_ranks_import_nothing_from_the_current_folder() -> None:
    assert _environment(LaunchConfig(), Path("e"), None)["PYTHONSAFEPATH"] == "1"
    assert "PYTHONSAFEPATH" not in _environment(LaunchConfig(), Path("e"), Path("mine.py"))


def test_gloo_listens_on_the_loopback_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert _environment(LaunchConfig(), Path("e"), None)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in _environment(TWO_HOSTS, Path("e"), None)
    given = LaunchConfig(local_addr="10.0.0.7")
    assert "GLOO_SOCKET_IFNAME" not in _environment(given, Path("e"), None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert _environment(LaunchConfig(), Path("e"), None)["GLOO_SOCKET_IFNAME"] == "eth1"


def test_without_torchrec_nothing_is_launched(
    bundle_path: Path, click_data: Path, call_dmt: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("dmt_convert.cluster.requirements.missing_packages", lambda: ["torchrec"])
    monkeypatch.setattr("dmt_convert.cluster.finetune.launch", lambda *_, **__: 1 / 0)
    run = call_dmt("finetune", bundle_path, "--data", click_data, "--json")
    assert run.code == 3
    value = json.loads(run.stdout)
    assert value["found"].endswith("not installed: torchrec")
    assert "pip install" in value["hint"]
    assert "-m dmt_convert.recipes.finetune_dmt" in value["hint"]


def test_missing_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages() == []
    monkeypatch.setattr(requirements, "_NEEDED", ("json", "no_such_package_at_all"))
    assert missing_packages() == ["no_such_package_at_all"]
    assert "no_such_package_at_all" in lacking_error(missing_packages()).found


@pytest.mark.parametrize(
    "option",
    [
        ("--table-optimizer", "adamw"),
        ("--dense-optimizer", "lamb"),
        ("--lr-decay", "cosines"),
        ("--comm-dtype", "fp4"),
        ("--backend", "mpi"),
    ],
)
def test_unknown_choices_are_usage_errors_before_anything_starts(
    bundle_path: Path,
    call_dmt: Callable[..., Any],
    option: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmt_convert.cluster.finetune.launch", lambda *_, **__: 1 / 0)
    run = call_dmt("finetune", bundle_path, "--data", "clicks", *option)
    assert run.code == 2
    assert all(word in run.stderr for word in option)


@pytest.mark.slow
def test_the_recipe_runs_without_docstrings() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-P", "-m", "dmt_convert.recipes.finetune_dmt", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert "Fine-tune a bundle" in done.stdout


class SteppedRanks:
    """Ranks in one process: what all of them ask for is known."""

    def __init__(self, others: list[int], *, is_first: bool = True) -> None:
        self.others, self.is_first = others, is_first

    def start_max(self, value: int) -> Callable[[], int]:
        largest = max(value, self.others.pop(0))
        return lambda: largest


def test_ranks_stop_one_step_after_any_of_them_was_signalled() -> None:
    request = StopRequest()
    ranks: Any = SteppedRanks([0, 0, 2, 0])
    demands = Demands(ranks, None, request=request)
    assert [demands.poll() for _ in range(4)] == [0, 0, 0, Demand.STOP]
    with request.watch():
        request.note(signal.SIGTERM)
    ranks.others = [0, 0]
    assert [demands.poll() for _ in range(2)] == [0, Demand.STOP]


def test_the_first_ranks_clock_asks_for_checkpoints() -> None:
    now = [0.0]
    ranks: Any = SteppedRanks([0] * 9)
    demands = Demands(ranks, 60.0, request=StopRequest(), clock=lambda: now[0])
    assert demands.poll() is Demand.NOTHING
    now[0] = 61.0
    assert [demands.poll(), demands.poll()] == [Demand.NOTHING, Demand.SAVE]
    demands.saved(0.1)
    demands.poll()
    assert demands.poll() is Demand.NOTHING
    now[0] = 125.0
    demands.poll()
    assert demands.poll() is Demand.SAVE
    demands.saved(10.0)  # slow to write: at most a fiftieth of the time is spent on it
    now[0] = 600.0
    demands.poll()
    assert demands.poll() is Demand.NOTHING


def test_a_signal_is_noted_only_while_a_loop_looks_for_it() -> None:
    request = StopRequest()
    assert not request.note(signal.SIGTERM)
    assert request.signal is None
    with request.watch():
        assert request.note(signal.SIGUSR1)
        assert request.note(signal.SIGTERM)
    assert request.signal is signal.SIGUSR1
    assert not request.note(signal.SIGTERM)
