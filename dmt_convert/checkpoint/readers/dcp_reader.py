"""Directories of torch.distributed.checkpoint (DCP), read without torch and without ranks.

Source: `torch/distributed/checkpoint/{metadata,filesystem}.py`. The file `.metadata` is a
plain pickle that torch loads unguarded; here it is read as inert records.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, FlatCheckpoint, Piece, TensorInfo
from dmt_convert.checkpoint.inert import (
    DCP_GLOBALS,
    Record,
    TensorRef,
    UnknownGlobal,
    collect_content,
    is_size,
    read_pickle,
    read_sizes,
    refuse_global,
)
from dmt_convert.checkpoint.readers.safetensors_reader import (
    SafetensorsHeader,
    looks_like_header,
    read_header,
)
from dmt_convert.checkpoint.readers.shards import check_files, check_tiling, payload_path
from dmt_convert.checkpoint.torch_archive import read_zip_archive
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
            expected="the hidden file .metadata, which the save writes last",
            hint="copies by * leave hidden files behind: copy that file too; if it never was "
            "there, the save did not finish: use the previous checkpoint",
        )
    with metadata_path.open("rb") as file:
        unknown: dict[str, UnknownGlobal] = {}
        metadata = read_pickle(file, source=metadata_path, allowed=DCP_GLOBALS, unknown=unknown)
    for name in unknown:
        if not name.startswith("torch.") or name.count(".") > 1:  # else a dtype
            raise refuse_global(metadata_path, name)
    try:
        if not isinstance(metadata, Record):
            raise TypeError("no Metadata record")
        tensors, unread = _read_entries(folder, metadata)
        if not tensors:
            tensors, unread = _read_objects(folder, metadata, unread)
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
    """Read the metadata of `model/` and what lies beside; these names become the outermost keys.

    Beside it may lie `optimizer/`, and TorchEasyRec's averaged weights of the dense part,
    `dense_ema/`.

    Raises:
        CheckpointError: One of them is incomplete or damaged.
    """
    folders = [path / name for name in ("model", "optimizer", "dense_ema")]
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


def _read_entries(folder: Path, metadata: Record) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    entries = _mapping(metadata.get("state_dict_metadata"))
    locations = _read_locations(folder, metadata.get("storage_data"))
    payloads = _Payloads(folder)
    paths: Mapping[str, Any] = metadata.fields.get("planner_data") or {}
    tensors: list[TensorInfo] = []
    unread: dict[str, str] = {}
    for fqn, entry in dict.items(entries):
        keys = _keys(_text(fqn), paths)
        if "chunks" not in entry.fields:
            unread[fqn] = (
                "a pickled object (a value, or a dict saved with flatten_state_dict=False)"
            )
            continue
        shape, dtype = read_sizes(entry.get("size")), _dtype(entry.get("properties"))
        if dtype not in ITEM_BYTES:
            unread[fqn] = f"a tensor of shape {list(shape)} in {dtype.removeprefix('torch.')[:40]}"
            continue
        pieces = tuple(
            payloads.resolve(_piece(folder, fqn, chunk, locations), fqn, dtype)
            for chunk in entry.get("chunks")
        )
        check_tiling(folder, fqn, shape, pieces)
        tensors.append(
            TensorInfo(
                name=keys[-1],
                container=keys[:-1],
                dtype=dtype,
                shape=shape,
                pieces=pieces,
            )
        )
    return tuple(tensors), unread


def _read_objects(
    folder: Path, metadata: Record, unread: dict[str, str]
) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Look for tensors in the objects of a checkpoint that was saved with flatten_state_dict=False.

    Each is a file of `torch.save` inside of a payload file. What is sharded in one is not read: of
    objects only one rank's are saved.
    """
    tensors: list[TensorInfo] = []
    left = dict(unread)
    locations = _read_locations(folder, metadata.get("storage_data"))
    for name in [name for name in unread if unread[name].startswith("a pickled object")]:
        relative, offset, length = locations[name, ()]
        path = payload_path(folder, _text(relative))
        if not (is_size(offset) and is_size(length)) or not path.is_file():
            continue
        archive = read_zip_archive(path, start=offset, length=length)
        unknown: dict[str, UnknownGlobal] = {}
        value = read_pickle(io.BytesIO(archive.pickle), source=path, unknown=unknown)
        content = collect_content(value, path)
        found = content.tensors.items()
        if content.tensors and all(isinstance(tensor, TensorRef) for _, tensor in found):
            tensors += [
                TensorInfo(
                    name=keys[-1] if keys else name,
                    container=(name, *keys[:-1]) if keys else (),
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    pieces=(archive.piece(tensor, name=".".join((name, *keys))),),
                )
                for keys, tensor in found
                if isinstance(tensor, TensorRef)
            ]
            del left[name]
            left |= {f"{name}.{key}": what for key, what in content.unread.items()}
    return tuple(tensors), left


def _mapping(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} for a dict")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} for a name")
    return value


def _read_locations(folder: Path, storage: object) -> dict[tuple[str, tuple[int, ...]], _Location]:
    locations: dict[tuple[str, tuple[int, ...]], _Location] = {}
    for index, info in dict.items(_mapping(storage)):
        offset = index.fields.get("offset")
        _refuse_transformed(folder, info.fields.get("transform_descriptors"))
        # flat by these checks: to hash tuples nested deeply overflows the stack
        key = (_text(index.get("fqn")), () if offset is None else read_sizes(offset))
        locations[key] = (info.get("relative_path"), info.get("offset"), info.get("length"))
    return locations


def _refuse_transformed(folder: Path, descriptors: object) -> None:
    if not descriptors:
        return
    first = descriptors[0] if isinstance(descriptors, list | tuple) else descriptors
    name = first[:60] if isinstance(first, str) else "of an unknown name"
    raise CheckpointError(
        f"{folder} was saved with the extension {name} of torch.distributed.checkpoint, so that "
        "its payload is compressed or encrypted",
        expected="plain payloads",
        hint="load it where it was saved (dcp.load) and save it again without stream extensions: "
        "FileSystemWriter(path), without _extensions",
    )


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
    if isinstance(dtype, UnknownGlobal):
        return dtype.name
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
    path = payload_path(folder, _text(relative))
    if not (is_size(offset) and is_size(length)):
        raise ValueError("a payload without an offset and a length")
    return Piece(
        path=path,
        offset=offset,
        length=length,
        starts=starts,
        sizes=sizes,
        encoding="torch-zip",
    )


class _Payloads:
    """What the payload files are: archives of `torch.save`, or one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, tuple[SafetensorsHeader, dict[str, TensorInfo]] | None] = {}

    def resolve(self, piece: Piece, fqn: str, dtype: str) -> Piece:
        """Say where a piece lies, if its file is one of safetensors; else return it as it is.

        Raises:
            CheckpointError: Its file holds another part of the tensor.
        """
        found = self._look_into(piece)
        if found is None:
            return piece
        header, tensors = found
        tensor = tensors.get(fqn)
        starts = (header.offsets or {}).get(fqn, (0,) * len(piece.sizes))
        fits = tensor is not None and (tensor.dtype, tensor.shape) == (dtype, piece.sizes)
        if tensor is None or not fits or starts != piece.starts:
            raise CheckpointError(
                f"{piece.path} does not hold the part of {fqn} at {list(piece.starts)} that "
                ".metadata says",
                expected=f"{dtype} of shape {list(piece.sizes)}",
                hint="of several parts of a tensor that one rank holds, this format keeps only the "
                "last: save it with torch's default format; or files of two saves are mixed",
            )
        return replace(tensor.pieces[0], starts=starts)

    def _look_into(self, piece: Piece) -> tuple[SafetensorsHeader, dict[str, TensorInfo]] | None:
        if piece.path not in self._files:
            self._files[piece.path] = None
            if piece.path.is_file():
                with piece.path.open("rb") as file:
                    file.seek(piece.offset)
                    if looks_like_header(file.read(9)):
                        header = read_header(piece.path, start=piece.offset)
                        tensors = {tensor.name: tensor for tensor in header.tensors}
                        self._files[piece.path] = header, tensors
        return self._files[piece.path]
