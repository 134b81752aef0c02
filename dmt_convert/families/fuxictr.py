"""FuxiCTR: DLRM and DCNv2.

`feature_map.json` beside the checkpoint tells the features' order, their types and what they
share; `params.json`, where there is one, the activations. Ids begin at 1, row 0 is the padding.
A DLRM with dense inputs is the plain one after its first layer's columns are put into our order:
FuxiCTR has [pairs, dense], with the dense vector behind the features. All else is a network.
Source: `model_zoo/{DLRM,DCNv2}/src/*.py`, `fuxictr/pytorch/layers/**`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dmt_convert.families.architecture import Architecture
from dmt_convert.families.deepctr import describe_cross_mix
from dmt_convert.families.fuxictr_features import Fields, read_fields
from dmt_convert.families.plain_dlrm import describe_plain_dlrm
from dmt_convert.families.trainer_tensors import Described, LayerNames, TrainerTensors


def describe_fuxictr(source: TrainerTensors) -> Described:
    """Describe a model of FuxiCTR.

    Raises:
        ArchitectureError: Tensors are missing, misshapen or unknown, or it is another model.
    """
    fields = read_fields(source, FUXICTR)
    if source.indices_of("top_mlp.mlp.{}.weight"):
        return _describe_dlrm(source, fields)
    if "fc.weight" in source:
        return _describe_dcn(source, fields)
    raise source.refuse(
        "neither top_mlp nor fc among its tensors",
        expected="a DLRM or a DCNv2",
        hint="other models of the trainer cannot be converted yet",
    )


def _describe_dlrm(source: TrainerTensors, fields: Fields) -> Described:
    dims = fields.dims
    bottom = _stack(source, fields, "bottom", "bottom_mlp", "bottom_mlp_activations", None)
    num_dense = bottom[0]["in"] if bottom else 0
    if fields.numeric is not None and num_dense != len(fields.numeric):
        source.wrong.append(
            f"bottom_mlp takes {num_dense} inputs, feature_map.json has {len(fields.numeric)} "
            "numeric features"
        )
    pairs = "interact.triu_mask" in source
    source.skip("interact.triu_mask")
    vectors = [*dims, *([bottom[-1]["out"]] if bottom else [])]
    count = len(vectors)
    width = count * (count - 1) // 2 + sum(vectors[len(dims) :]) if pairs else sum(vectors)
    top = _stack(source, fields, "top", "top_mlp", "top_mlp_activations", width, output=True)
    value = "dot" if pairs else "cat"
    source.fact("interaction", value, "read", "interact.triu_mask is there for dot alone")
    if len(set(vectors)) > 1:
        source.wrong.append(f"embedding dims and the bottom MLP's output differ: {vectors}")
    source.check()
    plain = all(
        layer["activation"] == "relu" and not layer["norm"] for layer in (*bottom, *top[:-1])
    )
    if bottom and plain:
        return describe_plain_dlrm(
            source,
            family=FUXICTR.name,
            tables=fields.tables,
            features=fields.features,
            bottom=bottom,
            top=top,
            pairs=pairs,
            dense_first=False,
            final_sigmoid=_sigmoid(source),
        )
    append = ["dense"] if pairs and bottom else []
    config = {"bottom": bottom or None, "dense_first": False, "pairs": pairs, "append": append}
    return _network(source, fields, num_dense, "dot-pairs", {**config, "top": top})


def _describe_dcn(source: TrainerTensors, fields: Fields) -> Described:
    width = source.believed_width(fields.width)
    cross = _cross(source, width)
    stacked = _stack(source, fields, "stacked", "stacked_dnn", "dnn_activations", width)
    parallel = _stack(source, fields, "parallel", "parallel_dnn", "dnn_activations", width)
    joined = stacked[-1]["out"] if stacked else width
    joined += parallel[-1]["out"] if parallel else 0
    source.put("head.weight", source.take("fc.weight", 1, joined))
    source.put("bias", source.take("fc.bias", 1))
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
        "stacked": stacked or None,
        "parallel": parallel or None,
        "final": None,
        "head": True,
        "bias": True,
    }
    source.check()
    return _network(source, fields, fields.num_dense, "deep-cross", config)


def _network(
    source: TrainerTensors, fields: Fields, num_dense: int, name: str, config: Mapping[str, Any]
) -> Described:
    return source.describe_network(
        tables=fields.tables,
        features=fields.features,
        num_dense=num_dense,
        name=name,
        config=config,
        final_sigmoid=_sigmoid(source),
    )


def _cross(source: TrainerTensors, width: int) -> dict[str, Any]:
    if "crossnet.U_list.0" in source:
        return describe_cross_mix(source, width)
    layers = len(source.indices_of("crossnet.cross_layers.{}.weight"))
    for i in range(layers or 1):
        name = f"crossnet.cross_layers.{i}"
        source.put(f"cross.layers.{i}.weight", source.take(f"{name}.weight", width, width))
        source.put(f"cross.layers.{i}.bias", source.take(f"{name}.bias", width))
    source.fact("cross network", f"matrix, {layers} layers", "inferred", "tensor shapes")
    return {"kind": "matrix", "layers": layers}


def _stack(
    source: TrainerTensors,
    fields: Fields,
    target: str,
    stem: str,
    key: str,
    width: int | None,
    *,
    output: bool = False,
) -> list[dict[str, Any]]:
    """Take an MLP_Block: an nn.Sequential of linear layers, norms, activations and dropouts.

    Args:
        source: The tensors.
        fields: The features, and what params.json says.
        target: Name of the stack in the network.
        stem: The trainer's name.
        key: Where params.json has its activations.
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
    names = _activations(source, fields.params, key, hidden)
    if any(layer.slope for layer in layers):
        names = ["prelu"] * hidden
    return source.stack(target, layers, names + ["linear"] * output, width)


def _activations(
    source: TrainerTensors, params: Mapping[str, Any] | None, key: str, count: int
) -> list[str]:
    if params is None or source.config.activation is not None:
        return [source.activation()] * count
    value = params.get(key, "ReLU")
    given = value if isinstance(value, list) else [value] * count
    names = ["linear" if name is None else str(name).lower() for name in given]
    shown = ", ".join(dict.fromkeys(names)) or "none"
    source.fact(f"activation ({key})", shown, "read", "params.json, or the trainer's default")
    if len(names) != count:
        source.wrong.append(f"params.json: {key} has {len(names)} entries for {count} layers")
        return ["relu"] * count
    return names


def _sigmoid(source: TrainerTensors) -> bool:
    given = source.config.final_sigmoid
    if given is not None:
        source.fact("final sigmoid", str(given).lower(), "given", "--model-config")
        return given
    params = source.checkpoint.documents.get("params.json")
    task = params.get("task") if isinstance(params, dict) else None
    source.fact(
        "final sigmoid",
        str(task != "regression").lower(),
        "assumed" if task is None else "read",
        "task binary_classification, the default" if task is None else "task in params.json",
    )
    return task != "regression"


FUXICTR: Final = Architecture(
    name="fuxictr",
    trainer="FuxiCTR (DLRM, DCNv2)",
    anchor=(
        r"(?P<prefix>.*?)embedding_layer\.embedding_layer\.embedding_layers?\."
        r"(?P<table>[^.]+)\.weight"
    ),
    final_sigmoid=True,
    describe=describe_fuxictr,
)
