"""DeepCTR-Torch: DCN, DCNMix, DeepFM and WDL.

The logit is a linear model over all inputs, plus a factorisation machine (DeepFM), plus
`dnn_linear` over [cross network, DNN]. Linear terms of categorical features are tables of dim 1;
each is joined to the feature's embedding table as its last column, so that one lookup gives both.
Dense inputs stand behind the embeddings; there is no bottom MLP. A sigmoid ends the model.
Source: `deepctr_torch/models/{basemodel,dcn,dcnmix,deepfm,wdl}.py`, `layers/{core,interaction}.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from dmt_convert.checkpoint import TensorInfo, derived
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.deepctr_columns import READ, ModuleColumns, read_module
from dmt_convert.families.facts import Fact
from dmt_convert.families.feature_order import infer_features
from dmt_convert.families.trainer_tensors import Described, LayerNames, TrainerTensors
from dmt_convert.spec import FeatureSpec, TableSpec

_DEEP: Final = "embedding_dict.{}.weight"
_WIDE: Final = "linear_model.embedding_dict.{}.weight"
_MAX_LAYERS: Final = 1000
"""Cross layers that are believed of a tensor's shape."""


def describe_deepctr(source: TrainerTensors) -> Described:
    """Describe a model of DeepCTR-Torch.

    Raises:
        ArchitectureError: Tensors are missing, misshapen or unknown, or the widths fit no model.
    """
    tables = _tables(source)
    said = read_module(source, source.keys_of(_DEEP), source.keys_of(_WIDE))
    features = _features(source, list(tables), said)
    deep = [i for i, f in enumerate(features) if _DEEP.format(f.table) in source]
    wide = [i for i, f in enumerate(features) if _WIDE.format(f.table) in source]
    vectors = {i: tables[features[i].table].dim - (i in wide) for i in deep}
    width = _input_width(source)
    num_wide = source.tensors["linear_model.weight"].shape[0] if _has_wide(source) else 0
    num_dense = _num_dense(source, sum(vectors.values()), width, num_wide, said)
    config: dict[str, Any] = {
        "inputs": [["feature", i] for i in deep]
        + [["dense", d] for d in range(max(0, width - sum(vectors.values())))],
        "wide": wide,
        "wide_dense": num_wide > 0,
        "backbone": None,
        "stacked": None,
        "final": None,
        "cross": _cross(source, width),
    }
    config["parallel"] = _dnn(source, width, said) or None
    config["fm"] = _paired(source, config, vectors, said)
    joined = (width if config["cross"] else 0) + (
        config["parallel"][-1]["out"] if config["parallel"] else 0
    )
    config["head"], config["bias"] = joined > 0, True
    if joined:
        source.put("head.weight", source.take("dnn_linear.weight", 1, joined))
    source.put("bias", source.take("out.bias", 1))
    if num_wide:
        source.put("wide_dense", _wide_dense(source, num_wide, num_dense, said))
    source.check()
    sigmoid = _final_sigmoid(source, said)
    return source.describe_network(
        tables=tuple(tables.values()),
        features=features,
        num_dense=num_dense,
        name="deep-cross",
        config=config,
        final_sigmoid=sigmoid,
    )


def _tables(source: TrainerTensors) -> dict[str, TableSpec]:
    """Take all tables, linear terms joined to embeddings; those of linear terms alone come last."""
    tables = {}
    for name in dict.fromkeys([*source.keys_of(_DEEP), *source.keys_of(_WIDE)]):
        parts: list[TensorInfo] = []
        rows = None
        for pattern, dim in ((_DEEP, None), (_WIDE, 1)):
            if pattern.format(name) in source:
                parts.append(source.take(pattern.format(name), rows, dim))
                rows = parts[0].shape[0]
        joined = parts[0] if len(parts) == 1 else derived.concat_columns(*parts)
        tables[name] = source.table(name, joined)
    joined_names = [name for name in tables if _WIDE.format(name) in source]
    if joined_names:
        source.fact(
            "linear terms",
            f"the last column of {len(joined_names)} tables",
            "read",
            "linear_model's tables of dim 1 are joined to those of embedding_dict",
        )
    return tables


def _features(
    source: TrainerTensors, tables: list[str], said: ModuleColumns | None
) -> tuple[FeatureSpec, ...]:
    config = source.config
    # the trainer knows no DMP, which would sort names: an order that the file keeps is the model's
    shown = tables[0] + (f" ... {tables[-1]}" if len(tables) > 1 else "")
    order = Fact(subject="feature order", value=shown, source="read", reason="order of the file")
    features, facts = infer_features(
        tables,
        ordered=source.checkpoint.ordered,
        family=DEEPCTR,
        config=config,
        known_order=order if source.checkpoint.ordered else None,
        told=said.features if said is not None else None,
    )
    read = said is not None and config.features is None
    source.facts += [
        fact
        for fact in facts
        if fact.subject != "pooling" or read or isinstance(config.pooling, str)
    ]
    if not read and not isinstance(config.pooling, str):
        given = set(config.pooling or ())
        given |= {f.name for f in config.features or () if f.pooling is not None}
        features = tuple(f if f.name in given else replace(f, pooling="mean") for f in features)
        source.fact(
            "pooling",
            "mean, but for those given" if given else "mean",
            "assumed",
            "VarLenSparseFeat's default; bags of one id are the same under sum",
        )
    source.fact(
        "padding",
        "id 0 of a variable-length feature",
        "assumed",
        "the trainer masks it out; leave it out of bags",
    )
    return features


def _wide_dense(
    source: TrainerTensors, num_wide: int, num_dense: int, said: ModuleColumns | None
) -> TensorInfo:
    """Take the linear part's weights of the dense inputs, in the order of the deep part's."""
    weight = derived.reshape(source.take("linear_model.weight", num_wide, 1), (num_wide,))
    if said is None or not said.deep_dense or len(said.wide_dense) != num_wide:
        return weight
    places = {column: i for i, column in enumerate(said.wide_dense)}
    order = [places.get(column, -1) for column in said.deep_dense]
    row = derived.select_columns(derived.reshape(weight, (1, num_wide)), order)
    return derived.reshape(row, (num_dense,))


def _final_sigmoid(source: TrainerTensors, said: ModuleColumns | None) -> bool:
    given = source.config.final_sigmoid
    read = said.final_sigmoid if said is not None else None
    value = read if given is None else given
    if given is not None:
        source.fact("final sigmoid", str(value).lower(), "given", "--model-config")
    elif read is not None:
        source.fact("final sigmoid", str(value).lower(), "read", READ)
    else:
        source.fact(
            "final sigmoid",
            "true",
            "assumed",
            "task binary, the default; logits are given before it",
        )
    return value is not False


def _has_wide(source: TrainerTensors) -> bool:
    return "linear_model.weight" in source and source.tensors["linear_model.weight"].shape != ()


def _input_width(source: TrainerTensors) -> int:
    """Width of what the cross network and the DNN take; 0 where there is neither."""
    shapes = [
        (source.tensors[name].shape, axis)
        for name, axis in (
            ("dnn.linears.0.weight", 1),
            ("crossnet.kernels", 1),
            ("crossnet.kernels.0", 0),
            ("crossnet.U_list", 2),
            ("crossnet.U_list.0", 1),
        )
        if name in source
    ]
    width = next((shape[axis] for shape, axis in shapes if len(shape) > axis), 0)
    return source.believed_width(width)


def _num_dense(
    source: TrainerTensors, vectors: int, width: int, num_wide: int, said: ModuleColumns | None
) -> int:
    """Count the dense inputs: what the DNN takes beside the embeddings."""
    if not width:
        return num_wide
    dense = width - vectors
    if source.missing or source.wrong:
        return max(dense, 0)
    same = dense == num_wide or not dense or not num_wide
    if said is not None:
        same = dense == len(said.deep_dense) and num_wide == len(said.wide_dense)
        same = same and (not dense or set(said.wide_dense) <= set(said.deep_dense))
    if dense < 0 or not same:
        raise source.refuse(
            f"the network takes {width} inputs, the embeddings have {vectors} columns"
            + (f", the linear model takes {num_wide} dense inputs" if num_wide else ""),
            expected="embeddings and dense inputs side by side, as DCN, DCNMix, DeepFM and WDL "
            "have them, the same dense inputs in the linear model",
            hint="if features share a table, list them with --model-config: "
            "`features: [{name: ..., table: ...}, ...]`",
        )
    source.fact(
        "dense inputs",
        str(dense or num_wide),
        "inferred",
        "what the network takes beside the embeddings",
    )
    return dense or num_wide


def _dnn(source: TrainerTensors, width: int, said: ModuleColumns | None) -> list[dict[str, Any]]:
    count = len(source.indices_of("dnn.linears.{}.weight"))
    if not count:
        return []
    norm = bool(source.keys_of("dnn.bn.{}.running_mean"))
    slope = bool(source.keys_of("dnn.activation_layers.{}.weight"))
    layers = [
        LayerNames(
            linear=f"dnn.linears.{i}",
            norm=f"dnn.bn.{i}" if norm else "",
            slope=f"dnn.activation_layers.{i}.weight" if slope else "",
        )
        for i in range(count)
    ]
    activation = "prelu"
    if not slope:
        read = said.activation if said is not None else None
        activation = source.activation() if read is None else read
        if read is not None:
            source.fact("activation", read, "read", READ)
    return source.stack("parallel", layers, [activation] * count, width)


def _paired(
    source: TrainerTensors,
    config: dict[str, Any],
    vectors: dict[int, int],
    said: ModuleColumns | None,
) -> list[int]:
    """Tell which features a factorisation machine pairs: DeepFM and WDL have the same tensors."""
    if config["cross"] is not None or "crossnet.bias" in source:
        return []
    if not config["wide"]:
        raise source.refuse(
            "neither a cross network nor a linear model",
            expected="a DCN, DCNMix, DeepFM or WDL",
            hint="other models of the trainer cannot be converted yet",
        )
    same = len(set(vectors.values())) == 1
    if source.config.fm is not None:
        source.fact("FM term", str(source.config.fm).lower(), "given", "--model-config")
        return list(vectors) if source.config.fm else []
    if said is not None and said.fm is not None:
        source.fact("FM term", str(said.fm).lower(), "read", READ)
        return list(vectors) if said.fm else []
    if not same:
        source.fact("FM term", "false", "inferred", "the embeddings have different dims: WDL")
        return []
    source.fact(
        "FM term",
        "true",
        "assumed",
        "DeepFM; WDL holds the same tensors: say `fm: false` in --model-config",
    )
    return list(vectors)


def _cross(source: TrainerTensors, width: int) -> dict[str, Any] | None:
    if "crossnet.U_list" in source or "crossnet.U_list.0" in source:
        return describe_cross_mix(source, width)
    if "crossnet.kernels" not in source and "crossnet.kernels.0" not in source:
        return None
    layers = _layer_count(source, "crossnet.kernels")
    if not layers:
        source.skip("crossnet.kernels", "crossnet.bias")
        return None
    name = "crossnet.kernels" if "crossnet.kernels" in source else "crossnet.kernels.0"
    matrix = source.tensors[name].shape[-1:] == (width,) and width > 1
    for i in range(layers):
        shape = (width, width if matrix else 1)
        weight = _layer(source, "crossnet.kernels", i, layers, shape)
        bias = _layer(source, "crossnet.bias", i, layers, (width, 1))
        source.put(f"cross.layers.{i}.bias", derived.reshape(bias, (width,)))
        source.put(
            f"cross.layers.{i}.weight", weight if matrix else derived.reshape(weight, (width,))
        )
    kind = "matrix" if matrix else "vector"
    source.fact("cross network", f"{kind}, {layers} layers", "inferred", "tensor shapes")
    return {"kind": kind, "layers": layers}


def describe_cross_mix(source: TrainerTensors, width: int) -> dict[str, Any]:
    """Take a CrossNetMix (FuxiCTR has it too) and return its config.

    Args:
        source: The tensors.
        width: What it takes.
    """
    layers = _layer_count(source, "crossnet.U_list")
    name = "crossnet.C_list" if "crossnet.C_list" in source else "crossnet.C_list.0"
    c_shape = source.tensors[name].shape if name in source else ()
    experts = max(1, len(source.indices_of("crossnet.gating.{}.weight")))
    rank = c_shape[-1] if c_shape else 1
    for i in range(layers):
        for ours, theirs, rows in (("u", "U", width), ("v", "V", width), ("c", "C", rank)):
            info = _layer(source, f"crossnet.{theirs}_list", i, layers, (experts, rows, rank))
            source.put(f"cross.layers.{i}.{ours}", info)
        bias = _layer(source, "crossnet.bias", i, layers, (width, 1))
        source.put(f"cross.layers.{i}.bias", derived.reshape(bias, (width,)))
    gates = [source.take(f"crossnet.gating.{e}.weight", 1, width) for e in range(experts)]
    source.put("cross.gates", derived.concat_rows(*gates))
    value = f"mix of {experts} experts, {layers} layers of rank {rank}"
    source.fact("cross network", value, "inferred", "tensor shapes")
    return {"kind": "mix", "layers": layers, "rank": rank, "experts": experts}


def _layer_count(source: TrainerTensors, name: str) -> int:
    """Number of cross layers: in one tensor, as now, or in a list, as formerly."""
    if name in source:
        shape = source.tensors[name].shape
        return min(shape[0], _MAX_LAYERS) if shape else 1
    return len(source.indices_of(name + ".{}"))


def _layer(
    source: TrainerTensors, name: str, index: int, layers: int, shape: tuple[int, ...]
) -> TensorInfo:
    if name in source:
        return derived.take_index(source.take(name, layers, *shape), index)
    return source.take(f"{name}.{index}", *shape)


DEEPCTR: Final = Architecture(
    name="deepctr",
    trainer="DeepCTR-Torch (DCN, DCNMix, DeepFM, WDL)",
    anchor=r"(?P<prefix>.*?)(?<!linear_model\.)embedding_dict\.(?P<table>[^.]+)\.weight",
    final_sigmoid=True,
    describe=describe_deepctr,
)
