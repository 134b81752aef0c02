"""TorchEasyRec: DLRM and DCNv2.

`pipeline.config` lists the feature groups, and with them the order of the network's inputs, how
features are pooled, and the activations. A DLRM that does not pass on embeddings beside their dot
products becomes a plain one by a reordering of its first layer's columns: TorchEasyRec has
[pairs, dense]. Other models are networks.
Source: `tzrec/models/{dlrm,dcn_v2}.py`, `tzrec/modules/{embedding,mlp,interaction}.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from dmt_convert.families.family import Family
from dmt_convert.families.feature_order import infer_features
from dmt_convert.families.layer_stacks import Layer, LayerNames
from dmt_convert.families.model_info import FlatModelInfo
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, Pooling, TableSpec

_TABLE: Final = re.compile(
    r"embedding_group\.emb_impls\.[^.]+\.ebc\.embedding_bags\.([^.]+)\.weight"
)
_MESSAGES: Final[Mapping[str, tuple[str, str]]] = {
    "dense_mlp": ("dlrm", "dense_mlp"),
    "final_mlp": ("dlrm", "final"),
    "backbone": ("dcn_v2", "backbone"),
    "deep": ("dcn_v2", "deep"),
    "final": ("dcn_v2", "final"),
}
"""Stacks -> messages of pipeline.config, below model_config, with their activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """One entry of a feature group."""

    name: str
    """Feature name."""
    table: str | None
    """Its table, None for a dense feature."""
    dim: int
    """Embedding dim, or number of dense inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """The inputs of the model, from `pipeline.config` and from its tables."""

    features: tuple[FeatureSpec, ...]
    """All categorical features, in the order of their group."""
    sparse: tuple[_Field, ...]
    """The group that the model takes (DLRM: `sparse`), in order."""
    num_dense: int | None
    """DLRM only: width of the group `dense`; None if nothing says."""
    model: Mapping[str, Any]
    """What pipeline.config says about the model; empty without one."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Embedding dim of every feature."""
        return tuple(field.dim for field in self.sparse if field.table is not None)

    @property
    def inputs(self) -> list[list[Any]]:
        """The group's entries, as the network `deep-cross` takes them."""
        found: list[list[Any]] = []
        feature = dense = 0
        for field in self.sparse:
            if field.table is not None:
                found.append(["feature", feature])
                feature += 1
            else:
                found += [["dense", dense + i] for i in range(field.dim)]
                dense += field.dim
        return found

    def activation(self, model: str, stack: str) -> str | None:
        """Return the activation of a stack, None if nothing says."""
        messages = _messages(self.model, model)
        if not messages:
            return None
        stacks = _messages(messages[0], stack)
        name = _last(stacks[0], "activation") if stacks else None
        return "relu" if name is None else str(name).strip().removeprefix("nn.").lower() or "linear"


class TorchEasyRec(Family):
    """The family of TorchEasyRec's models."""

    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a DLRM or a DCNv2."""
        crossed = source.indices_of("cross.u_kernels.{}.weight")
        described = "pipeline.config" in source.checkpoint.documents and not source.config.features
        if crossed and not described:
            raise source.refuse(
                "a DCNv2 without its pipeline.config, or with `features` in the model config",
                expected="pipeline.config beside the checkpoint: it says where the dense inputs "
                "stand among the embeddings",
                hint="copy it there from the training's model folder",
            )
        groups = _read_groups(source)
        if source.indices_of("final_mlp.mlp.{}.perceptron.0.weight"):
            return _describe_dlrm(source, groups)
        if crossed:
            return _describe_dcn(source, groups)
        raise source.refuse_model("neither a DLRM nor a DCNv2")


def _describe_dlrm(source: TrainerTensors, groups: _Groups) -> FlatModelInfo:
    """Describe a DLRM: a plain one if its layers are plain, else a network."""
    dims = groups.dims
    bottom = _stack(source, groups, "dense_mlp", groups.num_dense or None)
    if len(groups.sparse) > len(dims):
        raise source.refuse(
            "dense features in the group of the embeddings",
            expected="dense features in the group `dense`",
            hint="the trainer itself cannot pair them",
        )
    vectors = [*([bottom[-1].fan_out] if bottom else []), *dims]
    if len(set(vectors)) > 1:
        source.wrong.append(f"embedding dims and the dense MLP's output differ: {vectors}")
    top = _stack(source, groups, "final_mlp", None)
    with_sparse = _passes_on_embeddings(source, groups, bottom, top)
    top.append(_logit_layer(source, top[-1].fan_out))
    source.check()
    if bottom and not with_sparse and all(layer.is_plain for layer in (*bottom, *top[:-1])):
        return source.describe_dlrm(
            groups.features,
            (bottom, top),
            interaction="dot",
            dense_at=0,
            final_sigmoid=_sigmoid(source),
        )
    config = {
        "bottom": source.put_stack("bottom", bottom),
        "dense_first": True,
        "pairs": True,
        "append": ["dense"] * bool(bottom) + ["sparse"] * with_sparse,
        "top": source.put_stack("top", top),
    }
    num_dense = bottom[0].fan_in if bottom else 0
    return _network(source, groups, num_dense, "dot-pairs", config)


def _passes_on_embeddings(
    source: TrainerTensors, groups: _Groups, bottom: list[Layer], top: list[Layer]
) -> bool:
    """Tell by the width of final_mlp whether it takes the embeddings beside their pairs."""
    count, width = len(groups.dims) + bool(bottom), top[0].fan_in
    pairs = count * (count - 1) // 2 + (bottom[-1].fan_out if bottom else 0)
    with_sparse = pairs + sum(groups.dims)
    if width not in (pairs, with_sparse):
        source.wrong.append(
            f"final_mlp takes {width} inputs; {len(groups.dims)} features give {pairs}, or "
            f"{with_sparse} with the embeddings beside their pairs"
        )
    source.fact(
        "arch_with_sparse",
        str(width == with_sparse).lower(),
        "inferred",
        "only this gives final_mlp its inputs",
    )
    return width == with_sparse


def _logit_layer(source: TrainerTensors, width: int) -> Layer:
    """Take the layer that gives the logit."""
    tensors = {
        "linear.weight": source.take("output_mlp.weight", 1, width),
        "linear.bias": source.take("output_mlp.bias", 1),
    }
    return Layer(fan_in=width, fan_out=1, tensors=tensors)


def _describe_dcn(source: TrainerTensors, groups: _Groups) -> FlatModelInfo:
    """Describe a DCNv2: perhaps a backbone, a cross network, a DNN beside it, a final DNN."""
    width = source.check_width(sum(field.dim for field in groups.sparse))
    backbone = _stack(source, groups, "backbone", width)
    backbone_config = source.put_stack("backbone", backbone)
    crossed = backbone[-1].fan_out if backbone else width
    cross = _cross(source, crossed)
    deep = _stack(source, groups, "deep", width)
    deep_config = source.put_stack("parallel", deep)
    joined = crossed + (deep[-1].fan_out if deep else 0)
    final = _stack(source, groups, "final", joined)
    final_config = source.put_stack("final", final)
    out = final[-1].fan_out if final else joined
    source.put("head.weight", source.take("output_mlp.weight", 1, out))
    bias = "output_mlp.bias" in source
    if bias:
        source.put("bias", source.take("output_mlp.bias", 1))
    source.check()
    config: dict[str, Any] = {
        "inputs": groups.inputs,
        "wide": [],
        "wide_dense": False,
        "fm": [],
        "backbone": backbone_config,
        "cross": cross,
        "stacked": None,
        "parallel": deep_config,
        "final": final_config,
        "head": True,
        "bias": bias,
    }
    dense = sum(entry[0] == "dense" for entry in groups.inputs)
    return _network(source, groups, dense, "deep-cross", config)


def _cross(source: TrainerTensors, width: int) -> dict[str, Any]:
    """Take the low-rank cross network and return its config."""
    layers, rank = len(source.indices_of("cross.u_kernels.{}.weight")), 0
    for i in range(layers):
        v = source.take(f"cross.u_kernels.{i}.weight", rank or None, width)
        rank = v.shape[0]
        source.put(f"cross.layers.{i}.v", v)
        source.put(f"cross.layers.{i}.w", source.take(f"cross.v_kernels.{i}.weight", width, rank))
        source.put(f"cross.layers.{i}.bias", source.take(f"cross.v_kernels.{i}.bias", width))
    value = f"low rank, {layers} layers of rank {rank}"
    source.fact("cross network", value, "inferred", "tensor names and shapes")
    return {"kind": "low-rank", "layers": layers, "rank": rank}


def _network(
    source: TrainerTensors, groups: _Groups, num_dense: int, name: str, config: Mapping[str, Any]
) -> FlatModelInfo:
    return source.describe_network(
        features=groups.features,
        num_dense=num_dense,
        name=name,
        config=config,
        final_sigmoid=_sigmoid(source),
    )


def _stack(source: TrainerTensors, groups: _Groups, stem: str, width: int | None) -> list[Layer]:
    """Take an MLP of perceptrons: a linear layer, a norm, an activation each.

    Args:
        source: The tensors.
        groups: What pipeline.config says.
        stem: The trainer's name.
        width: Input width, if it is known.
    """
    layers = []
    for i in source.indices_of(f"{stem}.mlp.{{}}.perceptron.0.weight"):
        name = f"{stem}.mlp.{i}.perceptron"
        norm = f"{name}.1" if f"{name}.1.bias" in source else ""
        slope = f"{name}.{2 if norm else 1}.weight"
        layers.append(
            LayerNames(linear=f"{name}.0", norm=norm, slope=slope if slope in source else "")
        )
    if not layers:
        return []
    activation = groups.activation(*_MESSAGES[stem])
    if activation is None or source.config.activation is not None:
        activation = source.activation()
    else:
        source.fact(f"activation ({stem})", activation, "read", "pipeline.config")
    return source.take_stack(layers, [activation] * len(layers), width)


def _sigmoid(source: TrainerTensors) -> bool:
    return source.final_sigmoid(
        default=True, reason="of the predictions; logits are given before it"
    )


def _read_groups(source: TrainerTensors) -> _Groups:
    """Take the tables, and put the features in order.

    Raises:
        ArchitectureError: pipeline.config does not describe the features of these tables.
        ConfigError: The user's features do not fit the tables.
    """
    tables = {}
    for name in source.tensors:
        match = _TABLE.fullmatch(name)
        if match is not None:
            tables[match[1]] = source.table(match[1], source.take(name, None, None))
    document = source.checkpoint.documents.get("pipeline.config")
    if isinstance(document, dict) and source.config.features is None:
        return _groups_of_config(source, document, tables)
    features, facts = infer_features(source, list(tables))
    source.facts += facts
    return _Groups(
        features=features,
        sparse=tuple(_Field(name=f.name, table=f.table, dim=tables[f.table].dim) for f in features),
        num_dense=None,
        model={},
    )


def _groups_of_config(
    source: TrainerTensors, document: Mapping[str, Any], tables: Mapping[str, TableSpec]
) -> _Groups:
    """Read the feature groups of pipeline.config."""
    settings = {
        str(_last(message, "feature_name")): message
        for entry in _messages(document, "feature_configs")
        for kind in entry
        for message in _messages(entry, kind)
    }
    model = _messages(document, "model_config")
    groups = {
        str(_last(group, "group_name")): group
        for group in _messages(model[0] if model else {}, "feature_groups")
    }
    if not groups or not settings:
        raise source.refuse(
            "pipeline.config describes no feature groups",
            expected="feature_configs, and feature_groups in model_config",
            hint="take the pipeline.config that the training wrote into its model folder",
        )
    sparse = "sparse" if "sparse" in groups else next(iter(groups))
    fields = _fields(source, groups[sparse], settings, tables)
    dense = 0
    plain = [field for field in fields if field.table is None]
    if "dense" in groups and sparse != "dense":
        plain = [*_fields(source, groups["dense"], settings, tables)]
        dense = sum(field.dim for field in plain)
    if all(field.dim == 1 for field in plain):
        source.dense_names = tuple(field.name for field in plain)
    source.fact("features", f"group {sparse!r}, {len(fields)} features", "read", "pipeline.config")
    given = source.config.pooling is not None
    source.fact(
        "pooling",
        "as listed" if not isinstance(source.config.pooling, str) else source.config.pooling,
        "given" if given else "read",
        "--model-config" if given else "pipeline.config, whose default is sum",
    )
    return _Groups(
        features=tuple(
            FeatureSpec(
                name=field.name,
                table=field.table,
                pooling=_pooling(source, field.name, settings[field.name]),
            )
            for field in fields
            if field.table is not None
        ),
        sparse=fields,
        num_dense=dense,
        model=model[0],
    )


def _fields(
    source: TrainerTensors,
    group: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, TableSpec],
) -> tuple[_Field, ...]:
    """List the features of a group; one without table and embedding dim is dense."""
    suffix = _last(group, "embedding_name_suffix")
    fields = []
    if "sequence_groups" in group:
        raise source.refuse(
            "a feature group with sequences",
            expected="groups of features that are pooled",
            hint="sequence encoders cannot be converted yet",
        )
    for name in map(str, group.get("feature_names", [])):
        setting = settings.get(name)
        if setting is None:
            source.missing.append(f"feature_configs of {name} in pipeline.config")
            continue
        table = str(_last(setting, "embedding_name") or f"{name}_emb")
        table += f"_{suffix}" if suffix else ""
        if table in tables:
            fields.append(_Field(name=name, table=table, dim=tables[table].dim))
        elif _last(setting, "embedding_dim"):
            source.missing.append(f"the table {table} of feature {name}")
        else:
            width = _last(setting, "value_dim")
            fields.append(
                _Field(name=name, table=None, dim=width if isinstance(width, int) and width else 1)
            )
    return tuple(fields)


def _pooling(source: TrainerTensors, name: str, setting: Mapping[str, Any]) -> Pooling:
    given = source.config.pooling
    if given is not None:
        return given if isinstance(given, str) else given.get(name, "sum")
    value = str(_last(setting, "pooling") or "sum").lower()
    if value not in ("sum", "mean"):
        raise source.refuse(
            f"feature {name} is pooled by {value}",
            expected="sum or mean",
            hint="other poolings cannot be converted",
        )
    return cast(Pooling, value)


def _messages(message: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return all values of a field that are messages."""
    values = message.get(name)
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _last(message: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field that occurs once; the last one counts. None if it is not set."""
    values = message.get(name)
    return values[-1] if isinstance(values, list) and values else None


TORCHEASYREC: Final[TorchEasyRec] = TorchEasyRec(
    name="torcheasyrec",
    trainer="TorchEasyRec (DLRM, DCNv2)",
    anchor=(
        r"(?P<prefix>.*?)embedding_group\.emb_impls\.[^.]+\.ebc\.embedding_bags\."
        r"(?P<table>[^.]+)\.weight"
    ),
)
