"""Tables out of training checkpoints: the same whatever the sharding, in little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import TensorInfo, gather_rows, read_safetensors, read_tensor
from dmt_convert.cluster.checkpoint_tensors import open_tables, table_source
from dmt_convert.errors import CheckpointError
from dmt_convert.files.safetensors_writer import write_safetensors
from dmt_convert.spec import TableSpec
from support.cluster.client import RunRanks, serve_ranks

SPECS = (TableSpec(name="t_0", rows=11, dim=6), TableSpec(name="t_7", rows=9, dim=12))


@pytest.fixture(scope="module")
def saved(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 3, saved by four ranks: t_0 by rows, t_7 by columns, a rank without either."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(4, "save", folder=folder, steps=[3])
    return folder / "step_000000003"


def whole(rows: int, dim: int) -> np.ndarray:
    return (np.arange(rows * dim, dtype=np.float32) * 0.5 + 3).reshape(rows, dim)


def test_tables_are_found_and_whole(saved: Path) -> None:
    tables = open_tables(saved, SPECS)
    assert list(tables) == ["t_0", "t_7"]
    assert {piece.starts[0] for piece in tables["t_0"].pieces} == {0, 2, 4, 8}
    assert {piece.starts for piece in tables["t_7"].pieces} == {(0, 0), (0, 2), (0, 6), (0, 8)}
    for spec in SPECS:
        assert np.array_equal(read_tensor(tables[spec.name]), whole(spec.rows, spec.dim))
        rows = np.array([8, 0, 3])
        assert np.array_equal(gather_rows(tables[spec.name], rows), whole(11, spec.dim)[rows])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tables_are_written_in_the_type_of_the_bundle(
    saved: Path, tmp_path: Path, dtype: str
) -> None:
    tables = open_tables(saved, SPECS)
    sources = [
        table_source(f"tables.{name}.weight", info, dtype=dtype, origin=name)
        for name, info in tables.items()
    ]
    path = tmp_path / "tower.safetensors"
    write_safetensors(path, sources, metadata={})
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for info in read_safetensors(path).tensors:
        assert info.dtype == dtype
        rounded = torch.from_numpy(whole(*info.shape)).to(kind).float().numpy()
        assert np.array_equal(read_tensor(info).astype(np.float32), rounded)


def test_tables_that_are_not_there_are_refused_together(saved: Path) -> None:
    asked = [*SPECS, TableSpec(name="t_1", rows=5, dim=6), TableSpec(name="7", rows=9, dim=12)]
    with pytest.raises(CheckpointError, match="lacks 3 of the 4 tables") as refused:
        open_tables(saved, [TableSpec(name="t_0", rows=12, dim=6), *asked[1:]])
    assert refused.value.details == (
        "t_0 of shape [12, 6]: model.towers.towers.0.embedding.embedding_bags.t_0.weight, fp32 of "
        "shape [11, 6]",
        "t_1 of shape [5, 6]: missing",
        "7 of shape [9, 12]: missing",
    )


def test_names_that_only_resemble_a_table_are_none(tmp_path: Path, run_ranks: RunRanks) -> None:
    run_ranks(1, "save_names", folder=tmp_path)
    folder = tmp_path / "step_000000001"
    spec = TableSpec(name="a.b", rows=2, dim=3)
    assert open_tables(folder, [spec])["a.b"].path == "embedding_bags.a.b.weight"
    for name in ("x", "a.b.momentum1"):
        with pytest.raises(CheckpointError, match="lacks 1 of the 1"):
            open_tables(folder, [TableSpec(name=name, rows=2, dim=3)])
    with pytest.raises(CheckpointError) as refused:
        open_tables(folder, [TableSpec(name="twice", rows=2, dim=3)])
    assert " and " in refused.value.details[0]


def test_a_table_sharded_by_columns_streams_in_little_memory(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    run_ranks(2, "save_large", folder=tmp_path, rows=300_000, dim=64)
    spec = TableSpec(name="large", rows=300_000, dim=64)
    (info,) = open_tables(tmp_path / "step_000000001", [spec]).values()
    assert info.nbytes > 70 << 20
    for dtype, limit in (("fp32", 20 << 20), ("fp16", 40 << 20)):
        assert peak_of_streaming(info, dtype) < limit


def peak_of_streaming(info: TensorInfo, dtype: str) -> int:
    source = table_source("w", info, dtype=dtype, origin="w")
    tracemalloc.start()
    try:
        total = sum(chunk.nbytes for chunk in source.chunks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == source.nbytes
    return peak


@pytest.mark.slow
def test_a_sharding_by_torchrec_is_loaded_into_any_other_and_read_offline(
    tmp_path: Path,
) -> None:
    """Tables by rows, by columns, and whole; with their fused optimizer, on two ranks and one."""
    pytest.importorskip("torchrec", reason="shards by TorchRec")
    with serve_ranks("torchrec_scenarios") as run:
        saved, trained = run(2, "train_and_save", folder=tmp_path, kinds="rct")[0]["result"]
        for size, kinds in ((1, "tct"), (2, "tcr"), (2, "rct")):
            for report in run(size, "load_and_train", folder=tmp_path, kinds=kinds):
                before, after = report["result"]
                assert before == saved
                assert np.allclose(after, trained, rtol=0, atol=1e-6)
    specs = [TableSpec(name="t_0", rows=50, dim=16), TableSpec(name="t_1", rows=37, dim=32)]
    tables = open_tables(tmp_path / "step_000000002", specs)
    assert all(len(info.pieces) == 2 for info in tables.values())
    generator = torch.Generator().manual_seed(9)
    begin = 0
    for spec in specs:
        ids = torch.randint(0, spec.rows, (6,), generator=generator).numpy()
        found = gather_rows(tables[spec.name], ids)
        assert np.array_equal(found, np.float32(saved)[:, begin : begin + spec.dim])
        begin += spec.dim
