"""Files written by `torch.save`: state dicts, pickled modules, shards of one rank each.

`torch.save(model.state_dict())` of a `DistributedModelParallel` writes on every rank what that
rank holds: its shards of the tables, and its copy of the dense parts. Such files are joined
offline, without a process group and without torch. The other ranks' files are found by what they
hold, not by their names: the same tables, shards of other ranks. Names decide only if several
files would do.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Keys, Piece, TensorInfo
from dmt_convert.checkpoint.identify import check_stand_in
from dmt_convert.checkpoint.inert import (
    PickledContent,
    ShardedRef,
    ShardPlace,
    TensorRef,
    UnknownGlobal,
    collect_content,
    read_pickle,
    refuse_global,
)
from dmt_convert.checkpoint.readers.module_order import is_module_order
from dmt_convert.checkpoint.readers.shards import check_tiling, describe_block, stand_sorted
from dmt_convert.checkpoint.tensor_bytes import stream_tensor
from dmt_convert.checkpoint.torch_archive import (
    TorchArchive,
    read_legacy_archive,
    read_zip_archive,
)
from dmt_convert.errors import CheckpointError

_RUNNERS: Final = (
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "importlib.",
    "nt.",
    "os.",
    "posix.",
    "runpy.",
    "shutil.",
    "socket.",
    "subprocess.",
    "sys.",
)
"""Names that no trainer pickles, and that run commands or touch files."""

_MAX_FILES: Final = 10_000
_MAX_LISTED: Final = 20
_MAX_COMPARED_BYTES: Final = 64 << 20
"""Most bytes of the dense parts that are compared between two ranks if checksums are missing."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """An opened file: its pickle is read, its storages stay on disk."""

    path: Path
    """The file."""
    archive: TorchArchive
    """Where its storages lie."""
    content: PickledContent
    """What its pickle holds."""
    unknown: tuple[str, ...]
    """Globals that the pickle names beside those of plain state dicts."""

    def whole(self, keys: Keys, tensor: TensorRef) -> TensorInfo:
        """Describe a tensor that lies in this file alone.

        Raises:
            CheckpointError: The file does not hold all of it.
        """
        return _describe(keys, tensor, (self.archive.piece(tensor, name=".".join(keys)),))


def _describe(keys: Keys, tensor: TensorRef | ShardedRef, pieces: tuple[Piece, ...]) -> TensorInfo:
    return TensorInfo(
        name=keys[-1] if keys else "",
        container=keys[:-1],
        dtype=tensor.dtype,
        shape=tensor.shape,
        pieces=pieces,
    )


def is_torch_file(path: Path) -> bool:
    """Tell by the first bytes: a zip archive, or a pickle."""
    if not path.is_file() or path.suffix == ".npz":
        return False
    with path.open("rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or (len(head) > 1 and head[0] == 0x80 and head[1] <= 5)


def open_torch_file(path: Path) -> TorchFile:
    """Read the pickle; storages stay on disk, and nothing that the pickle names is run.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not is_torch_file(path):
        check_stand_in(path)
    unknown: dict[str, UnknownGlobal] = {}
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        archive = read_zip_archive(path) if zipped else read_legacy_archive(path, file)
    content = read_pickle(io.BytesIO(archive.pickle), source=path, unknown=unknown)
    return TorchFile(
        path=path,
        archive=archive,
        content=collect_content(content, path),
        unknown=tuple(unknown),
    )


def read_torch(path: Path) -> FlatCheckpoint:
    """Read `.pt`, `.pth` and any other file that `torch.save` wrote; never runs what it reads.

    If a file holds one rank's shards, the files of the other ranks are found beside it.

    Raises:
        CheckpointError: The file is damaged, holds only objects that are not read, or is one of
            several ranks' and others are missing.
    """
    file = open_torch_file(path)
    content = file.content
    if not content.tensors and file.unknown:
        raise refuse_global(path, file.unknown[0])
    for name in file.unknown:
        if name.startswith(_RUNNERS):
            _log.warning(
                "%s names %s, which torch.load would run and dmt does not: do not trust it",
                path,
                name[:200],
            )
    if _sharded(file):
        return _join_rank_files(file)
    return FlatCheckpoint(
        source=path,
        format="torch",
        tensors=tuple(
            file.whole(keys, tensor)
            for keys, tensor in content.tensors.items()
            if isinstance(tensor, TensorRef)
        ),
        ordered=is_module_order(content.tensors),
        files=(path,),
        scalars=content.scalars,
        unread=content.unread,
        table_configs=tuple(content.table_configs),
        documents=content.documents,
        modules=content.modules,
    )


def _join_rank_files(file: TorchFile) -> FlatCheckpoint:
    """Join one rank's file with those of the other ranks beside it.

    Raises:
        CheckpointError: A rank's file is missing, is there more than once, or is of another save.
    """
    others = _find_others(file) if _missing([file]) else {}
    files = [file, *others.values()]
    files.sort(key=_rank_of)
    missing = _missing(files)
    if missing:
        raise _incomplete(file, files, missing)
    for other in others.values():
        _compare_dense(file, other)
    _log.info("%d files, one per rank, are read as one: %s", len(files), _names(files))
    first = files[0]
    try:
        tensors = tuple(_join(keys, files) for keys in _all_keys(files))
    except ValueError as error:
        raise CheckpointError(
            f"{file.path}: {error}",
            expected="shards inside their tensor",
            hint="the file is damaged; copy it again",
        ) from None
    in_first = {keys[:-1] for keys in first.content.tensors}
    late = [keys for keys in _all_keys(files) if keys not in first.content.tensors]
    return FlatCheckpoint(
        source=file.path,
        format="torch",
        tensors=tensors,
        ordered=not any(keys[:-1] in in_first for keys in late)
        and not stand_sorted(_sharded(first))
        and is_module_order(first.content.tensors),
        files=tuple(f.path for f in files),
        scalars=first.content.scalars,
        unread=first.content.unread,
        modules=first.content.modules,
    )


def _rank_of(file: TorchFile) -> int:
    return next(iter(_sharded(file).values())).rank


def _sharded(file: TorchFile) -> dict[Keys, ShardedRef]:
    tensors = file.content.tensors.items()
    return {keys: tensor for keys, tensor in tensors if isinstance(tensor, ShardedRef)}


def _all_keys(files: Sequence[TorchFile]) -> list[Keys]:
    return list(dict.fromkeys(keys for file in files for keys in file.content.tensors))


def _names(files: Sequence[TorchFile]) -> str:
    names = [file.path.name for file in files]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _missing(files: Sequence[TorchFile]) -> dict[Keys, list[ShardPlace]]:
    """Return the shards that no file holds, by tensor."""
    held: dict[Keys, set[tuple[int, ...]]] = {}
    wanted: dict[Keys, tuple[ShardPlace, ...]] = {}
    for file in files:
        for keys, tensor in _sharded(file).items():
            wanted.setdefault(keys, tensor.places)
            held.setdefault(keys, set()).update(place.starts for place, _ in tensor.local)
    missing = {
        keys: [p for p in places if p.starts not in held[keys] and 0 not in p.sizes]
        for keys, places in wanted.items()
    }
    return {keys: places for keys, places in missing.items() if places}


def _find_others(file: TorchFile) -> dict[int, TorchFile]:
    """Return the other ranks' files by rank."""
    options: dict[int, list[TorchFile]] = {}
    for path in sorted(file.path.parent.iterdir())[:_MAX_FILES]:
        if path.name == file.path.name or not is_torch_file(path):
            continue
        try:
            other = open_torch_file(path)
        except CheckpointError:
            continue  # if it should have held a shard, that shard is reported as missing
        if _fits(file, other):
            options.setdefault(_rank_of(other), []).append(other)
    mine = _rank_of(file)
    return {rank: _choose(file, rank, found) for rank, found in options.items() if rank != mine}


def _fits(file: TorchFile, other: TorchFile) -> bool:
    """Tell whether two files describe the same tensors, sharded the same way."""
    mine, theirs = _sharded(file), _sharded(other)
    common = mine.keys() & theirs.keys()
    return bool(common) and all(
        (a.dtype, a.shape, a.places, a.world_size) == (b.dtype, b.shape, b.places, b.world_size)
        for a, b in ((mine[keys], theirs[keys]) for keys in common)
    )


def _choose(file: TorchFile, rank: int, found: list[TorchFile]) -> TorchFile:
    """Pick the file whose name differs in its rank only, if several hold a rank's shards."""
    if len(found) == 1:
        return found[0]
    named = [
        f for f in found if _differs_in_rank(file.path.name, _rank_of(file), f.path.name, rank)
    ]
    if len(named) == 1:
        return named[0]
    raise CheckpointError(
        f"{file.path.parent} holds {len(found)} files with the shards of rank {rank}: "
        f"{_names(found)}",
        expected="the files of one save, one per rank",
        hint="move the files of one save into a folder of their own",
    )


def _differs_in_rank(mine: str, my_rank: int, theirs: str, rank: int) -> bool:
    """Tell whether a name becomes the other by replacing one rank's number with the other's."""
    parts, other = re.split(r"(\d+)", mine), re.split(r"(\d+)", theirs)
    if len(parts) != len(other):
        return False
    different = [(a, b) for a, b in zip(parts, other, strict=True) if a != b]
    return (
        len(different) == 1
        and all(text.isdecimal() for text in different[0])
        and (int(different[0][0][:9]) - my_rank == int(different[0][1][:9]) - rank)
    )


def _incomplete(
    file: TorchFile, files: Sequence[TorchFile], missing: dict[Keys, list[ShardPlace]]
) -> CheckpointError:
    sharded = {keys: tensor for f in files for keys, tensor in _sharded(f).items()}
    world_size = next(iter(_sharded(file).values())).world_size
    lines = [
        f"{'.'.join(keys)}: {describe_block(place, sharded[keys].shape)}"
        + ("" if place.rank is None else f" (rank {place.rank})")
        for keys, places in missing.items()
        for place in places
    ]
    more = len(lines) - _MAX_LISTED
    return CheckpointError(
        f"{file.path} holds one rank's shards of a sharded model; beside it lie "
        f"{len(files) - 1} of the other {world_size - 1} ranks' files",
        expected="the files of all ranks of one save in one folder",
        hint="copy the missing ranks' files there, or save with "
        "torch.distributed.checkpoint.save, and give that directory",
        details=["missing: " + line for line in lines[:_MAX_LISTED]]
        + ([f"missing: ... and {more} more shards"] if more > 0 else []),
    )


def _compare_dense(file: TorchFile, other: TorchFile) -> None:
    """Refuse files of two saves: all ranks of one save hold the same dense parts.

    Statistics and metrics may differ between ranks, so a single different tensor proves nothing.
    """
    same, different = 0, []
    room = _MAX_COMPARED_BYTES
    for keys, tensor in file.content.tensors.items():
        theirs = other.content.tensors.get(keys)
        if not (isinstance(tensor, TensorRef) and isinstance(theirs, TensorRef)):
            continue
        a, b = file.whole(keys, tensor), other.whole(keys, theirs)
        if not a.dtype.startswith(("fp", "bf")) or len(a.shape) == 0:
            continue
        told = a.pieces[0].crc32 is not None and b.pieces[0].crc32 is not None
        if not told and a.nbytes > room:
            continue
        room -= 0 if told else a.nbytes
        if (a.shape, a.dtype) == (b.shape, b.dtype) and _equal(a, b):
            same += 1
        else:
            different.append(".".join(keys))
    if len(different) > same:
        raise CheckpointError(
            f"{file.path.name} and {other.path.name} are from different saves: "
            f"{len(different)} of {same + len(different)} dense tensors differ",
            expected="the files of all ranks of one save",
            hint="move the files of one save into a folder of their own",
            details=different[:_MAX_LISTED],
        )
    for name in different:
        _log.info("%s differs between %s and %s", name, file.path.name, other.path.name)


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    one, two = a.pieces[0].crc32, b.pieces[0].crc32
    if one is not None and two is not None:
        return one == two
    chunks = zip(stream_tensor(a), stream_tensor(b), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in chunks)


def _join(keys: Keys, files: Sequence[TorchFile]) -> TensorInfo:
    """Return a tensor with all its shards; of copies, the first rank's."""
    name = ".".join(keys)
    for file in files:
        tensor = file.content.tensors.get(keys)
        if isinstance(tensor, TensorRef):
            return file.whole(keys, tensor)
        if isinstance(tensor, ShardedRef):
            pieces = _pieces(keys, files)
            check_tiling(file.path, name, tensor.shape, pieces)
            return _describe(keys, tensor, pieces)
    raise AssertionError(name)


def _pieces(keys: Keys, files: Sequence[TorchFile]) -> tuple[Piece, ...]:
    """Return all shards; if ranks hold copies of one, the first rank's."""
    pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], Piece] = {}
    for file in files:
        tensor = file.content.tensors.get(keys)
        for place, local in tensor.local if isinstance(tensor, ShardedRef) else ():
            piece = file.archive.piece(local, name=".".join(keys), starts=place.starts)
            pieces.setdefault((piece.starts, piece.sizes), piece)
    return tuple(pieces.values())
