"""A pickled module tells pooling, shared tables and order of features, which tensors do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmt_convert.checkpoint import FlatCheckpoint, TableConfig, open_checkpoint
from dmt_convert.families import ModelConfig, infer_model
from support.checkpoints.flat import make_flat


def told(flat: FlatCheckpoint, *configs: tuple[str, tuple[str, ...], str]) -> FlatCheckpoint:
    return replace(
        flat,
        table_configs=tuple(
            TableConfig(name=name, features=features, pooling=pooling)  # type: ignore[arg-type]
            for name, features, pooling in configs
        ),
    )


CONFIGS = (
    ("t_cat_2", ("x", "y"), "mean"),
    ("t_cat_0", ("z",), "sum"),
    ("t_cat_1", ("w",), "sum"),
)


@pytest.fixture
def flat(tmp_path: Path) -> FlatCheckpoint:
    """A model of three tables and four features: two share a table."""

    def drop(state) -> None:
        del state["sparse_arch.embedding_bag_collection.embedding_bags.t_cat_3.weight"]

    return open_checkpoint(make_flat(tmp_path / "a.pt", edit=drop))


def test_features_are_read_from_the_module(flat):
    info = infer_model(told(flat, *CONFIGS))
    assert [(f.name, f.table, f.pooling) for f in info.spec.features] == [
        ("x", "t_cat_2", "mean"),
        ("y", "t_cat_2", "mean"),
        ("z", "t_cat_0", "sum"),
        ("w", "t_cat_1", "sum"),
    ]
    facts = {fact.subject: (fact.value, fact.source) for fact in info.facts}
    assert facts["pooling"] == ("mean and sum", "read")
    assert facts["features"] == ("4 features", "read")


def test_the_user_knows_better(flat):
    info = infer_model(told(flat, *CONFIGS), ModelConfig(pooling="sum"))
    assert {f.pooling for f in info.spec.features} == {"sum"}


def test_what_the_user_leaves_out_is_as_the_module_says(flat):
    info = infer_model(told(flat, *CONFIGS), ModelConfig(pooling={"z": "mean", "x": "sum"}))
    assert [f.pooling for f in info.spec.features] == ["sum", "mean", "mean", "sum"]


def test_configs_of_other_tables_count_for_nothing(flat):
    with pytest.raises(Exception, match="not a whole torchrec-dlrm"):
        infer_model(told(flat, *CONFIGS[:2]))


def test_a_real_module(tmp_path):
    torchrec = pytest.importorskip("torchrec")
    import torch
    from torchrec.models.dlrm import DLRM

    tables = [
        torchrec.EmbeddingBagConfig(
            name=name, num_embeddings=4, embedding_dim=8, feature_names=list(features), pooling=kind
        )
        for name, features, kind in (
            ("late", ("b", "a"), torchrec.PoolingType.MEAN),
            ("early", ("c",), torchrec.PoolingType.SUM),
        )
    ]
    model = DLRM(
        torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("cpu")),
        dense_in_features=3,
        dense_arch_layer_sizes=[8],
        over_arch_layer_sizes=[4, 1],
    )
    torch.save(model, tmp_path / "model.pt")
    spec = infer_model(open_checkpoint(tmp_path / "model.pt")).spec
    assert [(f.name, f.table, f.pooling) for f in spec.features] == [
        ("b", "late", "mean"),
        ("a", "late", "mean"),
        ("c", "early", "sum"),
    ]
