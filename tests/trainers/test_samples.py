"""Checkpoints that the trainers themselves wrote score as their probes say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import Bag, Batch
from dmt_convert.families import infer_model
from support.trainers.comparison import same_logits


def read_probe(path):
    probe = np.load(path, allow_pickle=False)
    names = tuple(str(name) for name in probe["feature_names"])
    bags = [
        Bag(values=probe[f"values_{i}"], offsets=probe[f"offsets_{i}"]) for i in range(len(names))
    ]
    logits = torch.from_numpy(probe["logits"])
    dense = probe["dense"] if "dense" in probe else np.zeros((len(logits), 0), np.float32)
    return Batch(dense=dense, feature_names=names, bags=tuple(bags)), logits


@pytest.mark.parametrize(
    ("sample", "name", "family", "atol"),
    [
        ("deepctr-dcnmix", "model.h5", "deepctr", 5e-7),
        ("fuxictr-dlrm-dot", ".", "fuxictr", 1e-7),
        ("fuxictr-dlrm-dot", "fuxictr-dlrm-dot.model", "fuxictr", 1e-7),
        ("tzrec-dlrm", ".", "torcheasyrec", 1e-7),
        ("tzrec-dlrm", "model.ckpt-585", "torcheasyrec", 1e-7),
    ],
)
def test_a_sample_scores_as_its_probe_says(shared, sample, name, family, atol):
    folder = shared / "checkpoints" / sample
    batch, logits = read_probe(folder / "probe.npz")
    info = same_logits(folder / name, batch, logits, atol=atol)
    assert info.spec.family == family


def test_adam_of_torcheasyrec_is_found(shared):
    info = infer_model(open_checkpoint(shared / "checkpoints" / "tzrec-dlrm"))
    assert set(info.optimizer_state) >= {f"tables.{t.name}.weight" for t in info.spec.tables}
