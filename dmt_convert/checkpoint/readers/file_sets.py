"""Checkpoints of several files that only their names, or their headers, hold together.

- Shards of torch's `HuggingFaceStorageWriter(save_distributed=True)`: every header says which rows
  of a tensor its file holds.
- Files that are numbered: `model-00001-of-00002.safetensors` without an index, `rank0.pt` and
  `rank1.pt`. Each holds some of the tensors, and perhaps copies of those of others.
- Files of one folder that share no tensor: the sparse part and the dense part.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Piece, TensorInfo
from dmt_convert.checkpoint.readers.safetensors_reader import (
    SafetensorsHeader,
    flat_checkpoint,
    is_safetensors,
    read_header,
    refuse_shard,
)
from dmt_convert.checkpoint.readers.shards import check_tiling
from dmt_convert.checkpoint.tensor_bytes import stream_tensor
from dmt_convert.errors import CheckpointError

_COUNTED: Final = re.compile(r"(?<!\d)(\d{1,5})([-_.]?of[-_.]?)(\d{1,5})(?!\d)")
_PROGRESS: Final = re.compile(r"(?i)(epoch|step|iter|iteration|fold|run|trial|seed|day)[-_.]?$")
"""Words before a number of how far a training was, not of a part."""
_NUMBERED: Final = re.compile(r"(?i)(?<![a-z])(rank|part|shard|piece)([-_.]?)(\d{1,6})(?!\d)")
_FOLDER: Final = re.compile(r"(?i)([a-z]{1,4}[-_.])?(rank|part|shard|piece)[-_.]?\d{1,6}([-_.].*)?")
"""Names of folders of which each rank has its own, such as mp_rank_00."""
_SHARD: Final = re.compile(r"shard-(\d{1,9})-model-(\d{1,9})-of-(\d{1,9})\.safetensors")
_MAX_LISTED: Final = 20
_MAX_COMPARED_BYTES: Final = 64 << 20
"""Copies without checksums are compared as a whole up to this size, beyond by their first rows."""

_log = logging.getLogger(__name__)


def read_safetensors_file(path: Path) -> FlatCheckpoint:
    """Read a file; if it is a shard of a rank, with the other shards of its folder.

    Raises:
        CheckpointError: A header is damaged, or the shards do not tile their tensors.
    """
    header = read_header(path)
    return _join_shards(header) if header.is_shard else flat_checkpoint(header)


def _join_shards(first: SafetensorsHeader) -> FlatCheckpoint:
    """Join the shards of all ranks, which lie in one folder.

    How many ranks there were is not stored, so that the file of one alone proves nothing.
    """
    folder = first.path.parent
    others = sorted(p for p in folder.glob("*.safetensors") if p != first.path)
    headers = [first, *(read_header(path) for path in others if is_safetensors(path))]
    headers = sorted((h for h in headers if h.is_shard), key=lambda header: header.path)
    if len(headers) < 2:
        raise refuse_shard(first.path)
    _check_shard_numbers(folder, [header.path.name for header in headers])
    parts: dict[str, list[TensorInfo]] = defaultdict(list)
    for header in headers:
        for tensor in header.tensors:
            starts = (header.offsets or {}).get(tensor.path, (0,) * len(tensor.shape))
            if len(starts) != len(tensor.shape):
                raise _contradiction(header.path, f"{tensor.path} has offsets {list(starts)}")
            piece = replace(tensor.pieces[0], starts=starts)
            parts[tensor.path].append(replace(tensor, pieces=(piece,)))
    tensors = tuple(_join_blocks(folder, blocks) for blocks in parts.values())
    if not any(_shows_last_rank(tensor, len(headers)) for tensor in tensors):
        _log.warning(
            "%d shards are read as one checkpoint, and nothing says that there were no more: check "
            "the rows of the tables: %s",
            len(headers),
            _name_some([header.path.name for header in headers]),
        )
    return FlatCheckpoint(
        source=first.path,
        format="safetensors",
        tensors=tensors,
        ordered=False,
        files=tuple(header.path for header in headers),
        scalars={key: value for h in reversed(headers) for key, value in h.scalars.items()},
        unread={key: value for h in headers for key, value in h.unread.items()},
    )


def _check_shard_numbers(folder: Path, names: Sequence[str]) -> None:
    """Refuse numbers with gaps: they count the ranks, and the files of the whole model."""
    numbers = [tuple(map(int, match.groups())) for n in names if (match := _SHARD.fullmatch(n))]
    ranks = {number[0] for number in numbers}
    files = {number[1] for number in numbers}
    lost = [f"shard {n:05d}" for n in range(1, max(ranks, default=0) + 1) if n not in ranks]
    count = max((number[2] for number in numbers), default=0)
    lost += [f"model {n:05d} of {count:05d}" for n in range(1, count + 1) if n not in files]
    if lost:
        raise CheckpointError(
            f"{folder} lacks {len(lost)} of the shards that torch numbered",
            expected="the shards of all ranks in one folder",
            hint="copy the missing ones there",
            details=lost[:_MAX_LISTED],
        )


def _join_blocks(folder: Path, blocks: Sequence[TensorInfo]) -> TensorInfo:
    first, name = blocks[0], blocks[0].path
    pieces: list[Piece] = [block.pieces[0] for block in blocks]
    if len({(block.dtype, len(block.shape)) for block in blocks}) > 1:
        raise _contradiction(folder, f"the shards of {name} differ in dtype or in rank")
    ends = [tuple(a + n for a, n in zip(p.starts, p.sizes, strict=True)) for p in pieces]
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    check_tiling(folder, name, shape, pieces)
    return replace(first, shape=shape, pieces=tuple(pieces))


def _shows_last_rank(tensor: TensorInfo, count: int) -> bool:
    """Tell whether the rows of a tensor's shards show that there were no more than so many ranks.

    torch gives every rank ceil(rows / ranks) of them, as long as there are any: a shard with fewer
    is the last one, and other numbers of ranks would have given shards of other sizes.
    """
    pieces = sorted(tensor.pieces, key=lambda piece: piece.starts)
    if not tensor.shape or any(piece.sizes[1:] != tensor.shape[1:] for piece in pieces):
        return False
    first, last = pieces[0].sizes[0], pieces[-1].sizes[0]
    return last < first and first > 1 and -(-tensor.shape[0] // (first - 1)) - 1 <= count


def _contradiction(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}",
        expected="the shards of one save",
        hint="files of two saves are mixed; copy the folder again",
    )


def find_parts(path: Path) -> tuple[Path, ...]:
    """Return the files that are numbered as parts of what a file is a part of; itself if none.

    Raises:
        CheckpointError: The numbers say that one is missing.
    """
    counted = [
        match
        for match in _COUNTED.finditer(path.name)
        if not _PROGRESS.search(path.name[: match.start()])
    ]
    if counted:
        return _counted_parts(path, counted[-1])
    match = _NUMBERED.search(path.name)
    if match is not None:
        return _numbered_parts(path, _alike(path), alone=match[1].lower())
    folder = path.absolute().parent
    if _FOLDER.fullmatch(folder.name):
        return _numbered_parts(path, {n: p / path.name for n, p in _alike(folder).items()})
    return (path,)


def _alike(path: Path) -> dict[tuple[int, ...], Path]:
    """Return what lies beside a path under names that differ in their numbers only, by these."""
    skeleton = _NUMBERED.sub(r"\1\2#", path.name)
    return {
        tuple(int(match[3]) for match in _NUMBERED.finditer(other.name)): other
        for other in path.parent.iterdir()
        if _NUMBERED.sub(r"\1\2#", other.name) == skeleton
    }


def _numbered_parts(
    path: Path, alike: dict[tuple[int, ...], Path], *, alone: str = ""
) -> tuple[Path, ...]:
    """Return the files whose numbers count from 0 or 1; the file itself if they do not.

    Args:
        path: The file.
        alike: Files by number.
        alone: What its name calls it; a shard alone is refused, and of a rank that is said.
    """
    found = {numbers: other for numbers, other in alike.items() if other.is_file()}
    columns = [sorted(set(column)) for column in zip(*found, strict=True)]
    varying = [column for column in columns if len(column) > 1]
    if any(column[0] > 1 for column in varying):
        return (path,)  # numbers that do not count: rank8, rank16
    if not varying and alone in ("shard", "part", "piece"):
        raise _part_missing(path, ["all others"], 1)
    if not varying and alone and columns[0][0] <= 1:
        _log.warning(
            "%s has the name of one rank's file, and no other rank's lies beside it: if the "
            "tables were sharded, it holds some of their rows",
            path,
        )
    for column in varying:
        missing = sorted(set(range(column[0], column[-1] + 1)) - set(column))
        if missing:
            raise _part_missing(path, [str(number) for number in missing], len(found))
    return tuple(found[numbers] for numbers in sorted(found)) if varying else (path,)


def _counted_parts(path: Path, match: re.Match[str]) -> tuple[Path, ...]:
    number, of, count = match.groups()
    names = [
        f"{path.name[: match.start()]}{i:0{len(number)}d}{of}{count}{path.name[match.end() :]}"
        for i in range(int(count) + 1)
    ]
    from_zero = int(number) == 0 or (
        int(number) < int(count) and path.with_name(names[0]).is_file()
    )
    wanted = names[:-1] if from_zero else names[1:]
    if int(count) < 2 or path.name not in wanted:
        return (path,)
    missing = [name for name in wanted if not path.with_name(name).is_file()]
    if missing:
        raise _part_missing(path, missing, len(wanted) - len(missing))
    return tuple(path.with_name(name) for name in wanted)


def _part_missing(path: Path, missing: list[str], there: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is one of several files of a checkpoint, as its name says; {there} of "
        f"{there + len(missing)} are there",
        expected="all of them in one folder",
        hint="copy the missing ones there; if it is a whole model, put it into a folder of its own",
        details=[f"missing: {name}" for name in missing[:_MAX_LISTED]],
    )


def join_parts(parts: Sequence[FlatCheckpoint]) -> FlatCheckpoint:
    """Join files of which each holds some of a checkpoint's tensors, and perhaps copies of others.

    Raises:
        CheckpointError: A tensor is another one in another file: a row of a table sharded without
            a word about it, or another save.
    """
    first = parts[0]
    tensors: dict[str, TensorInfo] = {}
    shared: set[str] = set()
    different: dict[str, str] = {}
    held: list[set[tuple[str, ...]]] = []
    for part in parts:
        for tensor in part.tensors:
            known = tensors.setdefault(tensor.path, tensor)
            if known is not tensor:
                shared.add(tensor.path)
                if known.shape != tensor.shape or not same_elements(known, tensor):
                    different[tensor.path] = f"{list(known.shape)} and {list(tensor.shape)}"
        held.append({tensor.container for tensor in part.tensors})
    # statistics of batch norm, and metrics, may differ between ranks
    several = {name: shapes for name, shapes in different.items() if len(tensors[name].shape) > 1}
    if several or 2 * len(different) > len(shared):
        raise CheckpointError(
            f"{_name_some([part.source.name for part in parts])} are numbered as parts of one "
            f"checkpoint, and {len(different)} of the {len(shared)} tensors that several of them "
            "hold differ",
            expected="files that together hold every tensor once, or copies of it",
            hint="if ranks hold rows of a table each, save the model of all ranks with "
            "torch.distributed.checkpoint.save; if each is a model, put it into a folder of its "
            "own",
            details=[f"{name}: {shapes}" for name, shapes in different.items()][:_MAX_LISTED],
        )
    _log.info(
        "%d files are read as one: %s", len(parts), _name_some([p.source.name for p in parts])
    )
    grown = len(tensors) > len(first.tensors) and any(held[0] & later for later in held[1:])
    return replace(
        first,
        tensors=tuple(tensors.values()),
        ordered=all(part.ordered for part in parts) and not grown,
        files=tuple(file for part in parts for file in part.files),
        scalars={key: value for p in reversed(parts) for key, value in p.scalars.items()},
        unread={key: value for p in reversed(parts) for key, value in p.unread.items()},
    )


def same_elements(one: TensorInfo, two: TensorInfo) -> bool:
    """Tell whether two tensors of one shape are copies; of large ones the first rows decide."""
    if one.dtype != two.dtype:
        return False
    crcs = [piece.crc32 for tensor in (one, two) for piece in tensor.pieces]
    if len(crcs) == 2 and None not in crcs:
        return crcs[0] == crcs[1]
    for a, b in zip(stream_tensor(one), stream_tensor(two), strict=False):
        if a.tobytes() != b.tobytes():
            return False
        if one.nbytes > _MAX_COMPARED_BYTES:
            break
    return True


def join_folder(folder: Path, parts: Sequence[FlatCheckpoint]) -> FlatCheckpoint | None:
    """Join checkpoints of one folder as dicts of one, named after their files.

    Returns:
        The whole; None if two of them hold tensors of one name: then they are several models.
    """
    names = [tensor.path for part in parts for tensor in part.tensors]
    stems = [part.source.stem for part in parts]
    if len(set(names)) < len(names) or len(set(stems)) < len(stems):
        return None
    return FlatCheckpoint(
        source=folder,
        format=parts[0].format,
        tensors=tuple(
            replace(tensor, container=(part.source.stem, *tensor.container))
            for part in parts
            for tensor in part.tensors
        ),
        ordered=all(part.ordered for part in parts),
        files=tuple(file for part in parts for file in part.files),
        scalars={
            f"{p.source.stem}.{key}": value for p in parts for key, value in p.scalars.items()
        },
        unread={f"{p.source.stem}.{key}": value for p in parts for key, value in p.unread.items()},
        documents={key: value for p in parts for key, value in p.documents.items()},
        table_configs=tuple(config for part in parts for config in part.table_configs),
    )


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
