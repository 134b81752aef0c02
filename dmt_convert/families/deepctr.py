"""DeepCTR-Torch: DCN, DCNMix, DeepFM and WDL.

The logit is a linear model over all inputs, plus a factorisation machine (DeepFM), plus
`dnn_linear` over [cross network, DNN]. Linear terms of categorical features are tables of dim 1;
each is joined to the feature's embedding table as its last column, so that one lookup gives both.
Dense inputs follow the embeddings; there is no bottom MLP. A sigmoid ends the model.

A pickled module answers what tensors leave open: which features there are, in which order, how they
are pooled and which share a table; whether there is a factorisation machine; the activation; the
order of the dense inputs of the linear part.
Source: `deepctr_torch/models/{basemodel,dcn,dcnmix,deepfm,wdl}.py`, `layers/{core,interaction}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from dmt_convert.checkpoint import DEEPCTR_MODULE, TensorInfo, derived
from dmt_convert.families.family import Family
from dmt_convert.families.feature_order import infer_features
from dmt_convert.families.layer_stacks import LayerNames
from dmt_convert.families.leftovers import DESCRIBE_IT
from dmt_convert.families.model_config import FeatureConfig
from dmt_convert.families.model_info import Fact, FlatModelInfo
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, Pooling, TableSpec

_DEEP: Final = "embedding_dict.{}.weight"
_WIDE: Final = "linear_model.embedding_dict.{}.weight"
_MAX_LAYERS: Final = 1000
"""More cross layers than this in a tensor's shape are taken for damage."""
_READ: Final = "the pickled module"
_MODELS: Final = ("DCN", "DCNMix", "DeepFM", "WDL")
_ACTIVATIONS: Final[Mapping[str, str]] = {
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "SiLU": "silu",
    "Identity": "linear",
    "Linear": "linear",
    "PReLU": "prelu",
}
"""Classes without settings of their own -> what networks call them."""


class DeepCtr(Family):
    """The family of DeepCTR-Torch's models."""

    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a DCN, DCNMix, DeepFM or WDL."""
        tables = _tables(source)
        module = _read_module(source, source.keys_of(_DEEP), source.keys_of(_WIDE))
        features = _features(source, list(tables), module)
        deep = [i for i, f in enumerate(features) if _DEEP.format(f.table) in source]
        wide = [i for i, f in enumerate(features) if _WIDE.format(f.table) in source]
        with_term = set(wide)
        vectors = {i: tables[features[i].table].dim - (i in with_term) for i in deep}
        width, columns = _input_width(source), sum(vectors.values())
        num_wide = source.tensors["linear_model.weight"].shape[0] if _has_wide(source) else 0
        num_dense = _num_dense(source, columns, width, num_wide, module)
        if module is not None:
            named = module.deep_dense or module.wide_dense
            source.dense_names = tuple(name for name, _ in named)
        config: dict[str, Any] = {
            "inputs": [["feature", i] for i in deep]
            + [["dense", d] for d in range(max(0, width - columns))],
            "wide": wide,
            "wide_dense": num_wide > 0,
            "backbone": None,
            "stacked": None,
            "final": None,
            "cross": _cross(source, width),
        }
        config["parallel"] = _dnn(source, width, module)
        config["fm"] = _paired(source, config, vectors, module)
        joined = (width if config["cross"] else 0) + (
            config["parallel"][-1]["out"] if config["parallel"] else 0
        )
        config["head"], config["bias"] = joined > 0, True
        if joined:
            source.put("head.weight", source.take("dnn_linear.weight", 1, joined))
        source.put("bias", source.take("out.bias", 1))
        if num_wide:
            source.put("wide_dense", _wide_dense(source, num_wide, num_dense, module))
        source.check()
        return source.describe_network(
            features=features,
            num_dense=num_dense,
            name="deep-cross",
            config=config,
            final_sigmoid=source.final_sigmoid(
                default=True,
                reason="task binary, the default; logits are given before it",
                stored=None if module is None else module.final_sigmoid,
                stored_in=_READ,
            ),
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
    source: TrainerTensors, tables: list[str], module: _Module | None
) -> tuple[FeatureSpec, ...]:
    """Put the features in order, with their pooling: mean by default."""
    config = source.config
    deep = source.tables_by_module()
    if set(deep) == set(source.keys_of(_DEEP)):
        # those of linear terms alone follow, in any order: no layer takes them side by side
        tables = [*deep, *sorted(set(tables) - set(deep))]
        source.order = Fact(
            subject="feature order",
            value=tables[0] + (f" ... {tables[-1]}" if len(tables) > 1 else ""),
            source="read",
            reason="the order of the modules in the state dict",
        )
    stored = module.features if module is not None else None
    features, facts = infer_features(source, tables, stored=stored)
    read = module is not None and config.features is None
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
            "mean, except for those given" if given else "mean",
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
    source: TrainerTensors, num_wide: int, num_dense: int, module: _Module | None
) -> TensorInfo:
    """Take the linear part's weights of the dense inputs, in the order of the deep part's."""
    weight = derived.reshape(source.take("linear_model.weight", num_wide, 1), (num_wide,))
    if module is None or not module.deep_dense or len(module.wide_dense) != num_wide:
        return weight
    places = {column: i for i, column in enumerate(module.wide_dense)}
    order = [places.get(column, -1) for column in module.deep_dense]
    row = derived.select_columns(derived.reshape(weight, (1, num_wide)), order)
    return derived.reshape(row, (num_dense,))


def _has_wide(source: TrainerTensors) -> bool:
    return "linear_model.weight" in source and source.tensors["linear_model.weight"].shape != ()


def _input_width(source: TrainerTensors) -> int:
    """Return the width of what the cross network and the DNN take; 0 if there is neither."""
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
    return source.check_width(width)


def _num_dense(
    source: TrainerTensors, vectors: int, width: int, num_wide: int, module: _Module | None
) -> int:
    """Return the number of dense inputs: what the DNN takes beside the embeddings."""
    if not width:
        return num_wide
    dense = width - vectors
    if source.missing or source.wrong:
        return max(dense, 0)
    same = dense == num_wide or not dense or not num_wide
    if module is not None:
        same = dense == len(module.deep_dense) and num_wide == len(module.wide_dense)
        same = same and (not dense or set(module.wide_dense) <= set(module.deep_dense))
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


def _dnn(source: TrainerTensors, width: int, module: _Module | None) -> list[dict[str, Any]] | None:
    """Take the DNN and return its config, None without one."""
    count = len(source.indices_of("dnn.linears.{}.weight"))
    if not count:
        return None
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
        read = module.activation if module is not None else None
        activation = source.activation() if read is None else read
        if read is not None:
            source.fact("activation", read, "read", _READ)
    stack = source.take_stack(layers, [activation] * count, width)
    return source.put_stack("parallel", stack)


def _paired(
    source: TrainerTensors,
    config: dict[str, Any],
    vectors: dict[int, int],
    module: _Module | None,
) -> list[int]:
    """Decide which features a factorisation machine pairs: WDL has the same tensors as DeepFM."""
    if config["cross"] is not None or "crossnet.bias" in source:
        return []
    if not config["wide"]:
        raise source.refuse(
            "neither a cross network nor a linear model",
            expected="a DCN, DCNMix, DeepFM or WDL",
            hint=f"other models of the trainer are not supported by themselves; {DESCRIBE_IT}",
        )
    same = len(set(vectors.values())) == 1
    if source.config.fm is not None:
        source.fact("FM term", str(source.config.fm).lower(), "given", "--model-config")
        return list(vectors) if source.config.fm else []
    if module is not None and module.fm is not None:
        source.fact("FM term", str(module.fm).lower(), "read", _READ)
        return list(vectors) if module.fm else []
    if not same:
        source.fact("FM term", "false", "inferred", "the embeddings have different dims: WDL")
        return []
    if source.modules:
        fm = "fm" in source.modules
        reason = f"the state dict names {'a' if fm else 'no'} module `fm`"
        source.fact("FM term", str(fm).lower(), "read", reason)
        return list(vectors) if fm else []
    raise source.refuse(
        "a DeepFM or a WDL, which hold the same tensors",
        expected="a state dict as `state_dict()` returns it, whose modules tell them apart",
        hint="say which one with --model-config: `fm: true` for DeepFM, `fm: false` for WDL",
    )


def _cross(source: TrainerTensors, width: int) -> dict[str, Any] | None:
    """Take the cross network and return its config, None without one."""
    if "crossnet.U_list" in source or "crossnet.U_list.0" in source:
        return take_cross_mix(source, width)
    if "crossnet.kernels" not in source and "crossnet.kernels.0" not in source:
        return None
    layers = _layer_count(source, "crossnet.kernels")
    if not layers:
        source.skip("crossnet.kernels", "crossnet.bias", reason="a cross network without layers")
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


def take_cross_mix(source: TrainerTensors, width: int) -> dict[str, Any]:
    """Take a CrossNetMix (FuxiCTR has the same one) and return its config.

    Args:
        source: The tensors.
        width: Its input width.
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
    """Return the number of cross layers: in one tensor, or in a list as older versions had it."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """What a pickled module says about its model."""

    features: tuple[FeatureConfig, ...]
    """Features in the model's order, those that only the linear part has at the end."""
    deep: frozenset[str]
    """Names of features that the deep part takes."""
    deep_dense: tuple[tuple[str, int], ...]
    """Dense inputs of the deep part: name and column."""
    wide_dense: tuple[tuple[str, int], ...]
    """Dense inputs of the linear part: name and column."""
    fm: bool | None
    """Whether there is a factorisation machine; None if it does not say."""
    final_sigmoid: bool | None
    """Whether a sigmoid ends the model; None if it does not say."""
    activation: str | None
    """Activation of hidden layers; None if it does not say."""


def _read_module(
    source: TrainerTensors, deep_tables: Sequence[str], wide_tables: Sequence[str]
) -> _Module | None:
    """Return what the pickled module says; None without one, or if it has other tables.

    Args:
        source: The tensors.
        deep_tables: Names of the tables of embeddings.
        wide_tables: Names of the tables of linear terms.

    Raises:
        ArchitectureError: It is another model of the trainer, or has columns that cannot be
            converted.
    """
    said = source.checkpoint.documents.get(DEEPCTR_MODULE)
    if not isinstance(said, dict):
        return None
    package, _, name = str(said["class"]).rpartition(".")
    if package.startswith("deepctr_torch.") and name not in _MODELS:
        raise source.refuse(
            f"a pickled {name}",
            expected="one of " + ", ".join(_MODELS),
            hint=f"other models of the trainer are not supported by themselves; {DESCRIBE_IT}",
        )
    deep, wide = said["deep"], said["linear"]
    if deep is None or wide is None:
        return None
    if {row[1] for row in deep["sparse"]} != set(deep_tables) or {
        row[1] for row in wide["sparse"]
    } != set(wide_tables):
        return None
    rows = _join(source, deep["sparse"], wide["sparse"])
    use_fm = said["use_fm"]
    return _Module(
        features=tuple(
            FeatureConfig(name=name, table=table, pooling=_pooling(source, name, kind))
            for name, table, kind in rows
        ),
        deep=frozenset(row[0] for row in deep["sparse"]),
        deep_dense=_dense(deep["dense"]),
        wide_dense=_dense(wide["dense"]),
        fm=False if use_fm is None and name == "WDL" else use_fm,
        final_sigmoid=None if said["task"] is None else said["task"] == "binary",
        activation=_activation(source, said["activations"]),
    )


def _join(source: TrainerTensors, deep: list[list[Any]], wide: list[list[Any]]) -> list[list[Any]]:
    """List the features of both parts. Features of one table must be in the same parts."""
    rows = {row[0]: row for row in (*wide, *deep)}
    in_deep, in_wide = {row[0] for row in deep}, {row[0] for row in wide}
    parts = {name: (name in in_deep, name in in_wide) for name in rows}
    by_table: dict[str, set[tuple[bool, bool]]] = {}
    for name, row in rows.items():
        by_table.setdefault(row[1], set()).add(parts[name])
    odd = [table for table, kinds in by_table.items() if len(kinds) > 1]
    odd += [row[0] for row in (*wide, *deep) if rows[row[0]] != row]
    if odd or len(rows) != len({*map(tuple, (*deep, *wide))}):
        raise source.refuse(
            f"the features of {', '.join(odd[:5])} differ between linear and deep columns",
            expected="features of one table in the same parts of the model, pooled the same way",
            hint="such a model cannot be converted yet",
        )
    deep_names = [row[0] for row in deep]
    return [rows[name] for name in dict.fromkeys([*deep_names, *(row[0] for row in wide)])]


def _pooling(source: TrainerTensors, name: str, kind: str | None) -> Pooling:
    config = source.config
    if isinstance(config.pooling, Mapping):
        kind = config.pooling.get(name, kind)
    elif config.pooling is not None:
        kind = config.pooling
    if kind not in (None, "sum", "mean"):
        raise source.refuse(
            f"the feature {name} is pooled by {kind!r}",
            expected="sum or mean",
            hint="a model with another pooling cannot be converted",
        )
    return cast(Pooling, kind or "mean")


def _dense(rows: list[list[Any]]) -> tuple[tuple[str, int], ...]:
    columns: list[tuple[str, int]] = []
    for name, width in rows:
        # A damaged width shows later, when the sum is compared with the network's width.
        columns += [(name, i) for i in range(min(width, 100_000 - len(columns)))]
    return tuple(columns)


def _activation(source: TrainerTensors, classes: list[str]) -> str | None:
    names = {name.rpartition(".")[2] for name in classes}
    if not names or source.config.activation is not None:
        return None
    known = {_ACTIVATIONS.get(name) for name in names}
    if len(known) > 1 or None in known:
        raise source.refuse(
            f"the activation {', '.join(sorted(names))}",
            expected="one of " + ", ".join(_ACTIVATIONS),
            hint="if it computes the same as a known one, set `activation` in --model-config",
        )
    return known.pop()


DEEPCTR: Final[DeepCtr] = DeepCtr(
    name="deepctr",
    trainer="DeepCTR-Torch (DCN, DCNMix, DeepFM, WDL)",
    anchor=r"(?P<prefix>.*?)(?<!linear_model\.)embedding_dict\.(?P<table>[^.]+)\.weight",
)
