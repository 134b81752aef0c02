"""What GPUs, NCCL and gloo say: told with its reason, and for what it is."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dmt_convert.cluster import agent, rank_process
from dmt_convert.cluster.checkpoint_store import _explain
from dmt_convert.cluster.faults import (
    GpuError,
    GpuMemoryError,
    PeerFailedError,
    explain_gpu,
    is_loss,
    reason,
)
from dmt_convert.cluster.ranks import _Outcome
from dmt_convert.errors import ConfigError, DmtError

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {what}, NCCL "
    "version 2.27.5\n{kind}: {text}\nLast error:\n{last}\n\nException raised from ..."
)
REFUSED = NCCL.format(
    what="unhandled system error (run with NCCL_DEBUG=INFO for details)",
    kind="ncclSystemError",
    text="System call (e.g. socket, malloc) or external library call failed or device error.",
    last="socketPollConnect: connect to 10.0.0.2<43> returned Connection refused",
)
DUPLICATE = NCCL.format(
    what="invalid usage (run with NCCL_DEBUG=WARN for details)",
    kind="ncclInvalidUsage",
    text="This usually reflects invalid usage of NCCL library.",
    last="Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
)
NOTHING_LAST = "NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed.\n"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.31 GiB is free. Of the allocated memory 77.0 GiB is allocated by PyTorch, and 0.5 GiB "
    "is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try ..."
)
GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[10.0.0.2]:41234. This may indicate a remote worker crash."
)
CUDA = "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (REFUSED, "NCCL: socketPollConnect: connect to 10.0.0.2<43> returned Connection refused"),
        (DUPLICATE, "NCCL: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        (NOTHING_LAST, "NCCL: A call failed."),
        (GLOO, "Connection closed by peer [10.0.0.2]:41234"),
        ("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 2000 ms", "Ranks 1 failed to pass"),
        ("", "DistBackendError"),
    ],
)
def test_the_reason_is_told_in_one_line(text: str, told: str) -> None:
    assert reason(dist.DistBackendError(text)).startswith(told)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError(REFUSED), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (dist.DistStoreError("wait timeout after 600000ms"), True),
        (RuntimeError(GLOO), True),
        (RuntimeError(f"Rank 0 received errors from rank 1. Original exception: \n{GLOO}"), True),
        (PeerFailedError("rank 1 failed"), True),
        (RuntimeError("size mismatch for frank.weight: shape [3] against [4]"), False),
        (RuntimeError("Connection of layers: timeout of NCCL gloo"), False),
        (ValueError(GLOO), False),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), False),
    ],
)
def test_a_lost_rank_is_known_by_what_was_raised(error: Exception, lost: bool) -> None:
    assert is_loss(error) is lost


def test_what_a_peer_raised_is_a_loss_for_the_others_and_a_bug_for_itself() -> None:
    with pytest.raises(PeerFailedError, match="rank 2 failed:\nTraceback"):
        _Outcome(fault="Traceback").unwrap(2)
    failed: Any = CheckpointException("save", {1: (KeyError("x"), None)})  # type: ignore[dict-item]
    kinds = [type(_explain(failed, Path("f"), "written to", rank)) for rank in (0, 1)]
    assert kinds == [PeerFailedError, RuntimeError]


@pytest.mark.parametrize(
    ("error", "kind", "code", "words"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            GpuMemoryError,
            3,
            ("rank 3: ", "Tried to allocate 2.00 GiB", "79.11 GiB", "1.31 GiB", "--batch-size"),
        ),
        (RuntimeError(CUDA.format("out of memory")), GpuMemoryError, 3, ("--batch-size",)),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            GpuMemoryError,
            3,
            ("CUBLAS_STATUS_ALLOC_FAILED",),
        ),
        (
            torch.AcceleratorError(CUDA.format("an illegal memory access was encountered")),
            GpuError,
            1,
            ("rank 3: CUDA error: an illegal memory access", "Xid", "CUDA_LAUNCH_BLOCKING=1"),
        ),
        (
            RuntimeError(CUDA.format("no kernel image is available for execution on the device")),
            ConfigError,
            3,
            ("no kernel image", "--backend gloo"),
        ),
        (
            dist.DistBackendError(DUPLICATE),
            ConfigError,
            3,
            ("Duplicate GPU detected", "NCCL_DEBUG"),
        ),
    ],
)
def test_what_a_gpu_says_is_an_error_with_a_hint(
    error: Exception, kind: type[DmtError], code: int, words: tuple[str, ...]
) -> None:
    told = explain_gpu(error, 3)
    assert type(told) is kind
    assert told.exit_code == code
    assert "If reserved" not in str(told) and "asynchronously" not in str(told)
    assert all(word in str(told) for word in words), str(told)


@pytest.mark.parametrize(
    "error",
    [dist.DistBackendError(REFUSED), RuntimeError("out of memory"), ValueError("CUDA error: x")],
)
def test_what_is_no_gpus_fault_is_left_alone(error: Exception) -> None:
    assert explain_gpu(error, 0) is None


class Exited(BaseException):
    """The process would have ended with a code."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Be a rank under plain torchrun, whose end is only noted."""

    def leave(code: int, **_: object) -> None:
        raise Exited(code)

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv(rank_process.ERROR_FILE, str(tmp_path / "0" / "3" / "error.json"))
    (tmp_path / "0" / "3").mkdir(parents=True)
    for name in (rank_process.LAUNCHED, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_process, "_exit", leave)
    monkeypatch.setattr(rank_process, "_handle_signals", lambda end: None)
    monkeypatch.setattr(rank_process, "_silence_libraries", lambda: None)
    monkeypatch.setattr(rank_process, "_GRACE_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (torch.OutOfMemoryError(OUT_OF_MEMORY), 3, "error: rank 3: CUDA out of memory"),
        (dist.DistBackendError(REFUSED), 1, "another rank was lost, or did not answer within 9 s"),
        (RuntimeError("size mismatch for frank.weight"), 1, "Traceback"),
    ],
)
def test_how_a_rank_ends(
    ending: None, capsys: pytest.CaptureFixture[str], error: Exception, code: int, told: str
) -> None:
    with (
        pytest.raises(Exited) as ended,
        rank_process.training_process(json_errors=False, quiet=True, timeout=9.0),
    ):
        raise error
    assert ended.value.args == (code,)
    printed = capsys.readouterr().err
    assert told in printed
    assert ("another rank" in printed) == ("another rank" in told)
    assert ("Connection refused" in printed) == (error.args == (REFUSED,))


def failure(rank: int, code: int) -> Any:
    return SimpleNamespace(local_rank=rank, exitcode=code, error_file_data={})


@pytest.mark.parametrize("stalled", [False, True])
def test_a_rank_that_nccls_watchdog_aborted_waited_in_vain(
    stalled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[DmtError] = []
    monkeypatch.setattr(agent, "write_error", written.append)
    monkeypatch.setattr(agent, "has_gpus", lambda: True)
    monkeypatch.setattr(agent._Agent, "ended", {1} if stalled else set())
    failures = {0: failure(0, -signal.SIGABRT)}
    if stalled:
        failures[1] = failure(1, -signal.SIGKILL)
    assert agent._conclude(failures) == 3
    (told,) = written
    assert "over NCCL failed, or took longer than --timeout" in str(told)
    assert "out of memory" not in str(told)
    assert told.found.startswith("rank 1 stalled" if stalled else "rank 0 was aborted (SIGABRT)")


def test_an_abort_on_cpus_is_not_nccls(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[DmtError] = []
    monkeypatch.setattr(agent, "write_error", written.append)
    monkeypatch.setattr(agent, "has_gpus", lambda: False)
    assert agent._conclude({0: failure(0, -signal.SIGABRT)}) == 3
    assert written[0].found == "rank 0 was killed (SIGABRT)"
