"""Start ranks on this host that believe to be on two; run as a file, it is such a rank.

`python ranks.py HOSTS HOOKS MODULE ARGUMENTS...`: the module's `main(arguments)` is called. HOOKS
is JSON: `kill_at` ends the last rank before that step of a training, as a lost host would;
`measure` writes what a step costs into that file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def run_ranks(
    nproc: int,
    module: str,
    arguments: Sequence[str],
    hooks: Mapping[str, Any] | None = None,
    *,
    may_die: bool = False,
) -> Mapping[str, Any] | None:
    """Run a module on ranks, half of them on each of two emulated hosts.

    Returns:
        The document that rank 0 printed; None if a rank died.

    Raises:
        DmtError: A rank refused.
        RuntimeError: A rank failed.
    """
    from dmt_convert.cluster import launch
    from dmt_convert.config import LaunchConfig

    hosts = 2 if nproc > 1 and nproc % 2 == 0 else 1
    config = LaunchConfig(nproc=nproc, shutdown_timeout=5)
    given = [str(hosts), json.dumps(hooks or {}), module, *arguments]
    done = launch(config, given, recipe=Path(__file__), capture=True)
    if done.code == 0:
        return done.result or {}
    if may_die:
        return None
    if done.error is not None:
        raise done.error
    raise RuntimeError(f"the ranks ended with code {done.code}")


def _emulate_hosts(hosts: int) -> None:
    """Make this rank one of a host that has only some of the ranks, and only their GPUs."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = size // hosts
    os.environ |= {"LOCAL_RANK": str(rank % own), "LOCAL_WORLD_SIZE": str(own)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(size)]
    first = rank // own * own
    if visible != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + own])


def _hook(recipe: Any, hooks: Mapping[str, Any]) -> None:
    """Wrap the recipe's step."""
    take_step, steps = recipe.take_step, 0
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    meter: Any = None
    if "measure" in hooks:
        from dmt_convert.selftest.steps import StepMeter

        meter = StepMeter(Path(hooks["measure"]))

    def hooked(trainer: Any, lr_factor: float) -> Any:
        nonlocal steps
        steps += 1
        if last and steps == hooks.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if meter is None:
            return take_step(trainer, lr_factor)
        return meter.measure(lambda: take_step(trainer, lr_factor))

    recipe.take_step = hooked


def main(hosts: str, hooks: str, name: str, *arguments: str) -> None:
    """Be one rank."""
    _emulate_hosts(int(hosts))
    module = import_module(name)
    if json.loads(hooks):
        _hook(module, json.loads(hooks))
    module.main(list(arguments))


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    main(*sys.argv[1:])
