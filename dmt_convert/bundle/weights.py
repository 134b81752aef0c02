"""Which tensors go into which file of a bundle, and where their bytes come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import ZEROS, ByteRows, TensorInfo, to_fp32
from dmt_convert.families import FlatModelInfo
from dmt_convert.files import TensorSource, array_source, digest_names, digest_of, stream_checked
from dmt_convert.spec import Dtype

DENSE_FILE: Final = "weights/dense.safetensors"
Arrays = Mapping[str, npt.NDArray[np.floating]]


def tower_file(index: int) -> str:
    """Name of a tower's weights below the bundle."""
    return f"weights/tower_{index:03d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallWeights:
    """What a bundle holds beside tables: computed, not streamed."""

    dense: Arrays
    """Weights outside towers, by canonical name."""
    modules: tuple[Arrays, ...]
    """State of every tower's module."""

    def sources(self) -> dict[str, list[TensorSource]]:
        """List the tensors by weights file."""
        files = {DENSE_FILE: [array_source(name, array) for name, array in self.dense.items()]}
        for t, module in enumerate(self.modules):
            files[tower_file(t)] = [
                array_source(f"tower_module.{name}", array) for name, array in module.items()
            ]
        return files


def plan_table_files(
    info: FlatModelInfo,
    towers: Sequence[Sequence[str]],
    *,
    dtype: Dtype | None = None,
    accept_outliers: bool = False,
) -> dict[str, list[TensorSource]]:
    """List the tables of every weights file; the one of the dense parts has none.

    Args:
        info: The flat checkpoint: tables are streamed from it, byte for byte.
        towers: Features of every tower.
        dtype: Store tables in this type instead of their own.
        accept_outliers: Take values that are absurd as weights.
    """
    tables = info.spec.tables_by_feature
    files: dict[str, list[TensorSource]] = {DENSE_FILE: []}
    for t, features in enumerate(towers):
        names = dict.fromkeys(tables[feature].name for feature in features)
        files[tower_file(t)] = [
            replace(
                _table_source(info.table_info(name), name, dtype), is_weight=not accept_outliers
            )
            for name in names
        ]
    return files


def digest_dense(info: FlatModelInfo) -> str:
    """Digest all weights of a flat checkpoint but its tables, as they are stored."""
    return digest_names(
        (name, tensor.dtype, tensor.shape, digest_of(tensor))
        for name, tensor in info.dense_tensors.items()
    )


def table_bytes(info: FlatModelInfo, dtype: Dtype | None) -> int:
    """Bytes that all tables take in a bundle."""
    itemsize = {"fp32": 4, "fp16": 2, "bf16": 2}
    return sum(
        table.rows * table.dim * itemsize[dtype or table.dtype] for table in info.spec.tables
    )


def _table_source(tensor: TensorInfo, table: str, dtype: Dtype | None) -> TensorSource:
    recoded = dtype is not None and dtype != tensor.dtype
    origin = f"table {table!r} ({tensor.path})"
    return TensorSource(
        name=f"tables.{table}.weight",
        dtype=dtype if dtype is not None else tensor.dtype,
        shape=tensor.shape,
        chunks=(lambda: _recode(tensor, dtype, origin))
        if dtype is not None and recoded
        else (lambda: stream_checked(tensor, origin)),
        origin=origin,
    )


def _recode(tensor: TensorInfo, dtype: Dtype, origin: str) -> Iterator[ByteRows]:
    """Convert chunk by chunk; a value that does not fit becomes Inf, which is then refused."""
    import torch

    target = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for chunk in stream_checked(tensor, origin):
        if chunk is ZEROS:
            chunk = ZEROS.copy()
        values = torch.from_numpy(np.array(to_fp32(chunk.reshape(1, -1), tensor.dtype)))
        yield values.to(target).view(torch.uint8).numpy().reshape(-1)
