"""One rank: builds variants and trains turns of them, as the stage asks.

Requests come as lines of JSON on stdin, answers go as lines of JSON to what was stdout; anything
else that is printed goes to stderr.

    {"do": "build", "variant": NAME}                       {"loss": mean loss of the first step,
                                                            "sent": bytes to every rank | null,
                                                            "planned": bytes of all ranks | null}
    {"do": "turn", "variant": NAME, "steps": n}            {"start": s, "ends": [s, ...],
                                                            "cpu_s": s, "bytes": {NIC: [rx, tx]}}

Times are of the monotonic clock, which all processes of a machine share. The bytes are counted by
the first rank of a host for the whole host.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .case_model import Batch, endless, make_batches
from .network import read_counters
from .settings import Settings
from .variants import RankContext, Variant, build, counted_bytes, mean_over_ranks

Counters = dict[str, tuple[int, int]]


class Rank:
    """Variants that are built, and where each stands in its batches."""

    def __init__(self, settings: Settings, context: RankContext) -> None:
        self.settings = settings
        self.context = context
        self.batches = make_batches(settings, context.rank)
        self.variants: dict[str, Variant] = {}
        self.feeds: dict[str, Iterator[Batch]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        name = request["variant"]
        if request["do"] == "build":
            self.variants[name] = build(name, self.settings, self.context)
            self.feeds[name] = endless(self.batches)
            with counted_bytes() as sent:
                loss = self._step(name)
            planned = self.variants[name].planned
            counts = {"planned": planned, "sent": None if planned is None else sent}
            return {"loss": mean_over_ranks(loss), **counts}
        assert request["do"] == "turn", request
        return self._turn(name, request["steps"])

    def _step(self, name: str) -> torch.Tensor:
        before = self.context.computed
        loss = self.variants[name].step(next(self.feeds[name]))
        called = self.context.computed - before
        assert called == 1, f"{name} called compute() {called} times in a step, not once"
        return loss

    def _turn(self, name: str, steps: int) -> dict[str, Any]:
        for _ in range(self.settings.warmup):
            self._step(name)
        bytes_before = self._count()
        cpu_before, start = time.process_time(), time.monotonic()
        ends = []
        for _ in range(steps):
            self._step(name)
            ends.append(time.monotonic())
        cpu_s = time.process_time() - cpu_before
        moved = {
            nic: [now - then for now, then in zip(counts, bytes_before[nic], strict=True)]
            for nic, counts in self._count().items()
        }
        return {"start": start, "ends": ends, "cpu_s": cpu_s, "bytes": moved}

    def _count(self) -> Counters:
        """Count while all ranks stand still."""
        dist.barrier()
        counters = read_counters() if self.context.local_rank == 0 else {}
        dist.barrier()
        return counters


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    settings = Settings.from_json(json.loads(sys.argv[1]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=settings.timeout_s))
    context = RankContext(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        compute_s=settings.compute_ms / 1000,
    )
    rank = Rank(settings, context)
    for line in sys.stdin:
        print(json.dumps(rank.answer(json.loads(line))), file=answers)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
