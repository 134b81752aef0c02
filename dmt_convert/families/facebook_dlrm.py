"""facebookresearch/dlrm, `dlrm_s_pytorch.py --save-model`.

Layers stand in an nn.Sequential with activations between them, so linear layers have even
indices. ReLU everywhere, also behind the last bottom layer; a sigmoid ends the model. Pairs are
the lower triangle, row by row, with the dense vector as row 0.
Source: `dlrm_s_pytorch.py`, create_mlp, create_emb, interact_features.
"""

from __future__ import annotations

from typing import Final

from dmt_convert.families.architecture import Architecture
from dmt_convert.families.facebook_tables import PARTS, put_tables_together
from dmt_convert.families.name_map import NameMap


def _halve(index: int) -> int | None:
    return None if index % 2 else index // 2


def _double(index: int) -> int:
    return 2 * index


FACEBOOK_DLRM: Final = Architecture(
    name="facebook-dlrm",
    trainer="facebookresearch/dlrm (dlrm_s_pytorch.py)",
    anchor=r"(?P<prefix>.*?)emb_l\.(?P<table>\d+)\.(weight|weight_q|embs\.weight)",
    names=NameMap(
        {
            "emb_l.{}.weight": "tables.{}.weight",
            "bot_l.{}.weight": "dense_arch.{}.weight",
            "bot_l.{}.bias": "dense_arch.{}.bias",
            "top_l.{}.weight": "over_arch.{}.weight",
            "top_l.{}.bias": "over_arch.{}.bias",
            **PARTS,
        },
        renumber={"dense_arch": (_halve, _double), "over_arch": (_halve, _double)},
    ),
    interactions=("dot", "cat"),
    pair_order="tril",
    allows_self_pairs=True,
    final_sigmoid=True,
    positional=True,
    rewrite=put_tables_together,
)
