"""What GPUs, NCCL and gloo say when they fail, as errors that say what to try. Imports no torch."""

from __future__ import annotations

import re
import sys
from typing import Any, Final

from dmt_convert.errors import ConfigError, DmtError

_GLOO_SOURCE: Final = re.compile(r"\[[^\]\s]*gloo/[^\]\s]*\] ?")
"""Every message of gloo names the line of its source."""
_NCCL_KIND: Final = re.compile(r"^nccl(?P<kind>[A-Z]\w+): (?P<text>.*)$", re.MULTILINE)
_MISUSES: Final = ("InvalidUsage", "InvalidArgument")
"""Errors of NCCL that come again however often one tries."""
_NO_CODE: Final = ("no kernel image", "invalid device function", "device kernel image is invalid")
_NO_MEMORY: Final = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_MORE_OF_MEMORY: Final = " If reserved"
"""Where torch's account of its memory ends, and its advice begins."""
_MAX_REASON: Final = 300


class GpuError(DmtError):
    """A GPU failed, or a program on it; a new start may help."""

    exit_code = 1


class GpuMemoryError(DmtError):
    """A GPU has too little memory for this training."""


class PeerFailedError(RuntimeError):
    """Another rank raised something; it says what, with its traceback."""


def explain_gpu(error: BaseException, rank: int | None) -> DmtError | None:
    """Turn what CUDA or NCCL says of this rank into an error with a hint.

    Args:
        error: What was raised.
        rank: This rank.

    Returns:
        None if it says nothing of the kind; see `is_loss`, too.
    """
    text = str(error)
    who = "" if rank is None else f"rank {rank}: "
    if _is(error, "OutOfMemoryError") or (_is_cuda(error) and _has(text, _NO_MEMORY)):
        return GpuMemoryError(
            f"{who}{_first_line(text).partition(_MORE_OF_MEMORY)[0]}",
            expected="tables, optimizer state and activations of each rank in its GPU's memory",
            hint="lower --batch-size, train on more GPUs (--nproc, --nnodes), or choose "
            "--table-optimizer rowwise-adagrad; if much memory is reserved but not allocated, set "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        )
    if _is_cuda(error) and _has(text, _NO_CODE):
        return ConfigError(
            f"{who}{_first_line(text)}",
            expected="a GPU that these builds of torch and fbgemm have code for",
            hint="compare `python -m torch.utils.collect_env` with the builds' release notes; "
            "--backend gloo trains on CPUs",
        )
    if _is_cuda(error):
        return GpuError(
            f"{who}{_first_line(text)}",
            expected="GPUs that run to the end",
            hint="look for Xid in the host's system log, and run it again with "
            "CUDA_LAUNCH_BLOCKING=1 to see which step fails; --resume goes on from the last whole "
            "checkpoint",
        )
    found = _NCCL_KIND.search(text) if _is(error, "distributed.DistBackendError") else None
    if found is not None and found["kind"] in _MISUSES:
        return ConfigError(
            f"{who}{reason(error)}",
            expected="a GPU of its own for every rank, and the same NCCL everywhere",
            hint="NCCL_DEBUG=WARN prints more",
        )
    return None


def is_loss(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone, failed, or does not answer."""
    if isinstance(error, PeerFailedError) or _is(error, "distributed.DistError"):
        return True
    return isinstance(error, RuntimeError) and _GLOO_SOURCE.search(str(error)) is not None


def reason(error: BaseException) -> str:
    """Return what a backend of torch.distributed says is wrong, in one line."""
    text = str(error) or type(error).__name__
    last = [line.strip() for line in text.partition("Last error:")[2].splitlines() if line.strip()]
    kind = _NCCL_KIND.search(text)
    if last or kind:
        said = last[0] if last else kind["text"] if kind else ""
        return f"NCCL: {said}"[:_MAX_REASON]
    said = _GLOO_SOURCE.sub("", _first_line(text))
    return re.sub(r"^\[[^]]*\]:? ", "", said).partition(". ")[0][:_MAX_REASON]


def _is(error: BaseException, name: str) -> bool:
    """Whether an error is of a class of torch, which is not imported for this."""
    kind: Any = sys.modules.get("torch")
    for part in name.split("."):
        kind = getattr(kind, part, None)
    return kind is not None and isinstance(error, kind)


def _is_cuda(error: BaseException) -> bool:
    is_error = _is(error, "AcceleratorError") or isinstance(error, RuntimeError)
    return is_error and str(error).startswith("CUDA error")


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
