"""Tables of 8-bit rows, as TorchRec's `quantize_embeddings` makes them, decoded to fp32.

A row holds an fp16 scale, an fp16 bias and one byte per element, padded (to 16 bytes, where
nothing else was asked for); or scale and bias are tensors of their own. FBGEMM's older rows end
with an fp32 scale and bias instead.
Source: `fbgemm_gpu/split_table_batched_embeddings_ops_inference.py`, rounded_row_size_in_bytes,
split_embedding_weights_with_scale_bias; `torchrec/quant/embedding_modules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dmt_convert.checkpoint import RowCodes, TensorInfo, derived
from dmt_convert.families.facts import Fact
from dmt_convert.families.model_tensors import ModelTensors

_PADDING: Final = 16
_BEFORE: Final = RowCodes(dtype="fp16", at_end=False)
_BEHIND: Final = RowCodes(dtype="fp32", at_end=True)


def decode_tables(model: ModelTensors) -> None:
    """Replace tables of bytes by the numbers that they stand for."""
    parts = model.parts()
    coded = {n: found for n, found in parts.items() if "weight" in found and _is_coded(found)}
    if not coded:
        return
    whole = {n: found["weight"] for n, found in coded.items() if len(found) == 1}
    dims = _row_dims(model, whole)
    tables, layouts = {}, set()
    for name, found in parts.items():
        table = found.get("weight")
        if name in whole:
            table, layout = _decode_rows(model, whole[name], dims.get(name))
            layouts |= {layout} if table is not None else set()
        elif name in coded:
            table = _decode_parts(model, found)
            layouts.add("a scale and a bias per row beside the codes")
        if table is not None:
            tables[name] = table
    model.facts.append(
        Fact(
            subject="int8 tables",
            value=f"{len(coded)} of {len(parts)}, decoded to fp32",
            source="inferred",
            reason="; ".join(sorted(layouts)) or "uint8 rows",
        )
    )
    model.set_tables(tables)


def _is_coded(found: Mapping[str, TensorInfo]) -> bool:
    info = found["weight"]
    return info.dtype == "uint8" and len(info.shape) == 2 and 0 not in info.shape


def _row_dims(model: ModelTensors, tables: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Tell the embedding dims: that of dense_arch's output, else all of a row but four bytes."""
    dim = model.dense_width or 0
    if all(0 <= info.shape[1] - dim - 4 < _PADDING for info in tables.values()):
        return dict.fromkeys(tables, dim)
    if any(name.startswith("cross.") for name in model.tensors):
        return {name: info.shape[1] - 4 for name, info in tables.items()}
    return {}


def _decode_rows(
    model: ModelTensors, info: TensorInfo, dim: int | None
) -> tuple[TensorInfo | None, str]:
    row = info.shape[1]
    if dim is None or dim < 1:
        expected = model.dense_width or 0
        model.wrong.append(
            f"{info.path} has rows of {row} bytes; those of {expected} int8 elements take "
            f"{expected + 4}, or more with padding up to {_PADDING}"
        )
        return None, ""
    # a row that ends with fp32 numbers is never padded, one that begins with fp16 ones mostly is
    behind = row == _BEHIND.row_bytes(dim) and row % _PADDING != 0
    codes = _BEHIND if behind else _BEFORE
    layout = f"uint8 rows of {row} bytes: "
    layout += (
        f"{dim} codes, fp32 scale and bias"
        if behind
        else f"fp16 scale and bias, {dim} codes, {row - dim - 4} of padding"
    )
    return derived.dequantise_rows(info, dim, codes), layout


def _decode_parts(model: ModelTensors, found: Mapping[str, TensorInfo]) -> TensorInfo | None:
    table = found["weight"]
    scale, bias = found.get("qscale"), found.get("qbias")
    rows = table.shape[0]
    for part in (scale, bias):
        if part is not None and part.shape not in ((rows,), (rows, 1)):
            model.wrong.append(f"{part.path} has shape {list(part.shape)}, expected [{rows}, 1]")
            return None
    if scale is None or bias is None:
        model.wrong.append(f"{table.path} has a scale or a bias, not both")
        return None
    return derived.decode_rows(table, scale, bias)
