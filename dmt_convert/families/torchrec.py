"""TorchRec's DLRM, DLRM_DCN and DLRM_Projection, alone or inside DLRMTrain.

ReLU behind every layer of dense_arch, of the branches, and of over_arch but the last; raw
logits. Pairs are the upper triangle, row by row, with the dense vector as row 0.

`quantize_embeddings` makes tables of bytes; see `quantised_rows`.
Source: `torchrec/models/dlrm.py`, `torchrec/modules/{mlp,crossnet}.py`.
"""

from __future__ import annotations

from typing import Final

from dmt_convert.families.dlrm import DlrmFamily
from dmt_convert.families.name_map import NameMap
from dmt_convert.families.quantised_rows import decode_tables

_BRANCH: Final = "inter_arch.interaction_branch{n}.model._mlp.{{}}._linear.{kind}"


TORCHREC_DLRM: Final[DlrmFamily] = DlrmFamily(
    name="torchrec-dlrm",
    trainer="TorchRec (DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain)",
    anchor=(
        r"(?P<prefix>.*?)sparse_arch\.embedding_bag_collection\.embedding_bags\."
        r"(?P<table>[^.]+)\.weight"
    ),
    names=NameMap(
        {
            "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight": "tables.{}.weight",
            "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight_qscale": (
                "tables.{}.qscale"
            ),
            "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight_qbias": (
                "tables.{}.qbias"
            ),
            "dense_arch.model._mlp.{}._linear.weight": "dense_arch.{}.weight",
            "dense_arch.model._mlp.{}._linear.bias": "dense_arch.{}.bias",
            "inter_arch.crossnet.W_kernels.{}": "cross.{}.w",
            "inter_arch.crossnet.V_kernels.{}": "cross.{}.v",
            "inter_arch.crossnet.bias.{}": "cross.{}.bias",
            **{
                _BRANCH.format(n=n, kind=kind): f"branch{n}.{{}}.{kind}"
                for n in (1, 2)
                for kind in ("weight", "bias")
            },
            "over_arch.model.0._mlp.{}._linear.weight": "over_arch.{}.weight",
            "over_arch.model.0._mlp.{}._linear.bias": "over_arch.{}.bias",
            "over_arch.model.1.weight": "over_arch.last.weight",
            "over_arch.model.1.bias": "over_arch.last.bias",
            "inter_arch.triu_indices": None,  # a constant that old versions saved
        }
    ),
    interactions=("dot",),
    pair_order="triu",
    feature_prefix="t_",
    separate_last=True,
    rewrite=decode_tables,
)
