"""facebookresearch/dlrm, `dlrm_s_pytorch.py --save-model`.

Layers are in an nn.Sequential with activations between them, so linear layers have even indices.
ReLU everywhere, also behind the last bottom layer; a sigmoid ends the model. Pairs are the lower
triangle, row by row, with the dense vector as row 0.

Tables may be stored in parts: quotient-remainder, mixed-dimension, weighted. Each becomes the
plain table with the same effect on a bag: row i of it is what id i adds to the pooled sum. Fixed
pooling weights are ones and are not stored, so they need nothing.
Source: `dlrm_s_pytorch.py`, create_mlp, create_emb, apply_emb, interact_features;
`tricks/qr_embedding_bag.py`, `tricks/md_embedding_bag.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dmt_convert.checkpoint import Combination, TensorInfo, derived
from dmt_convert.errors import ConfigError
from dmt_convert.families.dlrm import DlrmFamily
from dmt_convert.families.name_map import NameMap
from dmt_convert.families.trainer_tensors import TrainerTensors

_PARTS: Final = {
    "embs": "mixed-dimension tables",
    "row_weights": "tables with learned pooling weights",
}
"""Parts that are reported -> what tables with them are called."""


def put_tables_together(source: TrainerTensors) -> None:
    """Replace tables in parts by plain ones.

    Raises:
        ArchitectureError: Neither the shapes nor the user tell the operation.
        ConfigError: The operation that the user gives contradicts the shapes.
    """
    parts = source.table_parts()
    if all(set(found) == {"weight"} for found in parts.values()):
        return
    operation = _operation(source, parts)
    tables = {}
    for name, found in parts.items():
        table = _plain_table(source, name, found, operation)
        if table is not None:
            tables[name] = table
    if operation == "mult":
        # the trainer multiplies pooled sums, which equals pooled products only for one id
        source.single_id_tables = {name for name, found in parts.items() if "q" in found}
    _report(source, parts)
    source.set_tables(tables)


def _plain_table(
    source: TrainerTensors, name: str, found: Mapping[str, TensorInfo], operation: Combination
) -> TensorInfo | None:
    """Put one table together; None, noted as a fault, if parts are missing or do not fit."""
    needed = {"weight"}
    if "q" in found or "r" in found:
        needed = {"q", "r"}
    elif "embs" in found or "proj" in found:
        needed = {"embs"}
    absent = sorted(needed - set(found))
    for part in absent:
        source.note_missing(f"tables.{name}.{part}")
    flat = [info for part, info in found.items() if part != "row_weights" and not _is_matrix(info)]
    source.wrong += [f"{info.path} has shape {list(info.shape)}, not 2 dims" for info in flat]
    if absent or flat:
        return None
    weights = found.get("row_weights")
    if "q" in needed:
        return _combine(source, found["q"], found["r"], weights, operation)
    if "embs" in needed:
        return _weigh(source, _project(source, found["embs"], found.get("proj")), weights)
    return _weigh(source, found["weight"], weights)


def _combine(
    source: TrainerTensors,
    q: TensorInfo,
    r: TensorInfo,
    weights: TensorInfo | None,
    operation: Combination,
) -> TensorInfo | None:
    if operation != "concat" and q.shape[1] != r.shape[1]:
        source.wrong.append(f"{r.path} has {r.shape[1]} columns, {q.path} has {q.shape[1]}")
        return None
    # the last quotient's rows are listed to the end, but the trainer may not have all of them
    table = _weigh(source, derived.combine_rows(q, r, operation), weights, spare=r.shape[0] - 1)
    # the trainer applies the weights to both factors before it multiplies them
    return _weigh(source, table, weights) if operation == "mult" else table


def _project(
    source: TrainerTensors, table: TensorInfo, proj: TensorInfo | None
) -> TensorInfo | None:
    if proj is None:
        return table
    if proj.shape[1] != table.shape[1]:
        source.wrong.append(
            f"{proj.path} takes {proj.shape[1]} inputs, {table.path} gives {table.shape[1]}"
        )
        return None
    return derived.project_rows(table, proj)


def _weigh(
    source: TrainerTensors, table: TensorInfo | None, weights: TensorInfo | None, *, spare: int = 0
) -> TensorInfo | None:
    """Multiply rows by the weights that pooling gives them; `spare` rows may have none."""
    if table is None or weights is None:
        return table
    rows = weights.shape[0] if len(weights.shape) == 1 else -1
    if not max(1, table.shape[0] - spare) <= rows <= table.shape[0]:
        source.wrong.append(
            f"{weights.path} has shape {list(weights.shape)}, expected [{table.shape[0]}]"
        )
        return None
    return derived.scale_rows(derived.slice_rows(table, 0, rows), weights)


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and 0 not in info.shape


def _operation(
    source: TrainerTensors, parts: Mapping[str, Mapping[str, TensorInfo]]
) -> Combination:
    """Decide how quotient and remainder are combined; only concat shows in the dims."""
    pairs = [(found["q"], found["r"]) for found in parts.values() if {"q", "r"} <= set(found)]
    given, width = source.config.qr_operation, source.dense_width
    if not pairs:
        return "mult"
    q, r = pairs[0]
    joined = _is_matrix(q) and _is_matrix(r) and q.shape[1] + r.shape[1] == width
    if given is not None and (given == "concat") != joined:
        raise ConfigError(
            f"the model config says qr_operation {given}, but {q.path} has shape {list(q.shape)} "
            f"and dense_arch gives {width} outputs",
            expected="concat if both parts together are as wide as dense_arch's output; mult or "
            "add if each part is",
            hint="leave `qr_operation` out, or correct it",
        )
    if given is None and not joined:
        raise source.refuse(
            f"{len(pairs)} quotient-remainder tables, whose rows may be multiplied or added",
            expected="parts that are concatenated, which shows in their width",
            hint="say it with --model-config: `qr_operation: mult` (the trainer's default) or "
            "`qr_operation: add`",
        )
    operation: Combination = "concat" if joined else given or "mult"
    reason = "both parts together are as wide as dense_arch's output"
    source.fact(
        "quotient-remainder tables",
        f"{len(pairs)} of {len(parts)}, {operation}",
        "inferred" if joined else "given",
        reason if joined else "--model-config",
    )
    if operation == "mult":
        reason = "the trainer multiplies pooled rows; data with longer bags are refused"
        source.fact("bags of those tables", "at most one id", "read", reason)
    return operation


def _report(source: TrainerTensors, parts: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    for part, called in _PARTS.items():
        count = sum(part in found for found in parts.values())
        if count:
            value = f"{count} of {len(parts)}"
            source.fact(called, value, "read", "tensor names; worked into the rows")


def _halve(index: int) -> int | None:
    return None if index % 2 else index // 2


def _double(index: int) -> int:
    return 2 * index


FACEBOOK_DLRM: Final[DlrmFamily] = DlrmFamily(
    name="facebook-dlrm",
    trainer="facebookresearch/dlrm (dlrm_s_pytorch.py)",
    anchor=r"(?P<prefix>.*?)emb_l\.(?P<table>\d+)\.(weight|weight_q|embs\.weight)",
    names=NameMap(
        {
            "emb_l.{}.weight": "tables.{}.weight",
            "bot_l.{}.weight": "dense_arch.{}.weight",
            "bot_l.{}.bias": "dense_arch.{}.bias",
            "top_l.{}.weight": "over_arch.{}.weight",
            "top_l.{}.bias": "over_arch.{}.bias",
            "emb_l.{}.weight_q": "tables.{}.q",
            "emb_l.{}.weight_r": "tables.{}.r",
            "emb_l.{}.embs.weight": "tables.{}.embs",
            "emb_l.{}.proj.weight": "tables.{}.proj",
            "v_W_l.{}": "tables.{}.row_weights",
        },
        renumber={"dense_arch": (_halve, _double), "over_arch": (_halve, _double)},
    ),
    interactions=("dot", "cat"),
    pair_order="tril",
    allows_self_pairs=True,
    final_sigmoid=True,
    positional=True,
    rewrite=put_tables_together,
)
