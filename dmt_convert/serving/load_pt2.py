"""Run the graphs that `dmt export --format pt2` wrote. Needs torch, and nothing else.

    model = load("served")                       # the whole model
    tower = load("served", "tower_000")          # one tower; "over_arch" takes all towers' outputs
    logits = model({"dense": dense, "f0.values": ids, "f0.lengths": lengths, ...})
    tower = load("served", "tower_001", device="cuda:1")  # exported with --gpu

A graph is machine code: load exports only that you made, or whose makers you trust. The digests in
`export.json` show damage, and no attack. `model.inputs` lists what a graph takes.

Weights stay in the `.safetensors` files, memory-mapped: loading costs milliseconds, and processes
share one copy. The first requests read from the disk, so send some before traffic comes. On a GPU,
weights are copied to its memory, and so are inputs that lie elsewhere; the output stays there.
Threads: `torch.set_num_threads`. A server of large batches (1,000 rows and more) calls
`keep_freed_memory()` when it starts.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, cuda

_CPUS = ("DEFAULT", "AVX2", "AVX512")
_Loader: Any = torch._C._aoti.AOTIModelPackageLoader
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def load(
    folder: str | Path, part: str = "whole", *, runners: int = 1, device: str | None = None
) -> Graph:
    """Open one graph of an export.

    Args:
        folder: The export.
        part: `whole`, `tower_000`, ..., or `over_arch`.
        runners: Requests that run at the same time; further ones wait.
        device: Where it runs, such as `cuda:1`; by default the CPU, or the current GPU.

    Raises:
        OSError: A file is missing.
        RuntimeError: The graph was damaged, or does not fit this machine or its weights.
    """
    manifest = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
    parts = manifest["parts"]
    if part not in parts:
        raise ValueError(f"{folder} has no graph {part!r}; it has {', '.join(parts)}")
    path = Path(folder) / parts[part]
    digest = manifest.get("files", {}).get(parts[part], {}).get("sha256")
    if digest is not None and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise RuntimeError(f"{path} is not the file that was exported: it has another SHA-256")
    return Graph(path, runners=runners, device=device)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next request; with glibc only.

    Else it goes back to the system after every large batch, and coming by it again takes a third
    of the time. The process stays as large as its largest request made it.

    Returns:
        Whether the C library can do so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) & mallopt(_M_TRIM_THRESHOLD, -1))


class Graph:
    """One graph; may be called by several threads.

    `device` is where it runs, and where its output is.
    """

    def __init__(self, path: Path, *, runners: int = 1, device: str | None = None) -> None:
        described: dict[str, Any] = json.loads(
            _Loader.load_metadata_from_package(str(path), "model")["dmt"]
        )
        self.device = _choose_device(described, device)
        index = self.device.index if self.device.type == "cuda" else -1
        self._loader = _Loader(str(path), "model", False, runners, index)
        self.inputs: list[dict[str, Any]] = described["inputs"]
        self._ids: list[dict[str, Any]] = described["ids"]
        files = {name: MappedFile(path.parent / name) for name in described["files"]}
        self._weights: dict[str, Tensor] = {}
        for name in self._loader.get_constant_fqns():
            entry = described["weights"][name]
            if "values" in entry:
                weight = torch.tensor(
                    entry["values"], dtype=getattr(torch, entry.get("dtype", "int64"))
                )
            else:
                weight = files[entry["file"]].view(entry["tensors"], entry["dtype"], entry["shape"])
            self._weights[name] = weight.to(self.device)
        self._loader.load_constants(self._weights, False, True, True)

    def __call__(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """Return the graph's output: float32, or uint8 of a tower that sends bytes.

        Args:
            feeds: Its inputs by name; others are ignored.

        Raises:
            ValueError: An input is missing or of another type or shape, or ids are outside.
        """
        sizes: dict[str, int] = {}
        tensors = [self._checked(entry, feeds, sizes) for entry in self.inputs]
        try:
            output: Tensor = self._loader.boxed_run(tensors)[0]
        except RuntimeError as error:
            raise ValueError(self._explain(feeds) or str(error)) from None
        return output

    def _checked(
        self, entry: Mapping[str, Any], feeds: Mapping[str, Tensor], sizes: dict[str, int]
    ) -> Tensor:
        name, shape = entry["name"], entry["shape"]
        tensor = feeds.get(name)
        if tensor is None:
            raise ValueError(f"input {name!r} is missing")
        fits = str(tensor.dtype) == f"torch.{entry['dtype']}" and tensor.dim() == len(shape)
        if not fits or any(
            found != (size if isinstance(size, int) else sizes.setdefault(size, found))
            for found, size in zip(tensor.shape, shape, strict=True)
        ):
            found, wanted = list(tensor.shape), [sizes.get(size, size) for size in shape]
            raise ValueError(f"{name!r} is {tensor.dtype} {found}, not {entry['dtype']} {wanted}")
        if sizes.get("B") == 0:
            raise ValueError("the batch is empty")
        return tensor.to(self.device).contiguous()  # a kernel would read any address as its own

    def _explain(self, feeds: Mapping[str, Tensor]) -> str | None:
        """Say which input is wrong; looked for only when a graph has refused."""
        for entry in self._ids:
            ids = feeds[entry["name"]]
            bad = ids[(ids < entry["lowest"]) | (ids >= entry["rows"])]
            if len(bad):
                return (
                    f"id {int(bad[0])} in {entry['name']!r}, whose table has {entry['rows']} rows"
                )
            lengths = feeds[entry["lengths"]] if entry["lengths"] else torch.tensor([len(ids)])
            if bool((lengths < 0).any()) or int(lengths.sum()) != len(ids):
                return f"{entry['lengths']!r} does not add up to the {len(ids)} ids there are"
        return None


def _choose_device(described: Mapping[str, Any], asked: str | None) -> torch.device:
    """Return where a package runs: on the device asked for, if its code fits it.

    Raises:
        RuntimeError: It does not.
    """
    kind = described["device"]
    device = torch.device(kind if asked is None else asked)
    if device.type != kind:
        raise RuntimeError(f"it was compiled for {kind}, and cannot run on {device}")
    needed, found = described["cpu"], torch.backends.cpu.get_cpu_capability()
    weaker = _CPUS[: _CPUS.index(found)] if found in _CPUS else ()
    if needed != found and needed not in weaker:
        raise RuntimeError(f"it was compiled for {needed}; this machine has {found}")
    if kind != "cuda":
        return device
    if not cuda.is_available():
        raise RuntimeError("it was compiled for a GPU; torch finds none here")
    index = cuda.current_device() if str(device) == kind else device.index
    has_major, has_minor = cuda.get_device_capability(index)
    major, minor = described.get("gpu") or (has_major, has_minor)  # early versions did not say
    if has_major != major or has_minor < minor:
        raise RuntimeError(
            f"it was compiled for GPUs of compute capability {major}.{minor}; cuda:{index} has "
            f"{has_major}.{has_minor}"
        )
    return torch.device("cuda", index)


class MappedFile:
    """A `.safetensors` file, memory-mapped; its tensors must not be written to."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._begin = 8 + length

    def view(self, names: Sequence[str], dtype: str, shape: Sequence[int]) -> Tensor:
        """View neighbouring tensors as one.

        Raises:
            RuntimeError: The file does not hold them so.
        """
        places = [self._header.get(name, {}).get("data_offsets", (0, 0)) for name in names]
        kind: torch.dtype = getattr(torch, dtype)
        begin, end, count = places[0][0], places[-1][1], math.prod(shape)
        gaps = any(left[1] != right[0] for left, right in itertools.pairwise(places))
        if gaps or end - begin != count * kind.itemsize or self._begin + end > len(self._bytes):
            raise RuntimeError(f"{', '.join(names)}: not the {dtype} {list(shape)} compiled for")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is read-only: a graph never writes to its weights
            start = self._begin + begin
            flat = torch.frombuffer(self._bytes, dtype=kind, count=count, offset=start)
        return flat.reshape(list(shape))
