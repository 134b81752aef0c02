"""Checkpoints of tensors on a GPU; stand-ins play its part."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmt_convert.cluster import checkpoint_store
from dmt_convert.cluster.checkpoint_store import CheckpointStore
from dmt_convert.cluster.checkpoint_tensors import copy_to_cpu


class OnlyRank:
    """A rank that need not ask others."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def on_first(self, work: Any) -> Any:
        return work()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("device", [None, 3])
def test_the_thread_that_writes_uses_the_gpu_of_its_rank(
    device: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[tuple[str, int]] = []

    def set_device(number: int) -> None:
        used.append((threading.current_thread().name.partition("_")[0], number))

    monkeypatch.setattr(checkpoint_store, "Ranks", OnlyRank)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    store = CheckpointStore(tmp_path / "checkpoints")
    store._writer.submit(lambda: None).result()
    store.close()
    assert used == ([] if device is None else [("checkpoint", device)])


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, and notes what it is asked for."""

    @property
    def is_cuda(self) -> bool:
        return True


def test_copies_of_a_gpu_are_pinned_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, waited = [], []
    really_empty = torch.empty_like

    def empty_like(like: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        pinned.append(pin_memory)
        return really_empty(like.as_subclass(Tensor), device=device)

    class Stream:
        def synchronize(self) -> None:
            waited.append(len(pinned))

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    plain = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3)[:2]}
    on_gpu = {name: tensor.as_subclass(OnGpu) for name, tensor in plain.items()}
    copies = copy_to_cpu(on_gpu)
    assert (pinned, waited) == ([True, True], [2])
    assert all(torch.equal(copies[name], plain[name]) for name in plain)


def test_copies_on_the_cpu_share_no_memory() -> None:
    tensor = torch.arange(4.0)
    copies = copy_to_cpu({0: tensor[1:]})
    tensor.zero_()
    assert copies[0].tolist() == [1.0, 2.0, 3.0]
