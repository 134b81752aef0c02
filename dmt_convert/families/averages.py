"""Averaged weights beside the trained ones: only the user knows which of them are served.

Trainers keep a moving average of the weights in a dict of its own (`ema`, `state_dict_ema`,
`shadow_params`, TorchEasyRec's `dense_ema`, callbacks of Lightning). If it is a whole model with
names, two models are found. Lists without names and dense parts alone are found here.
"""

from __future__ import annotations

import re
from typing import Final

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_info import ModelPlace
from dmt_convert.families.name_map import strip_wrappers

_WORDS: Final = re.compile("ema|swa|averaged?|averages?|averaging|polyak|shadow", re.IGNORECASE)
_MAX_LISTED: Final = 10


def is_averaged(path: str) -> bool:
    """Tell by its name whether a tensor, or a dict of tensors, is an average over training."""
    words = re.split(r"[._\d]+|(?<=[a-z])(?=[A-Z])|(?<=EMA)(?=[A-Z])", path)
    return any(_WORDS.fullmatch(word) for word in words if word)


def check_averages(checkpoint: FlatCheckpoint, place: ModelPlace, config: ModelConfig) -> None:
    """Ask which weights are meant if averaged ones lie beside the model, in another dict.

    Args:
        checkpoint: The checkpoint.
        place: Where the model is.
        config: What the user says; `container` or `prefix` answers the question.

    Raises:
        ArchitectureError: There are averaged weights, and the user does not say which ones count.
    """
    if config.container is not None or config.prefix is not None:
        return
    own = [info for info in checkpoint.tensors if _belongs(info, place)]
    if any(is_averaged(".".join((*info.container, place.prefix))) for info in own[:1]):
        return
    shapes = {info.shape for info in own if len(info.shape) > 0}
    beside = [
        info.path
        for info in checkpoint.tensors
        if info.container != place.container
        and info.shape in shapes
        and info.dtype in ("fp64", "fp32", "fp16", "bf16")
        and is_averaged(info.path)
    ]
    beside += [f"{path} ({what})" for path, what in checkpoint.unread.items() if is_averaged(path)]
    if not beside:
        return
    container = ".".join(place.container)
    rest = len(beside) - _MAX_LISTED
    raise ArchitectureError(
        f"{checkpoint.source} holds averaged weights beside the trained ones, and does not say "
        "which are served",
        expected="one set of weights",
        hint=f"say `container: {container or repr(container)}` in --model-config to convert the "
        "trained ones; to convert the averaged ones, load them into the model with the trainer and "
        "save it again",
        details=[*beside[:_MAX_LISTED], *([f"... and {rest} more"] if rest > 0 else [])],
    )


def _belongs(info: TensorInfo, place: ModelPlace) -> bool:
    return info.container == place.container and strip_wrappers(info.name).startswith(place.prefix)
