"""Directories that NVIDIA's DLRM saves, in both of its layouts, give the logits they came from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.errors import ArchitectureError, CheckpointError
from dmt_convert.families import FeatureConfig, ModelConfig, infer_model
from support.originals import assert_agrees, difference, facebook_original, flat_logits

ROWS = (1, 7, 30, 11, 2)
NUMBERS = (3, 0, 4, 1, 2)
"""The feature that each of the model's tables belongs to: it takes them device by device."""
DEVICES = [[3, 0], [], [4, 1, 2]]


def stack(state: dict[str, torch.Tensor], stem: str, first: int = 0) -> list[dict[str, Any]]:
    """Weights and biases of every layer."""
    count = sum(name.startswith(stem) for name in state) // 2
    return [
        {kind: state[f"{stem}.{2 * i}.{kind}"] for kind in ("weight", "bias")}
        for i in range(first, count)
    ]


def save(
    folder: Path,
    model: torch.nn.Module,
    numbers: tuple[int, ...] = NUMBERS,
    *,
    old: str = "",
    padding: int = 3,
    **config: Any,
) -> Path:
    """Write a model as the trainer's writers do; `old`: as the first release did, by that MLP."""
    state = dict(model.state_dict())
    bottom, top = stack(state, "bot_l"), stack(state, "top_l")
    rubbish = torch.full((len(top[0]["weight"]), padding), 9.0)
    top[0]["weight"] = torch.cat([top[0]["weight"], rubbish], dim=1)  # it is fed zeros
    out = top.pop()
    tables = [state[f"emb_l.{i}.weight"] for i in range(len(numbers))]
    flags = {"interaction_op": "cuda_dot", "embedding_type": "joint_sparse", "sizes": ["7"] * 1500}
    mapping = {"bottom_mlp": 0, "embedding": DEVICES, "vectors_per_gpu": [3, 0, 3]}
    folder.mkdir()

    def part(name: str, value: Any) -> None:
        torch.save(value, folder / name, _use_new_zipfile_serialization=not old)

    metadata = {"device_mapping": mapping, "epoch": 0, "step": 9}
    if old:
        part("metadata.pt", {**metadata, "config": flags | config})
        part("bottom_model.mlp.pt", named(bottom, old))
        part("top_model.pt", {**named(top, f"mlp.{old}"), **named([out], "out.{kind}")})
        joint, begin = torch.cat(tables), 0
        for number, table in zip(numbers, tables, strict=True):
            view = joint[begin : begin + len(table)]
            part(f"bottom_model.embeddings.{number}.pt", {"weight": view})
            begin += len(table)
        return folder
    part("metadata.pt", {"data": metadata, "config": flags | config})
    for name, layers in (("bottom_model", bottom), ("top_model", top)):
        kinds = {"weights": "weight", "biases": "bias"}
        part(f"{name}.mlp.pt", {k: [layer[v] for layer in layers] for k, v in kinds.items()})
    part("top_model.out.pt", out)
    for number, table in zip(numbers, tables, strict=True):
        (folder / f"bottom_model.embeddings.{number}.bin").write_bytes(table.numpy().tobytes())
        part(f"embeddings.{number}.meta.pt", {"shape": table.shape})
    return folder


def named(layers: list[dict[str, Any]], pattern: str) -> dict[str, Any]:
    return {
        pattern.format(i=i, twice=2 * i, kind=kind): layer[kind]
        for i, layer in enumerate(layers)
        for kind in ("weight", "bias")
    }


OLD = {"": "", "torch": "layers.{twice}.{kind}", "apex": "mlp.{kind}_{i}"}


@pytest.fixture
def original() -> Any:
    """Five tables in the model's order, one id per feature."""
    return facebook_original("dot", rows=ROWS, lengths=1, bottom=(5, 4), top=(4, 3))


@pytest.mark.parametrize("old", OLD)
def test_directories(old, original, tmp_path):
    path = save(tmp_path / "ckpt", original.model, old=OLD[old])
    assert_agrees(path, original)
    info = infer_model(open_checkpoint(path))
    assert info.spec.feature_names == tuple(f"f{number}" for number in NUMBERS)
    facts = {fact.subject: fact for fact in info.facts}
    assert facts["feature order"].source == "read"
    assert facts["padding"].value == "3 columns dropped"
    assert info.checkpoint.nbytes >= sum(table.nbytes for table in info.spec.tables)
    assert info.checkpoint.scalars["config.embedding_type"] == "joint_sparse"


def test_ordered_features_have_the_order_of_their_numbers(original, tmp_path):
    path = save(
        tmp_path / "ckpt", original.model, (0, 1, 2, 3, 4), padding=0, bottom_features_ordered=True
    )
    assert_agrees(path, original)
    info = infer_model(open_checkpoint(path))
    assert info.spec.feature_names == ("f0", "f1", "f2", "f3", "f4")
    assert "padding" not in {fact.subject for fact in info.facts}


def test_cat_is_not_padded_and_hashed_ids_are_said(tmp_path):
    original = facebook_original("cat", rows=ROWS, lengths=1)
    flags = {"interaction_op": "cat", "hash_indices": True}
    path = save(tmp_path / "ckpt", original.model, padding=0, **flags)
    assert_agrees(path, original)
    facts = {fact.subject: fact for fact in infer_model(open_checkpoint(path)).facts}
    assert (facts["interaction"].value, facts["interaction"].source) == ("cat", "read")
    assert facts["ids"].source == "read"


def test_the_order_matters(original, tmp_path):
    """Saboteur: features in the order of their numbers give other logits."""
    path = save(tmp_path / "ckpt", original.model, bottom_features_ordered=True)
    info = infer_model(open_checkpoint(path))
    bags = [original.batch.bags[NUMBERS.index(i)] for i in range(5)]
    _, ours = flat_logits(info, replace(original.batch, bags=tuple(bags)))
    assert difference(ours, original.logits) > 1e-3


def test_without_metadata_the_order_is_asked(original, tmp_path):
    folder = save(tmp_path / "ckpt", original.model)
    names = {info.name: info for info in open_checkpoint(folder).tensors}
    plain = {name: torch.from_numpy(read_tensor(info).copy()) for name, info in names.items()}
    torch.save(plain, tmp_path / "plain.pt")
    with pytest.raises(ArchitectureError, match="the order in which the features") as caught:
        infer_model(open_checkpoint(tmp_path / "plain.pt"))
    assert "features: [f9, f20" in caught.value.hint
    features = tuple(FeatureConfig(name=f"f{number}") for number in NUMBERS)
    assert_agrees(tmp_path / "plain.pt", original, ModelConfig(features=features))


@pytest.mark.parametrize("mapping", [{}, {"embedding": [[], []]}, None])
def test_metadata_that_maps_no_table_gives_no_order(original, tmp_path, mapping):
    folder = save(tmp_path / "ckpt", original.model)
    torch.save({"data": {"device_mapping": mapping}, "config": {}}, folder / "metadata.pt")
    with pytest.raises(ArchitectureError, match="the order in which the features"):
        infer_model(open_checkpoint(folder))
    features = tuple(FeatureConfig(name=f"f{number}") for number in NUMBERS)
    assert_agrees(folder, original, ModelConfig(features=features))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "metadata.pt").unlink(), "holds no metadata.pt"),
        (lambda d: (d / "top_model.out.pt").unlink(), "holds no top_model.out.pt"),
        (lambda d: (d / "embeddings.4.meta.pt").unlink(), "holds no embeddings.4.meta.pt"),
        (lambda d: (d / "bottom_model.embeddings.4.bin").unlink(), r"4 tables; missing: \[4\]"),
        (
            lambda d: shutil.copy(
                d / "bottom_model.embeddings.4.bin", d / "bottom_model.embeddings.7.bin"
            ),
            r"of no device: \[7\]",
        ),
        (
            lambda d: (d / "bottom_model.embeddings.0.bin").write_bytes(b"1234"),
            r"0.bin has 4 bytes",
        ),
        (
            lambda d: torch.save({"shape": [3]}, d / "embeddings.1.meta.pt"),
            "does not hold the shape of a table",
        ),
    ],
)
def test_damaged_directories(spoil, says, original, tmp_path):
    folder = save(tmp_path / "ckpt", original.model)
    spoil(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(folder)
    assert caught.value.expected and caught.value.hint
