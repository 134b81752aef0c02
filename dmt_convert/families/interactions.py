"""Which interaction a model has: told by its tensors, or by the width of over_arch."""

from __future__ import annotations

import math

from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.facts import Fact
from dmt_convert.families.matching import Match
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_tensors import ModelTensors
from dmt_convert.families.widths import ShapeReader
from dmt_convert.spec import InteractionKind, InteractionSpec, MlpSpec


def parametric_kind(shapes: ShapeReader) -> InteractionKind | None:
    """Tell an interaction that has tensors of its own; None for dot and cat."""
    if shapes.indices("cross"):
        return "dcn"
    if shapes.indices("branch1") or shapes.indices("branch2"):
        return "projection"
    return None


def check_given_kind(kind: InteractionKind | None, config: ModelConfig) -> None:
    """Refuse an interaction in the model config that the tensors contradict."""
    given = config.interaction
    if given is None or given == kind or (kind is None and given in ("dot", "cat")):
        return
    raise ConfigError(
        f"the model config says interaction {given}, the checkpoint "
        + (f"holds the tensors of {kind}" if kind else f"holds no tensor of {given}"),
        expected=kind or "dot or cat",
        hint="leave `interaction` out; `dmt inspect` shows what the tensors tell",
    )


def infer_interaction(
    match: Match,
    model: ModelTensors,
    shapes: ShapeReader,
    kind: InteractionKind | None,
    dims: list[int],
    over_arch: MlpSpec,
    facts: list[Fact],
) -> InteractionSpec | None:
    """Describe the interaction.

    Args:
        match: The model.
        model: Its tensors, and what is known of it.
        shapes: Takes what does not fit.
        kind: What `parametric_kind` says.
        dims: Widths of the interaction's inputs, the dense vector first.
        over_arch: What takes its output.
        facts: Takes how it was come by.

    Returns:
        The interaction; None, and a problem, where nothing fits.

    Raises:
        ArchitectureError: Two interactions fit, and neither is the trainer's default.
    """
    if kind == "dcn":
        cross = shapes.cross(sum(dims))
        if cross is None:
            return None
        facts.append(_shape_fact("interaction", f"dcn, {cross[0]} layers of rank {cross[1]}"))
        interaction = InteractionSpec(kind="dcn", cross_layers=cross[0], cross_rank=cross[1])
    elif kind == "projection":
        branch1 = shapes.mlp("branch1", final_relu=True)
        branch2 = shapes.mlp("branch2", final_relu=True)
        if branch1 is None or branch2 is None:
            return None
        facts.append(_shape_fact("interaction", "projection"))
        interaction = InteractionSpec(kind="projection", branch1=branch1, branch2=branch2)
        for name, branch in (("branch1", branch1), ("branch2", branch2)):
            if branch.widths[0] != sum(dims) or branch.widths[-1] % dims[0]:
                shapes.wrong.append(
                    f"{shapes.source_name(f'{name}.0.weight')} and its successors map "
                    f"{branch.widths[0]} to {branch.widths[-1]}, expected {sum(dims)} to a "
                    f"multiple of {dims[0]}"
                )
    else:
        return _dot_or_cat(match, model, shapes, dims, over_arch.widths[0], facts)
    if over_arch.widths[0] != interaction.output_width(dims):
        shapes.wrong.append(
            f"{shapes.source_name('over_arch.0.weight')} takes {over_arch.widths[0]} inputs, the "
            f"{interaction.kind} interaction of {len(dims) - 1} features gives "
            f"{interaction.output_width(dims)}"
        )
        return None
    return interaction


def _dot_or_cat(
    match: Match,
    model: ModelTensors,
    shapes: ShapeReader,
    dims: list[int],
    width: int,
    facts: list[Fact],
) -> InteractionSpec | None:
    """Tell dot, dot with self-pairs and cat apart by the width of over_arch."""
    family, config = match.family, model.config
    known = config.interaction or model.interaction
    kinds = family.interactions if known is None else (known,)
    order = config.pair_order or family.pair_order
    pairs = (False, True) if family.allows_self_pairs else (False,)
    if config.self_pairs is not None:
        pairs = (config.self_pairs,)
    options = [
        InteractionSpec(kind="dot", self_pairs=own, pair_order=order)
        for own in pairs
        if "dot" in kinds and len(set(dims)) == 1
    ]
    options += [InteractionSpec(kind="cat")] if "cat" in kinds else []
    fitting = [option for option in options if option.output_width(dims) == width]
    if not fitting:
        shapes.wrong.append(_width_problem(shapes, dims, width, options))
        return None
    chosen = fitting[0]
    label = _label(chosen)
    if config.interaction is not None:
        facts.append(
            Fact(subject="interaction", value=label, source="given", reason="--model-config")
        )
    elif model.interaction is not None:
        facts.append(
            Fact(subject="interaction", value=label, source="read", reason="the model's settings")
        )
    elif label != "dot" and config.self_pairs is None and _saved_by_one_of_several(match):
        raise _one_ranks_share(match, shapes, width, label)
    elif len(fitting) > 1:
        others = " and ".join(_label(option) for option in fitting[1:])
        if label != "dot":
            raise ArchitectureError(
                f"{shapes.source_name('over_arch.0.weight')} takes {width} inputs, which "
                f"{label} and {others} both give",
                expected="a width that only one interaction gives, or dot, the trainer's default",
                hint="say which one with --model-config: `interaction: cat`, or "
                "`interaction: dot` (and `self_pairs: true`)",
            )
        reason = f"{others} would give the same width; dot is the trainer's default"
        facts.append(Fact(subject="interaction", value=label, source="assumed", reason=reason))
    elif chosen.self_pairs:
        # n vectors have as many pairs with themselves as n + 1 have without
        reason = (
            f"a dot of {len(dims)} features without self-pairs is as wide: if a table is missing, "
            "or serves two features, say so with --model-config"
        )
        facts.append(Fact(subject="interaction", value=label, source="assumed", reason=reason))
    else:
        facts.append(
            _shape_fact("interaction", label, f"only this gives over_arch its {width} inputs")
        )
    if chosen.kind == "dot":
        facts.append(
            Fact(
                subject="order of pairs",
                value=order,
                source="assumed" if config.pair_order is None else "given",
                reason="the trainer's order" if config.pair_order is None else "--model-config",
            )
        )
    return chosen


def _saved_by_one_of_several(match: Match) -> bool:
    """Tell a file of dlrm_s_pytorch.py run on several ranks: DDP is around its MLPs alone.

    Each rank has but a share of the tables, numbered from 0, and saves no others.
    """
    return match.family.allows_self_pairs and any(
        ".bot_l.module." in f".{name}" or ".top_l.module." in f".{name}"
        for name in match.parameter_names
    )


def _one_ranks_share(
    match: Match, shapes: ShapeReader, width: int, label: str
) -> ArchitectureError:
    count = sum(name.startswith("tables.") for name in match.tensors)
    key = "interaction: cat" if label == "cat" else "self_pairs: true"
    return ArchitectureError(
        f"{shapes.source_name('over_arch.0.weight')} takes {width} inputs, which for the {count} "
        f"tables that are there only a {label} gives; DistributedDataParallel around bot_l and "
        "top_l shows a run on several ranks, which saves one rank's tables alone",
        expected="all tables of the model",
        hint=f"save it from a run on one rank; if the tables are all there, say `{key}` in "
        "--model-config",
    )


def _shape_fact(subject: str, value: str, reason: str = "tensor names and shapes") -> Fact:
    return Fact(subject=subject, value=value, source="inferred", reason=reason)


def _width_problem(
    shapes: ShapeReader, dims: list[int], width: int, options: list[InteractionSpec]
) -> str:
    name = shapes.source_name("over_arch.0.weight")
    gives = ", ".join(f"{_label(option)} {option.output_width(dims)}" for option in options)
    if not options:
        gives = f"vectors of widths {sorted(set(dims))}, which dot cannot pair"
    text = (
        f"{name} takes {width} inputs; {len(dims) - 1} features and the dense vector give {gives}"
    )
    implied = {
        f"a {_label(option)} of {count - 1} features"
        for option in options
        for count in (_implied_count(option, dims[0], width),)
        if len(set(dims)) == 1 and count > len(dims)
    }
    if implied:
        text += (
            f". {' or '.join(sorted(implied))} would fit: tables are missing (a multi-rank run of "
            "dlrm_s_pytorch.py saves only its own), or a table serves several features (list "
            "them with --model-config)"
        )
    return text


def _label(option: InteractionSpec) -> str:
    return option.kind + (" with self-pairs" if option.self_pairs else "")


def _implied_count(option: InteractionSpec, dim: int, width: int) -> int:
    """Return how many vectors of `dim` make an interaction so wide; 0 where no number does."""
    guess = width // dim
    if option.kind == "dot":
        root = math.isqrt(max(0, 1 + 8 * (width - dim)))
        guess = (root - 1 if option.self_pairs else root + 1) // 2
    return guess if guess and option.output_width([dim] * guess) == width else 0
