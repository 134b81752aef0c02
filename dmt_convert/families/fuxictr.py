"""FuxiCTR: DLRM and DCNv2.

`feature_map.json` beside the checkpoint lists the features in order, their types and the tables
that they share; `params.json`, if it is there, has the activations. Ids begin at 1, row 0 is the
padding. A DLRM with dense inputs becomes a plain one by a reordering of its first layer's columns:
FuxiCTR has [pairs, dense], with the dense vector after the features. Other models are networks.
Source: `model_zoo/{DLRM,DCNv2}/src/*.py`, `fuxictr/pytorch/layers/**`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dmt_convert.checkpoint import TensorInfo, derived, stream_tensor
from dmt_convert.families.deepctr import take_cross_mix
from dmt_convert.families.family import Family
from dmt_convert.families.feature_order import infer_features
from dmt_convert.families.layer_stacks import Layer, LayerNames
from dmt_convert.families.model_info import FlatModelInfo, Source
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, Pooling

_STEMS: Final = (
    "embedding_layer.embedding_layer.embedding_layers",
    "embedding_layer.embedding_layer.embedding_layer",
)
_POOLINGS: Final[Mapping[str, Pooling]] = {
    "layers.MaskedAveragePooling()": "mean",
    "layers.MaskedSumPooling()": "sum",
}
_ACTIVATION_KEYS: Final[Mapping[str, str]] = {
    "bottom_mlp": "bottom_mlp_activations",
    "top_mlp": "top_mlp_activations",
    "stacked_dnn": "dnn_activations",
    "parallel_dnn": "dnn_activations",
}
"""Stacks -> keys of params.json with their activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """The inputs of the model, from `feature_map.json` and from its tables."""

    features: tuple[FeatureSpec, ...]
    """Categorical features and sequences, in the model's order."""
    dims: tuple[int, ...]
    """Their embedding dims."""
    numeric: tuple[str, ...] | None
    """Numeric features, in the order of the dense inputs; None if nothing lists them."""
    inputs: list[list[Any]]
    """All fields that are embedded, as the network `deep-cross` takes them."""
    params: Mapping[str, Any] | None
    """The content of params.json, None without one."""

    @property
    def num_dense(self) -> int:
        """Number of numeric features that are embedded."""
        return sum(entry[0] == "scaled" for entry in self.inputs)

    @property
    def width(self) -> int:
        """Width of all embeddings side by side."""
        scaled = sum(entry[2] for entry in self.inputs if entry[0] == "scaled")
        return sum(self.dims) + int(scaled)


class FuxiCtr(Family):
    """The family of FuxiCTR's models."""

    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a DLRM or a DCNv2."""
        fields = _read_fields(source)
        if source.indices_of("top_mlp.mlp.{}.weight"):
            return _describe_dlrm(source, fields)
        if "fc.weight" in source and (
            "crossnet.U_list.0" in source or source.indices_of("crossnet.cross_layers.{}.weight")
        ):
            return _describe_dcn(source, fields)
        raise source.refuse_model("neither a DLRM nor a DCNv2")


def _describe_dlrm(source: TrainerTensors, fields: _Fields) -> FlatModelInfo:
    """Describe a DLRM: a plain one if its layers are plain, else a network."""
    dims = fields.dims
    bottom = _stack(source, fields, "bottom_mlp", None)
    num_dense = bottom[0].fan_in if bottom else 0
    if fields.numeric is not None and num_dense != len(fields.numeric):
        source.wrong.append(
            f"bottom_mlp takes {num_dense} inputs, feature_map.json has {len(fields.numeric)} "
            "numeric features"
        )
    pairs = "interact.triu_mask" in source
    source.skip("interact.triu_mask", reason="a constant: which pairs a dot takes")
    vectors = [*dims, *([bottom[-1].fan_out] if bottom else [])]
    count = len(vectors)
    width = count * (count - 1) // 2 + sum(vectors[len(dims) :]) if pairs else sum(vectors)
    top = _stack(source, fields, "top_mlp", width, output=True)
    value = "dot" if pairs else "cat"
    source.fact("interaction", value, "read", "only dot has interact.triu_mask")
    if len(set(vectors)) > 1:
        source.wrong.append(f"embedding dims and the bottom MLP's output differ: {vectors}")
    source.check()
    if bottom and all(layer.is_plain for layer in (*bottom, *top[:-1])):
        return source.describe_dlrm(
            fields.features,
            (bottom, top),
            interaction="dot" if pairs else "cat",
            dense_at=len(dims),
            final_sigmoid=_sigmoid(source),
        )
    config = {
        "bottom": source.put_stack("bottom", bottom),
        "dense_first": False,
        "pairs": pairs,
        "append": ["dense"] if pairs and bottom else [],
        "top": source.put_stack("top", top),
    }
    return _network(source, fields, num_dense, "dot-pairs", config)


def _describe_dcn(source: TrainerTensors, fields: _Fields) -> FlatModelInfo:
    """Describe a DCNv2: a cross network, a DNN behind it, a DNN beside it, then one layer."""
    width = source.check_width(fields.width)
    cross = _cross(source, width)
    stacked = _stack(source, fields, "stacked_dnn", width)
    parallel = _stack(source, fields, "parallel_dnn", width)
    joined = stacked[-1].fan_out if stacked else width
    joined += parallel[-1].fan_out if parallel else 0
    names = [name for name, layers in (("stacked", stacked), ("parallel", parallel)) if layers]
    source.fact(
        "model structure", "_".join(names) or "crossnet_only", "inferred", "tensor names and shapes"
    )
    config = {
        "inputs": fields.inputs,
        "wide": [],
        "wide_dense": False,
        "fm": [],
        "backbone": None,
        "cross": cross,
        "stacked": source.put_stack("stacked", stacked),
        "parallel": source.put_stack("parallel", parallel),
        "final": None,
        "head": True,
        "bias": True,
    }
    source.put("head.weight", source.take("fc.weight", 1, joined))
    source.put("bias", source.take("fc.bias", 1))
    source.check()
    return _network(source, fields, fields.num_dense, "deep-cross", config)


def _network(
    source: TrainerTensors, fields: _Fields, num_dense: int, name: str, config: Mapping[str, Any]
) -> FlatModelInfo:
    return source.describe_network(
        features=fields.features,
        num_dense=num_dense,
        name=name,
        config=config,
        final_sigmoid=_sigmoid(source),
    )


def _cross(source: TrainerTensors, width: int) -> dict[str, Any]:
    """Take the cross network and return its config."""
    if "crossnet.U_list.0" in source:
        return take_cross_mix(source, width)
    layers = len(source.indices_of("crossnet.cross_layers.{}.weight"))
    for i in range(layers or 1):
        name = f"crossnet.cross_layers.{i}"
        source.put(f"cross.layers.{i}.weight", source.take(f"{name}.weight", width, width))
        source.put(f"cross.layers.{i}.bias", source.take(f"{name}.bias", width))
    source.fact("cross network", f"matrix, {layers} layers", "inferred", "tensor shapes")
    return {"kind": "matrix", "layers": layers}


def _stack(
    source: TrainerTensors,
    fields: _Fields,
    stem: str,
    width: int | None,
    *,
    output: bool = False,
) -> list[Layer]:
    """Take an MLP_Block: an nn.Sequential of linear layers, norms, activations and dropouts.

    Args:
        source: The tensors.
        fields: The features, and what params.json says.
        stem: The trainer's name.
        width: Input width, if it is known.
        output: Whether its last layer gives the logit, without norm or activation.
    """
    layers: list[LayerNames] = []
    for index in source.indices_of(f"{stem}.mlp.{{}}.weight"):
        name = f"{stem}.mlp.{index}"
        if f"{name}.weight" not in source:
            continue
        if len(source.tensors[f"{name}.weight"].shape) == 2:
            layers.append(LayerNames(linear=name))
        elif layers and f"{name}.running_mean" in source:
            layers[-1] = LayerNames(linear=layers[-1].linear, norm=name)
        elif layers and not layers[-1].slope:
            slope = f"{name}.weight"
            layers[-1] = LayerNames(linear=layers[-1].linear, norm=layers[-1].norm, slope=slope)
    if not layers:
        return []
    hidden = len(layers) - output
    names = _activations(source, fields.params, _ACTIVATION_KEYS[stem], hidden)
    if any(layer.slope for layer in layers):
        names = ["prelu"] * hidden
    return source.take_stack(layers, names + ["linear"] * output, width)


def _activations(
    source: TrainerTensors, params: Mapping[str, Any] | None, key: str, count: int
) -> list[str]:
    """Return the activations of hidden layers, from params.json if it is there."""
    if params is None or source.config.activation is not None:
        return [source.activation()] * count
    value = params.get(key, "ReLU")
    given = value if isinstance(value, list) else [value] * count
    names = ["linear" if name is None else str(name).lower() for name in given]
    shown = ", ".join(dict.fromkeys(names)) or "none"
    reason = "params.json" if key in params else "the trainer's default; params.json does not say"
    source.fact(f"activation ({key})", shown, "read" if key in params else "assumed", reason)
    if len(names) != count:
        source.wrong.append(f"params.json: {key} has {len(names)} entries for {count} layers")
        return ["relu"] * count
    return names


def _sigmoid(source: TrainerTensors) -> bool:
    task = (_document(source, "params.json") or {}).get("task")
    return source.final_sigmoid(
        default=True,
        reason="task binary_classification, the default",
        stored=None if task is None else task != "regression",
        stored_in="task in params.json",
    )


def _read_fields(source: TrainerTensors) -> _Fields:
    """Take the tables and the vectors of numeric features.

    Raises:
        ArchitectureError: feature_map.json describes features that cannot be converted.
        ConfigError: The user's features do not fit the tables.
    """
    stem = next(s for s in _STEMS if source.keys_of(f"{s}.{{}}.weight"))
    stored = source.keys_of(f"{stem}.{{}}.weight")
    described = _described(source)
    if described is not None:
        _check_order(source, stored, described)
    numeric = _numeric(source, stem, stored, described)
    scaled = [name for name in numeric if name in stored]
    shared = _shared(described or {}, stored)
    # the trainer saves a shared table again under the name of every feature that uses it
    for name, owner in shared.items():
        _skip_copy(source, f"{stem}.{name}.weight", f"{stem}.{owner}.weight")
    names = [name for name in stored if name not in scaled and name not in shared]
    tables = {
        name: source.table(name, source.take(f"{stem}.{name}.weight", None, None)) for name in names
    }
    features = _features(source, names, described, shared)
    order = _input_order(source, stored, described, features, scaled)
    source.dense_names = tuple(numeric)
    return _Fields(
        features=features,
        dims=tuple(tables[f.table].dim for f in features),
        numeric=tuple(numeric) if described is not None else None,
        inputs=_inputs(source, stem, order, [f.name for f in features], numeric),
        params=_document(source, "params.json"),
    )


def _skip_copy(source: TrainerTensors, name: str, owner: str) -> None:
    """Pass over a table that is another one's copy; note as a fault if it is not."""
    copy, table = source.tensors.get(name), source.tensors.get(owner)
    if copy is None or table is None:
        return
    if not _same(copy, table):
        source.mark_used(name)
        source.wrong.append(
            f"{copy.path} differs from {table.path}, which it shares by feature_map.json"
        )
        return
    source.skip(name, reason=f"a copy of {table.path}")


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    """Tell whether two tensors hold the same bytes; a trainer's file mostly stores them once."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return a.pieces == b.pieces or all(
        x.tobytes() == y.tobytes() for x, y in zip(stream_tensor(a), stream_tensor(b), strict=True)
    )


def _shared(described: Mapping[str, Mapping[str, Any]], stored: list[str]) -> dict[str, str]:
    """Map features to the tables that they share; the owner precedes them, as in the trainer."""
    shared: dict[str, str] = {}
    seen: set[str] = set()
    for name, spec in described.items():
        owner = spec.get("share_embedding")
        if isinstance(owner, str) and owner in seen:
            shared[name] = shared.get(owner, owner)
        if name in stored:
            seen.add(name)
    return shared


def _input_order(
    source: TrainerTensors,
    stored: list[str],
    described: Mapping[str, Mapping[str, Any]] | None,
    features: tuple[FeatureSpec, ...],
    scaled: list[str],
) -> list[str]:
    """Put features and embedded numeric features in the order in which the network takes them."""
    names = [feature.name for feature in features]
    if source.config.features is not None:
        # the user lists only categorical features; numeric ones keep their places among them
        rest = iter(names)
        slots = [n if n in scaled else next(rest, "") for n in described or stored]
        return [*(name for name in slots if name), *rest]
    known = {*names, *scaled}
    places = dict.fromkeys(name for name in described or stored if name in known)
    return [*places, *(name for name in names if name not in places)]


def _document(source: TrainerTensors, name: str) -> Mapping[str, Any] | None:
    value = source.checkpoint.documents.get(name)
    return value if isinstance(value, dict) else None


def _described(source: TrainerTensors) -> dict[str, Mapping[str, Any]] | None:
    """Return what feature_map.json says about every feature, in its order."""
    document = _document(source, "feature_map.json")
    if document is None:
        return None
    entries = document.get("features", document.get("feature_specs"))
    listed = entries if isinstance(entries, list) else [entries]
    found: dict[str, Mapping[str, Any]] = {}
    for entry in listed:
        if not isinstance(entry, dict) or not all(isinstance(v, dict) for v in entry.values()):
            raise source.refuse(
                "feature_map.json does not list features",
                expected='`"features": [{"name": {"type": ...}}, ...]`',
                hint="the file is damaged, or of a version that is not known yet",
            )
        found.update(entry)
    found = _as_the_model_has_them(source, found)
    known = ("numeric", "categorical", "sequence", "meta")
    odd = [name for name, spec in found.items() if spec.get("type") not in known]
    odd += [name for name, spec in found.items() if "pretrained_emb" in spec]
    odd += [
        name
        for name, spec in found.items()
        if spec.get("type") in known[:2] and spec.get("feature_encoder")
    ]
    if odd:
        raise source.refuse(
            f"features {', '.join(odd[:5])} of a kind that cannot be converted",
            expected=f"types {', '.join(known)}; no pretrained embeddings; encoders only for "
            "sequences",
            hint="such features consist of more than a table; train the model without them",
        )
    return {name: spec for name, spec in found.items() if spec["type"] != "meta"}


def _as_the_model_has_them(
    source: TrainerTensors, found: dict[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Apply `use_features` and `feature_specs` of params.json, as the trainer does."""
    params = _document(source, "params.json") or {}
    used, changes = params.get("use_features"), params.get("feature_specs")
    if isinstance(used, list) and used:
        found = {name: found[name] for name in used if isinstance(name, str) and name in found}
    for change in changes if isinstance(changes, list) else ():
        names = change.get("name") if isinstance(change, dict) else None
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and name in found:
                own = {key: value for key, value in change.items() if key != "name"}
                found[name] = {**found[name], **own}
    return found


def _check_order(
    source: TrainerTensors, stored: list[str], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a file whose tables are in another order than the features of the description."""
    held = set(stored)
    listed = [name for name in described if name in held]
    order = source.tables_by_module() or (stored if source.ordered else [])
    if order and listed != [name for name in order if name in described]:
        raise source.refuse(
            "its tables stand in another order than feature_map.json lists them",
            expected="the feature_map.json of this model",
            hint="a model that was given `use_features` says so in params.json beside it",
        )


def _numeric(
    source: TrainerTensors,
    stem: str,
    stored: list[str],
    described: Mapping[str, Mapping[str, Any]] | None,
) -> list[str]:
    """Return the numeric features in order; embedded ones have a vector of shape (dim, 1)."""
    if described is not None:
        return [name for name, spec in described.items() if spec["type"] == "numeric"]
    shapes = {name: source.tensors[f"{stem}.{name}.weight"].shape for name in stored}
    dims = {shape[1] for shape in shapes.values() if len(shape) == 2 and shape[1] > 1}
    found = [name for name in stored if dims and shapes[name] in {(dim, 1) for dim in dims}]
    if found:
        source.fact("numeric features", ", ".join(found), "inferred", "vectors of shape (dim, 1)")
    return found


def _features(
    source: TrainerTensors,
    names: list[str],
    described: Mapping[str, Mapping[str, Any]] | None,
    shared: Mapping[str, str],
) -> tuple[FeatureSpec, ...]:
    """Put the categorical features in order, with their tables and pooling."""
    config = source.config
    if described is None or config.features is not None:
        features, facts = infer_features(source, names)
        source.facts += facts
    else:
        known = [name for name, spec in described.items() if spec["type"] != "numeric"]
        source.missing += [f"table of {n}" for n in known if shared.get(n, n) not in names]
        listed = tuple(
            FeatureSpec(
                name=name, table=shared.get(name, name), pooling=_pooling(source, name, spec)
            )
            for name, spec in described.items()
            if name in known and shared.get(name, name) in names
        )
        used = {feature.table for feature in listed}
        features = (
            *listed,
            *(FeatureSpec(name=name, table=name) for name in names if name not in used),
        )
        source.wrong += [f"{name} is not in feature_map.json" for name in names if name not in used]
        source.fact("features", f"{len(features)} features", "read", "feature_map.json")
        poolings = {f.pooling for f in listed if described[f.name]["type"] == "sequence"}
        if poolings:
            how: Source = "read" if config.pooling is None else "given"
            reason = "feature_encoder in feature_map.json" if how == "read" else "--model-config"
            source.fact("pooling of sequences", " and ".join(sorted(poolings)), how, reason)
    reason = "the trainer's ids begin at 1, row 0 is the padding"
    source.fact("padding", "id 0", "assumed" if described is None else "read", reason)
    return features


def _pooling(source: TrainerTensors, name: str, spec: Mapping[str, Any]) -> Pooling:
    """Return a feature's pooling: any for one id (categorical), its encoder's for a sequence."""
    given = source.config.pooling
    encoder = spec.get("feature_encoder")
    if spec["type"] != "sequence":
        return "sum"
    if isinstance(given, Mapping):
        given = given.get(name)
    if given is not None:
        return given
    if not isinstance(encoder, str) or encoder not in _POOLINGS:
        raise source.refuse(
            f"a sequence with the encoder {encoder!r}",
            expected="one of " + ", ".join(_POOLINGS),
            hint="if it sums or averages, say `pooling: sum` or `pooling: mean` in --model-config",
        )
    return _POOLINGS[encoder]


def _inputs(
    source: TrainerTensors, stem: str, order: list[str], features: list[str], numeric: list[str]
) -> list[list[Any]]:
    """List what the network takes, and take the vectors of numeric features."""
    inputs: list[list[Any]] = []
    place = {name: i for i, name in enumerate(features)}
    for name in order:
        if name in place:
            inputs.append(["feature", place[name]])
            continue
        vector = source.take(f"{stem}.{name}.weight", None, 1)
        index = numeric.index(name)
        source.put(f"scales.{index}", derived.reshape(vector, (vector.shape[0],)))
        inputs.append(["scaled", index, vector.shape[0]])
    return inputs


FUXICTR: Final[FuxiCtr] = FuxiCtr(
    name="fuxictr",
    trainer="FuxiCTR (DLRM, DCNv2)",
    anchor=(
        r"(?P<prefix>.*?)embedding_layer\.embedding_layer\.embedding_layers?\."
        r"(?P<table>[^.]+)\.weight"
    ),
)
