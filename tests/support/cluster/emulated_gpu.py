"""A GPU that is emulated on the CPU: which tensors would lie on it, and what would wait for it.

The device is `cpu:0`, which torch takes for another one than `cpu`, though both are host memory.
What is copied there or made there is on it, and so is what is computed of that. Two modes of torch
watch every operation:
- an operation on tensors of both devices fails, as it does on a GPU;
- a tensor of the host that is given to a collective of a group that stands for NCCL fails;
- what would make the host wait for the GPU is counted, by place.

Storages stay alive, so that an address stands for one tensor: for tiny models only.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dmt_convert.cluster import Ranks, Transport

GPU = torch.device("cpu", 0)
STANDS_FOR = "DMT_TESTS_STAND_FOR"
"""Set to nccl: ranks exchange over gloo as they would over NCCL."""

_FETCHES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}
"""Operations whose result the host needs."""
_TO_HOST = {Tensor.cpu, Tensor.tolist, Tensor.numpy}
_COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "gather",
    "all_gather",
    "all_gather_into_tensor",
    "reduce",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
_SEEN = ("/dmt_convert/", "/recipes/", "/torchrec/", "/fbgemm_gpu/")
"""Whose code is named as the place of a wait, the innermost first."""


def stands_for_nccl() -> bool:
    return os.environ.get(STANDS_FOR) == "nccl"


def make_transport(*, on_gpu: bool = False) -> Transport:
    """The transport of a scenario: as over NCCL if the job asks for it."""
    if stands_for_nccl():
        return Transport(GPU if on_gpu else "cpu", "nccl")
    return Transport("cpu", "gloo")


class EmulatedGpu:
    """What lies on the emulated GPU, and what the host waited for."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.parameters: list[Tensor] = []
        """Of the model."""
        self._kept: dict[int, Any] = {}
        self._host_groups: set[Any] = set()

    def holds(self, tensor: Tensor) -> bool:
        return _is_plain(tensor) and tensor.untyped_storage()._cdata in self._kept

    def place(self, tensor: Tensor) -> None:
        if not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage

    def place_gradients(self) -> None:
        """Let gradients lie where their parameters lie: C++ makes them, unseen."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                self.place(parameter.grad)

    def wait(self, what: str) -> None:
        """Count a wait at the innermost frame of the engine, TorchRec or fbgemm."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not any(p in frame.f_code.co_filename for p in _SEEN):
            frame = frame.f_back
        place = "elsewhere"
        if frame is not None:
            file = frame.f_code.co_filename.rpartition("/")[2]
            place = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        self.waits[f"{what} at {place}"] += 1

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch all that is done in this thread, backward passes included."""
        kept = {name: getattr(dist, name) for name in _COLLECTIVES}
        make = Ranks.__init__

        def noted(ranks: Ranks, *arguments: Any, **options: Any) -> None:
            make(ranks, *arguments, **options)
            self._host_groups.add(ranks.group)

        Ranks.__init__ = noted  # type: ignore[method-assign]
        for name, original in kept.items():
            setattr(dist, name, self._guarded(name, original))
        backward = BackwardCFunction.apply

        def watched(node: Any, *gradients: Any) -> Any:
            with _Calls(self):  # torch puts modes of functions aside in backward passes
                return backward(node, *gradients)

        BackwardCFunction.apply = watched  # type: ignore[method-assign]
        try:
            with _Operations(self), _Calls(self):
                yield
        finally:
            BackwardCFunction.apply = backward  # type: ignore[method-assign]
            Ranks.__init__ = make  # type: ignore[method-assign]
            for name, original in kept.items():
                setattr(dist, name, original)

    def _guarded(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            given = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
            group = options.get("group")
            if group not in self._host_groups:
                on_host = [tuple(x.shape) for x in given if not self.holds(x)]
                assert not on_host, f"a tensor of the host is given to NCCL: {name} of {on_host}"
            return original(*arguments, **options)

        return call


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own, as a sharded tensor has not."""
    return type(tensor) in (Tensor, nn.Parameter)


def _is_asked_by_shards(frame: FrameType) -> bool:
    """Whether torch compares a tensor's device with a shard's, which is of the plan: cpu."""
    return "/_shard/" in frame.f_code.co_filename


class _Operations(TorchDispatchMode):
    """Follows tensors through operations."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        given = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        on_gpu = [self._gpu.holds(x) for x in given]
        name = func._schema.name.partition("::")[2]
        if any(on_gpu) and not all(on_gpu):
            self._gpu.place_gradients()
            on_gpu = [self._gpu.holds(x) for x in given]
        if "out" in options:  # DistributedDataParallel's buckets, which C++ makes beside gradients
            self._gpu.place(options["out"])
            on_gpu = [self._gpu.holds(x) for x in given]
        self._check(func, name, given, on_gpu, options)
        found = func(*args, **options)
        is_made_there = options.get("device") == GPU
        if (any(on_gpu) and name != "copy_") or is_made_there:
            for x in tree_leaves(found):
                if isinstance(x, Tensor):
                    self._gpu.place(x)
        return found

    def _check(
        self, func: Any, name: str, given: list[Tensor], on_gpu: list[bool], options: Any
    ) -> None:
        if name in _FETCHES and any(on_gpu):
            self._gpu.wait(name.strip("_"))
        if func.namespace != "aten":
            return
        if name == "_to_copy":
            if options.get("device") == GPU and not all(on_gpu):
                self._copied(options.get("non_blocking", False))
            return
        hosts = [x for x, there in zip(given, on_gpu, strict=True) if not there and x.dim()]
        if not any(on_gpu) or not hosts:
            return
        if name in ("copy_", "index", "index_put_"):
            self._gpu.wait(f"{name} of host memory")
            return
        shapes = [(tuple(x.shape), there) for x, there in zip(given, on_gpu, strict=True)]
        raise AssertionError(f"{name} of tensors on two devices: {shapes}")

    def _copied(self, non_blocking: bool) -> None:
        if not non_blocking:
            self._gpu.wait("blocking copy")


class _Calls(TorchFunctionMode):
    """Sees what never becomes an operation on a CPU: fetches, and which device tensors say."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and self._gpu.holds(first):
            is_device = func == Tensor.device.__get__  # type: ignore[attr-defined]
            if is_device and not _is_asked_by_shards(sys._getframe(1)):
                return GPU
            target = options.get("device", args[1] if len(args) > 1 else None)
            to_host = func is Tensor.to and str(target) == "cpu"
            if func in _TO_HOST or to_host:
                self._gpu.wait(func.__name__)
                with _disable_current_modes():
                    return func(first.detach().clone(), *args[1:], **options)
        if func is torch.tensor and options.get("device") == GPU:
            self._gpu.wait("new tensor")
        found = func(*args, **options)
        if isinstance(found, Tensor) and options.get("device") == GPU:
            self._gpu.place(found)
        return found
