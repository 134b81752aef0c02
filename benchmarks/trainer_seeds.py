"""Tiny checkpoints of trainers that describe their models in files of their own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIPELINE = """
feature_configs { id_feature { feature_name: "a" embedding_dim: 4 num_buckets: 5 } }
feature_configs { id_feature { feature_name: "b" embedding_dim: 4 pooling: "mean" } }
feature_configs { raw_feature { feature_name: "c" } }
model_config {
  feature_groups { group_name: "all" feature_names: ["a", "c", "b"] group_type: DEEP }
  dcn_v2 { cross { cross_num: 1 low_rank: 2 } final { hidden_units: 3 } }
}
"""


def write_trainer_seeds(place: Callable[[str], Path]) -> dict[str, Path]:
    """Write one checkpoint per trainer.

    Args:
        place: Makes a folder of that name.

    Returns:
        Kind -> what to open.
    """
    return {
        "deepctr": _write_deepctr(place("deepctr")),
        "fuxictr": _write_fuxictr(place("fuxictr")),
        "torcheasyrec": _write_torcheasyrec(place("torcheasyrec")),
        "hugectr": _write_hugectr(place("hugectr")),
    }


def _layer(name: str, fan_in: int, fan_out: int) -> dict[str, Any]:
    import torch

    return {f"{name}.weight": torch.ones(fan_out, fan_in), f"{name}.bias": torch.ones(fan_out)}


def _write_deepctr(folder: Path) -> Path:
    import torch

    state = {f"embedding_dict.{n}.weight": torch.ones(rows, 4) for n, rows in (("b", 6), ("a", 5))}
    for name, rows in (("b", 6), ("a", 5)):
        state[f"linear_model.embedding_dict.{name}.weight"] = torch.ones(rows, 1)
    state |= {"linear_model.weight": torch.ones(2, 1), "out.bias": torch.ones(1)}
    state |= _layer("dnn.linears.0", 10, 3) | {"dnn_linear.weight": torch.ones(1, 13)}
    for kind, size in (("U", 10), ("V", 10), ("C", 2)):
        state[f"crossnet.{kind}_list"] = torch.ones(1, 2, size, 2)
    state |= {f"crossnet.gating.{e}.weight": torch.ones(1, 10) for e in range(2)}
    state["crossnet.bias"] = torch.ones(1, 10, 1)
    torch.save(state, folder / "model.h5")
    return folder / "model.h5"


def _write_fuxictr(folder: Path) -> Path:
    import torch

    stem = "embedding_layer.embedding_layer.embedding_layers"
    state = {f"{stem}.a.weight": torch.ones(5, 4), f"{stem}.b.weight": torch.ones(6, 4)}
    state["interact.triu_mask"] = torch.ones(3, 3, dtype=torch.bool)
    state |= _layer("bottom_mlp.mlp.0", 1, 4) | _layer("top_mlp.mlp.0", 7, 2)
    state |= _layer("top_mlp.mlp.2", 2, 1)
    torch.save(state, folder / "model.model")
    kinds = {"a": "categorical", "c": "numeric", "b": "categorical"}
    features = [{name: {"type": kind}} for name, kind in kinds.items()]
    (folder / "feature_map.json").write_text(json.dumps({"features": features}))
    (folder / "params.json").write_text(json.dumps({"top_mlp_activations": "relu", "task": "x"}))
    return folder


def _write_torcheasyrec(folder: Path) -> Path:
    import torch
    from torch.distributed import checkpoint as dcp

    bags = "model.embedding_group.emb_impls.__BASE__.ebc.embedding_bags"
    state = {f"{bags}.a_emb.weight": torch.ones(5, 4), f"{bags}.b_emb.weight": torch.ones(6, 4)}
    state["model.cross.u_kernels.0.weight"] = torch.ones(2, 9)
    state |= _layer("model.cross.v_kernels.0", 2, 9)
    state |= _layer("model.final.mlp.0.perceptron.0", 9, 3)
    state["model.output_mlp.weight"] = torch.ones(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "model.ckpt-3" / "model", no_dist=True)
    (folder / "pipeline.config").write_text(PIPELINE)
    return folder


def _write_hugectr(folder: Path) -> Path:
    import numpy as np

    settings = {"embedding_vec_size": 4, "combiner": "sum", "slot_size_array": [5, 6]}
    layers: list[dict[str, Any]] = [
        {
            "type": "Data",
            "dense": {"top": "dense", "dense_dim": 4},
            "sparse": [{"top": "ids", "slot_num": 2}],
        },
        {
            "type": "DistributedSlotSparseEmbeddingHash",
            "bottom": "ids",
            "top": "tables",
            "sparse_embedding_hparam": settings,
        },
        {"type": "Interaction", "bottom": ["dense", "tables"], "top": "x"},
        {"type": "MultiCross", "bottom": "x", "top": "y", "mc_param": {"num_layers": 1}},
        {"type": "Slice", "bottom": "y", "top": ["s", "t"], "ranges": [[0, 3], [3, 8]]},
        {"type": "InnerProduct", "bottom": "t", "top": "z", "fc_param": {"num_output": 1}},
        {"type": "BinaryCrossEntropyLoss", "bottom": ["z", "label"], "top": "loss"},
    ]
    (folder / "model.json").write_text(json.dumps({"layers": layers}))
    weights = np.ones(2 * 8 + 6, dtype="<f4")
    (folder / "m_dense_3.model").write_bytes(weights.tobytes())
    sparse = folder / "m0_sparse_3.model"
    sparse.mkdir()
    (sparse / "key").write_bytes(np.arange(11, dtype="<i8")[::-1].tobytes())
    (sparse / "emb_vector").write_bytes(np.ones(44, dtype="<f4").tobytes())
    return folder
