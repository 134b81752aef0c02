"""Tables of bytes: each type is decoded as its maker does, and asked for if several fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import TableConfig, open_checkpoint, read_tensor
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families import ModelConfig, infer_model
from dmt_convert.families.quantised_rows import ROW_TYPES
from support.checkpoints.flat import TORCHREC_TABLE, flat_state

fbgemm = pytest.importorskip("fbgemm_gpu")
assert fbgemm
ROWS = (40, 50)


def pack(table: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table's bytes as their maker packs them, and the numbers that it reads from them."""
    ops, torch_ops = torch.ops.fbgemm, torch.ops.quantized
    if kind in ("fp32", "fp16"):
        rows = table.half() if kind == "fp16" else table
        return _padded(rows.view(torch.uint8)), rows.float()
    if kind == "byte_prepack":
        packed = torch_ops.embedding_bag_byte_prepack(table)
        return packed, torch_ops.embedding_bag_byte_unpack(packed)
    bits = int(next(digit for digit in kind if digit.isdecimal()))
    packed = ops.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(table, bits)
    numbers = ops.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, bits)
    if kind.startswith("int"):  # TorchRec puts scale and bias before the codes
        packed = _padded(torch.cat([packed[:, -4:], packed[:, :-4]], dim=1))
    return packed, numbers


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 16))


def save(path: Path, dim: int, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Write a model whose tables are of these types; return what they stand for."""
    state, numbers = flat_state(rows=ROWS, dim=dim), {}
    for i, kind in enumerate(kinds):
        name = TORCHREC_TABLE.format(i)
        if kind != "plain":
            state[name], numbers[f"t_cat_{i}"] = pack(state[name], kind)
    torch.save(state, path)
    return numbers


@pytest.mark.parametrize("dim", [4, 8, 16, 24, 32, 64])
@pytest.mark.parametrize("kind", ROW_TYPES)
def test_every_type_is_right_asked_or_never_a_guess(kind, dim, tmp_path):
    if dim == 4 and kind in ("int2", "2bit_prepack"):
        pytest.skip("FBGEMM has no such rows")
    numbers = save(tmp_path / "model.pt", dim, (kind, kind))
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    width = numbers["t_cat_0"].shape[1]
    assert width == dim
    stored = checkpoint.tensors[0].shape[1]
    fitting = [name for name, row in ROW_TYPES.items() if row.fits(dim, stored)]
    assert kind in fitting
    if len(fitting) > 1:
        with pytest.raises(ArchitectureError, match="the type of 2 tables of bytes") as caught:
            infer_model(checkpoint)
        assert all(name in caught.value.details[0] for name in fitting)
        info = infer_model(checkpoint, ModelConfig(table_type={"t_cat_0": kind, "t_cat_1": kind}))
    else:
        info = infer_model(checkpoint)
    for name, wanted in numbers.items():
        ours = read_tensor(info.table_info(name)).astype(np.float32)
        np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_a_pickled_module_names_the_types(tmp_path):
    numbers = save(tmp_path / "model.pt", 8, ("fp16", "int8"))
    configs = tuple(
        TableConfig(name=f"t_cat_{i}", features=(f"cat_{i}",), pooling="sum", data_type=kind)
        for i, kind in enumerate(("fp16", "int8"))
    )
    checkpoint = replace(open_checkpoint(tmp_path / "model.pt"), table_configs=configs)
    info = infer_model(checkpoint)
    assert [table.dtype for table in info.spec.tables] == ["fp16", "fp32"]
    facts = [(f.value, f.source) for f in info.facts if f.subject == "table types"]
    assert facts == [
        ("1 of 2 tables fp16", "read"),
        ("1 of 2 tables int8, decoded to fp32", "read"),
    ]
    for name, wanted in numbers.items():
        np.testing.assert_allclose(read_tensor(info.table_info(name)), wanted.numpy(), rtol=1e-5)


def test_only_tables_that_are_in_doubt_are_asked_for(tmp_path):
    save(tmp_path / "model.pt", 12, ("fp16", "int8"))
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    with pytest.raises(ArchitectureError, match="the type of 1 tables of bytes") as caught:
        infer_model(checkpoint)
    assert "table_type: {t_cat_1: " in caught.value.hint
    infer_model(checkpoint, ModelConfig(table_type={"t_cat_1": "int8"}))


@pytest.mark.parametrize(
    ("kind", "said", "error", "says"),
    [
        ("fp16", "int8", ArchitectureError, "is not int8"),
        ("int8", "fp32", ArchitectureError, "rows of 16 bytes; those of 8 elements take fp32 32"),
        ("int8", {"nobody": "int8"}, ConfigError, "names nobody"),
    ],
)
def test_a_type_that_cannot_be_is_refused(kind, said, error, says, tmp_path):
    save(tmp_path / "model.pt", 8, (kind, kind))
    with pytest.raises(error) as caught:
        infer_model(open_checkpoint(tmp_path / "model.pt"), ModelConfig(table_type=said))
    assert says in str(caught.value)
