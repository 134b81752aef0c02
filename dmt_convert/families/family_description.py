"""What all families have in common when a model is described."""

from __future__ import annotations

from dataclasses import replace

from dmt_convert.checkpoint import FlatCheckpoint
from dmt_convert.families.facts import Fact
from dmt_convert.families.findings import FlatModelInfo
from dmt_convert.families.matching import Match
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.optimizer_state import find_optimizer_state
from dmt_convert.families.trainer_tensors import TrainerTensors


def describe_model(checkpoint: FlatCheckpoint, match: Match, config: ModelConfig) -> FlatModelInfo:
    """Let a family describe its model itself."""
    assert match.family.describe is not None
    source = TrainerTensors(
        family=match.family.name,
        trainer=match.family.trainer,
        prefix=match.prefix,
        checkpoint=checkpoint,
        config=config,
        tensors=match.tensors,
    )
    described = match.family.describe(source)
    # a tensor that is put together from others has no accumulator of its own
    own = {name: info for name, info in described.tensors.items() if info.derivation is None}
    return FlatModelInfo(
        checkpoint=checkpoint,
        spec=described.spec,
        tensors=described.tensors,
        optimizer_state=find_optimizer_state(checkpoint, replace(match, tensors=own)),
        facts=(state_family(match), *described.facts),
        ignored=list_ignored(checkpoint, match),
    )


def state_family(match: Match) -> Fact:
    """State which family a model is of."""
    where = ".".join((*match.container, match.prefix.removesuffix("."))).strip(".")
    return Fact(
        subject="family",
        value=match.family.name,
        source="inferred",
        reason="tensor names" + (f" below {where!r}" if where else ""),
    )


def list_ignored(checkpoint: FlatCheckpoint, match: Match) -> tuple[str, ...]:
    """Count what the checkpoint holds beside the model, one line per dict."""
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        if tensor.container != match.container:
            head = tensor.container[0] if tensor.container else "(top level)"
            counts[head] = counts.get(head, 0) + 1
    return tuple(f"{head}: {count} tensors" for head, count in counts.items())
