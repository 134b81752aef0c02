"""Whether ranks meet, and exchange what they should: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from dmt_convert.selftest.process import Context
from dmt_convert.selftest.ranks import run_ranks
from dmt_convert.selftest.report import Outcome

if TYPE_CHECKING:
    from dmt_convert.cluster import RankLayout

_LIMIT: Final = timedelta(seconds=60)
_BYTES: Final = 32 << 20
"""Of the timed exchange, per rank."""


def check_gloo(context: Context) -> Outcome:
    """Exchange on the CPU."""
    return _check(context, "gloo")


def check_nccl(context: Context) -> Outcome:
    """Exchange between GPUs."""
    if context.device != "cuda":
        return Outcome(status="skipped", line="no GPU")
    return _check(context, "nccl")


def _check(context: Context, backend: str) -> Outcome:
    found = run_ranks(context.nproc, "dmt_convert.selftest.exchange", [backend]) or {}
    wrong = found.get("wrong", ["the ranks said nothing"])
    if wrong:
        return Outcome(status="differs", line="; ".join(wrong)[:300], details=found)
    speeds = ", ".join(f"{name} {speed['AlltoAll']:.2g}" for name, speed in found["speeds"].items())
    line = f"{context.nproc} ranks met in {found['start']:.1f} s"
    line += f"; AlltoAll in GB/s per rank: {speeds}" if speeds else ""
    return Outcome(status="ok", line=line, details=found)


def main(arguments: list[str]) -> None:
    """Be one rank."""
    from dmt_convert.cluster import read_layout, start_ranks, stop_ranks, training_process

    (backend,) = arguments
    with training_process(json_errors=False, quiet=True, timeout=_LIMIT.total_seconds()):
        layout = read_layout("nccl" if backend == "nccl" else "gloo")
        begin = time.perf_counter()
        ranks = start_ranks(layout, hosts_per_tower=1, timeout=_LIMIT)
        start = time.perf_counter() - begin
        device = torch.device(layout.device)
        groups = _make_groups(layout)
        wrong: list[str] = []
        speeds: dict[str, dict[str, float]] = {}
        for name, group in groups.items():
            own = partial(_wrong, device, group)
            wrong += [f"{name}: {text}" for texts in ranks.on_all(own) for text in texts]
            speeds |= _measure(device, group, name)
        stop_ranks()
    if layout.rank == 0:
        sys.stdout.write(json.dumps({"wrong": wrong, "start": start, "speeds": speeds}) + "\n")


def _make_groups(layout: RankLayout) -> dict[str, dist.ProcessGroup | None]:
    """Return this rank's groups: all ranks, those of its host, and its peers on other hosts."""
    own, size = layout.ranks_per_host, layout.world_size
    # every rank has to take part in making every group
    inside = [dist.new_group([*range(first, first + own)]) for first in range(0, size, own)]
    across = [dist.new_group([*range(first, size, own)]) for first in range(own)]
    return {
        "all ranks": None,
        "inside hosts": inside[layout.rank // own],
        "across hosts": across[layout.rank % own],
    }


def _wrong(device: torch.device, group: dist.ProcessGroup | None) -> list[str]:
    """Exchange messages of known content; uneven ones, and empty ones."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    wrong = []

    def count(source: int, target: int) -> int:
        return (source + 2 * target + 1) % 3 * 5

    for dtype in (torch.float32, torch.uint8, torch.int64):
        sent = [torch.full((count(rank, t),), 16 * rank + t, dtype=dtype) for t in range(size)]
        expected = [torch.full((count(s, rank),), 16 * s + rank, dtype=dtype) for s in range(size)]
        got = torch.empty(sum(map(len, expected)), dtype=dtype, device=device)
        splits = [len(part) for part in expected], [len(part) for part in sent]
        dist.all_to_all_single(got, torch.cat(sent).to(device), *splits, group=group)
        if not torch.equal(got.cpu(), torch.cat(expected)):
            wrong.append(f"rank {rank}: AlltoAll of {dtype} gave other numbers than were sent")
    total = torch.full((7,), float(rank + 1), device=device)
    dist.all_reduce(total, group=group)
    if not torch.equal(total.cpu(), torch.full((7,), size * (size + 1) / 2)):
        wrong.append(f"rank {rank}: all-reduce gave another sum")
    return wrong


def _measure(
    device: torch.device, group: dist.ProcessGroup | None, name: str
) -> dict[str, dict[str, float]]:
    """Return GB/s of one rank in a group; nothing of a group of one."""
    size = dist.get_world_size(group)
    if size == 1:
        return {}
    data = torch.zeros(_BYTES // 4 // size * size, device=device)
    out = torch.empty_like(data)
    work: dict[str, Callable[[], Any]] = {
        "AlltoAll": lambda: dist.all_to_all_single(out, data, group=group),
        "all-reduce": lambda: dist.all_reduce(data, group=group),
    }
    found = {}
    for kind, run in work.items():
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found[kind] = data.nbytes / min(times) / 1e9
    return {name: found}
