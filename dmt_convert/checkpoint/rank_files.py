"""Files of ShardedTensors, one per rank, joined offline: no process group, no torch.

`torch.save(model.state_dict())` of a `DistributedModelParallel` writes on every rank what that
rank holds: its shards of the tables, and its copy of the dense parts. The other ranks' files are
found by what they hold, not by their names: the same tables, shards of other ranks. Names decide
only where several files would do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Piece, TensorInfo
from dmt_convert.checkpoint.inert_objects import TensorRef
from dmt_convert.checkpoint.pickled_content import Keys
from dmt_convert.checkpoint.sharded_tensor import ShardedRef, ShardPlace
from dmt_convert.checkpoint.shards import check_tiling, count_elements, describe_block, stand_sorted
from dmt_convert.checkpoint.tensor_bytes import stream_tensor
from dmt_convert.checkpoint.torch_file import TorchFile, is_torch_file, open_torch_file
from dmt_convert.errors import CheckpointError

_MAX_FILES: Final = 10_000
_MAX_LISTED: Final = 20
_MAX_COMPARED_BYTES: Final = 64 << 20
"""Most bytes of the dense parts that are compared between two ranks where no checksum tells."""

_log = logging.getLogger(__name__)


def join_rank_files(file: TorchFile, *, format_name: str) -> FlatCheckpoint:
    """Join one rank's file with those of the other ranks beside it.

    Args:
        file: The file that the user named.
        format_name: Name of the container.

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
        format=format_name,
        tensors=tensors,
        ordered=not any(keys[:-1] in in_first for keys in late)
        and not stand_sorted(_sharded(first)),
        files=tuple(f.path for f in files),
        scalars=first.content.scalars,
        unread=first.content.unread,
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
        keys: [p for p in places if p.starts not in held[keys] and count_elements(p.sizes)]
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
            continue  # whatever it is; a shard that it should hold will be missed
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
    """Pick the file whose name differs in its rank only, where several hold a rank's shards."""
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
    """Tell whether a name becomes the other by putting one rank's number for the other's."""
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

    Statistics and metrics may differ from rank to rank, so one tensor that differs proves nothing.
    """
    same, different = 0, []
    room = _MAX_COMPARED_BYTES
    for keys, tensor in file.content.tensors.items():
        theirs = other.content.tensors.get(keys)
        if not (isinstance(tensor, TensorRef) and isinstance(theirs, TensorRef)):
            continue
        a, b = _whole(file, keys, tensor), _whole(other, keys, theirs)
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
            f"{file.path.name} and {other.path.name} are not of one save: "
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
            return _whole(file, keys, tensor)
        if isinstance(tensor, ShardedRef):
            pieces = _pieces(keys, files)
            check_tiling(file.path, name, tensor.shape, pieces)
            return TensorInfo(
                name=keys[-1] if keys else "",
                container=keys[:-1],
                dtype=tensor.dtype,
                shape=tensor.shape,
                pieces=pieces,
            )
    raise AssertionError(name)


def _pieces(keys: Keys, files: Sequence[TorchFile]) -> tuple[Piece, ...]:
    """Return all shards; where ranks hold copies of one, the first rank's."""
    pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], Piece] = {}
    for file in files:
        tensor = file.content.tensors.get(keys)
        for place, local in tensor.local if isinstance(tensor, ShardedRef) else ():
            piece = file.piece(local, name=".".join(keys), starts=place.starts)
            pieces.setdefault((piece.starts, piece.sizes), piece)
    return tuple(pieces.values())


def _whole(file: TorchFile, keys: Keys, tensor: TensorRef) -> TensorInfo:
    return TensorInfo(
        name=keys[-1] if keys else "",
        container=keys[:-1],
        dtype=tensor.dtype,
        shape=tensor.shape,
        pieces=(file.piece(tensor, name=".".join(keys)),),
    )
