"""Files of ShardedTensors, one per rank, are joined; incomplete and mixed sets are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import FlatCheckpoint, open_checkpoint, read_tensor
from dmt_convert.errors import CheckpointError
from support.checkpoints.rank_files import PickledTensor, save_ranks


def whole(rows: int, cols: int, first: float = 0.0) -> torch.Tensor:
    return torch.arange(rows * cols, dtype=torch.float32).reshape(rows, cols) + first


TABLES = {
    "t.row_wise": (whole(7, 4), [(0, 0, 4, 4, 0), (4, 0, 3, 4, 1)]),
    "t.column_wise": (whole(5, 6).to(torch.bfloat16), [(0, 0, 5, 3, 0), (0, 3, 5, 3, 1)]),
    "t.table_wise": (whole(3, 2), [(0, 0, 3, 2, 1)]),
    "t.grid": (whole(4, 4), [(0, 0, 2, 2, 0), (0, 2, 2, 2, 1), (2, 0, 2, 2, 1), (2, 2, 2, 2, 0)]),
}
DENSE = {"over.weight": whole(2, 3), "over.bias": torch.ones(2), "bn.running_mean": torch.ones(3)}


def values(checkpoint: FlatCheckpoint) -> dict[str, np.ndarray]:
    return {info.name: read_tensor(info) for info in checkpoint.tensors}


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["dmp_rank{}.pt", "{}"])
def test_files_of_all_ranks_are_joined(name, legacy, tmp_path):
    options = {"_use_new_zipfile_serialization": not legacy}
    paths = save_ranks(tmp_path, TABLES, DENSE, name=name, **options)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    for path in paths:
        checkpoint = open_checkpoint(path)
        assert checkpoint.files == tuple(paths)
        found = values(checkpoint)
        assert set(found) == {*TABLES, *DENSE}
        for table, (tensor, _) in TABLES.items():
            np.testing.assert_array_equal(found[table], tensor.float().numpy())
        np.testing.assert_array_equal(found["over.weight"], DENSE["over.weight"].numpy())


def test_a_missing_rank_is_refused_with_its_rows(tmp_path):
    paths = save_ranks(tmp_path, TABLES, DENSE)
    paths[1].rename(tmp_path.parent / "elsewhere.pt")
    error = refuse(paths[0], "beside it lie 0 of the other 1 ranks' files")
    assert "missing: t.row_wise: rows 4 to 6 (rank 1)" in error.details
    assert "missing: t.column_wise: rows 0 to 4, columns 3 to 5 (rank 1)" in error.details
    assert "missing: t.table_wise: rows 0 to 2 (rank 1)" in error.details


def test_files_of_two_saves_are_not_mixed(tmp_path):
    first = save_ranks(tmp_path, TABLES, DENSE, name="step1_rank{}.pt")
    later = {name: tensor + 1 for name, tensor in DENSE.items()}
    second = save_ranks(tmp_path, TABLES, later, name="step2_rank{}.pt")
    assert open_checkpoint(first[1]).files == tuple(first)
    assert open_checkpoint(second[0]).files == tuple(second)
    # one rank of each save is left: the tables fit, the dense parts tell
    first[1].unlink()
    second[0].unlink()
    error = refuse(first[0], "are from different saves: 3 of 3 dense tensors differ")
    assert "over.weight" in error.details
    # and where names tell nothing, it is asked for
    save_ranks(tmp_path, TABLES, DENSE, name="step3_rank{}.pt")
    refuse(second[1], "holds 2 files with the shards of rank 0")


def test_statistics_may_differ_between_ranks(tmp_path):
    paths = save_ranks(tmp_path, TABLES, DENSE)
    own = save_ranks(tmp_path, TABLES, {**DENSE, "bn.running_mean": torch.zeros(3)}, name="x{}")
    own[1].replace(paths[1])
    own[0].unlink()
    assert values(open_checkpoint(paths[1]))["bn.running_mean"].tolist() == [1, 1, 1]


def test_tables_sharded_otherwise_do_not_fit(tmp_path):
    paths = save_ranks(tmp_path, TABLES, DENSE)
    other = {**TABLES, "t.row_wise": (whole(7, 4), [(0, 0, 3, 4, 0), (3, 0, 4, 4, 1)])}
    wrong = save_ranks(tmp_path, other, DENSE, name="x{}")
    wrong[1].replace(paths[1])
    wrong[0].unlink()
    refuse(paths[0], "beside it lie 0 of the other 1")


def test_shards_that_overlap_are_refused(tmp_path):
    table = {"t": (whole(4, 2), [(0, 0, 3, 2, 0), (2, 0, 2, 2, 1)])}
    paths = save_ranks(tmp_path, table, DENSE)
    refuse(paths[0], "shards of t hold 10 elements")


def test_a_table_of_an_unknown_dtype_and_no_shards(tmp_path):
    pickled = PickledTensor(torch.ones(0, 4), [], 0, 1)
    pickled.state[1].tensor_properties.dtype = "fp99"
    torch.save({"t": pickled, **DENSE}, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt", "t is a ShardedTensor that cannot be read")


def test_a_dtensor_is_named(tmp_path):
    data = b"\x80\x02}X\x01\x00\x00\x00wctorch._tensor\n_rebuild_from_type_v2\n(" + (
        b"ctorch._utils\n_rebuild_wrapper_subclass\nctorch.distributed.tensor\nDTensor\n)}tRs."
    )
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", data)
    refuse(tmp_path / "a.pt", "one rank's shards of a sharded model: w is a DTensor")


@pytest.mark.parametrize(("names", "ordered"), [("acb", True), ("abc", False)])
def test_sorted_tables_tell_no_order(names, ordered, tmp_path):
    """DMP sorts them, so that alphabetical order is no sign of the model's."""
    whole_table = whole(4, 2)
    tables = {
        f"ebc.embedding_bags.{name}.weight": (whole_table, [(0, 0, 4, 2, i % 2)])
        for i, name in enumerate(names)
    }
    save_ranks(tmp_path, tables, {})
    assert open_checkpoint(next(tmp_path.iterdir())).ordered is ordered
