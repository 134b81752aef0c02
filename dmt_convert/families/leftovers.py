"""Tensors that a model has no use for: which of them cannot take part, and which must not be lost.

A tensor that is left out silently makes another model. Hence:

- torch's own counters are passed over, because no forward pass reads them;
- what the user names under `ignore` is passed over if it is a metric or a counter, or if it stands
  outside the model's modules;
- tensors that remap or prune ids are never passed over, because without them ids reach the rows of
  other ids;
- everything else is refused by what it is.

All that is passed over is recorded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Final

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.name_map import strip_wrappers

DESCRIBE_IT: Final = "describe it with --model (docs/adapters.md)"
"""What to do about a model that no family knows."""
_MAX_UNREAD: Final = 10
"""Objects that were not read, as far as an error lists them."""
_COUNTERS: Final[dict[str, str]] = {
    "n_averaged": "torch's counter of averaged models",
    "num_batches_tracked": "torch's counter of batches",
}
_STEPS: Final = (
    "epoch",
    "global_step",
    "initted",
    "iteration",
    "num_updates",
    "step",
)
_MEASURES: Final = re.compile(
    "accuracy|auc|auprc|auroc|bce|confmat|confusion|criterion|logloss|loss|losses|mae|metrics?|mse|"
    "perplexity|precision|recall|rmse"
)
_BESIDE: Final = re.compile("avg|best|binary|eval|fn|log|matrix|running|test|torch|train|val|valid")
"""Words that stand with a measure in the name of a metric."""
_REMAPS: Final[tuple[tuple[str, str], ...]] = (
    (r".*_hash_zch_\w+", "multi-probe zero-collision hashing (MP-ZCH)"),
    (r"(.*\.)?(_mch_\w+|_output_segments_tensor)", "managed collisions (ZCH)"),
    (r"(.*\.)?_managed_collision\w*\..*", "managed collisions (ZCH)"),
    (r".*_ite?p_\w+(\..*)?|(.*[._])?(address_lookup|row_util)\w*", "pruning of rows (ITEP)"),
    (r".*\.(weight_id|bucket|metadata)", "key-value tables (KVZCH)"),
)
"""Name of a tensor that no known model has -> what remaps or prunes ids with it."""
_PARTS: Final[tuple[tuple[str, str], ...]] = (
    (r"cin(\..*|_linear\..*)?", "an xDeepFM's compressed interactions"),
    (r"inter_arch\.deep_fm\..*|inter_arch\.fm\..*", "TorchRec's SimpleDeepFMNN"),
    (r"(.*\.)?second_order_embedding_dict\..*", "an ONN"),
    (r"factor_estimating_net\..*|transform_weight_matrix_P\..*", "an IFM or a DIFM"),
    (r"vector_wise_net\..*|bit_wise_net\..*", "a DIFM"),
    (r"(.*\.)?(attention|attn|self_attn|multi_head\w*)\..*", "attention"),
    (r"(.*\.)?(lstm|gru|rnn)\..*", "a recurrent network"),
    (
        r"(.*\.)?(position_weights?|_?feature_processors?)(\..*)?",
        "a feature processor, which weights ids by their position",
    ),
    (r"(.*\.)?lr_layer\..*", "a linear part"),
)
"""Names of tensors, without the model's prefix -> what trainers have under them."""
_MAX_LISTED: Final = 20


def counter_of(info: TensorInfo) -> str | None:
    """Say which of torch's own counters a tensor is; None if it is none of them."""
    single = math.prod(info.shape) == 1 and info.dtype in ("int64", "int32")
    return _COUNTERS.get(info.name.rpartition(".")[2]) if single else None


def is_measure(info: TensorInfo) -> bool:
    """Tell the state of a metric or a loss, or a count of steps: no logit depends on it."""
    parts = strip_wrappers(info.name).lower().split(".")
    whole = math.prod(info.shape) == 1 and info.dtype in ("int64", "int32", "bool")
    return (whole and parts[-1] in _STEPS) or any(map(_names_measure, parts))


def _names_measure(part: str) -> bool:
    words = [word for word in re.split(r"[_\d]+", part.replace("binary", "")) if word]
    measures = [word for word in words if _MEASURES.fullmatch(word)]
    return bool(measures) and all(word in measures or _BESIDE.fullmatch(word) for word in words)


def remapping_of(name: str) -> str | None:
    """Say what remaps or prunes ids by a tensor of this name; None if nothing does."""
    return next((what for pattern, what in _REMAPS if re.fullmatch(pattern, name)), None)


def check_remapping(checkpoint: FlatCheckpoint, tensors: Iterable[TensorInfo]) -> None:
    """Refuse a model that remaps or prunes ids.

    Raises:
        ArchitectureError: There are such tensors.
    """
    found = {info.path: what for info in tensors if (what := remapping_of(info.name)) is not None}
    if not found:
        return
    raise ArchitectureError(
        f"{checkpoint.source} holds a model that remaps or prunes ids: "
        + ", ".join(dict.fromkeys(found.values())),
        expected="tables whose rows are numbered by the ids in the data",
        hint="such models are not supported, with --model neither: without the remapping, which is "
        "not part of the dense model, ids would reach the rows of other ids. Convert a model that "
        "was trained without it",
        details=_shorten([f"{path}: {what}" for path, what in found.items()]),
    )


def describe_parts(names: Iterable[str]) -> str:
    """Name the modules that tensors belong to, and say what is known about them.

    Args:
        names: Names of tensors, without the model's prefix.
    """
    modules: dict[str, str] = {}
    for name in names:
        head = name.split(".")[0]
        own = ".".join(name.split(".")[:2]) if head in _SHARED_HEADS else head
        what = next((said for pattern, said in _PARTS if re.fullmatch(pattern, name)), "")
        modules[own] = modules.get(own) or what
    shown = [f"{module} ({what})" if what else module for module, what in modules.items()]
    rest = len(shown) - 6
    return ", ".join(shown[:6]) + (f" and {rest} more" if rest > 0 else "")


_SHARED_HEADS: Final = ("sparse_arch", "dense_arch", "inter_arch", "over_arch", "fm")
"""Modules of known models, in which a part that is not known needs its own name."""


def list_parts(names: Iterable[str]) -> list[str]:
    """Say what trainers have under names of tensors, each thing once."""
    found: dict[str, None] = {}
    for name in names:
        for pattern, said in _PARTS:
            if re.fullmatch(pattern, name):
                found[said] = None
    return list(found)


def find_matches(pattern: str, tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors that a pattern of `ignore` catches: by name, or by whole path."""
    return [
        info
        for info in tensors
        if fnmatch(info.name, pattern)
        or fnmatch(info.path, pattern)
        or fnmatch(strip_wrappers(info.name), pattern)
    ]


def refuse_unmatched(pattern: str, left: Sequence[str]) -> ConfigError:
    """Return the error for a pattern that catches nothing.

    Args:
        pattern: The pattern.
        left: Tensors that the model has no use for.
    """
    return ConfigError(
        f"`ignore` names {pattern!r}, which matches no tensor of the model's dict",
        expected="patterns that each match a tensor",
        hint="correct the pattern, or leave it out; `dmt inspect` names the tensors",
        details=_shorten([f"not of the model: {path}" for path in left]),
    )


def refuse_part(pattern: str, caught: Sequence[TensorInfo]) -> ConfigError:
    """Return the error for a pattern that catches tensors which may take part."""
    return ConfigError(
        f"`ignore` names {pattern!r}, which catches {len(caught)} tensors inside the model's own "
        "modules",
        expected="patterns of metrics and counters, or of what stands outside the model's modules",
        hint="without them it would be another model: describe the whole model with --model "
        "(docs/adapters.md), whose `rename` may return None for a tensor that no logit depends on; "
        "or delete such tensors from the state dict and save it again",
        details=_shorten([info.path for info in caught]),
    )


def _shorten(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - _MAX_LISTED
    return [*lines[:_MAX_LISTED], *([f"... and {rest} more"] if rest > 0 else [])]


def list_unread(checkpoint: FlatCheckpoint) -> list[str]:
    """Name what a checkpoint holds and was not read, one line each."""
    lines = [f"not read: {path} ({what})" for path, what in checkpoint.unread.items()]
    rest = len(lines) - _MAX_UNREAD
    return [*lines[:_MAX_UNREAD], *([f"not read: ... and {rest} more"] if rest > 0 else [])]
