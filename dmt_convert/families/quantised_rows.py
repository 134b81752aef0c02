"""Tables of bytes, as TorchRec's `quantize_embeddings` and torch's prepack operators make them.

A row of bytes may hold floats, or codes of 8, 4 or 2 bits with a scale and a bias. Rows of several
types can be equally wide, and a model may mix types. So the type of each table comes from the
user, from a pickled module, or from the width, if only one type has rows of that width; otherwise
the user is asked.

Source: `torchrec/quant/embedding_modules.py`; rounded_row_size_in_bytes of
`fbgemm_gpu/split_table_batched_embeddings_ops_inference.py`;
`torch.ops.quantized.embedding_bag_{byte,4bit,2bit}_prepack`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.checkpoint import (
    RowCodes,
    TensorInfo,
    derived,
    gather_bytes,
    gather_rows,
    to_fp32,
)
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.model_config import TableType
from dmt_convert.families.model_info import Source
from dmt_convert.families.trainer_tensors import TrainerTensors

_ALIGNMENT: Final = 16
"""Rows of FBGEMM's tables are padded to a multiple of this, or not at all."""
_MAX_LISTED: Final = 20
_SAMPLED_ROWS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowType:
    """A type of rows: floats, or codes with a scale and a bias."""

    says: str
    """What a row holds, for messages."""
    float_dtype: str = ""
    """Dtype of the floats; empty for codes."""
    codes: RowCodes | None = None
    """How codes are laid out."""
    padded: bool = True
    """Whether rows may be padded."""

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of `dim` elements, without padding."""
        if self.codes is None:
            return dim * (4 if self.float_dtype == "fp32" else 2)
        return self.codes.row_bytes(dim)

    def fits(self, dim: int, width: int) -> bool:
        """Tell whether trainers make rows of `width` bytes of `dim` elements."""
        least = self.row_bytes(dim)
        aligned = -(-least // _ALIGNMENT) * _ALIGNMENT
        return width == least or (self.padded and width == aligned)

    def decode(self, info: TensorInfo, dim: int) -> TensorInfo:
        """Describe the numbers that a table of bytes stands for."""
        if self.codes is None:
            return derived.view_rows(info, dim, self.float_dtype)
        return derived.dequantise_rows(info, dim, self.codes)

    def is_sane(self, info: TensorInfo, dim: int) -> bool:
        """Look at the first rows: a wrong type shows as absurd numbers and negative scales."""
        rows = np.arange(min(info.shape[0], _SAMPLED_ROWS), dtype=np.int64)
        with np.errstate(all="ignore"):
            numbers = gather_rows(self.decode(info, dim), rows)
            if self.codes is not None:
                raw = gather_bytes(info, rows)
                begin = self.codes.code_bytes(dim) if self.codes.at_end else 0
                item = 2 if self.codes.dtype == "fp16" else 4
                scale = np.ascontiguousarray(raw[:, begin : begin + item])
                if np.any(to_fp32(scale, self.codes.dtype) < 0):
                    return False
            return bool(np.all(np.isfinite(numbers)) and np.max(np.abs(numbers)) < 1e6)


def _coded(bits: int, dtype: str, *, at_end: bool) -> _RowType:
    codes = RowCodes(dtype="fp16" if dtype == "fp16" else "fp32", at_end=at_end, bits=bits)
    place = "behind" if at_end else "before"
    says = f"codes of {bits} bits, {dtype} scale and bias {place} them"
    return _RowType(says=says, codes=codes, padded=not at_end)


ROW_TYPES: Final[Mapping[TableType, _RowType]] = {
    "fp32": _RowType(says="fp32 numbers", float_dtype="fp32"),
    "fp16": _RowType(says="fp16 numbers", float_dtype="fp16"),
    "int8": _coded(8, "fp16", at_end=False),
    "int4": _coded(4, "fp16", at_end=False),
    "int2": _coded(2, "fp16", at_end=False),
    "byte_prepack": _coded(8, "fp32", at_end=True),
    "8bit_prepack": _coded(8, "fp16", at_end=True),
    "4bit_prepack": _coded(4, "fp16", at_end=True),
    "2bit_prepack": _coded(2, "fp16", at_end=True),
}
"""What `table_type` may say -> the type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """The type of a table's rows, and how it is known."""

    kind: TableType
    """Name of the type."""
    source: Source
    """How it is known."""
    reason: str
    """Why."""


def decode_tables(source: TrainerTensors) -> None:
    """Replace tables of bytes by the numbers for which they stand.

    Raises:
        ArchitectureError: A table may be of several types, or is of the wrong one.
        ConfigError: `table_type` names a table that does not exist.
    """
    parts = source.table_parts()
    given = source.config.table_type
    unknown = sorted(set(given) - set(parts)) if isinstance(given, Mapping) else []
    if unknown:
        raise ConfigError(
            f"`table_type` names {', '.join(unknown[:5])}, which the model does not have",
            expected="names of its tables: " + ", ".join([*parts][:5]),
            hint="`dmt inspect` shows the tables",
        )
    coded = {n: found for n, found in parts.items() if "weight" in found and _is_coded(found)}
    if not coded:
        return
    whole = {n: found["weight"] for n, found in coded.items() if len(found) == 1}
    decisions = _decide(source, whole)
    tables: dict[str, TensorInfo] = {}
    for name, found in parts.items():
        table = found.get("weight")
        if name in whole:
            table = _decode_rows(source, name, whole[name], decisions.get(name))
        elif name in coded:
            table, decision = _decode_parts(source, found)
            decisions |= {name: decision} if decision is not None else {}
        if table is not None:
            tables[name] = table
    kinds = {decisions[name].kind if name in decisions else "" for name in parts}
    if isinstance(source.config.pooling, Mapping) or len(kinds) > 1:
        # quantize_embeddings groups tables by pooling and type: the file's order is not the model's
        source.ordered = False
    _report(source, decisions, len(parts))
    source.set_tables(tables)


def _is_coded(found: Mapping[str, TensorInfo]) -> bool:
    info = found["weight"]
    return info.dtype == "uint8" and len(info.shape) == 2 and 0 not in info.shape


def _decide(source: TrainerTensors, tables: Mapping[str, TensorInfo]) -> dict[str, _Decision]:
    """Decide of what type each table is; tables that none fits are left out.

    Raises:
        ArchitectureError: Several types fit, and nothing says which one is meant.
    """
    dim, given = source.dense_width or 0, source.config.table_type
    stored = {config.name: config.data_type for config in source.checkpoint.table_configs}
    found: dict[str, _Decision] = {}
    open_: dict[str, list[TableType]] = {}
    for name, info in tables.items():
        said = given.get(name) if isinstance(given, Mapping) else given
        stated = stored.get(name)
        fitting = [kind for kind, row in ROW_TYPES.items() if row.fits(dim, info.shape[1])]
        if said is not None:
            found[name] = _Decision(kind=said, source="given", reason="--model-config")
        elif (kind := next((kind for kind in ROW_TYPES if kind == stated), None)) is not None:
            reason = "the configs of the tables in the pickled module"
            found[name] = _Decision(kind=kind, source="read", reason=reason)
        elif len(fitting) == 1:
            reason = f"no other rows of {dim} elements take {info.shape[1]} bytes"
            found[name] = _Decision(kind=fitting[0], source="inferred", reason=reason)
        elif fitting:
            open_[name] = fitting
    if open_:
        raise _ask(source, tables, open_, dim)
    return found


def _ask(
    source: TrainerTensors,
    tables: Mapping[str, TensorInfo],
    open_: Mapping[str, list[TableType]],
    dim: int,
) -> ArchitectureError:
    first, kinds = next(iter(open_.items()))
    lines = [
        f"{name}: rows of {tables[name].shape[1]} bytes may be {', '.join(fitting)}"
        for name, fitting in open_.items()
    ]
    rest = len(lines) - _MAX_LISTED
    meant = "; ".join(f"{kind}: {ROW_TYPES[kind].says}" for kind in kinds)
    return ArchitectureError(
        f"{source.checkpoint.source}: the type of {len(open_)} tables of bytes is not in the "
        f"checkpoint: rows of {dim} elements are equally wide in {' and '.join(kinds)}",
        expected="a width that only one type has, or a pickled module, which names the types",
        hint=f"say it with --model-config: `table_type: {{{first}: {kinds[0]}}}`, or "
        f"`table_type: {kinds[0]}` for all tables of bytes ({meant})",
        details=lines[:_MAX_LISTED] + ([f"... and {rest} more"] if rest > 0 else []),
    )


def _decode_rows(
    source: TrainerTensors, name: str, info: TensorInfo, decision: _Decision | None
) -> TensorInfo | None:
    """Decode a table; None, noted as a fault, if its rows are of no type or of another one."""
    dim, width = source.dense_width or 0, info.shape[1]
    row = ROW_TYPES[decision.kind] if decision is not None else None
    if row is None or dim < 1 or row.row_bytes(dim) > width:
        wanted = {kind: r for kind, r in ROW_TYPES.items() if row in (None, r)}
        takes = ", ".join(f"{kind} {r.row_bytes(dim)}" for kind, r in wanted.items())
        source.wrong.append(
            f"{info.path} has rows of {width} bytes; those of {dim} elements take {takes}, or "
            f"more with padding to {_ALIGNMENT}"
        )
        return None
    assert decision is not None
    if not row.is_sane(info, dim):
        source.wrong.append(
            f"{info.path} is not {decision.kind}: {row.says} would hold NaN, Inf, numbers beyond "
            f"1e6 or negative scales (say what it is: `table_type: {{{name}: ...}}`)"
        )
        return None
    return row.decode(info, dim)


def _decode_parts(
    source: TrainerTensors, found: Mapping[str, TensorInfo]
) -> tuple[TensorInfo | None, _Decision | None]:
    """Decode a table whose scales and biases are tensors of their own."""
    table, dim = found["weight"], source.dense_width or 0
    scale, bias = found.get("qscale"), found.get("qbias")
    rows, width = table.shape
    for part in (scale, bias):
        if part is not None and part.shape not in ((rows,), (rows, 1)):
            source.wrong.append(f"{part.path} has shape {list(part.shape)}, expected [{rows}, 1]")
            return None, None
    if scale is None or bias is None:
        source.wrong.append(f"{table.path} has a scale or a bias, not both")
        return None, None
    kinds: Mapping[TableType, int] = {"int8": 8, "int4": 4, "int2": 2}
    fitting = [kind for kind, bits in kinds.items() if -(-dim * bits // 8) == width]
    kind = fitting[0] if fitting else "int8"
    reason = "a scale and a bias per row beside the codes"
    decision = _Decision(kind=kind, source="inferred", reason=reason)
    decoded = derived.decode_rows(
        table, scale, bias, bits=kinds[kind], dim=dim if fitting else width
    )
    return decoded, decision


def _report(source: TrainerTensors, decisions: Mapping[str, _Decision], count: int) -> None:
    groups: dict[tuple[TableType, Source, str], int] = {}
    for decision in decisions.values():
        key = (decision.kind, decision.source, decision.reason)
        groups[key] = groups.get(key, 0) + 1
    for (kind, how, reason), number in groups.items():
        plain = kind in ("fp32", "fp16")
        value = f"{number} of {count} tables {kind}" + ("" if plain else ", decoded to fp32")
        source.fact("table types", value, how, reason)
