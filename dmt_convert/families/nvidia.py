"""NVIDIA DeepLearningExamples, PyTorch/Recommendation/DLRM: the directories that it saves.

ReLU behind every layer but the last, raw logits, one id per feature. Pairs are the lower triangle,
row by row, with the dense vector as row 0. Zeros follow them up to a multiple of 8; the columns of
the first layer that multiply these are dropped. Features are in the order of the devices that held
them, unless the model was built with --bottom_features_ordered.
Source: `dlrm/model/distributed.py`, `dlrm/nn/{parts,interactions,mlps}.py`,
`dlrm/utils/checkpointing/`.
"""

from __future__ import annotations

from typing import Final

from dmt_convert.checkpoint import NVIDIA_TABLE_ORDER, derived
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.dlrm import DlrmFamily
from dmt_convert.families.model_info import Fact
from dmt_convert.families.name_map import NameMap
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import InteractionKind, InteractionSpec

_FIRST: Final = "over_arch.0.weight"
_PADDING: Final = 8
_DOT: Final = InteractionSpec(kind="dot")


def rewrite_nvidia(source: TrainerTensors) -> None:
    """Drop the padding, and find the interaction and the order of the features.

    Raises:
        ArchitectureError: Neither the checkpoint nor the user gives the order.
    """
    order = source.checkpoint.scalars.get(NVIDIA_TABLE_ORDER)
    if order is not None:
        source.order = Fact(
            subject="feature order",
            value=" ".join(list(source.table_parts())[:6]) + " ...",
            source="read",
            reason=f"{order} in metadata.pt",
        )
    elif source.config.features is None:
        raise ArchitectureError(
            "the order in which the features enter the interaction is not in the checkpoint",
            expected="the directory that the trainer saved, with its metadata.pt",
            hint="pass that directory, or list the features in the model's order with "
            "--model-config: `features: [f9, f20, ...]`",
        )
    if source.checkpoint.scalars.get("config.hash_indices") is True:
        source.fact(
            "ids",
            "modulo the rows of their table",
            "read",
            "hash_indices in metadata.pt; reduce them before lookup",
        )
    _drop_padding(source)


def _drop_padding(source: TrainerTensors) -> None:
    """Drop the columns that multiply zeros; which interaction it is shows in their number."""
    first, width = source.canonical.get(_FIRST), source.dense_width
    count = len(source.table_parts() if source.config.features is None else source.config.features)
    if first is None or len(first.shape) != 2 or width is None:
        return
    dims = [width] * (count + 1)
    takes, dot = first.shape[1], _DOT.output_width(dims)
    said = str(source.checkpoint.scalars.get("config.interaction_op", ""))
    kind: InteractionKind = "cat" if "cat" in (said, source.config.interaction) else "dot"
    if said in ("cat", "dot", "cuda_dot"):
        source.interaction = kind
    elif takes == sum(dims) and source.config.interaction is None:
        if dot <= takes < dot + _PADDING:
            raise source.refuse(
                f"{first.path} takes {takes} inputs, which cat and a padded dot both give",
                expected="metadata.pt with interaction_op",
                hint="say which one with --model-config: `interaction: dot` or `interaction: cat`",
            )
        kind = "cat"
    if kind == "dot" and dot < takes < dot + _PADDING:
        source.canonical[_FIRST] = derived.select_columns(first, range(dot))
        source.fact(
            "padding",
            f"{takes - dot} columns dropped",
            "inferred",
            f"{first.path} takes {takes} inputs, dot gives {dot}; the rest are zeros",
        )


NVIDIA_DLRM: Final[DlrmFamily] = DlrmFamily(
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
    positional=True,
    separate_last=True,
    rewrite=rewrite_nvidia,
)
