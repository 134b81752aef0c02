"""Whether what training over ranks needs is installed, and goes together. Imports none of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

from dmt_convert.errors import ConfigError
from dmt_convert.stacks import STACKS, Stack

logger = logging.getLogger(__name__)

ANY_STACK: Final = "DMT_ANY_STACK"
"""Environment variable: 1 takes releases that are not known to go together, with a warning."""
_NEEDED: Final = ("torch", "torchrec", "fbgemm_gpu", "torchmetrics", "tensordict")
"""Packages that training over ranks imports; one process does without all but torch."""
_CPU_BUILD: Final = "fbgemm-gpu-cpu"
_CUDA_BUILD: Final = "fbgemm-gpu"


def check_requirements() -> None:
    """Refuse packages that are missing, or whose releases do not go together.

    Raises:
        ConfigError: With what is installed, and what to install.
    """
    lacking = missing_packages()
    if lacking:
        raise lacking_error(lacking)
    torch, torchrec = _version("torch"), _version("torchrec")
    cpu, cuda = _version(_CPU_BUILD), _version(_CUDA_BUILD)
    is_stand_in = cuda.endswith("+cpu")  # packaging/fbgemm-gpu-cpu
    if cpu and cuda and not is_stand_in:
        raise _both_error(cpu, cuda)
    fbgemm, name = (cpu, _CPU_BUILD) if cpu else (cuda, _CUDA_BUILD)
    if any(_fits(stack, torch, torchrec, fbgemm) for stack in STACKS):
        return
    found = (
        f"torch {torch or '(unknown)'}, torchrec {torchrec or '(unknown)'} and {name} "
        f"{fbgemm or '(unknown)'} are not known to go together"
    )
    if os.environ.get(ANY_STACK) == "1":
        logger.warning("%s; they are used all the same, as %s is 1", found, ANY_STACK)
        return
    wanted = next((stack for stack in STACKS if _is_of(torch, stack.torch)), STACKS[-1])
    raise ConfigError(
        found,
        expected="; or ".join(map(str, STACKS)),
        hint=f"{install_command(wanted)}; or {ANY_STACK}=1 in the environment, to try these",
    )


def install_command(stack: Stack) -> str:
    """Return what installs a stack from a clone."""
    return (
        f"pip install ./packaging/fbgemm-gpu-cpu '.[cpu{stack.suffix}]' "
        f"(or '.[cuda{stack.suffix}]')"
    )


def missing_packages() -> list[str]:
    """Return the packages that training over ranks needs and that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def lacking_error(packages: Sequence[str]) -> ConfigError:
    """Say which packages training over ranks lacks, and how to do without."""
    torch = _version("torch")
    stack = next((stack for stack in STACKS if _is_of(torch, stack.torch)), STACKS[0])
    return ConfigError(
        f"training over ranks needs packages that are not installed: {', '.join(packages)}",
        expected=", ".join(_NEEDED),
        hint=f"{install_command(stack)}; or train in one process, which needs none of them: "
        "python -P -m dmt_convert.recipes.finetune_dmt --bundle BUNDLE --data DATA --out OUT",
    )


def _both_error(cpu: str, cuda: str) -> ConfigError:
    return ConfigError(
        f"both builds of fbgemm are installed: {_CPU_BUILD} {cpu} and {_CUDA_BUILD} {cuda}",
        expected="one of them: each overwrites files of the other",
        hint="make a new virtual environment, and install '.[cpu]' or '.[cuda]' there",
    )


def _version(name: str) -> str:
    """Return the release of an installed distribution; "" if there is none of that name."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _fits(stack: Stack, torch: str, torchrec: str, fbgemm: str) -> bool:
    pairs = ((torch, stack.torch), (torchrec, stack.torchrec), (fbgemm, stack.fbgemm))
    return all(_is_of(found, known) for found, known in pairs)


def _is_of(found: str, known: str) -> bool:
    """Whether two releases have the same minor version: patch releases keep the interface."""
    return found.split(".")[:2] == known.split(".")[:2]
