"""TorchEasyRec: DLRM and DCNv2.

`pipeline.config` tells the feature groups and with them the order of what the network takes, how
features are pooled, and the activations. A DLRM that passes on no embeddings beside their dot
products is the plain one after its first layer's columns are put into our order: TorchEasyRec has
[pairs, dense]. All else is a network.
Source: `tzrec/models/{dlrm,dcn_v2}.py`, `tzrec/modules/{embedding,mlp,interaction}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dmt_convert.families.architecture import Architecture
from dmt_convert.families.plain_dlrm import describe_plain_dlrm
from dmt_convert.families.torcheasyrec_features import Groups, read_groups
from dmt_convert.families.trainer_tensors import Described, LayerNames, TrainerTensors


def describe_torcheasyrec(source: TrainerTensors) -> Described:
    """Describe a model of TorchEasyRec.

    Raises:
        ArchitectureError: Tensors are missing, misshapen or unknown, or it is another model.
    """
    crossed = source.indices_of("cross.u_kernels.{}.weight")
    described = "pipeline.config" in source.checkpoint.documents and not source.config.features
    if crossed and not described:
        raise source.refuse(
            "a DCNv2 without its pipeline.config, or with `features` in the model config",
            expected="pipeline.config beside the checkpoint: it tells where the dense inputs stand "
            "among the embeddings",
            hint="copy it there from the training's model folder",
        )
    groups = read_groups(source, TORCHEASYREC)
    if source.indices_of("final_mlp.mlp.{}.perceptron.0.weight"):
        return _describe_dlrm(source, groups)
    if crossed:
        return _describe_dcn(source, groups)
    raise source.refuse(
        "neither final_mlp nor cross.u_kernels among its tensors",
        expected="a DLRM or a DCNv2",
        hint="other models of the trainer cannot be converted yet",
    )


def _describe_dlrm(source: TrainerTensors, groups: Groups) -> Described:
    dims = groups.dims
    bottom = _stack(
        source, groups, "bottom", "dense_mlp", ("dlrm", "dense_mlp"), groups.num_dense or None
    )
    if len(groups.sparse) > len(dims):
        raise source.refuse(
            "dense features in the group of the embeddings",
            expected="dense features in the group `dense`",
            hint="the trainer itself cannot pair them",
        )
    num_dense = bottom[0]["in"] if bottom else 0
    vectors = [*([bottom[-1]["out"]] if bottom else []), *dims]
    if len(set(vectors)) > 1:
        source.wrong.append(f"embedding dims and the dense MLP's output differ: {vectors}")
    pairs = len(vectors) * (len(vectors) - 1) // 2 + sum(vectors[: len(bottom) > 0])
    top = _stack(source, groups, "top", "final_mlp", ("dlrm", "final"), None)
    with_sparse = top[0]["in"] == pairs + sum(dims)
    if top[0]["in"] not in (pairs, pairs + sum(dims)):
        source.wrong.append(
            f"final_mlp takes {top[0]['in']} inputs; {len(dims)} features give {pairs}, or "
            f"{pairs + sum(dims)} with the embeddings beside their pairs"
        )
    source.fact(
        "arch_with_sparse",
        str(with_sparse).lower(),
        "inferred",
        "only this gives final_mlp its inputs",
    )
    top.append(_logit_layer(source, len(top), top[-1]["out"]))
    source.check()
    plain = bottom and not with_sparse
    layers = (*bottom, *top[:-1])
    if plain and all(
        layer["activation"] == "relu" and layer["bias"] and not layer["norm"] for layer in layers
    ):
        return describe_plain_dlrm(
            source,
            family=TORCHEASYREC.name,
            tables=groups.tables,
            features=groups.features,
            bottom=bottom,
            top=top,
            pairs=True,
            dense_first=True,
            final_sigmoid=_sigmoid(source),
        )
    append = ["dense"] * bool(bottom) + ["sparse"] * with_sparse
    config = {"bottom": bottom or None, "dense_first": True, "pairs": True, "append": append}
    return _network(source, groups, num_dense, "dot-pairs", {**config, "top": top})


def _logit_layer(source: TrainerTensors, index: int, width: int) -> dict[str, Any]:
    """Take the layer that gives the logit."""
    source.put(f"top.{index}.linear.weight", source.take("output_mlp.weight", 1, width))
    source.put(f"top.{index}.linear.bias", source.take("output_mlp.bias", 1))
    return {"in": width, "out": 1, "bias": True, "norm": None, "activation": "linear"}


def _describe_dcn(source: TrainerTensors, groups: Groups) -> Described:
    width = source.believed_width(sum(field.dim for field in groups.sparse))
    inputs = groups.inputs
    backbone = _stack(source, groups, "backbone", "backbone", ("dcn_v2", "backbone"), width)
    crossed = backbone[-1]["out"] if backbone else width
    layers = len(source.indices_of("cross.u_kernels.{}.weight"))
    rank = 0
    for i in range(layers):
        v = source.take(f"cross.u_kernels.{i}.weight", rank or None, crossed)
        rank = v.shape[0]
        source.put(f"cross.layers.{i}.v", v)
        source.put(f"cross.layers.{i}.w", source.take(f"cross.v_kernels.{i}.weight", crossed, rank))
        source.put(f"cross.layers.{i}.bias", source.take(f"cross.v_kernels.{i}.bias", crossed))
    value = f"low rank, {layers} layers of rank {rank}"
    source.fact("cross network", value, "inferred", "tensor names and shapes")
    deep = _stack(source, groups, "parallel", "deep", ("dcn_v2", "deep"), width)
    joined = crossed + (deep[-1]["out"] if deep else 0)
    final = _stack(source, groups, "final", "final", ("dcn_v2", "final"), joined)
    source.put(
        "head.weight",
        source.take("output_mlp.weight", 1, final[-1]["out"] if final else joined),
    )
    bias = "output_mlp.bias" in source
    if bias:
        source.put("bias", source.take("output_mlp.bias", 1))
    config: dict[str, Any] = {
        "inputs": inputs,
        "wide": [],
        "wide_dense": False,
        "fm": [],
        "backbone": backbone or None,
        "cross": {"kind": "low-rank", "layers": layers, "rank": rank},
        "stacked": None,
        "parallel": deep or None,
        "final": final or None,
        "head": True,
        "bias": bias,
    }
    source.check()
    dense = sum(entry[0] == "dense" for entry in inputs)
    return _network(source, groups, dense, "deep-cross", config)


def _network(
    source: TrainerTensors, groups: Groups, num_dense: int, name: str, config: Mapping[str, Any]
) -> Described:
    return source.describe_network(
        tables=groups.tables,
        features=groups.features,
        num_dense=num_dense,
        name=name,
        config=config,
        final_sigmoid=_sigmoid(source),
    )


def _stack(
    source: TrainerTensors,
    groups: Groups,
    target: str,
    stem: str,
    message: tuple[str, str],
    width: int | None,
) -> list[dict[str, Any]]:
    """Take an MLP of perceptrons: a linear layer, a norm, an activation each.

    Args:
        source: The tensors.
        groups: What pipeline.config says.
        target: Name of the stack in the network.
        stem: The trainer's name.
        message: Where pipeline.config describes it, below model_config.
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
    activation = groups.activation(*message)
    if activation is None or source.config.activation is not None:
        activation = source.activation()
    else:
        source.fact(f"activation ({stem})", activation, "read", "pipeline.config")
    return source.stack(target, layers, [activation] * len(layers), width)


def _sigmoid(source: TrainerTensors) -> bool:
    given = source.config.final_sigmoid
    value = "true" if given is None else str(given).lower()
    reason = "of the predictions; logits are given before it"
    if given is None:
        source.fact("final sigmoid", value, "assumed", reason)
    else:
        source.fact("final sigmoid", value, "given", "--model-config")
    return given is not False


TORCHEASYREC: Final = Architecture(
    name="torcheasyrec",
    trainer="TorchEasyRec (DLRM, DCNv2)",
    anchor=(
        r"(?P<prefix>.*?)embedding_group\.emb_impls\.[^.]+\.ebc\.embedding_bags\."
        r"(?P<table>[^.]+)\.weight"
    ),
    final_sigmoid=True,
    describe=describe_torcheasyrec,
)
