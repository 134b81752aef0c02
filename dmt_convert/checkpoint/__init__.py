"""Containers: how the bytes on disk become named tensors, without reading the weights."""

from dmt_convert.checkpoint.flat_checkpoint import (
    ITEM_BYTES,
    Derivation,
    FlatCheckpoint,
    Piece,
    Scalar,
    Segment,
    TableConfig,
    TensorInfo,
)
from dmt_convert.checkpoint.nvidia_reader import NVIDIA_TABLE_ORDER
from dmt_convert.checkpoint.registry import READERS, Reader, open_checkpoint
from dmt_convert.checkpoint.safetensors_reader import DTYPE_NAMES, SafetensorsReader
from dmt_convert.checkpoint.tensor_bytes import (
    CHUNK_BYTES,
    ZEROS,
    ByteRows,
    check_finite,
    gather_bytes,
    gather_rows,
    read_tensor,
    resolve_segments,
    stream_tensor,
    to_fp32,
)

__all__ = [
    "CHUNK_BYTES",
    "DTYPE_NAMES",
    "ITEM_BYTES",
    "NVIDIA_TABLE_ORDER",
    "READERS",
    "ZEROS",
    "ByteRows",
    "Derivation",
    "FlatCheckpoint",
    "Piece",
    "Reader",
    "SafetensorsReader",
    "Scalar",
    "Segment",
    "TableConfig",
    "TensorInfo",
    "check_finite",
    "gather_bytes",
    "gather_rows",
    "open_checkpoint",
    "read_tensor",
    "resolve_segments",
    "stream_tensor",
    "to_fp32",
]
