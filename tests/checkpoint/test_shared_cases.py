"""Inputs that users had, and that failed once: they score right, or are called what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import CheckpointError, DmtError
from dmt_convert.families import infer_model
from support.originals import difference, flat_logits


@pytest.fixture
def cases(shared: Path) -> Path:
    if not (shared / "cases" / "checkpoints").is_dir():
        pytest.skip("needs shared/cases beside the repository")
    return shared / "cases"


def read_probe(path: Path) -> tuple[Batch, np.ndarray]:
    probe = np.load(path, allow_pickle=False)
    names = tuple(str(name) for name in probe["feature_names"])
    bags = [
        Bag(values=probe[f"values_{i}"], offsets=probe[f"offsets_{i}"]) for i in range(len(names))
    ]
    return Batch(dense=probe["dense"], feature_names=names, bags=tuple(bags)), probe["logits"]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("dcp-huggingface-shards", "ck"),
        ("dcp-huggingface-shards", "ck/shard-00001-model-00001-of-00001.safetensors"),
        ("dcp-huggingface-shards", "ck/shard-00002-model-00001-of-00001.safetensors"),
        ("dcp-not-flattened", "ck"),
        ("dcp-safetensors-payload", "ck"),
        ("dcp-to-torch-save", "model.pt"),
        ("dcp-to-torch-save", "dcp"),
        ("deepspeed-folder", "ck/global_step100/mp_rank_00_model_states.pt"),
        ("frozenset-protocol4", "frozenset.pt"),
        ("frozenset-protocol4", "bytearray.pt"),
        ("frozenset-protocol4", "nested-key.pt"),
        ("pickled-compiled-module", "model.pt"),
        ("safetensors-save-model-tied", "model.safetensors"),
        ("torch-save-skip-data-filled", "model.pt"),
    ],
)
def test_what_can_be_read_scores_as_its_probe_says(case, name, cases):
    folder = cases / "checkpoints" / case
    batch, logits = read_probe(folder / "probe.npz")
    info = infer_model(open_checkpoint(folder / name))
    # features are matched by name, as `dmt score` does
    place = {feature: i for i, feature in enumerate(batch.feature_names)}
    bags = tuple(batch.bags[place[feature]] for feature in info.spec.feature_names)
    batch = Batch(dense=batch.dense, feature_names=info.spec.feature_names, bags=bags)
    assert difference(flat_logits(info, batch)[1], logits) < 1e-6


@pytest.mark.parametrize(
    ("case", "name", "found", "hint"),
    [
        ("dcp-zstd", "ck", "extension stream.zstd", "without stream extensions"),
        ("deepspeed-folder", "ck", "DeepSpeed", "mp_rank_00_model_states.pt"),
        ("gzip-file", "model.pt.gz", "compressed with gzip", "gunzip"),
        ("gzip-file", "lfs.safetensors", "pointer of git-lfs", "git lfs pull"),
        ("numpy-state-dict", "model.pt", "numpy array", "from_numpy"),
        ("pt2-export", "model.pt2", "exported program", "torch.export.load"),
        ("safetensors-fp8-tables", "model.safetensors", "F8_E4M3", ""),
        ("snapshot-without-hidden-file", "snapshot", ".snapshot_metadata", "hidden"),
        ("snapshot-without-hidden-file", "dcp", ".metadata", "hidden"),
    ],
)
def test_what_cannot_is_called_what_it_is(case, name, found, hint, cases):
    with pytest.raises(DmtError) as caught:
        infer_model(open_checkpoint(cases / "checkpoints" / case / name))
    assert found in str(caught.value) and hint in caught.value.hint
    assert "damaged" not in str(caught.value)


def test_a_bomb_of_aliases_is_refused(cases, tmp_path):
    folder = cases / "reliability" / "torchsnapshot-yaml-alias-bomb"
    for path in folder.glob("*.snapshot_metadata"):
        (tmp_path / ".snapshot_metadata").write_bytes(path.read_bytes())
        with pytest.raises(CheckpointError, match="does not describe a snapshot"):
            open_checkpoint(tmp_path)
