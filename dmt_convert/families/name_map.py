"""From a trainer's tensor names to canonical ones, by a table that reads both ways.

Canonical names: `tables.{table}.weight`; `dense_arch.{i}.weight|bias`, likewise `over_arch`,
`branch1`, `branch2`; `cross.{l}.v` (r, M), `cross.{l}.w` (M, r), `cross.{l}.bias` (M,).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

WRAPPERS: Final = ("module", "_orig_mod", "_dmp_wrapped_module", "_fsdp_wrapped_module")
"""Name components that wrappers insert: DDP, torch.compile, DistributedModelParallel, FSDP."""
_TABLE_HOLDERS: Final = (
    "embedding_bags",
    "embedding_dict",
    "embedding_layer",
    "embedding_layers",
    "embeddings",
)
"""Modules whose children are named after tables."""


class NameMap:
    """A table of name patterns; `{}` stands for one name component.

    Args:
        patterns: Trainer's pattern -> canonical pattern, or None for a tensor that is dropped
            on purpose.
        renumber: Turns the trainer's layer index into ours, by canonical stem; it returns None
            for an index that cannot occur.
    """

    def __init__(
        self,
        patterns: Mapping[str, str | None],
        renumber: Mapping[str, tuple[Callable[[int], int | None], Callable[[int], int]]]
        | None = None,
    ) -> None:
        self._patterns = patterns
        self._renumber = renumber or {}
        self._compiled = [
            (re.compile(re.escape(source).replace(r"\{\}", r"([^.]+)")), target)
            for source, target in patterns.items()
        ]

    def to_canonical(self, name: str) -> tuple[bool, str | None]:
        """Return whether a name is listed, and its canonical name (None: dropped)."""
        for pattern, target in self._compiled:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            if target is None:
                return True, None
            key = match.group(1) if match.groups() else ""
            renumber = self._renumber.get(target.split(".", maxsplit=1)[0])
            if renumber is not None:
                index = renumber[0](int(key)) if is_index(key) else None
                if index is None:
                    return False, None
                key = str(index)
            elif "{}" in target and not target.startswith("tables.") and not is_index(key):
                return False, None
            return True, target.replace("{}", key)
        return False, None

    def to_source(self, canonical: str) -> str | None:
        """Return the trainer's name of a canonical one, None where it has none."""
        for source, target in self._patterns.items():
            if target is None:
                continue
            key_pattern = r"(.+)" if target.startswith("tables.") else r"(\d+)"
            match = re.fullmatch(re.escape(target).replace(r"\{\}", key_pattern), canonical)
            if match is None:
                continue
            key = match.group(1) if match.groups() else ""
            renumber = self._renumber.get(target.split(".", maxsplit=1)[0])
            if renumber is not None:
                key = str(renumber[1](int(key)))
            return source.replace("{}", key)
        return None


def is_index(key: str) -> bool:
    """Tell whether a name component is an index as torch writes it: `7`, not `07`."""
    return key.isascii() and key.isdecimal() and len(key) < 6 and str(int(key)) == key


def strip_wrappers(name: str) -> str:
    """Drop the components that wrappers insert in a dotted name.

    A table may be called `module` itself: in a module that holds tables by name, what stands
    between it and the tensor's own name is the table's.
    """
    parts = name.split(".")
    if not any(part in WRAPPERS for part in parts):
        return name
    kept = [part for part in parts if part not in WRAPPERS]
    if len(kept) > 1 and kept[-2] in _TABLE_HOLDERS and parts[-2] in WRAPPERS:
        kept.insert(-1, parts[-2])
    return ".".join(kept)
