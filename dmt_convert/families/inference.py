"""From named tensors to a `ModelSpec`: what was read, what was inferred, what was assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.facts import Fact
from dmt_convert.families.families import ARCHITECTURES
from dmt_convert.families.family_description import describe_model, list_ignored, state_family
from dmt_convert.families.feature_order import features_of_module, infer_features
from dmt_convert.families.findings import FlatModelInfo
from dmt_convert.families.incomplete import incomplete_model
from dmt_convert.families.interactions import check_given_kind, infer_interaction, parametric_kind
from dmt_convert.families.matching import Match, find_model
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_tensors import ModelTensors
from dmt_convert.families.optimizer_state import find_optimizer_state
from dmt_convert.families.quantised_rows import decode_tables
from dmt_convert.families.table_faults import blame_tables
from dmt_convert.families.user_model import infer_user_model
from dmt_convert.families.widths import ShapeReader
from dmt_convert.spec import DTYPE_BYTES, Dtype, FeatureSpec, ModelSpec, TableSpec


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
    if config.adapter is not None:
        return infer_user_model(checkpoint, config.adapter, config)
    match = find_model(checkpoint, ARCHITECTURES, config)
    if match.family.describe is not None:
        return describe_model(checkpoint, match, config)
    model = _rewrite(checkpoint, match, config)
    facts = [state_family(match)]
    shapes = ShapeReader(model.tensors, match.family, match.prefix)
    shapes.missing += [shapes.source_name(name) for name in model.missing]
    shapes.wrong += model.wrong
    tables = _read_tables(model, match.family, shapes)
    spec = None
    if tables:
        features, feature_facts = infer_features(
            [table.name for table in tables],
            ordered=checkpoint.ordered and not _is_regrouped(match, config),
            family=match.family,
            config=config,
            known_order=model.order,
            told=features_of_module(checkpoint, tables),
        )
        facts += [*feature_facts, *model.facts]
        spec = _assemble(match, model, shapes, tables, features, facts)
    if match.unsupported:
        raise ArchitectureError(
            f"{checkpoint.source} uses {', '.join(match.unsupported)}",
            expected="one plain table per feature",
            hint="this variant cannot be converted yet",
        )
    extra = [*match.extra]
    tensors: Mapping[str, TensorInfo] = model.tensors
    state = _fitting_state(find_optimizer_state(checkpoint, match), match, model)
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
        ignored=list_ignored(checkpoint, match),
    )


def _rewrite(checkpoint: FlatCheckpoint, match: Match, config: ModelConfig) -> ModelTensors:
    """Put plain tensors in the place of those that are stored in another form."""
    model = ModelTensors(tensors=dict(match.tensors), scalars=checkpoint.scalars, config=config)
    if match.family.rewrite is not None:
        match.family.rewrite(model)
    decode_tables(model)
    return model


def _is_regrouped(match: Match, config: ModelConfig) -> bool:
    """Tell whether tables may stand in another order than features enter the model.

    quantize_embeddings puts tables of one pooling behind one another.
    """
    quantised = any(
        name.startswith("tables.") and info.dtype == "uint8" for name, info in match.tensors.items()
    )
    return quantised and isinstance(config.pooling, Mapping)


def _fitting_state(
    state: Mapping[str, TensorInfo], match: Match, model: ModelTensors
) -> dict[str, TensorInfo]:
    """Keep accumulators of tensors that are as they were, and of tables with the same rows."""
    fitting = {}
    for name, info in state.items():
        # a mixed-dimension table has the rows of its narrow one
        target = re.sub(r"^(tables\..+)\.embs$", r"\1.weight", name)
        now = model.tensors.get(target)
        same_rows = now is not None and now.shape[:1] == info.shape[:1]
        if now is match.tensors[name] or (same_rows and target.startswith("tables.")):
            fitting[target] = info
    return fitting


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


def _read_tables(model: ModelTensors, family: Architecture, shapes: ShapeReader) -> list[TableSpec]:
    names = [n for n in model.tensors if n.startswith("tables.")]
    found = {n.removeprefix("tables.").removesuffix(".weight") for n in names}
    if family.positional:
        last = max((int(name) for name in found), default=-1)
        if last < 100_000:
            gaps = [str(i) for i in range(last + 1) if str(i) not in found]
            shapes.missing += [shapes.source_name(f"tables.{gap}.weight") for gap in gaps]
    tables = []
    for name in names:
        shape = shapes.shape(name, 2)
        info = model.tensors[name]
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
    model: ModelTensors,
    shapes: ShapeReader,
    tables: list[TableSpec],
    features: tuple[FeatureSpec, ...],
    facts: list[Fact],
) -> ModelSpec | None:
    # without all tables no width fits: what is missing is reported, not what follows from it
    whole = not shapes.missing and len(tables) == sum(
        n.startswith("tables.") for n in model.tensors
    )
    config = model.config
    by_name = {table.name: table for table in tables}
    dims = [by_name[feature.table].dim for feature in features]
    kind = parametric_kind(shapes)
    check_given_kind(kind, config)
    same_dim = kind in (None, "projection") and len(set(dims)) == 1
    dense_arch = shapes.mlp("dense_arch", output=dims[0] if same_dim else None, final_relu=True)
    last = "over_arch.last" if match.family.over_arch_last else None
    over_arch = shapes.mlp("over_arch", last=last, final_relu=False)
    if dense_arch is None or over_arch is None or not whole:
        return None
    widths = {"dense": dense_arch.widths[-1], "over": over_arch.widths[0]}
    if config.features is None and blame_tables(shapes, match.family, tables, kind, **widths):
        return None
    interaction = infer_interaction(
        match, model, shapes, kind, [dense_arch.widths[-1], *dims], over_arch, facts
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


def _incomplete(
    checkpoint: FlatCheckpoint, match: Match, shapes: ShapeReader, extra: list[str]
) -> ArchitectureError:
    return incomplete_model(
        checkpoint.source,
        family=match.family.name,
        trainer=match.family.trainer,
        missing=shapes.missing,
        wrong=shapes.wrong,
        extra=extra,
    )
