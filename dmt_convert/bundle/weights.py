"""Which tensors go into which file of a bundle, and where their bytes come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.architectures import FlatModelInfo
from dmt_convert.bundle.safetensors_writer import TensorSource, array_source
from dmt_convert.checkpoint import (
    ZEROS,
    ByteRows,
    TensorInfo,
    resolve_segments,
    stream_tensor,
    to_fp32,
)
from dmt_convert.spec import Dtype
from dmt_convert.towers import DmtSpec

DENSE_FILE: Final = "weights/dense.safetensors"
Arrays = Mapping[str, npt.NDArray[np.floating]]


def tower_file(index: int) -> str:
    """Name of a tower's weights below the bundle."""
    return f"weights/tower_{index:03d}.safetensors"


def plan_weight_files(
    info: FlatModelInfo,
    spec: DmtSpec,
    *,
    dense: Arrays,
    modules: tuple[Arrays, ...],
    dtype: Dtype | None = None,
) -> dict[str, list[TensorSource]]:
    """List the tensors of every weights file.

    Args:
        info: The flat checkpoint: tables are streamed from it, byte for byte.
        spec: The converted model.
        dense: Weights outside towers, by canonical name.
        modules: State of every tower's module.
        dtype: Store tables in this type instead of their own.
    """
    files = {DENSE_FILE: [array_source(name, array) for name, array in sorted(dense.items())]}
    for t, tower in enumerate(spec.towers):
        names = dict.fromkeys(info.spec.table_of(feature).name for feature in tower.features)
        sources = [_table_source(info.table_info(name), name, dtype) for name in names]
        sources += [
            array_source(f"tower_module.{name}", array) for name, array in modules[t].items()
        ]
        files[tower_file(t)] = sources
    return files


def table_bytes(info: FlatModelInfo, dtype: Dtype | None) -> int:
    """Bytes that all tables take in a bundle."""
    itemsize = {"fp32": 4, "fp16": 2, "bf16": 2}
    return sum(
        table.rows * table.dim * itemsize[dtype or table.dtype] for table in info.spec.tables
    )


def _table_source(tensor: TensorInfo, table: str, dtype: Dtype | None) -> TensorSource:
    recoded = dtype is not None and dtype != tensor.dtype
    segments = resolve_segments(tensor)
    whole = len(segments) == 1 and not recoded and segments[0].strides is None
    return TensorSource(
        name=f"tables.{table}.weight",
        dtype=dtype if dtype is not None else tensor.dtype,
        shape=tensor.shape,
        chunks=(lambda: _recode(tensor, dtype))
        if dtype is not None and recoded
        else (lambda: stream_tensor(tensor)),
        origin=f"table {table!r} ({tensor.path})",
        crc32=segments[0].crc32 if whole else None,
    )


def _recode(tensor: TensorInfo, dtype: Dtype) -> Iterator[ByteRows]:
    """Convert chunk by chunk; a value that does not fit becomes Inf, which is then refused."""
    import torch

    target = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for chunk in stream_tensor(tensor):
        if chunk is ZEROS:
            chunk = ZEROS.copy()
        values = torch.from_numpy(np.array(to_fp32(chunk.reshape(1, -1), tensor.dtype)))
        yield values.to(target).view(torch.uint8).numpy().reshape(-1)
