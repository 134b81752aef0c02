"""Files that are parts of a checkpoint: joined if all are there, else refused; never the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmt_convert.checkpoint import FlatCheckpoint, open_checkpoint, read_tensor
from dmt_convert.errors import CheckpointError
from dmt_convert.files import unshard_checkpoint
from support.checkpoints.containers import StateDict, tiny_state


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    with pytest.raises(CheckpointError):
        unshard_checkpoint(path, path.parent / "out.safetensors")
    assert not (path.parent / "out.safetensors").exists()
    return caught.value


def same(checkpoint: FlatCheckpoint, state: StateDict) -> None:
    found = {info.name: read_tensor(info) for info in checkpoint.tensors}
    assert {*found} == {*state}
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


Starts = dict[str, tuple[int, ...]]


def write_shard(
    folder: Path, rank: int, tensors: StateDict, starts: Starts, file: str = "00001-of-00001"
) -> Path:
    """Write a file as HuggingFaceStorageWriter(save_distributed=True) does on a rank."""
    offsets = {n: {"saved_offsets": starts.get(n, (0,) * t.dim())} for n, t in tensors.items()}
    path = folder / f"shard-{rank:05d}-model-{file}.safetensors"
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_shards(folder: Path, state: StateDict, *, spread: bool = False, table: bool = True):
    """Cut the last table over three ranks by rows (or none), and spread the dense part."""
    parts: list[StateDict] = [{}, {}, {}]
    starts: list[Starts] = [{}, {}, {}]
    for place, (name, tensor) in enumerate(state.items()):
        if table and name == "emb_l.2.weight":
            for rank in range(3):
                parts[rank][name] = tensor[3 * rank : 3 * rank + 3]
                starts[rank][name] = (3 * rank, 0)
        else:
            parts[place % 3 if spread else 0][name] = tensor
    return [write_shard(folder, rank + 1, parts[rank], starts[rank]) for rank in range(3)]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_shards_of_torchs_safetensors_are_joined(spread, table, tmp_path):
    state = tiny_state()
    if not spread and not table:
        return
    paths = write_shards(tmp_path, state, spread=spread, table=table)
    for path in (tmp_path, *paths):
        checkpoint = open_checkpoint(path)
        assert checkpoint.files == tuple(paths) and not checkpoint.ordered
        same(checkpoint, state)
    (tmp_path / "out").mkdir()
    unshard_checkpoint(tmp_path, tmp_path / "out" / "whole.safetensors")
    same(open_checkpoint(tmp_path / "out" / "whole.safetensors"), state)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("lost", [{1}, {2}, {1, 2}, {2, 3}])
def test_shards_that_are_not_all_there_are_refused(spread, lost, tmp_path):
    paths = write_shards(tmp_path, tiny_state(), spread=spread)
    for rank in lost:
        paths[rank - 1].unlink()
    refuse(tmp_path, "shard")
    for rank in {1, 2, 3} - lost:
        refuse(paths[rank - 1], "shard")
        alone = tmp_path / "alone"
        alone.mkdir(exist_ok=True)
        shutil.copy(paths[rank - 1], alone / "model.safetensors")  # under an innocent name
        assert "other shards" in refuse(alone / "model.safetensors", "one rank's shard").hint
        refuse(alone, "one rank's shard")


def test_shards_of_two_saves_are_refused(tmp_path):
    first, second, _ = write_shards(tmp_path, tiny_state())
    table = tiny_state()["emb_l.2.weight"]
    write_shard(tmp_path, 2, {"emb_l.2.weight": table[2:6]}, {"emb_l.2.weight": (2, 0)})
    refuse(first, "hold 40 elements")
    write_shard(tmp_path, 2, {"emb_l.2.weight": table[3:6].half()}, {"emb_l.2.weight": (3, 0)})
    refuse(second, "differ in dtype")
    write_shard(tmp_path, 2, {"emb_l.2.weight": table[3:6]}, {"emb_l.2.weight": (3,)})
    refuse(second, "has offsets")


def test_a_shard_of_several_files_needs_all_of_them(tmp_path):
    state = tiny_state()
    one = {name: state[name] for name in list(state)[:3]}
    two = {name: state[name] for name in list(state)[3:]}
    write_shard(tmp_path, 1, one, {}, "00001-of-00002")
    last = write_shard(tmp_path, 2, two, {}, "00002-of-00002")
    same(open_checkpoint(tmp_path), state)
    last.unlink()
    write_shard(tmp_path, 2, {"x": torch.ones(1)}, {}, "00001-of-00002")
    assert "model 00002 of 00002" in refuse(tmp_path, "lacks 1").details


def test_a_shard_under_an_index_is_no_whole(tmp_path):
    path = write_shard(tmp_path, 1, {"w": torch.ones(2, 2)}, {"w": (2, 0)})
    index = {"metadata": {}, "weight_map": {"w": path.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(tmp_path, "one rank's shard")


def test_what_one_rank_wrote_whole_has_an_index_with_its_size(tmp_path):
    state = tiny_state()
    weight_map = {}
    for place in range(2):
        part = {name: state[name] for name in list(state)[place::2]}
        path = write_shard(tmp_path, 1, part, {})
        path = path.rename(tmp_path / f"model-0000{place + 1}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, path.name)
    size = sum(tensor.nbytes for tensor in state.values())
    for total, whole in ((size, True), (2 * size, False)):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        if whole:
            same(open_checkpoint(path), state)
        else:  # ranks wrote to one file, one after the other
            refuse(path, "one rank's shard")


@pytest.mark.parametrize(("rows", "shown"), [(1000, False), (1001, True), (1500, False), (7, True)])
def test_whether_a_rank_is_missing_at_the_end_is_said(rows, shown, tmp_path, caplog):
    """Only what is not divided evenly shows that the last shard is the last."""
    table, step = torch.ones(rows, 2), -(-rows // 2)
    for rank in range(2):
        part = {"w": table[rank * step : (rank + 1) * step]}
        write_shard(tmp_path, rank + 1, part, {"w": (rank * step, 0)})
    same(open_checkpoint(tmp_path), {"w": table})
    assert shown != ("nothing says that there were no more" in caplog.text)


def save(value: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(value, path)
    else:
        torch.save(value, path)
    return path


NAMES = [
    "model-{}-of-00002.safetensors",
    "pytorch_model-{}-of-00002.bin",
    "rank{}.pt",
    "model_rank_{}.safetensors",
    "mp_rank_0{}_weights.pt",
    "part-{}.pth",
    "shard{}of2.pt",
]


def number_of(name: str, place: int) -> str:
    return f"{place + 1:05d}" if "00002" in name else str(place)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copies", [False, True])
def test_numbered_parts_are_joined(name, copies, tmp_path):
    """Tables on alternate ranks; the dense part on the first, or copies of it on all."""
    state = tiny_state()
    tables = [key for key in state if key.startswith("emb")]
    dense = [key for key in state if key not in tables]
    kept = ([tables[0], tables[2], *dense], [tables[1], *(dense if copies else ())])
    paths = []
    for place, keys in enumerate(kept):
        path = tmp_path / name.format(number_of(name, place))
        paths.append(save({key: state[key] for key in keys}, path))
    for path in (tmp_path, *paths):
        checkpoint = open_checkpoint(path)
        same(checkpoint, state)
        assert checkpoint.files == tuple(paths) and not checkpoint.ordered


@pytest.mark.parametrize("name", [name for name in NAMES if "of" in name])
def test_a_numbered_part_alone_is_refused(name, tmp_path):
    for place in range(2):
        path = save({"w": torch.ones(2, 2)}, tmp_path / name.format(number_of(name, place)))
        refuse(path, "one of several files")
        refuse(tmp_path, "one of several files")
        path.unlink()


@pytest.mark.parametrize("name", ["shard_0.pt", "part1.safetensors", "piece-7.pt"])
def test_a_shard_by_its_name_is_no_whole(name, tmp_path):
    save(tiny_state(), tmp_path / name)
    refuse(tmp_path / name, "one of several files")
    refuse(tmp_path, "one of several files")


def test_a_ranks_file_alone_is_said_to_be_one(tmp_path, caplog):
    """Rank 0 may well have saved all for the others."""
    save(tiny_state(), tmp_path / "model_rank0.pt")
    same(open_checkpoint(tmp_path), tiny_state())
    assert "no other rank's lies beside it" in caplog.text


def test_a_folder_per_rank(tmp_path):
    state = tiny_state()
    for rank in range(2):
        (tmp_path / f"mp_rank_0{rank}").mkdir()
        part = {name: state[name] for name in list(state)[rank::2]}
        save(part, tmp_path / f"mp_rank_0{rank}" / "model.pt")
    for rank in range(2):
        same(open_checkpoint(tmp_path / f"mp_rank_0{rank}" / "model.pt"), state)
        same(open_checkpoint(tmp_path / f"mp_rank_0{rank}"), state)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "mp_rank_00" in caught.value.hint


def test_ranks_with_a_gap_are_refused(tmp_path):
    for rank in (0, 1, 3):
        save({f"w{rank}": torch.ones(2, 2)}, tmp_path / f"rank{rank}.pt")
    assert refuse(tmp_path / "rank0.pt", "3 of 4").details == ("missing: 2",)


def test_rows_of_a_table_saved_as_plain_tensors_are_refused(tmp_path):
    table = tiny_state()["emb_l.2.weight"]
    for rank, rows in enumerate((table[:5], table[5:])):
        save({"emb_l.2.weight": rows.clone()}, tmp_path / f"rank{rank}.pt")
    error = refuse(tmp_path / "rank1.pt", "1 of the 1 tensors that several of them hold differ")
    assert "torch.distributed.checkpoint" in error.hint
    assert error.details == ("emb_l.2.weight: [5, 4] and [4, 4]",)
    for rank in range(2):  # of one shape
        save(
            {"emb_l.2.weight": table[4 * rank : 4 * rank + 4].clone()}, tmp_path / f"rank{rank}.pt"
        )
    refuse(tmp_path, "differ")


def test_statistics_may_differ_between_ranks(tmp_path):
    state = tiny_state()
    for rank in range(2):
        save(state | {"bn.running_mean": torch.full((3,), rank + 1.0)}, tmp_path / f"rank{rank}.pt")
    checkpoint = open_checkpoint(tmp_path / "rank1.pt")
    (mean,) = (t for t in checkpoint.tensors if t.name == "bn.running_mean")
    assert read_tensor(mean).tolist() == [1.0] * 3 and checkpoint.ordered


@pytest.mark.parametrize(
    "names",
    [
        ("epoch-1-of-3.pt", "epoch-2-of-3.pt"),
        ("step_1_of_9.pt", "step_2_of_9.pt"),
        ("cross_rank8.pt", "cross_rank16.pt"),
        ("model_1.pt", "model_2.pt"),
        ("fold0.pt", "fold1.pt"),
    ],
)
def test_numbers_that_count_something_else(names, tmp_path):
    for place, name in enumerate(names):
        save({"w": torch.full((2, 2), float(place))}, tmp_path / name)
    for place, name in enumerate(names):
        (tensor,) = open_checkpoint(tmp_path / name).tensors
        assert read_tensor(tensor)[0, 0] == place
    error = refuse(tmp_path, "holds several checkpoints")
    assert all(name in error.hint for name in names)
