"""The GPUs of this host: whether there are any, and why torch cannot use them. Imports no torch."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import ConfigError

_DEVICES: Final = Path("/dev")
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_HIDING: Final = frozenset({"", "-1", "NoDevFiles"})
"""Values of that variable that hide all GPUs; the last is Slurm's."""
_DRIVERS: Final = {"12": "525", "13": "580"}
"""Major version of CUDA -> the oldest NVIDIA driver that runs programs built with it."""


def has_gpus() -> bool:
    """Return whether this host has NVIDIA GPUs that nobody hid from this process.

    Only device files count: a container that was given no GPU still sees its host's driver.
    """
    if os.environ.get(_VISIBLE) in _HIDING:
        return False
    return any(_DEVICES.glob("nvidia[0-9]*"))


def sees_one_gpu() -> bool:
    """Return whether this process was given a single GPU, as schedulers do for every task."""
    entries = os.environ.get(_VISIBLE, "").split(",")
    return len(entries) == 1 and entries[0] not in _HIDING


def unusable_error(found: str) -> ConfigError:
    """Say in torch's own words why it can use no GPU.

    Args:
        found: What was looked for, in the beginning of a sentence.
    """
    torch: Any = import_module("torch")
    version, cuda = torch.__version__, torch.version.cuda
    if cuda is None:
        needs = "a build of torch for CUDA"
        hint = "pip install '.[cuda]'"
    else:
        driver = _DRIVERS.get(cuda.partition(".")[0])
        needs = f"a driver for CUDA {cuda}, which torch {version} is built for"
        needs += f": {driver} or newer" if driver else ""
        hint = "look at what nvidia-smi says; update the driver"
    return ConfigError(
        f"{found}, but torch {version} can use none: {_reason(torch)}",
        expected=needs,
        hint=f"{hint}; or train on CPUs with --backend gloo",
    )


def _reason(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return f"it finds {torch.cuda.device_count()} GPUs"
