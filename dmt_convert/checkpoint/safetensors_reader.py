"""`.safetensors` files: a JSON header, then raw tensors. Source: the safetensors format text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import (
    ITEM_BYTES,
    FlatCheckpoint,
    Piece,
    Scalar,
    TensorInfo,
)
from dmt_convert.errors import CheckpointError

DTYPE_NAMES: Final = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER_BYTES: Final = 100_000_000
DICTS_KEY: Final = "dmt.dicts"
"""Key of the metadata under which `dmt unshard` lists the dicts that names begin with."""


def is_safetensors(path: Path) -> bool:
    """Tell by the suffix, or by a header length followed by a brace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (
        len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27
    )


def read_safetensors(path: Path) -> FlatCheckpoint:
    """Read the header only. The order of the tensors says nothing about the model's order.

    Raises:
        CheckpointError: The header is damaged, or the file is not as long as it says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"{size} bytes, with a header of {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("the header is not an object")
        metadata = header.pop("__metadata__", None) or {}
        scalars: dict[str, Scalar] = {str(k): str(v) for k, v in dict(metadata).items()}
        dicts = _read_dicts(str(scalars.pop(DICTS_KEY, "[]")))
        tensors = tuple(
            _put_back(_tensor_info(path, 8 + length, *item), dicts) for item in header.items()
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"a header that cannot be read ({error})") from None
    _check_layout(path, 8 + length, size, tensors)
    return FlatCheckpoint(
        source=path,
        format="safetensors",
        tensors=tensors,
        ordered=False,
        files=(path,),
        scalars=scalars,
    )


def _read_dicts(text: str) -> dict[str, tuple[str, ...]]:
    """Return the dicts around tensors that are not the model's, by what names begin with."""
    dicts = [tuple(str(key) for key in keys) for keys in json.loads(text)]
    return {".".join(keys): keys for keys in dicts if keys}


def _put_back(tensor: TensorInfo, dicts: dict[str, tuple[str, ...]]) -> TensorInfo:
    """Put a tensor back into the dict that `dmt unshard` took it from."""
    end = len(tensor.name)
    while dicts and (end := tensor.name.rfind(".", 0, end)) > 0:
        keys = dicts.get(tensor.name[:end])
        if keys is not None:
            return replace(tensor, name=tensor.name[end + 1 :], container=keys)
    return tensor


def _tensor_info(path: Path, base: int, name: str, entry: dict[str, object]) -> TensorInfo:
    dtype = DTYPE_NAMES.get(str(entry["dtype"]))
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise ValueError(f"tensor {name!r} has shape or offsets {values!r:.60}")
    assert isinstance(shape, list) and isinstance(offsets, list)
    begin, end = offsets
    length = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != length:
        raise ValueError(
            f"tensor {name!r} of shape {shape} in {dtype} takes {end - begin} bytes, not {length}"
        )
    piece = Piece(
        path=path,
        offset=base + begin,
        length=length,
        starts=(0,) * len(shape),
        sizes=tuple(shape),
    )
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), pieces=(piece,))


def _check_layout(path: Path, base: int, size: int, tensors: tuple[TensorInfo, ...]) -> None:
    """Refuse holes, overlaps and a wrong file length: the format allows none of them."""
    position = base
    for tensor in sorted(tensors, key=lambda t: (t.pieces[0].offset, t.pieces[0].length)):
        piece = tensor.pieces[0]
        if piece.offset != position:
            raise _damaged(path, f"tensor {tensor.name!r} at byte {piece.offset}, not {position}")
        position += piece.length
    if position != size:
        raise _damaged(path, f"{size} bytes, where its header describes {position}")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {found}",
        expected="a whole .safetensors file: header, then every tensor without gaps",
        hint="the file is damaged or was cut short; copy it again and compare its size",
    )
