"""TorchRec's DLRM, DLRM_DCN and DLRM_Projection, alone or inside DLRMTrain.

ReLU behind every layer of dense_arch, of the branches, and of over_arch but the last; raw
logits. Pairs are the upper triangle, row by row, with the dense vector as row 0.

`quantize_embeddings` makes tables of 8-bit rows, which are decoded to fp32 here. A row holds an
fp16 scale, an fp16 bias and one byte per element, padded (to 16 bytes by default); or scale and
bias are tensors of their own. FBGEMM's older rows end with an fp32 scale and bias instead.
Source: `torchrec/models/dlrm.py`, `torchrec/modules/{mlp,crossnet}.py`,
`torchrec/quant/embedding_modules.py`;
`fbgemm_gpu/split_table_batched_embeddings_ops_inference.py`, rounded_row_size_in_bytes,
split_embedding_weights_with_scale_bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dmt_convert.checkpoint import RowCodes, TensorInfo, derived
from dmt_convert.families.dlrm import DlrmFamily
from dmt_convert.families.name_map import NameMap
from dmt_convert.families.trainer_tensors import TrainerTensors

_PADDING: Final = 16
_BEFORE: Final = RowCodes(dtype="fp16", at_end=False)
_BEHIND: Final = RowCodes(dtype="fp32", at_end=True)
_BRANCH: Final = "inter_arch.interaction_branch{n}.model._mlp.{{}}._linear.{kind}"


def decode_tables(source: TrainerTensors) -> None:
    """Replace tables of 8-bit rows by the numbers for which they stand."""
    parts = source.table_parts()
    coded = {n: found for n, found in parts.items() if "weight" in found and _is_coded(found)}
    if not coded:
        return
    if isinstance(source.config.pooling, Mapping):
        # quantize_embeddings groups tables by pooling, so the order of the file is not the model's
        source.ordered = False
    whole = {n: found["weight"] for n, found in coded.items() if len(found) == 1}
    dims = _row_dims(source, whole)
    tables, layouts = {}, set()
    for name, found in parts.items():
        table = found.get("weight")
        if name in whole:
            table, layout = _decode_rows(source, whole[name], dims.get(name))
            layouts |= {layout} if table is not None else set()
        elif name in coded:
            table = _decode_parts(source, found)
            layouts.add("a scale and a bias per row beside the codes")
        if table is not None:
            tables[name] = table
    source.fact(
        "int8 tables",
        f"{len(coded)} of {len(parts)}, decoded to fp32",
        "inferred",
        "; ".join(sorted(layouts)) or "uint8 rows",
    )
    source.set_tables(tables)


def _is_coded(found: Mapping[str, TensorInfo]) -> bool:
    info = found["weight"]
    return info.dtype == "uint8" and len(info.shape) == 2 and 0 not in info.shape


def _row_dims(source: TrainerTensors, tables: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the embedding dims: that of dense_arch's output, else a row without four bytes."""
    dim = source.dense_width or 0
    if all(0 <= info.shape[1] - dim - 4 < _PADDING for info in tables.values()):
        return dict.fromkeys(tables, dim)
    if any(name.startswith("cross.") for name in source.canonical):
        return {name: info.shape[1] - 4 for name, info in tables.items()}
    return {}


def _decode_rows(
    source: TrainerTensors, info: TensorInfo, dim: int | None
) -> tuple[TensorInfo | None, str]:
    row = info.shape[1]
    if dim is None or dim < 1:
        expected = source.dense_width or 0
        source.wrong.append(
            f"{info.path} has rows of {row} bytes; those of {expected} int8 elements take "
            f"{expected + 4}, or more with padding up to {_PADDING}"
        )
        return None, ""
    # rows that end with fp32 numbers are never padded, rows that begin with fp16 ones mostly are
    behind = row == _BEHIND.row_bytes(dim) and row % _PADDING != 0
    codes = _BEHIND if behind else _BEFORE
    layout = f"uint8 rows of {row} bytes: "
    layout += (
        f"{dim} codes, fp32 scale and bias"
        if behind
        else f"fp16 scale and bias, {dim} codes, {row - dim - 4} of padding"
    )
    return derived.dequantise_rows(info, dim, codes), layout


def _decode_parts(source: TrainerTensors, found: Mapping[str, TensorInfo]) -> TensorInfo | None:
    table = found["weight"]
    scale, bias = found.get("qscale"), found.get("qbias")
    rows = table.shape[0]
    for part in (scale, bias):
        if part is not None and part.shape not in ((rows,), (rows, 1)):
            source.wrong.append(f"{part.path} has shape {list(part.shape)}, expected [{rows}, 1]")
            return None
    if scale is None or bias is None:
        source.wrong.append(f"{table.path} has a scale or a bias, not both")
        return None
    return derived.decode_rows(table, scale, bias)


TORCHREC_DLRM: Final[DlrmFamily] = DlrmFamily(
    name="torchrec-dlrm",
    trainer="TorchRec (DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain)",
    anchor=(
        r"(?P<prefix>.*?)sparse_arch\.embedding_bag_collection\.embedding_bags\."
        r"(?P<table>[^.]+)\.weight"
    ),
    names=NameMap(
        {
            "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight": "tables.{}.weight",
            "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight_qscale": (
                "tables.{}.qscale"
            ),
            "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight_qbias": (
                "tables.{}.qbias"
            ),
            "dense_arch.model._mlp.{}._linear.weight": "dense_arch.{}.weight",
            "dense_arch.model._mlp.{}._linear.bias": "dense_arch.{}.bias",
            "inter_arch.crossnet.W_kernels.{}": "cross.{}.w",
            "inter_arch.crossnet.V_kernels.{}": "cross.{}.v",
            "inter_arch.crossnet.bias.{}": "cross.{}.bias",
            **{
                _BRANCH.format(n=n, kind=kind): f"branch{n}.{{}}.{kind}"
                for n in (1, 2)
                for kind in ("weight", "bias")
            },
            "over_arch.model.0._mlp.{}._linear.weight": "over_arch.{}.weight",
            "over_arch.model.0._mlp.{}._linear.bias": "over_arch.{}.bias",
            "over_arch.model.1.weight": "over_arch.last.weight",
            "over_arch.model.1.bias": "over_arch.last.bias",
            "inter_arch.triu_indices": None,  # a constant that old versions saved
        }
    ),
    interactions=("dot",),
    pair_order="triu",
    feature_prefix="t_",
    separate_last=True,
    rewrite=decode_tables,
)
