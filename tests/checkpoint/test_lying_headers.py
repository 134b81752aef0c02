"""Headers of safetensors and DCP that say what is not so."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.checkpoint.inert.sharded import ShardPlace
from dmt_convert.checkpoint.readers import shards
from dmt_convert.errors import CheckpointError
from support.checkpoints.containers import SAVES


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


def safetensors_bytes(header: Any, data: bytes = bytes(48)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        safetensors_bytes(b"{not json"),
        safetensors_bytes([1]),
        safetensors_bytes({"w": 3}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [12]}}),
        safetensors_bytes({"w": {"dtype": "Q7", "shape": [12], "data_offsets": [0, 48]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [-12], "data_offsets": [0, 48]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [13], "data_offsets": [0, 48]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [12.0], "data_offsets": [0, 48]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [11], "data_offsets": [4, 48]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48, 96]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 48]}}),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [11], "data_offsets": [0, 44]}}),
        safetensors_bytes({"__metadata__": "text"}, b""),
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes(b'{"w":{"dtype":"F32","shape":[' + b"9" * 9000 + b"]}}"),
        safetensors_bytes(b'{"\\ud800":{"dtype":"F32","shape":[12],"data_offsets":[0,48]}}'),
        safetensors_bytes({}, b""),
    ],
    ids=range(18),
)
def test_lying_safetensors(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refuse(path, ".")


def _mutate_metadata(folder: Path, change: Any) -> None:
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def _set(record: Any, **fields: Any) -> None:
    for name, value in fields.items():
        object.__setattr__(record, name, value)


def _first_storage(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def _first_chunk(metadata: Any) -> Any:
    return metadata.state_dict_metadata["emb_l.0.weight"].chunks[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: _set(_first_storage(m), relative_path="../elsewhere"), "outside the directory"),
        (lambda m: _set(_first_storage(m), relative_path="/etc/passwd"), "outside the directory"),
        (lambda m: _set(_first_storage(m), relative_path="x" * 5000), "cannot be read|lacks"),
        (lambda m: _set(_first_storage(m), relative_path="a\0b"), "does not describe"),
        (lambda m: _set(_first_storage(m), offset=-1), "without an offset"),
        (lambda m: _set(_first_storage(m), offset=1 << 40), "lacks 1 of its"),
        (lambda m: _set(_first_storage(m), length=10**5000), "without an offset"),
        (lambda m: _set(_first_storage(m), transform_descriptors=["zstd"]), "compressed"),
        (lambda m: m.storage_data.clear(), "does not describe"),
        (lambda m: _set(_first_chunk(m), sizes=torch.Size([4, 4])), "hold 16 elements"),
        (lambda m: _set(_first_chunk(m), sizes=torch.Size([5])), "does not describe"),
        (lambda m: _set(_first_chunk(m), sizes=(5.0, 4)), "does not describe"),
        (lambda m: _set(_first_chunk(m), sizes=torch.Size([6, 4])), "reaches outside"),
        (
            lambda m: m.state_dict_metadata["emb_l.0.weight"].chunks.append(_first_chunk(m)),
            "hold 40 elements",
        ),
        (lambda m: _set(m, planner_data={"emb_l.0.weight": 3}), None),
        (lambda m: _set(m, state_dict_metadata={"a": 3}), "does not describe"),
        (lambda m: _set(m.state_dict_metadata["emb_l.0.weight"], properties=3), "not describe"),
        (
            lambda m: _set(
                m.state_dict_metadata["emb_l.0.weight"].properties, dtype=torch.complex64
            ),
            None,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_dcp_metadata_that_lies_in_one_field(change, match, state, tmp_path):
    folder = SAVES["dcp"](state, tmp_path)
    _mutate_metadata(folder, change)
    if match is None:
        checkpoint = open_checkpoint(folder)
        assert len(checkpoint.tensors) + len(checkpoint.unread) == len(state)
    else:
        refuse(folder, match)


NESTED = b")" + b"\x85" * 200_000
"""A tuple 200,000 deep: to hash or print it overflows the stack."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda m: _set(next(iter(m.storage_data)), fqn="NESTED"),
        lambda m: _set(next(iter(m.storage_data)), offset=("NESTED",)),
        lambda m: _set(m, state_dict_metadata=[("NESTED", 1)]),
        lambda m: _set(m, storage_data=[("NESTED", 1)]),
        lambda m: _set(m, state_dict_metadata={5: m.state_dict_metadata["emb_l.0.weight"]}),
        lambda m: _set(_first_storage(m), relative_path="NESTED"),
        lambda m: _set(_first_storage(m), relative_path="loop"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_dcp_metadata_of_other_types(change, state, tmp_path):
    folder = SAVES["dcp"](state, tmp_path)
    (folder / "loop").symlink_to("loop")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    data = pickle.dumps(metadata, protocol=2)
    (folder / ".metadata").write_bytes(data.replace(b"X\x06\x00\x00\x00NESTED", NESTED))
    refuse(folder, "does not describe|loop: missing")


def test_dcp_keys_that_are_no_text_count_for_nothing(state, tmp_path):
    folder = SAVES["dcp"](state, tmp_path)
    _mutate_metadata(folder, lambda m: _set(m, planner_data={"emb_l.0.weight": ("a", "NESTED")}))
    data = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=2)
    (folder / ".metadata").write_bytes(data.replace(b"X\x06\x00\x00\x00NESTED", NESTED))
    assert "emb_l.0.weight" in [tensor.path for tensor in open_checkpoint(folder).tensors]


def test_shards_of_the_same_rows_are_not_compared_for_hours(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "_MAX_COMPARED", 2)
    sharded = [ShardPlace(starts=(0, i), sizes=(2, 1), rank=None) for i in range(3)]
    with pytest.raises(ValueError, match="3 shards of the same rows"):
        shards.check_tiling(tmp_path, "t", (2, 3), sharded)
    shards.check_tiling(tmp_path, "t", (2, 2), sharded[:2])


def test_shards_that_overlap(state, tmp_path):
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    folder = SAVES["dcp"](state, tmp_path)

    def overlap(metadata: Any) -> None:
        # 20 elements in all, but row 1 twice and row 4 never
        name = "emb_l.0.weight"
        (old,) = (i for i in metadata.storage_data if i.fqn == name)
        stored = metadata.storage_data.pop(old)
        chunks = [(0, 2), (1, 3)]
        metadata.state_dict_metadata[name].chunks[:] = [
            ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([rows, 4]))
            for row, rows in chunks
        ]
        for row, _ in chunks:
            metadata.storage_data[MetadataIndex(name, torch.Size([row, 0]))] = stored

    _mutate_metadata(folder, overlap)
    refuse(folder, "2 shards of emb_l.0.weight hold 20 elements, some twice")
