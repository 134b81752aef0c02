"""Directories of torch.distributed.checkpoint (DCP), read without torch and without ranks.

Source: `torch/distributed/checkpoint/{metadata,filesystem}.py`. The file `.metadata` is a
plain pickle that torch loads unguarded; here it is read as inert records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, FlatCheckpoint, Piece, TensorInfo
from dmt_convert.checkpoint.inert import DCP_GLOBALS, Record, is_size, read_pickle, read_sizes
from dmt_convert.checkpoint.shards import check_files, check_tiling
from dmt_convert.errors import CheckpointError

_Location = tuple[str, int, int]
_DAMAGED: Final = (KeyError, TypeError, ValueError, IndexError, AttributeError)


def is_dcp(path: Path) -> bool:
    """Tell a DCP directory, or a file in it, by the names."""
    folder = path if path.is_dir() else path.parent
    named = path.name == ".metadata" or path.suffix == ".distcp"
    if not path.is_dir() and not named:
        return False
    return (folder / ".metadata").is_file() or any(folder.glob("*.distcp"))


def read_dcp(path: Path) -> FlatCheckpoint:
    """Read `.metadata` of a DCP directory; the payload in `__<rank>_<n>.distcp` stays on disk.

    Args:
        path: The directory, or a file in it.

    Raises:
        CheckpointError: The directory is incomplete or damaged, or was compressed.
    """
    folder = path if path.is_dir() else path.parent
    metadata_path = folder / ".metadata"
    if not metadata_path.is_file():
        raise CheckpointError(
            f"{folder} holds .distcp files but no .metadata",
            expected="the .metadata file, which the save writes last",
            hint="the save did not finish; use the previous checkpoint",
        )
    with metadata_path.open("rb") as file:
        metadata = read_pickle(file, source=metadata_path, allowed=DCP_GLOBALS)
    try:
        tensors, unread = _read_entries(folder, metadata)
    except (*_DAMAGED, RuntimeError) as error:  # pathlib's word for a loop of symbolic links
        raise CheckpointError(
            f"{metadata_path} does not describe a checkpoint ({type(error).__name__}: {error})",
            expected="the metadata of torch.distributed.checkpoint",
            hint="the file is damaged, or of a version that is not known yet; report it",
        ) from None
    files = tuple(sorted({piece.path for tensor in tensors for piece in tensor.pieces}))
    check_files(folder, tensors, expected="every .distcp file that .metadata names, whole")
    return FlatCheckpoint(
        source=folder,
        format="dcp",
        tensors=tensors,
        ordered=False,
        files=(*files, metadata_path),
        unread=unread,
    )


def is_dcp_pair(path: Path) -> bool:
    """Tell a folder of DCP directories that were saved apart: `model/`, perhaps `optimizer/`."""
    return path.is_dir() and not _is_saved(path) and _is_saved(path / "model")


def read_dcp_pair(path: Path) -> FlatCheckpoint:
    """Read the metadata of `model/` and `optimizer/`; these names become the outermost keys.

    Raises:
        CheckpointError: One of them is incomplete or damaged.
    """
    folders = [path / name for name in ("model", "optimizer")]
    opened = {folder.name: read_dcp(folder) for folder in folders if _is_saved(folder)}
    return FlatCheckpoint(
        source=path,
        format="dcp-pair",
        tensors=tuple(
            replace(tensor, container=(name, *tensor.container))
            for name, checkpoint in opened.items()
            for tensor in checkpoint.tensors
        ),
        ordered=False,
        files=tuple(file for checkpoint in opened.values() for file in checkpoint.files),
        unread={
            f"{name}.{key}": value
            for name, checkpoint in opened.items()
            for key, value in checkpoint.unread.items()
        },
    )


def _is_saved(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def _read_entries(folder: Path, metadata: object) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    if not isinstance(metadata, Record):
        raise TypeError("no Metadata record")
    entries = _mapping(metadata.get("state_dict_metadata"))
    locations = _read_locations(metadata.get("storage_data"))
    paths: Mapping[str, Any] = metadata.fields.get("planner_data") or {}
    tensors: list[TensorInfo] = []
    unread: dict[str, str] = {}
    for fqn, entry in dict.items(entries):
        keys = _keys(_text(fqn), paths)
        if "chunks" not in entry.fields:
            unread[fqn] = "a pickled object"
            continue
        pieces = tuple(_piece(folder, fqn, chunk, locations) for chunk in entry.get("chunks"))
        shape = read_sizes(entry.get("size"))
        check_tiling(folder, fqn, shape, pieces)
        tensors.append(
            TensorInfo(
                name=keys[-1],
                container=keys[:-1],
                dtype=_dtype(entry.get("properties")),
                shape=shape,
                pieces=pieces,
            )
        )
    return tuple(tensors), unread


def _mapping(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} for a dict")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} for a name")
    return value


def _read_locations(storage: object) -> dict[tuple[str, tuple[int, ...]], _Location]:
    locations: dict[tuple[str, tuple[int, ...]], _Location] = {}
    for index, info in dict.items(_mapping(storage)):
        offset = index.fields.get("offset")
        if info.fields.get("transform_descriptors"):
            raise ValueError("its payload is compressed or encrypted, which is not supported yet")
        # flat by these checks: to hash tuples nested deeply overflows the stack
        key = (_text(index.get("fqn")), () if offset is None else read_sizes(offset))
        locations[key] = (info.get("relative_path"), info.get("offset"), info.get("length"))
    return locations


def _keys(fqn: str, paths: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the nested keys that DCP flattened into one name."""
    path = paths.get(fqn)
    if isinstance(path, tuple) and path and all(isinstance(key, str | int) for key in path):
        return tuple(str(key) for key in path)
    return (fqn,)


def _dtype(properties: Record) -> str:
    # TensorProperties pickles as a tuple (dtype, layout, ...); older versions as a dict
    if "dtype" in properties.fields:
        dtype = properties.get("dtype")
    else:
        states = [arg for arg in properties.args if isinstance(arg, tuple)]
        dtype = states[0][0]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TypeError("a tensor without a dtype that is known")
    return dtype


def _piece(
    folder: Path,
    fqn: str,
    chunk: Record,
    locations: Mapping[tuple[str, tuple[int, ...]], _Location],
) -> Piece:
    starts, sizes = read_sizes(chunk.get("offsets")), read_sizes(chunk.get("sizes"))
    relative, offset, length = locations[fqn, starts]
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or Path(relative).is_absolute():
        raise ValueError(f"a payload outside the directory: {relative}")
    if not (is_size(offset) and is_size(length)):
        raise ValueError("a payload without an offset and a length")
    return Piece(
        path=folder / relative,
        offset=offset,
        length=length,
        starts=starts,
        sizes=sizes,
        encoding="torch-zip",
    )
