"""`.safetensors` files: a JSON header, then raw tensors. Source: the safetensors format text.

What a header may say besides: which names `safetensors.torch.save_model` left out because their
tensors are others of the file, and which rows of a tensor a shard of torch's
`HuggingFaceStorageWriter` holds (`torch/distributed/checkpoint/{hf_storage,_hf_utils}.py`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import (
    ITEM_BYTES,
    MAX_NAME_LENGTH,
    FlatCheckpoint,
    Piece,
    Scalar,
    TensorInfo,
)
from dmt_convert.checkpoint.identify import check_stand_in
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
_OTHER_BITS: Final = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
}
"""Bits per element of the other dtypes of the format; such tensors are named and not read."""
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_PREFIX_LENGTHS: Final = 100_000
"""Most characters of the prefixes that every name is compared with."""
DICTS_KEY: Final = "dmt.dicts"
"""Key of the metadata under which `dmt unshard` lists the dicts that names begin with."""
_SHARDS_KEY: Final = "DCP_SHARDING_INFO"


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """What the header of one file says."""

    path: Path
    """The file."""
    tensors: tuple[TensorInfo, ...]
    """All tensors in it that can be read."""
    scalars: Mapping[str, Scalar]
    """Its metadata."""
    unread: Mapping[str, str]
    """Tensors of dtypes that are not read: what each is, by name."""
    offsets: Mapping[str, tuple[int, ...]] | None
    """If the file is a shard: by name, the index of the first element in the whole tensor."""

    @property
    def is_shard(self) -> bool:
        """Whether it says that its tensors may be parts of larger ones."""
        return self.offsets is not None


def is_safetensors(path: Path) -> bool:
    """Tell by the suffix, or by a header length followed by a brace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or looks_like_header(file.read(9))


def looks_like_header(head: bytes) -> bool:
    """Tell a safetensors file by its first nine bytes."""
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27


def read_safetensors(path: Path) -> FlatCheckpoint:
    """Read the header of a file that is whole by itself.

    The order of its tensors says nothing about the model's order.

    Raises:
        CheckpointError: The header is damaged, the file is not as long as it says, or is a shard.
    """
    header = read_header(path)
    if header.is_shard:
        raise refuse_shard(path)
    return flat_checkpoint(header)


def refuse_shard(path: Path) -> CheckpointError:
    """Say that a file of torch's HuggingFaceStorageWriter may hold parts of tensors."""
    return CheckpointError(
        f"{path} is one rank's shard of a checkpoint (its header has {_SHARDS_KEY}); it may hold "
        "some rows of a table only",
        expected="the shards of all ranks in one folder",
        hint="copy the other shards there and give the folder; if there was one rank only, save "
        "the tensors again: safetensors.torch.save_file(load_file(shard), 'model.safetensors')",
    )


def flat_checkpoint(header: SafetensorsHeader) -> FlatCheckpoint:
    """Describe what a file holds as a checkpoint."""
    return FlatCheckpoint(
        source=header.path,
        format="safetensors",
        tensors=header.tensors,
        ordered=False,
        files=(header.path,),
        scalars=header.scalars,
        unread=header.unread,
    )


def read_header(path: Path, *, start: int = 0) -> SafetensorsHeader:
    """Read the header of a file; its tensors stay on disk.

    Args:
        path: The file.
        start: Where the header begins in it, in bytes.

    Raises:
        CheckpointError: The header is damaged, or the file is not as long as it says.
    """
    size = path.stat().st_size - start
    with path.open("rb") as file:
        file.seek(start)
        head = file.read(9)
        if not looks_like_header(head):
            check_stand_in(path)
        file.seek(start + 8)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"{size} bytes, with a header of {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise TypeError("the header is not an object")
        metadata = header.pop("__metadata__", None) or {}
        scalars: dict[str, Scalar] = {str(k): str(v) for k, v in dict(metadata).items()}
        dicts = _Dicts(str(scalars.pop(DICTS_KEY, "[]")))
        offsets = _read_offsets(scalars.pop(_SHARDS_KEY, None))
        entries = {name: _Entry.read(name, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"a header that cannot be read ({str(error)[:200]})") from None
    _check_layout(path, size - 8 - length, entries)
    tensors = {
        name: entry.describe(path, start + 8 + length, name)
        for name, entry in entries.items()
        if entry.dtype in DTYPE_NAMES
    }
    return SafetensorsHeader(
        path=path,
        tensors=tuple(map(dicts.put_back, (*tensors.values(), *_aliases(tensors, scalars)))),
        scalars=scalars,
        unread={
            name: f"a tensor of shape {list(entry.shape)} in {entry.dtype[:40]}"
            for name, entry in entries.items()
            if entry.dtype not in DTYPE_NAMES
        },
        offsets=offsets,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of what a JSON object holds; a key that occurs twice is an error."""
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the name {counts.most_common(1)[0][0][:100]!r} occurs twice")
    return made


def _read_offsets(text: Scalar) -> dict[str, tuple[int, ...]] | None:
    """Return where in the whole tensors those of a shard begin; None if the file is no shard."""
    if text is None:
        return None
    offsets = {}
    for name, entry in json.loads(str(text)).items():
        starts = entry["saved_offsets"]
        if not isinstance(starts, list) or not all(type(v) is int and v >= 0 for v in starts):
            raise ValueError(f"the offsets {starts!r:.60} of {name[:100]!r}")
        offsets[name] = tuple(starts)
    return offsets


class _Dicts:
    """The dicts around tensors that are not the model's, by what names begin with."""

    def __init__(self, text: str) -> None:
        dicts = [tuple(str(key) for key in keys) for keys in json.loads(text)]
        self._dicts = {".".join(keys): keys for keys in dicts if keys}
        self._lengths = sorted({len(prefix) for prefix in self._dicts}, reverse=True)
        if sum(self._lengths) > _MAX_PREFIX_LENGTHS:
            raise ValueError(f"{DICTS_KEY} names dicts that are too long")

    def put_back(self, tensor: TensorInfo) -> TensorInfo:
        """Put a tensor back into the dict that `dmt unshard` took it from."""
        name = tensor.name
        for end in self._lengths:
            keys = self._dicts.get(name[:end]) if name[end : end + 1] == "." else None
            if keys is not None:
                return replace(tensor, name=name[end + 1 :], container=keys)
        return tensor


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the header says about one tensor; `begin` and `end` count from behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @staticmethod
    def read(name: str, entry: dict[str, object]) -> _Entry:
        """Check one entry."""
        if len(name) > MAX_NAME_LENGTH:
            raise ValueError(f"a name of {len(name)} characters, {name[:40]!r}...")
        dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        for values in (shape, offsets):
            if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
                raise ValueError(f"tensor {name!r} has shape or offsets {values!r:.60}")
        assert isinstance(shape, list) and isinstance(offsets, list)
        begin, end = offsets
        bits = (
            8 * ITEM_BYTES[DTYPE_NAMES[dtype]] if dtype in DTYPE_NAMES else _OTHER_BITS.get(dtype)
        )
        if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
            raise ValueError(
                f"tensor {name!r} of shape {shape} in {dtype} takes {end - begin} bytes, not "
                f"{math.prod(shape) * bits / 8:g}"
            )
        return _Entry(dtype, tuple(shape), begin, end)

    def describe(self, path: Path, base: int, name: str) -> TensorInfo:
        """Say where the tensor lies."""
        piece = Piece(
            path=path,
            offset=base + self.begin,
            length=self.end - self.begin,
            starts=(0,) * len(self.shape),
            sizes=self.shape,
        )
        dtype = DTYPE_NAMES[self.dtype]
        return TensorInfo(name=name, dtype=dtype, shape=self.shape, pieces=(piece,))


def _aliases(
    tensors: Mapping[str, TensorInfo], scalars: Mapping[str, Scalar]
) -> Iterator[TensorInfo]:
    """Describe tensors that `save_model` left out because they are others under a second name."""
    for name, other in scalars.items():
        if isinstance(other, str) and other in tensors and name not in tensors and name != "format":
            yield replace(tensors[other], name=name)


def _check_layout(path: Path, size: int, entries: Mapping[str, _Entry]) -> None:
    """Refuse holes, overlaps and a wrong file length: the format allows none of them."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position or entry.end < entry.begin:
            raise _damaged(path, f"tensor {name!r} at byte {entry.begin}, not {position}")
        position = entry.end
    if position != size:
        raise _damaged(path, f"{size} bytes of tensors; its header describes {position}")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {found}",
        expected="a whole .safetensors file",
        hint="the file is damaged or was cut short; copy it again and compare its size",
    )
