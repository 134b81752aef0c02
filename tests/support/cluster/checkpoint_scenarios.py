"""What ranks do with a store of checkpoints; run by `rank_server`."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Placed

from dmt_convert.cluster import checkpoint_folder, checkpoint_tensors
from dmt_convert.cluster.checkpoint_store import CheckpointStore
from dmt_convert.errors import DmtError

ROW_WISE = "towers.towers.0.embedding.embedding_bags.t_0.weight"
COLUMN_WISE = "towers.towers.1.embedding.embedding_bags.t_7.weight"


def whole_tensors(step: int) -> dict[str, Tensor]:
    """What all ranks hold together after a step; odd sizes make the shards uneven."""

    def count(*shape: int) -> Tensor:
        numel = torch.Size(shape).numel()
        return torch.arange(numel, dtype=torch.float32).reshape(shape) * 0.5 + step

    return {
        ROW_WISE: count(11, 6),
        COLUMN_WISE: count(9, 12),
        "dtensor_rows": count(7, 4).half(),
        "dtensor_columns": count(5, 8).bfloat16(),
        "over_arch.weight": count(3, 5),
        "step": torch.tensor(float(step)),
    }


def make_state(step: int) -> dict[str, Any]:
    """This rank's part of everything, nested as training has it."""
    whole = whole_tensors(step)
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    sharded: dict[str, Any] = {
        ROW_WISE: sharded_tensor(whole[ROW_WISE], 0, rank, size),
        COLUMN_WISE: sharded_tensor(whole[COLUMN_WISE], 1, rank, size),
        "dtensor_rows": distribute_tensor(whole["dtensor_rows"], mesh, [Placed(0)]),
        "dtensor_columns": distribute_tensor(whole["dtensor_columns"], mesh, [Placed(1)]),
    }
    dense = torch.nn.Parameter(whole["over_arch.weight"])
    return {
        "model": sharded | {"over_arch": {"weight": dense}, "nothing": {}},
        "optimizer": {"step": whole["step"]},
    }


def sharded_tensor(whole: Tensor, dim: int, rank: int, size: int) -> ShardedTensor:
    """As TorchRec's state dict has them: shards along one dim, on some ranks none."""
    cuts = [0, *(whole.shape[dim] * (r + 1) // size // 2 * 2 for r in range(size))]
    cuts[-1] = whole.shape[dim]
    begin, length = cuts[rank], cuts[rank + 1] - cuts[rank]
    shards = []
    if length:
        offsets, sizes = [0, 0], list(whole.shape)
        offsets[dim], sizes[dim] = begin, length
        metadata = ShardMetadata(offsets, sizes, placement=f"rank:{rank}/cpu")
        shards = [Shard(whole.narrow(dim, begin, length).contiguous(), metadata)]
    return init_from_local_shards(shards, list(whole.shape))


def flatten(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("model.").removeprefix("optimizer."): tensor
        for name, tensor in checkpoint_tensors.flatten_tensors(state).items()
    }


def local_parts(state: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The memory behind a state."""
    parts = {}
    for name, tensor in flatten(state).items():
        if isinstance(tensor, ShardedTensor):
            parts[name] = [shard.tensor for shard in tensor.local_shards()]
        elif isinstance(tensor, DTensor):
            parts[name] = [tensor.to_local()]
        else:
            parts[name] = [tensor.detach()]
    return parts


def spoil(state: dict[str, Any]) -> None:
    """Overwrite everything in place, as training does."""
    for parts in local_parts(state).values():
        for part in parts:
            part.fill_(-1)


def same(state: dict[str, Any], step: int) -> bool:
    got, want = local_parts(state), local_parts(make_state(step))
    return all(
        len(got[name]) == len(want[name])
        and all(torch.equal(a, b) for a, b in zip(got[name], want[name], strict=True))
        for name in want
    )


def save(
    folder: str, steps: list[int], *, asynchronous: bool = False, keep: int = 2
) -> dict[str, Any]:
    """Save some steps; what is asynchronous is overwritten before it can have been written."""
    store = CheckpointStore(Path(folder), keep=keep)
    for step in steps:
        state = make_state(step)
        store.save(step, state, progress(step), asynchronous=asynchronous)
        spoil(state)
    store.wait()
    done = store.poll()
    store.close()
    return {"done": done}


def progress(step: int) -> dict[str, Any]:
    return {"epoch": 1, "batch": step, "best": {"auc": 0.1 + step / 3, "ne": None}}


def load(folder: str, *, before: int | None = None) -> dict[str, Any] | None:
    """Load the newest into a state that has other values."""
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dmt_convert").addHandler(handler)
    store = CheckpointStore(Path(folder))
    saved = store.newest(before=before)
    if saved is None:
        return None
    state = make_state(10**6)
    got = store.load(saved, state)
    store.close()
    return {
        "step": saved.step,
        "num_ranks": saved.num_ranks,
        "same": same(state, saved.step),
        "progress": got == progress(saved.step),
        "notes": notes,
    }


def refusal(work: Callable[[], object]) -> dict[str, Any] | None:
    try:
        work()
    except DmtError as error:
        return error.to_json()
    return None


def load_another_model(folder: str) -> dict[str, Any] | None:
    """Ask for a tensor that is missing, one of another shape, one of another type."""
    store = CheckpointStore(Path(folder))
    saved = store.newest()
    assert saved is not None
    state = make_state(0)
    if dist.get_rank() == 0:  # the others have to stop as well
        state["model"]["new"] = torch.zeros(3)
        state["model"]["over_arch"]["weight"] = torch.zeros(3, 6)
        state["optimizer"]["step"] = torch.tensor(1)
    return refusal(lambda: store.load(saved, state))


def load_twice(folder: str) -> dict[str, Any] | None:
    """Load a checkpoint, and again after a bit of it flipped."""
    store = CheckpointStore(Path(folder))
    saved = store.newest()
    assert saved is not None
    store.load(saved, make_state(0))
    if dist.get_rank() == 0:
        path = saved.path / "__1_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    return refusal(lambda: store.load(saved, make_state(0)))


def save_in_little_room(
    folder: str, *, asynchronous: bool, limited: int, limit: int
) -> dict[str, Any]:
    """Save one checkpoint, then one where a rank may write no more than `limit` bytes a file."""
    store = CheckpointStore(Path(folder))
    store.save(1, make_state(1), progress(1))
    if dist.get_rank() == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def again() -> None:
        store.save(2, make_state(2), progress(2), asynchronous=asynchronous)
        store.wait()

    refused = refusal(again)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    names = sorted(path.name for path in Path(folder).iterdir())
    dist.barrier()
    again()
    store.close()
    return {"refused": refused, "names": names}


def save_names(folder: str) -> None:
    """Names that are tables, and names that only look so."""
    weight = torch.zeros(2, 3)
    state = {
        "embedding_bags.a.b.weight": weight,
        "embedding_bags.a.b.momentum1": weight,
        "my_embedding_bags.x.weight": weight,
        "one.embedding_bags.twice.weight": weight,
        "two.embedding_bags.twice.weight": weight,
    }
    store = CheckpointStore(Path(folder))
    store.save(1, state, {})
    store.close()


def save_large(folder: str, rows: int, dim: int) -> None:
    """One table sharded by columns."""
    width = dim // dist.get_world_size()
    metadata = ShardMetadata(
        [0, width * dist.get_rank()], [rows, width], placement=f"rank:{dist.get_rank()}/cpu"
    )
    table = init_from_local_shards([Shard(torch.zeros(rows, width), metadata)], [rows, dim])
    store = CheckpointStore(Path(folder))
    store.save(1, {"embedding_bags.large.weight": table}, {})
    store.close()


def open_folder(folder: str) -> dict[str, Any] | None:
    checkpoint_folder._LOCK_SECONDS = 0.2  # type: ignore[misc]
    return refusal(lambda: CheckpointStore(Path(folder)))


def save_earlier(folder: str, step: int) -> list[Any]:
    """Save a step before the newest: refused, until what is later is discarded."""
    store = CheckpointStore(Path(folder))
    refused = refusal(lambda: store.save(step, make_state(step), progress(step)))
    store.discard_after(step)
    store.save(step, make_state(step), progress(step))
    store.close()
    return [refused]


def save_no_tensor(folder: str) -> str:
    store = CheckpointStore(Path(folder))
    try:
        store.save(1, {"lr": 0.1}, {})
    except TypeError as error:
        return str(error)
    return ""


def save_without_the_others(folder: str) -> str:
    """Only the first rank saves; the others are stuck somewhere."""
    store = CheckpointStore(Path(folder), timeout=timedelta(seconds=1))
    lost = ""
    if dist.get_rank() == 0:
        try:
            store.save(1, {"w": torch.ones(2)}, {})
        except RuntimeError as error:
            lost = str(error)
    dist.barrier()
    return lost


def save_and_die(folder: str, *, moment: str, rank: int, asynchronous: bool = False) -> None:
    """Save steps 1 and 2, keeping one; at a moment of the second, one rank is killed."""
    store = CheckpointStore(Path(folder), keep=1, timeout=timedelta(seconds=20))
    store.save(1, make_state(1), progress(1))
    if dist.get_rank() == rank:
        die_at(moment)
    store.save(2, make_state(2), progress(2), asynchronous=asynchronous)
    store.close()


def die_at(moment: str) -> None:
    """Arrange that this process is killed at a moment of the next save."""
    owner, name, after = MOMENTS[moment]
    original = getattr(owner, name)

    def die(*arguments: Any, **options: Any) -> Any:
        if after:
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)


MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "begun": (checkpoint_folder.CheckpointFolder, "begin", True),
    "planning": (checkpoint_tensors.SyncedWriter, "prepare_local_plan", False),
    "first bytes written": (checkpoint_tensors._SyncedFile, "write", True),
    "tensors written": (checkpoint_tensors.SyncedWriter, "write_data", True),
    "metadata written": (checkpoint_tensors.SyncedWriter, "finish", True),
    "progress written": (checkpoint_folder, "_check_payload", False),
    "before the name": (checkpoint_folder, "sync_folder", False),
    "manifest written": (checkpoint_folder, "sync_folder", True),
    "named": (checkpoint_folder.CheckpointFolder, "complete", True),
    "old one removed": (checkpoint_folder.CheckpointFolder, "_remove", True),
    "old one half removed": (checkpoint_folder.shutil, "rmtree", False),
}

SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        save,
        load,
        load_another_model,
        load_twice,
        save_in_little_room,
        open_folder,
        save_earlier,
        save_no_tensor,
        save_names,
        save_large,
        save_without_the_others,
        save_and_die,
    )
}
