"""Checkpoints that other people's trainers wrote, with a batch and its logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import adapt_batches, open_data
from dmt_convert.families import infer_model
from support.originals import difference, flat_logits, passthrough

SAMPLES = {
    "fb-dlrm-cat": "model.pt",
    "fb-dlrm-dot": "model.pt",
    "fb-dlrm-qr-concat": "model.pt",
    "fb-dlrm-random-multihot": "model.pt",
    "nvidia-dlrm-dot-4gpu-unordered": "checkpoint",
    "torchrec-dcn-dcp-2rank": "dcp",
    "torchrec-dcn-dlrmtrain-pt": "model.pt",
    "torchrec-dcn-dmp-2rank-pt": "dmp_rank1.pt",
    "torchrec-dcn-fp16-tables-pt": "model.pt",
    "torchrec-dcn-pickled-module": "model.pt",
    "torchrec-dcn-safetensors": "model.safetensors",
    "torchrec-dcn-torchsnapshot-2rank": "snapshot",
    "torchrec-dlrm-pt": "model.pt",
    "torchrec-dlrmtrain-pt-multihot-probe": "model.pt",
    "torchrec-projection-pt": "model.pt",
}


@pytest.mark.parametrize("sample", sorted(SAMPLES))
def test_checkpoints_of_other_peoples_trainers(sample, shared):
    folder = shared / "checkpoints" / sample
    if not folder.is_dir():
        pytest.skip(f"no sample {sample}")
    assert json.loads((folder / "meta.json").read_text())
    info = infer_model(open_checkpoint(folder / SAMPLES[sample]))
    data = open_data(folder / "probe.npz")
    batch = next(adapt_batches(data, info.spec, data.batches(batch_size=data.num_rows)))
    flat, ours = flat_logits(info, batch)
    assert difference(ours, batch.logits) <= 1e-5
    with torch.no_grad():
        assert np.array_equal(passthrough(flat, 3)(batch).numpy(), ours)


def test_a_folder_of_files_of_one_rank_each_is_joined(shared):
    folder = shared / "checkpoints" / "torchrec-dcn-dmp-2rank-pt"
    joined = open_checkpoint(folder)
    assert joined.tensors == open_checkpoint(folder / "dmp_rank0.pt").tensors
