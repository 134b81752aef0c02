"""From named tensors to a `ModelSpec`: what was read, what was inferred, what was assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, cast

from dmt_convert.architectures.architecture import Architecture
from dmt_convert.architectures.facebook_dlrm import FACEBOOK_DLRM
from dmt_convert.architectures.feature_order import infer_features
from dmt_convert.architectures.findings import Fact, FlatModelInfo
from dmt_convert.architectures.matching import Match, find_model
from dmt_convert.architectures.model_config import ModelConfig
from dmt_convert.architectures.optimizer_state import find_optimizer_state
from dmt_convert.architectures.table_faults import blame_tables
from dmt_convert.architectures.torchrec_dlrm import TORCHREC_DLRM
from dmt_convert.architectures.widths import ShapeReader
from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.spec import (
    DTYPE_BYTES,
    Dtype,
    FeatureSpec,
    InteractionKind,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    TableSpec,
)

ARCHITECTURES: Final[tuple[Architecture, ...]] = (TORCHREC_DLRM, FACEBOOK_DLRM)
"""All families."""
_MAX_LISTED: Final = 100
"""Tensors of a kind that an error lists."""


def infer_model(checkpoint: FlatCheckpoint, config: ModelConfig | None = None) -> FlatModelInfo:
    """Understand a flat checkpoint from its headers.

    Args:
        checkpoint: An opened checkpoint.
        config: What the user says of the model.

    Raises:
        ArchitectureError: It is no known model, or not a whole one; every missing, extra and
            misshapen tensor is listed.
    """
    config = config or ModelConfig()
    match = find_model(checkpoint, ARCHITECTURES, config)
    facts = [_family_fact(match)]
    shapes = ShapeReader(match.tensors, match.family, match.prefix)
    tables = _read_tables(match, shapes)
    spec = None
    if tables:
        features, feature_facts = infer_features(
            [table.name for table in tables],
            ordered=checkpoint.ordered,
            family=match.family,
            config=config,
        )
        facts += feature_facts
        spec = _assemble(match, shapes, tables, features, config, facts)
    if match.unsupported:
        raise ArchitectureError(
            f"{checkpoint.source} uses {', '.join(match.unsupported)}",
            expected="one plain table per feature",
            hint="this variant cannot be converted yet",
        )
    extra = [*match.extra]
    tensors: Mapping[str, TensorInfo] = match.tensors
    state = find_optimizer_state(checkpoint, match)
    if spec is not None:
        tensors, state = _number_last(tensors, spec), _number_last(state, spec)
        extra += [info.path for name, info in tensors.items() if not _belongs(name, spec)]
    if shapes.missing or shapes.wrong or extra or spec is None:
        raise _incomplete(checkpoint, match, shapes, extra)
    return FlatModelInfo(
        checkpoint=checkpoint,
        spec=spec,
        tensors=tensors,
        optimizer_state=state,
        facts=tuple(facts),
        ignored=_ignored(checkpoint, match),
    )


def _number_last(tensors: Mapping[str, TensorInfo], spec: ModelSpec) -> dict[str, TensorInfo]:
    """Give a last over_arch layer that stands apart its number."""
    last = f"over_arch.{spec.over_arch.num_layers - 1}."
    return {name.replace("over_arch.last.", last): info for name, info in tensors.items()}


def _belongs(name: str, spec: ModelSpec) -> bool:
    """Tell whether the model has a part for a tensor (a DCN has none for a projection's)."""
    part = name.split(".", maxsplit=1)[0]
    if part == "cross":
        return spec.interaction.kind == "dcn"
    return not part.startswith("branch") or spec.interaction.kind == "projection"


def infer_spec(checkpoint: FlatCheckpoint, config: ModelConfig | None = None) -> ModelSpec:
    """Return the spec alone; see `infer_model`."""
    return infer_model(checkpoint, config).spec


def _family_fact(match: Match) -> Fact:
    where = ".".join((*match.container, match.prefix.removesuffix("."))).strip(".")
    return Fact(
        subject="family",
        value=match.family.name,
        source="inferred",
        reason="tensor names" + (f" below {where!r}" if where else ""),
    )


def _read_tables(match: Match, shapes: ShapeReader) -> list[TableSpec]:
    names = [n for n in match.tensors if n.startswith("tables.")]
    found = {n.removeprefix("tables.").removesuffix(".weight") for n in names}
    if match.family.positional:
        last = max((int(name) for name in found), default=-1)
        if last < 100_000:
            gaps = [str(i) for i in range(last + 1) if str(i) not in found]
            shapes.missing += [shapes.source_name(f"tables.{gap}.weight") for gap in gaps]
    tables = []
    for name in names:
        shape = shapes.shape(name, 2)
        info = match.tensors[name]
        if shape is not None:
            table = name.removeprefix("tables.").removesuffix(".weight")
            # another dtype is a problem that ShapeReader has noted; the widths still count
            dtype = info.dtype if info.dtype in DTYPE_BYTES else "fp32"
            tables.append(
                TableSpec(name=table, rows=shape[0], dim=shape[1], dtype=cast(Dtype, dtype))
            )
    return tables


def _assemble(
    match: Match,
    shapes: ShapeReader,
    tables: list[TableSpec],
    features: tuple[FeatureSpec, ...],
    config: ModelConfig,
    facts: list[Fact],
) -> ModelSpec | None:
    # without all tables no width fits: what is missing is reported, not what follows from it
    whole = not shapes.missing and len(tables) == sum(
        n.startswith("tables.") for n in match.tensors
    )
    by_name = {table.name: table for table in tables}
    dims = [by_name[feature.table].dim for feature in features]
    kind = _parametric_kind(shapes)
    _check_given_kind(kind, config)
    same_dim = kind in (None, "projection") and len(set(dims)) == 1
    dense_arch = shapes.mlp("dense_arch", output=dims[0] if same_dim else None, final_relu=True)
    last = "over_arch.last" if match.family.over_arch_last else None
    over_arch = shapes.mlp("over_arch", last=last, final_relu=False)
    if dense_arch is None or over_arch is None or not whole:
        return None
    widths = {"dense": dense_arch.widths[-1], "over": over_arch.widths[0]}
    if config.features is None and blame_tables(shapes, match.family, tables, kind, **widths):
        return None
    interaction = _interaction(
        match, shapes, kind, [dense_arch.widths[-1], *dims], over_arch, config, facts
    )
    if interaction is None or shapes.missing or shapes.wrong:
        return None
    sigmoid = config.final_sigmoid
    facts += [
        Fact(
            subject="activation",
            value="ReLU behind every layer but the last of over_arch",
            source="assumed",
            reason="the trainer's only choice; not stored",
        ),
        Fact(
            subject="final sigmoid",
            value=str(match.family.final_sigmoid if sigmoid is None else sigmoid).lower(),
            source="assumed" if sigmoid is None else "given",
            reason="the trainer's default; logits are given before it"
            if sigmoid is None
            else "--model-config",
        ),
    ]
    return ModelSpec(
        family=match.family.name,
        tables=tuple(tables),
        features=features,
        dense_arch=dense_arch,
        interaction=interaction,
        over_arch=over_arch,
        final_sigmoid=match.family.final_sigmoid if sigmoid is None else sigmoid,
    )


def _parametric_kind(shapes: ShapeReader) -> InteractionKind | None:
    if shapes.indices("cross"):
        return "dcn"
    if shapes.indices("branch1") or shapes.indices("branch2"):
        return "projection"
    return None


def _check_given_kind(kind: InteractionKind | None, config: ModelConfig) -> None:
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


def _interaction(
    match: Match,
    shapes: ShapeReader,
    kind: InteractionKind | None,
    dims: list[int],
    over_arch: MlpSpec,
    config: ModelConfig,
    facts: list[Fact],
) -> InteractionSpec | None:
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
        return _dot_or_cat(match, shapes, dims, over_arch.widths[0], config, facts)
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
    shapes: ShapeReader,
    dims: list[int],
    width: int,
    config: ModelConfig,
    facts: list[Fact],
) -> InteractionSpec | None:
    """Tell dot, dot with self-pairs and cat apart by the width of over_arch."""
    family = match.family
    kinds = family.interactions if config.interaction is None else (config.interaction,)
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


def _incomplete(
    checkpoint: FlatCheckpoint, match: Match, shapes: ShapeReader, extra: list[str]
) -> ArchitectureError:
    details, counts = [], []
    for items, label, prefix in (
        (shapes.missing, "missing", "missing"),
        (shapes.wrong, "misshapen", "wrong shape"),
        (extra, "extra", "extra"),
    ):
        found = [*dict.fromkeys(items)]
        details += [f"{prefix}: {text}" for text in found[:_MAX_LISTED]]
        if len(found) > _MAX_LISTED:
            details.append(f"{prefix}: ... and {len(found) - _MAX_LISTED} more")
        counts += [f"{len(found)} {label}"] if found else []
    return ArchitectureError(
        f"{checkpoint.source} is not a whole {match.family.name} model: "
        f"{', '.join(counts) or 'no'} tensors",
        expected=f"exactly the tensors of {match.family.trainer}, with shapes that fit together",
        hint="save the whole model again; pass over tensors that do not belong to it with "
        "`ignore: [pattern]` in --model-config",
        details=details,
    )


def _ignored(checkpoint: FlatCheckpoint, match: Match) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        if tensor.container != match.container:
            head = tensor.container[0] if tensor.container else "(top level)"
            counts[head] = counts.get(head, 0) + 1
    return tuple(f"{head}: {count} tensors" for head, count in counts.items())
