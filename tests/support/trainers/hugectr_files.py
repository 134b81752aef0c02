"""HugeCTR's files as its documentation describes them, and its layers computed anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

DIM, SLOTS, DENSE = 4, 3, 5


def data_layer(slots: int = SLOTS) -> dict:
    sparse = [
        {"top": "wide_data", "slot_num": 1, "nnz_per_slot": [30]},
        {"top": "deep_data", "slot_num": slots, "nnz_per_slot": [1] * slots},
    ]
    return {
        "type": "Data",
        "label": {"top": "label", "label_dim": 1},
        "dense": {"top": "dense", "dense_dim": DENSE},
        "sparse": sparse,
    }


def embedding(bottom: str, top: str, dim: int, sizes=None, combiner="sum") -> dict:
    settings = {"embedding_vec_size": dim, "combiner": combiner}
    if sizes:
        settings["slot_size_array"] = sizes
    kind = "DistributedSlotSparseEmbeddingHash"
    return {"type": kind, "bottom": bottom, "top": top, "sparse_embedding_hparam": settings}


def fc(bottom: str, top: str, out: int, fused: bool = False) -> dict:
    kind = "FusedInnerProduct" if fused else "InnerProduct"
    return {"type": kind, "bottom": bottom, "top": top, "fc_param": {"num_output": out}}


LOSS = {"type": "BinaryCrossEntropyLoss", "bottom": ["logit", "label"], "top": "loss"}


class Weights:
    """Draws weights in the order in which the dense model file holds them."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)
        self.drawn: list[np.ndarray] = []

    def __call__(self, *shape: int) -> torch.Tensor:
        self.drawn.append((self.rng.standard_normal(shape) * 0.6).astype(np.float32))
        return torch.from_numpy(self.drawn[-1])


def write(folder: Path, layers: list[dict], weights: Weights, sparse: list, step: int = 20) -> None:
    """Write a graph, a dense model, and (keys, vectors) per embedding."""
    (folder / "model.json").write_text(json.dumps({"layers": layers}))
    flat = np.concatenate([w.ravel() for w in weights.drawn])
    (folder / f"wdl_dense_{step}.model").write_bytes(flat.tobytes())
    (folder / f"wdl_opt_dense_{step}.model").write_bytes(b"")
    for i, (keys, vectors) in enumerate(sparse):
        part = folder / f"wdl{i}_sparse_{step}.model"
        part.mkdir()
        (part / "key").write_bytes(keys.astype("<i8").tobytes())
        (part / "emb_vector").write_bytes(vectors.astype("<f4").tobytes())
