"""A model whose tensors lie in several dicts: the sparse part and the dense part, for example."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Keys, TensorInfo

_OTHER_MODELS: Final = re.compile(r"(?i)(.*_)?(ema|swa|teacher|best|averaged?|shadow)(_.*)?")
"""Keys of dicts that hold another version of the weights."""
_STATE: Final = re.compile(r"(?i)(opt|optim|optimizer|sched|lr_|scaler|rng|metrics?).*")
"""Keys of dicts that hold no weights."""


def merge_dicts(checkpoint: FlatCheckpoint) -> Iterator[FlatCheckpoint]:
    """Yield checkpoints with the tensors of several dicts in one.

    First under their own names; then, if the dicts are named after the modules that they hold
    (`{"sparse_arch": ..., "dense_arch": ...}`), under the names of the dicts and their own.

    Nothing is yielded if a tensor occurs in two dicts, or another version of the weights is there:
    then only the user knows which one is meant.
    """
    dicts: dict[Keys, list[TensorInfo]] = {}
    for tensor in checkpoint.tensors:
        dicts.setdefault(tensor.container, []).append(tensor)
    if any(_OTHER_MODELS.fullmatch(key) for keys in dicts for key in keys):
        return
    weights = {
        keys: held for keys, held in dicts.items() if not any(_STATE.fullmatch(key) for key in keys)
    }
    if len(weights) < 2:
        return
    rest = tuple(t for t in checkpoint.tensors if t.container not in weights)
    tensors = [tensor for held in weights.values() for tensor in held]
    for names in ([t.name for t in tensors], [t.path for t in tensors]):
        if len(set(names)) == len(names):
            merged = [
                replace(tensor, name=name, container=())
                for tensor, name in zip(tensors, names, strict=True)
            ]
            yield replace(checkpoint, tensors=(*merged, *rest))
