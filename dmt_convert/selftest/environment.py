"""What there is: packages, compiler, driver; devices and what they do per second."""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from dmt_convert.cluster import check_requirements, has_gpus, unusable_error
from dmt_convert.free_memory import available_bytes, gib
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.report import Outcome

_PACKAGES: Final = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "onnxruntime")
_SHARED: Final = Path("/dev/shm")
_LEAST_SHARED: Final = 256 << 20
"""NCCL exchanges through shared memory; containers often have 64 MiB of it."""


def check_environment(_: Context) -> Outcome:
    """Say which versions there are; refuse packages that are missing or do not go together."""
    check_requirements()
    found: dict[str, Any] = {name: _version(name) for name in _PACKAGES}
    import fbgemm_gpu
    import torchrec

    assert fbgemm_gpu and torchrec  # they load what fits this torch only
    has_gpu = torch.cuda.is_available()
    if has_gpus() and not has_gpu:
        raise unusable_error("this host has NVIDIA GPUs")
    found |= {
        "python": platform.python_version(),
        "cuda": torch.version.cuda if has_gpu else None,
        "nccl": _nccl_version() if has_gpu else None,
        "compiler": shutil.which(os.environ.get("CXX", "g++")),
        "CUDA_HOME": os.environ.get("CUDA_HOME"),
        "cores": len(os.sched_getaffinity(0)),
        "shared_memory": shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None,
    }
    ranks = torch.cuda.device_count() if has_gpu else 2
    found["context"] = {"device": "cuda" if has_gpu else "cpu", "ranks": ranks}
    shared = found["shared_memory"]
    if has_gpu and shared is not None and shared < _LEAST_SHARED:
        line = f"/dev/shm has {gib(shared)} free; NCCL needs more: docker run --shm-size=1g"
        return Outcome(status="mend", line=line, details=found)
    named = [f"{name} {found[name]}" for name in ("torch", "torchrec") if found[name]]
    fbgemm = found["fbgemm-gpu-cpu"] or found["fbgemm-gpu"]
    return Outcome(status="ok", line=", ".join([*named, f"fbgemm {fbgemm}"]), details=found)


def _nccl_version() -> str:
    found: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, found))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_devices(context: Context) -> Outcome:
    """Say what devices there are, and how fast they multiply and copy."""
    if context.device == "cpu":
        cores, free = len(os.sched_getaffinity(0)), available_bytes()
        speed = _flops("cpu", torch.float32, 512)
        left = "unknown memory" if free is None else gib(free)
        line = f"no GPU; {cores} cores, {left} free; fp32 {speed / 1e9:.0f} GFLOP/s"
        return Outcome(status="ok", line=line, details={"fp32": speed, "free": free})
    gpus = [_try_gpu(index) for index in range(torch.cuda.device_count())]
    first = gpus[0]
    line = (
        f"{len(gpus)} x {first['name']}, {gib(min(gpu['free'] for gpu in gpus))} free; "
        f"fp32 {first['fp32'] / 1e12:.0f}, tf32 {first['tf32'] / 1e12:.0f}, bf16 "
        f"{first['bf16'] / 1e12:.0f} TFLOP/s; memory {first['memory'] / 1e12:.2f} TB/s; to the "
        f"GPU {first['pinned'] / 1e9:.0f} GB/s pinned, {first['pageable'] / 1e9:.0f} pageable"
    )
    return Outcome(status="ok", line=line, details={"gpus": gpus})


def _try_gpu(index: int) -> dict[str, Any]:
    torch.cuda.set_device(index)
    free, total = torch.cuda.mem_get_info()
    size = min(1 << 30, free // 4)
    block = torch.empty(size, dtype=torch.uint8, device="cuda")
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "free": free,
        "total": total,
        "fp32": _flops("cuda", torch.float32, 4096),
        "bf16": _flops("cuda", torch.bfloat16, 4096),
        "memory": 2 * size / _seconds("cuda", lambda: block.clone()),
    }
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = _flops("cuda", torch.float32, 4096)
    torch.backends.cuda.matmul.allow_tf32 = before
    host = torch.empty(256 << 20, dtype=torch.uint8)
    for name, source in (("pageable", host), ("pinned", host.pin_memory())):
        found[name] = len(host) / _seconds("cuda", lambda source=source: source.to("cuda"))
    return found


def _flops(device: str, dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _seconds(device, lambda: a @ a)


def _seconds(device: str, work: Any, repeats: int = 5) -> float:
    """Time of the quickest of a few runs."""
    work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
