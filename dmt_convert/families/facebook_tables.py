"""Tables that dlrm_s_pytorch.py stores in parts: quotient-remainder, mixed-dimension, weighted.

Each becomes the plain table that does the same to a bag: row i of it is what id i adds to the
pooled sum. Fixed pooling weights are ones and not stored, so that nothing is to be done for them.
Source: `tricks/qr_embedding_bag.py`, `tricks/md_embedding_bag.py`, `dlrm_s_pytorch.py` create_emb,
apply_emb.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dmt_convert.checkpoint import Combination, TensorInfo, derived
from dmt_convert.errors import ConfigError
from dmt_convert.families.facts import Fact
from dmt_convert.families.model_tensors import ModelTensors

PARTS: Final = {
    "emb_l.{}.weight_q": "tables.{}.q",
    "emb_l.{}.weight_r": "tables.{}.r",
    "emb_l.{}.embs.weight": "tables.{}.embs",
    "emb_l.{}.proj.weight": "tables.{}.proj",
    "v_W_l.{}": "tables.{}.row_weights",
}
"""The trainer's names of the parts -> ours."""


def put_tables_together(model: ModelTensors) -> None:
    """Replace tables in parts by plain ones.

    Raises:
        ConfigError: The operation that the user gives contradicts the shapes.
    """
    parts = model.parts()
    if all(set(found) == {"weight"} for found in parts.values()):
        return
    operation = _operation(model, parts)
    tables = {}
    for name, found in parts.items():
        table = _plain_table(model, name, found, operation)
        if table is not None:
            tables[name] = table
    _report(model, parts)
    model.set_tables(tables)


def _plain_table(
    model: ModelTensors, name: str, found: Mapping[str, TensorInfo], operation: Combination
) -> TensorInfo | None:
    """Put one table together; None, and a problem, where parts are missing or do not fit."""
    needed = {"weight"}
    if "q" in found or "r" in found:
        needed = {"q", "r"}
    elif "embs" in found or "proj" in found:
        needed = {"embs"}
    absent = sorted(needed - set(found))
    model.missing += [f"tables.{name}.{part}" for part in absent]
    flat = [info for part, info in found.items() if part != "row_weights" and not _is_matrix(info)]
    model.wrong += [f"{info.path} has shape {list(info.shape)}, not 2 dims" for info in flat]
    if absent or flat:
        return None
    weights = found.get("row_weights")
    if "q" in needed:
        return _combine(model, found["q"], found["r"], weights, operation)
    if "embs" in needed:
        return _weigh(model, _project(model, found["embs"], found.get("proj")), weights)
    return _weigh(model, found["weight"], weights)


def _combine(
    model: ModelTensors,
    q: TensorInfo,
    r: TensorInfo,
    weights: TensorInfo | None,
    operation: Combination,
) -> TensorInfo | None:
    if operation != "concat" and q.shape[1] != r.shape[1]:
        model.wrong.append(f"{r.path} has {r.shape[1]} columns, {q.path} has {q.shape[1]}")
        return None
    # the last quotient's rows are spelt out to the end, but the trainer may not have them all
    table = _weigh(model, derived.combine_rows(q, r, operation), weights, spare=r.shape[0] - 1)
    # the trainer weighs both factors, and multiplies them then
    return _weigh(model, table, weights) if operation == "mult" else table


def _project(model: ModelTensors, table: TensorInfo, proj: TensorInfo | None) -> TensorInfo | None:
    if proj is None:
        return table
    if proj.shape[1] != table.shape[1]:
        model.wrong.append(
            f"{proj.path} takes {proj.shape[1]} inputs, {table.path} gives {table.shape[1]}"
        )
        return None
    return derived.project_rows(table, proj)


def _weigh(
    model: ModelTensors, table: TensorInfo | None, weights: TensorInfo | None, *, spare: int = 0
) -> TensorInfo | None:
    """Multiply rows by the weights that pooling gives them; `spare` rows may have none."""
    if table is None or weights is None:
        return table
    rows = weights.shape[0] if len(weights.shape) == 1 else -1
    if not max(1, table.shape[0] - spare) <= rows <= table.shape[0]:
        model.wrong.append(
            f"{weights.path} has shape {list(weights.shape)}, expected [{table.shape[0]}]"
        )
        return None
    return derived.scale_rows(derived.slice_rows(table, 0, rows), weights)


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and 0 not in info.shape


def _operation(model: ModelTensors, parts: Mapping[str, Mapping[str, TensorInfo]]) -> Combination:
    """Tell what is made of quotient and remainder: twice the dim is concat, else it is asked."""
    pairs = [(found["q"], found["r"]) for found in parts.values() if {"q", "r"} <= set(found)]
    given, width = model.config.qr_operation, model.dense_width
    if not pairs:
        return "mult"
    q, r = pairs[0]
    joined = _is_matrix(q) and _is_matrix(r) and q.shape[1] + r.shape[1] == width
    if given is not None and (given == "concat") != joined:
        raise ConfigError(
            f"the model config says qr_operation {given}, but {q.path} has shape {list(q.shape)} "
            f"and dense_arch gives {width} outputs",
            expected="concat where both parts together are as wide as dense_arch's output, mult or "
            "add where each is",
            hint="leave `qr_operation` out, or mend it",
        )
    operation: Combination = "concat" if joined else given or "mult"
    reason = "--model-config"
    if joined:
        reason = "both parts together are as wide as dense_arch's output"
    elif given is None:
        reason = "the trainer's default; not stored (--model-config: `qr_operation: add`)"
    source = "inferred" if joined else "assumed" if given is None else "given"
    model.facts.append(
        Fact(
            subject="quotient-remainder tables",
            value=f"{len(pairs)} of {len(parts)}, {operation}",
            source=source,  # type: ignore[arg-type]
            reason=reason,
        )
    )
    if operation == "mult":
        model.facts.append(
            Fact(
                subject="bags of those tables",
                value="one id each",
                source="assumed",
                reason="the trainer multiplies pooled sums, which for one id alone is pooling "
                "products",
            )
        )
    return operation


def _report(model: ModelTensors, parts: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    counts = {part: sum(part in found for found in parts.values()) for part in PARTS_SAID}
    model.facts += [
        Fact(
            subject=PARTS_SAID[part],
            value=f"{count} of {len(parts)}",
            source="read",
            reason="tensor names; worked into the rows",
        )
        for part, count in counts.items()
        if count
    ]


PARTS_SAID: Final = {
    "embs": "mixed-dimension tables",
    "row_weights": "tables with learned pooling weights",
}
"""Parts that are worth a word in themselves."""
