"""Folders as Hugging Face libraries write them: shards of whole tensors, and an index of names.

`model.safetensors.index.json` beside `model-00001-of-00002.safetensors` and so on (or
`pytorch_model.bin.index.json` beside `.bin` files of `torch.save`), or one `model.safetensors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Scalar, TensorInfo
from dmt_convert.checkpoint.readers.safetensors_reader import (
    flat_checkpoint,
    read_header,
    read_safetensors,
    refuse_shard,
)
from dmt_convert.checkpoint.readers.torch_reader import read_torch
from dmt_convert.errors import CheckpointError

_INDEX: Final = ".index.json"
_SHARD: Final = re.compile(r"-\d+-of-\d+\.(?:safetensors|bin)$")
_SINGLE: Final = ("model.safetensors", "pytorch_model.bin")
_MAX_INDEX_BYTES: Final = 1 << 28
_MAX_LISTED: Final = 20


def is_indexed(path: Path) -> bool:
    """Tell by the names a folder with an index of its shards, the index itself, or a shard."""
    return bool(_indices(path)) or _single(path) is not None


def read_indexed(path: Path) -> FlatCheckpoint:
    """Read the index and the headers of all shards; or one file of weights without an index.

    Raises:
        CheckpointError: A shard is missing or damaged, or holds other tensors than the index says.
    """
    single = _single(path)
    if single is not None:
        return _read_whole(single)
    indices = _indices(path)
    if len(indices) > 1:
        raise CheckpointError(
            f"{path} holds {len(indices)} indices of shards",
            expected="one",
            hint="name one of them: " + ", ".join(index.name for index in indices[:5]),
        )
    return _read_all(indices[0])


def _read_whole(path: Path) -> FlatCheckpoint:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _read_shards(paths: list[Path], total: Scalar) -> list[FlatCheckpoint]:
    """Read the files that an index names.

    Args:
        paths: The files.
        total: Size of all tensors in bytes, as the index says.

    Raises:
        CheckpointError: One is damaged, or may hold parts of tensors only.
    """
    headers = [read_header(path) if path.suffix == ".safetensors" else None for path in paths]
    opened = [
        read_torch(path) if header is None else flat_checkpoint(header)
        for path, header in zip(paths, headers, strict=True)
    ]
    size = sum(tensor.nbytes for checkpoint in opened for tensor in checkpoint.tensors)
    for header in headers:
        # torch's writer calls shards also what one rank wrote whole: then the size is that of all
        offsets = {} if header is None else header.offsets or {}
        if header is not None and header.is_shard and (total != size or _any_moved(offsets)):
            raise refuse_shard(header.path)
    return opened


def _any_moved(offsets: Mapping[str, tuple[int, ...]]) -> bool:
    return any(any(starts) for starts in offsets.values())


def _indices(path: Path) -> list[Path]:
    """Return the indices that a path means."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(_INDEX) and p.is_file())
        plain = [p for p in found if p.name == f"model.safetensors{_INDEX}"]
        return plain or found
    if path.name.endswith(_INDEX) and path.is_file():
        return [path]
    match = _SHARD.search(path.name)
    if match is None:
        return []
    suffix = path.suffix
    return [
        index
        for index in (path.with_name(f"{path.name[: match.start()]}{suffix}{_INDEX}"),)
        if index.is_file()
    ]


def _single(path: Path) -> Path | None:
    """Return the one file of weights of a folder without an index."""
    if not path.is_dir() or _indices(path):
        return None
    return next((path / name for name in _SINGLE if (path / name).is_file()), None)


def _read_all(index: Path) -> FlatCheckpoint:
    weight_map, scalars = _read_index(index)
    shards = [index.with_name(name) for name in dict.fromkeys(weight_map.values())]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that {index.name} "
            "names",
            expected="all of them beside it",
            hint="copy the missing ones there",
            details=missing[:_MAX_LISTED],
        )
    opened = _read_shards(shards, scalars.get("total_size"))
    tensors = {
        (checkpoint.source.name, tensor.path): tensor
        for checkpoint in opened
        for tensor in checkpoint.tensors
    }
    listed = {(file, name) for name, file in weight_map.items()}
    wrong = [f"{file}: lacks {name}" for file, name in listed - tensors.keys()]
    wrong += [f"{file}: holds {name}, unlisted" for file, name in tensors.keys() - listed]
    if wrong:
        raise CheckpointError(
            f"{index} and its shards contradict each other in {len(wrong)} tensors",
            expected="every shard to hold what the index says",
            hint="files of two saves are mixed, or a download broke off; copy the folder again",
            details=sorted(wrong)[:_MAX_LISTED],
        )
    ordered: list[TensorInfo] = [tensors[file, name] for name, file in weight_map.items()]
    return FlatCheckpoint(
        source=index.parent,
        format="indexed",
        tensors=tuple(ordered),
        ordered=False,
        files=(*shards, index),
        scalars=scalars,
    )


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, Scalar]]:
    """Return tensor -> file name, and the plain values of the index."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"{index.stat().st_size} bytes")
        value = json.loads(index.read_text(encoding="utf-8"))
        weight_map = value["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"a shard outside the folder: {str(file)[:100]!r}")
        metadata = value.get("metadata") or {}
        scalars: dict[str, Scalar] = {
            key: entry
            for key, entry in dict(metadata).items()
            if isinstance(entry, str | int | float | None)
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards ({type(error).__name__}: {str(error)[:120]})",
            expected='a JSON document with "weight_map": tensor -> file',
            hint="the file is damaged; copy it again",
        ) from None
    return weight_map, scalars
