"""What a GPU that graphs are compiled for, or run on, must have: CUDA, its headers, and room."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from dmt_convert.errors import ExportError
from dmt_convert.free_memory import gib
from dmt_convert.serving.export_manifest import WHOLE, tower_name

if TYPE_CHECKING:
    from dmt_convert.serving.exporter import ExportJob

SPARE_BYTES: Final = 1 << 30
"""What a graph needs beside its weights: CUDA's own memory, and a batch of ids and embeddings."""


def check_gpu() -> None:
    """Refuse to compile for a GPU on a machine that lacks one, or lacks what compiling needs.

    Raises:
        ExportError: There is no CUDA device, no Triton, or no toolkit with headers.
    """
    if not torch.cuda.is_available():
        raise ExportError(
            "a pt2 export for a GPU on a machine that has none",
            expected="a CUDA device and a torch build for it: exporting compiles the packages",
            hint="export on a machine like your server, or omit --gpu",
        )
    if importlib.util.find_spec("triton") is None:
        raise ExportError(
            "a pt2 export for a GPU without the package triton, which compiles kernels",
            expected="the triton that torch's CUDA wheels bring with them",
            hint="install torch for CUDA in a fresh environment, or omit --gpu",
        )
    home = _cuda_home()
    if home is None or not (home / "include" / "cuda.h").is_file():
        found = "no CUDA toolkit was found" if home is None else f"{home} has no include/cuda.h"
        raise ExportError(
            f"a pt2 export for a GPU needs CUDA's headers: {found}",
            expected="a CUDA toolkit of torch's version "
            f"({torch.version.cuda}), which AOTInductor compiles against",
            hint="install the toolkit and set CUDA_HOME to its folder, for example "
            "CUDA_HOME=/usr/local/cuda; --format triton --gpu needs none",
        )


def _cuda_home() -> Path | None:
    from torch.utils.cpp_extension import CUDA_HOME  # looks for it when it is imported

    return None if CUDA_HOME is None else Path(CUDA_HOME)


def free_gpu_bytes() -> int | None:
    """Return what the current GPU has left; None if torch finds none."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free


def check_room(job: ExportJob) -> dict[str, str]:
    """Return the parts to leave out because their weights do not fit one GPU, and why.

    Raises:
        ExportError: A tower does not fit.
    """
    free = free_gpu_bytes()
    if free is None:
        return {}
    room = free - SPARE_BYTES
    towers = [file.bytes for file in job.weights.towers]
    wrong = [
        f"{tower_name(t)}: {gib(size)} of weights" for t, size in enumerate(towers) if size > room
    ]
    if wrong:
        raise ExportError(
            f"{len(wrong)} of {len(towers)} towers do not fit the GPU, which has {gib(free)} free",
            expected=f"at most {gib(max(0, room))} of weights per tower; {gib(SPARE_BYTES)} stay "
            "free for what a request needs",
            hint="convert to more towers, or export with --quantize int8 or int4",
            details=wrong,
        )
    whole = sum(towers) + job.weights.over_arch.bytes
    if whole <= room:
        return {}
    return {WHOLE: f"its weights are {gib(whole)}, and the GPU has {gib(free)} free"}
