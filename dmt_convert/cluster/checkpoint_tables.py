"""Tables out of a training checkpoint, streamed, however TorchRec had sharded them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

from dmt_convert.checkpoint import ByteRows, TensorInfo, stream_tensor
from dmt_convert.cluster.saved_checkpoint import read_payload
from dmt_convert.errors import CheckpointError
from dmt_convert.files import TensorSource
from dmt_convert.spec import TableSpec

_TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def open_tables(checkpoint: Path, tables: Iterable[TableSpec]) -> dict[str, TensorInfo]:
    """Find tables in a training checkpoint; nothing but its metadata is read.

    Tables are known by the end of their names, `embedding_bags.TABLE.weight`, as TorchRec's modules
    have them; what is before is the modules around them.

    Args:
        checkpoint: Its folder.
        tables: Which tables, in which shapes.

    Returns:
        Table -> its tensor. `stream_tensor` and `gather_rows` read it in little memory, whether it
        was sharded by rows, by columns, by both, or not at all.

    Raises:
        CheckpointError: It is damaged, or has not these tables in these shapes, once each.
    """
    named: dict[str, list[TensorInfo]] = {}
    for info in read_payload(checkpoint).tensors:
        name = _table_name(info.path)
        if name is not None:
            named.setdefault(name, []).append(info)
    found, faults = {}, []
    for table in tables:
        infos = named.get(table.name, [])
        shape = (table.rows, table.dim)
        if len(infos) == 1 and infos[0].shape == shape and infos[0].dtype in _TORCH_DTYPES:
            found[table.name] = infos[0]
        else:
            faults.append(f"{table.name} of shape {list(shape)}: {_describe(infos)}")
    if faults:
        raise CheckpointError(
            f"{checkpoint} lacks {len(faults)} of the {len(found) + len(faults)} tables",
            expected="every table of the model once, under a name ending in "
            "embedding_bags.TABLE.weight",
            hint="give a checkpoint of this model",
            details=faults,
        )
    return found


def table_source(name: str, info: TensorInfo, *, dtype: str, origin: str) -> TensorSource:
    """Make what a bundle's weights file is written from.

    Args:
        name: Name in the file.
        info: The table in the checkpoint.
        dtype: What it is stored in: fp32, fp16 or bf16; values are rounded to nearest.
        origin: What to call it in errors.
    """
    return TensorSource(
        name=name,
        dtype=dtype,
        shape=info.shape,
        chunks=lambda: _stream_as(info, dtype),
        origin=origin,
    )


def _stream_as(info: TensorInfo, dtype: str) -> Iterator[ByteRows]:
    if info.dtype == dtype:
        yield from stream_tensor(info)
        return
    for chunk in stream_tensor(info):
        values = torch.frombuffer(bytearray(chunk.data), dtype=_TORCH_DTYPES[info.dtype])
        yield values.to(_TORCH_DTYPES[dtype]).view(torch.uint8).numpy()


def _table_name(path: str) -> str | None:
    """Return the table whose weights a tensor holds; None for any other tensor."""
    head, mark, name = path.rpartition(".weight")[0].rpartition("embedding_bags.")
    whole = path.endswith(".weight") and mark and (not head or head.endswith("."))
    return name if whole and name else None


def _describe(infos: list[TensorInfo]) -> str:
    if not infos:
        return "missing"
    return " and ".join(f"{info.path}, {info.dtype} of shape {list(info.shape)}" for info in infos)
