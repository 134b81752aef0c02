"""Directories of torchsnapshot: `.snapshot_metadata` beside raw bytes, as MLPerf's DLRM has them.

Source: pytorch/torchsnapshot, `manifest.py` (entries), `flatten.py` (names in paths),
`io_preparers/` (what lies where). Tensors are raw bytes of a file or of a range of one; objects
of other kinds are pickles, which are listed and never loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import (
    ITEM_BYTES,
    FlatCheckpoint,
    Keys,
    Piece,
    Scalar,
    TensorInfo,
)
from dmt_convert.checkpoint.inert import is_size
from dmt_convert.checkpoint.readers.module_order import is_module_order
from dmt_convert.checkpoint.readers.shards import (
    check_files,
    check_tiling,
    payload_path,
    stand_sorted,
)
from dmt_convert.errors import CheckpointError

_METADATA: Final = ".snapshot_metadata"
_MAX_METADATA_BYTES: Final = 1 << 30
_MAX_PIECES: Final = 2_000_000
_DTYPES: Final[Mapping[str, str]] = {
    "torch.float64": "fp64",
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.int64": "int64",
    "torch.int32": "int32",
    "torch.int16": "int16",
    "torch.int8": "int8",
    "torch.uint8": "uint8",
    "torch.bool": "bool",
}
_SHARDED: Final[Mapping[str, str]] = {
    "ShardedTensor": "shards",
    "ChunkedTensor": "chunks",
    "DTensor": "shards",
}
"""Kinds of tensors in several blocks, and where their entries list them."""
_PRIMITIVES: Final = ("int", "str", "bool", "float", "bytes")
_DAMAGED: Final = (KeyError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(slots=True)
class _Found:
    """Entries of all ranks, by the keys around them."""

    count: int = 0
    pieces: dict[Keys, list[Piece]] = field(default_factory=dict)
    dtypes: dict[Keys, str] = field(default_factory=dict)
    shapes: dict[Keys, tuple[int, ...] | None] = field(default_factory=dict)
    orders: dict[Keys, dict[str, int]] = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def is_torchsnapshot(path: Path) -> bool:
    """Tell a directory that `Snapshot.take` wrote by the name of its metadata."""
    folder = path if path.is_dir() else path.parent
    return (path.is_dir() or path.name == _METADATA) and (folder / _METADATA).is_file()


def read_torchsnapshot(path: Path) -> FlatCheckpoint:
    """Read `.snapshot_metadata`; the payload stays on disk.

    Raises:
        CheckpointError: The directory is incomplete or damaged.
    """
    folder = path if path.is_dir() else path.parent
    manifest = _read_manifest(folder / _METADATA)
    found = _Found()
    try:
        for key, entry in manifest.items():
            _take(folder, found, key, entry)
        tensors = tuple(_join(folder, found, keys) for keys in _in_order(found))
    except (*_DAMAGED, RuntimeError) as error:  # pathlib's word for a loop of symbolic links
        raise _damaged(folder / _METADATA, f"{type(error).__name__}: {error}") from None
    order = _in_order(found)
    sharded = [keys for keys in order if found.shapes[keys] is None]
    check_files(folder, tensors, expected="every file that .snapshot_metadata names, whole")
    files = sorted({piece.path for tensor in tensors for piece in tensor.pieces})
    return FlatCheckpoint(
        source=folder,
        format="torchsnapshot",
        tensors=tensors,
        ordered=is_module_order(order) and not (sharded and stand_sorted(sharded)),
        files=(*files, folder / _METADATA),
        scalars=found.scalars,
        unread=found.unread,
    )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not describe a snapshot ({found[:200]})",
        expected="the metadata that torchsnapshot writes",
        hint="the file is damaged or was cut short; copy it again",
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    """Parse JSON, or the YAML of older versions."""
    if path.stat().st_size > _MAX_METADATA_BYTES:
        raise _damaged(path, f"{path.stat().st_size} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if text.lstrip().startswith("{") else _load_yaml(text)
        manifest = value["manifest"]
        if not isinstance(manifest, dict):
            raise TypeError("no manifest")
    except (*_DAMAGED, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    return manifest


def _load_yaml(text: str) -> Any:
    import yaml

    if "<<" in text:  # a merge copies what it names, as often as it is named
        raise ValueError("a merge key")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


def _keys(logical: str) -> Keys:
    """Split `rank/app/key/...`; slashes inside keys are escaped."""
    rank, *parts = logical.split("/")
    if not rank.isdecimal() or not parts:
        raise ValueError(f"a path {logical!r}")
    return tuple(part.replace("%2F", "/").replace("%25", "%") for part in parts)


def _take(folder: Path, found: _Found, logical: str, entry: Mapping[str, Any]) -> None:
    """Take up one entry of one rank."""
    keys = _keys(logical)
    kind, name = entry["type"], ".".join(keys)
    if kind in ("dict", "OrderedDict"):
        order = found.orders.setdefault(keys, {})
        for key in entry["keys"]:
            order.setdefault(_plain(key), len(order))
    elif kind == "Tensor":
        if keys not in found.pieces:  # a rank's own copy: the first one's is taken
            shape = _sizes(entry["shape"])
            _add(folder, found, keys, entry, (0,) * len(shape), shape)
    elif kind in _SHARDED:
        whole = _sizes(entry["shape"]) if "shape" in entry else None
        for shard in entry[_SHARDED[kind]]:
            _add(folder, found, keys, shard["tensor"], _sizes(shard["offsets"]), whole)
            if found.pieces.get(keys) and _sizes(shard["sizes"]) != _sizes(
                shard["tensor"]["shape"]
            ):
                raise ValueError(f"a shard of {name} whose sizes differ from its tensor's shape")
    elif kind in _PRIMITIVES:
        found.scalars.setdefault(name, _primitive(entry))
    elif kind == "object":
        found.unread.setdefault(name, f"a pickled object ({_plain(entry.get('obj_type'))[:100]})")
    elif kind != "list":
        raise ValueError(f"an entry of the unknown kind {_plain(kind)!r}")


def _add(
    folder: Path,
    found: _Found,
    keys: Keys,
    entry: Mapping[str, Any],
    starts: tuple[int, ...],
    shape: tuple[int, ...] | None,
) -> None:
    """Add one block of raw bytes, or of a `torch.save` archive, to a tensor."""
    dtype, serializer = _DTYPES.get(entry["dtype"]), entry["serializer"]
    if dtype is None or serializer not in ("buffer_protocol", "torch_save"):
        found.unread[".".join(keys)] = f"a tensor in {entry['dtype']}, written by {serializer}"
        return
    if found.dtypes.setdefault(keys, dtype) != dtype:
        raise ValueError(f"shards of {'.'.join(keys)} in two dtypes")
    found.shapes.setdefault(keys, shape)
    path, sizes = _locate(folder, entry["location"]), _sizes(entry["shape"])
    limits = entry.get("byte_range")
    raw = serializer == "buffer_protocol"
    if limits is None:
        begin = 0
        end = math.prod(sizes) * ITEM_BYTES[dtype] if raw else _file_size(path)
    else:
        begin, end = _sizes(limits)
    if end < begin or (raw and end - begin != math.prod(sizes) * ITEM_BYTES[dtype]):
        raise ValueError(
            f"{end - begin} bytes for {'.'.join(keys)} of shape {list(sizes)} in {dtype}"
        )
    found.count += 1
    if found.count > _MAX_PIECES:
        raise ValueError(f"over {_MAX_PIECES} blocks")
    found.pieces.setdefault(keys, []).append(
        Piece(
            path=path,
            offset=begin,
            length=end - begin,
            starts=starts,
            sizes=sizes,
            encoding="raw" if raw else "torch-zip",
        )
    )


def _locate(folder: Path, location: object) -> Path:
    if not isinstance(location, str):
        raise TypeError("a payload without a location")
    return payload_path(folder, location)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _primitive(entry: Mapping[str, Any]) -> Scalar:
    """Return a plain value; floats and bytes stay text if the file gives it."""
    kind, text = entry["type"], _plain(entry["serialized_value"])[:1000]
    if kind == "int":
        return int(text[:18])
    if kind == "bool":
        return text == "True"
    return _plain(entry.get("readable") or text)


def _plain(value: object) -> str:
    """Return a plain value as text: aliases of YAML may nest to any size, written out."""
    if value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"a {type(value).__name__} instead of text")
    return str(value)


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 16 or not all(map(is_size, values)):
        raise TypeError("not a shape, an offset or a range")
    return tuple(values)


def _in_order(found: _Found) -> list[Keys]:
    """Put tensors in the order of the dicts that held them."""

    def rank_of(keys: Keys) -> tuple[int, ...]:
        return tuple(
            found.orders.get(keys[:end], {}).get(keys[end], len(found.pieces))
            for end in range(1, len(keys))
        )

    apps = {keys[0]: i for i, keys in reversed(list(enumerate(found.pieces)))}
    return sorted(found.pieces, key=lambda keys: (apps[keys[0]], rank_of(keys)))


def _join(folder: Path, found: _Found, keys: Keys) -> TensorInfo:
    pieces = tuple(_distinct(found.pieces[keys]))
    shape = found.shapes[keys]
    if shape is None:  # of sharded tensors only the shards are described
        ends = [tuple(a + n for a, n in zip(p.starts, p.sizes, strict=True)) for p in pieces]
        shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    check_tiling(folder, ".".join(keys), shape, pieces)
    return TensorInfo(
        name=keys[-1],
        container=keys[:-1],
        dtype=found.dtypes[keys],
        shape=shape,
        pieces=pieces,
    )


def _distinct(pieces: list[Piece]) -> Iterator[Piece]:
    """Yield every block once: if ranks hold copies, the first one's."""
    seen = set()
    for piece in pieces:
        if (piece.starts, piece.sizes) not in seen:
            seen.add((piece.starts, piece.sizes))
            yield piece
