"""NVIDIA DeepLearningExamples, PyTorch/Recommendation/DLRM: the directories that it saves.

ReLU behind every layer but the last, raw logits, one id per feature. Pairs are the lower triangle,
row by row, with the dense vector as row 0. Behind them stand zeros up to a multiple of 8: the
first layer's columns for these are dropped. The order of the features is that of the devices which
held them, unless the model was built with --bottom_features_ordered.
Source: `dlrm/model/distributed.py`, `dlrm/nn/{parts,interactions,mlps}.py`,
`dlrm/utils/checkpointing/`.
"""

from __future__ import annotations

from typing import Final

from dmt_convert.checkpoint import NVIDIA_TABLE_ORDER, derived
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.facts import Fact
from dmt_convert.families.model_tensors import ModelTensors
from dmt_convert.families.name_map import NameMap
from dmt_convert.spec import InteractionKind, InteractionSpec

_FIRST: Final = "over_arch.0.weight"
_PADDING: Final = 8
_DOT: Final = InteractionSpec(kind="dot")


def rewrite_nvidia(model: ModelTensors) -> None:
    """Drop the padding, and tell the interaction and the order of the features.

    Raises:
        ArchitectureError: Neither checkpoint nor user says the order.
    """
    order = model.scalars.get(NVIDIA_TABLE_ORDER)
    if order is not None:
        model.order = Fact(
            subject="feature order",
            value=" ".join(list(model.parts())[:6]) + " ...",
            source="read",
            reason=f"{order} in metadata.pt",
        )
    elif model.config.features is None:
        raise ArchitectureError(
            "the order in which the features enter the interaction is not in the checkpoint",
            expected="the directory that the trainer saved, with its metadata.pt",
            hint="name that directory, or list the features in the model's order with "
            "--model-config: `features: [f9, f20, ...]`",
        )
    if model.scalars.get("config.hash_indices") is True:
        model.facts.append(
            Fact(
                subject="ids",
                value="modulo the rows of their table",
                source="read",
                reason="hash_indices in metadata.pt; reduce them before lookup",
            )
        )
    _drop_padding(model)


def _drop_padding(model: ModelTensors) -> None:
    first, width = model.tensors.get(_FIRST), model.dense_width
    count = len(model.parts() if model.config.features is None else model.config.features)
    if first is None or len(first.shape) != 2 or width is None:
        return
    dims = [width] * (count + 1)
    takes, dot = first.shape[1], _DOT.output_width(dims)
    said = str(model.scalars.get("config.interaction_op", ""))
    kind: InteractionKind = "cat" if said == "cat" else "dot"
    if said in ("cat", "dot", "cuda_dot"):
        model.interaction = kind
    elif takes == sum(dims) and not dot <= takes < dot + _PADDING:
        kind = "cat"
    if kind == "dot" and dot < takes < dot + _PADDING:
        model.tensors[_FIRST] = derived.select_columns(first, range(dot))
        model.facts.append(
            Fact(
                subject="padding",
                value=f"{takes - dot} columns dropped",
                source="inferred",
                reason=f"{first.path} takes {takes} inputs, dot gives {dot}; the rest are zeros",
            )
        )


NVIDIA_DLRM: Final = Architecture(
    name="nvidia-dlrm",
    trainer="NVIDIA DeepLearningExamples (PyTorch/Recommendation/DLRM)",
    anchor=r"(?P<prefix>.*?)bottom_model\.embeddings\.(?P<table>\d+)\.weight",
    names=NameMap(
        {
            "bottom_model.embeddings.{}.weight": "tables.{}.weight",
            "bottom_model.mlp.weights.{}": "dense_arch.{}.weight",
            "bottom_model.mlp.biases.{}": "dense_arch.{}.bias",
            "top_model.mlp.weights.{}": "over_arch.{}.weight",
            "top_model.mlp.biases.{}": "over_arch.{}.bias",
            "top_model.out.weight": "over_arch.last.weight",
            "top_model.out.bias": "over_arch.last.bias",
        }
    ),
    interactions=("dot", "cat"),
    pair_order="tril",
    allows_self_pairs=False,
    final_sigmoid=False,
    positional=True,
    over_arch_last="top_model.out",
    rewrite=rewrite_nvidia,
)
