"""TorchEasyRec: every model scores as its trainer's code does, flat and through towers."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import ArchitectureError, CheckpointError
from dmt_convert.families import infer_model
from support.trainers import tzrec_models
from support.trainers.comparison import draw_rows, same_logits, stir

TABLES = {"user_emb": 11, "shared": 7, "day_emb": 5}
FEATURES = {
    "user": ("user_emb", False),
    "item": ("shared", True),
    "seen": ("shared", True),
    "day": ("day_emb", False),
}
ROWS = {name: TABLES[table] for name, (table, _) in FEATURES.items()}
SETTINGS = """# a comment
feature_configs { id_feature { feature_name: "user" embedding_dim: 4 num_buckets: 11 } }
feature_configs: < id_feature < feature_name: 'item' embedding_name: "shared" embedding_dim: 4
    pooling: "%s" vocab_dict { key: "a\\"b" value: 2 } > >
feature_configs { id_feature { feature_name: "seen" embedding_name: "shared"; embedding_dim: 4,
    pooling: "%s" } }
feature_configs { id_feature { feature_name: "day" embedding_dim: 4 pooling: "SUM" } }
feature_configs { raw_feature { feature_name: "price" expression: "user:price" } }
feature_configs { raw_feature { feature_name: "look" expression: "user:" "look" value_dim: 2 } }
model_config {
  %s
  losses { binary_cross_entropy {} }
}
"""


def group(name: str, *features: str) -> str:
    listed = ", ".join(f'"{feature}"' for feature in features)
    return f'feature_groups {{ group_name: "{name}" feature_names: [{listed}] group_type: DEEP }}'


@pytest.fixture
def save(tmp_path):
    """Save a model folder as the trainer does; give the model's logits too."""
    from torch.distributed import checkpoint as dcp

    def save(model, model_text, *, pooling="mean", num_dense=3, step=20):
        stir(model)
        batch = draw_rows(ROWS, num_dense, multi=("item", "seen", "day"))
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = tmp_path / f"model.ckpt-{step}"
            dcp.save(state, checkpoint_id=folder / "model", no_dist=True)
        text = SETTINGS % (pooling, pooling, model_text)
        (tmp_path / "pipeline.config").write_text(text)
        return tmp_path, batch, model(bags, torch.from_numpy(batch.dense))

    return save


GROUPS = group("dense", "look", "price") + group("sparse", "user", "item", "seen", "day")


@pytest.mark.parametrize(
    ("options", "kind", "stacks"),
    [
        ({}, "network", ""),
        ({"with_sparse": False}, "dot", ""),
        ({"with_sparse": False, "bn": True}, "network", ""),
        (
            {"act": nn.Tanh},
            "network",
            'dense_mlp { activation: "nn.Tanh" } final { activation: "nn.Tanh" }',
        ),
    ],
)
def test_a_dlrm_scores_as_its_trainer_does(save, options, kind, stacks):
    model = tzrec_models.Dlrm(TABLES, FEATURES, 3, **options)
    info = same_logits(*save(model, f"{GROUPS} dlrm {{ {stacks} }}"))
    assert info.spec.interaction.kind == kind
    assert info.spec.feature_names == tuple(FEATURES)
    assert [f.pooling for f in info.spec.features] == ["sum", "mean", "mean", "sum"]


def test_a_dlrm_without_dense_inputs(save):
    model = tzrec_models.Dlrm(TABLES, FEATURES, 0)
    text = group("features", "user", "item", "seen", "day") + "dlrm {}"
    assert same_logits(*save(model, text, num_dense=0)).spec.num_dense == 0


def test_raw_features_name_the_dense_inputs(save):
    model = tzrec_models.Dlrm(TABLES, FEATURES, 1)
    text = group("dense", "price") + group("sparse", "user", "item", "seen", "day") + "dlrm {}"
    path, *_ = save(model, text, num_dense=1)
    info = infer_model(open_checkpoint(path))
    assert info.inputs is not None and info.inputs.dense == ("price",)


@pytest.mark.parametrize(
    "options", [{}, {"backbone": True}, {"deep": False}, {"final": False, "backbone": True}]
)
def test_a_dcn_takes_its_group_in_order(save, options):
    features = {name: (table, False) for name, (table, _) in FEATURES.items()}
    model = tzrec_models.DcnV2(
        TABLES, features, ["user", [0], "day", "item", [1, 2], "seen"], **options
    )
    text = group("all", "user", "price", "day", "item", "look", "seen") + "dcn_v2 { cross {} }"
    path, batch, expected = save(model, text, pooling="sum")
    info = same_logits(path, batch, expected)
    assert info.spec.feature_names == ("user", "day", "item", "seen")
    config = path / "pipeline.config"
    config.write_text(config.read_text().replace('"day", "item", "look"', '"item", "day", "look"'))
    with pytest.raises(AssertionError, match="Mismatch"):
        same_logits(path, batch, expected)
    config.unlink()
    with pytest.raises(ArchitectureError, match=r"DCNv2 without its pipeline\.config"):
        infer_model(open_checkpoint(path))


def test_the_newest_checkpoint_of_a_folder_is_taken(save):
    text = f"{GROUPS} dlrm {{}}"
    save(tzrec_models.Dlrm(TABLES, FEATURES, 3, with_sparse=False), text, step=9)
    path, batch, expected = save(tzrec_models.Dlrm(TABLES, FEATURES, 3), text, step=10)
    info = same_logits(path, batch, expected)
    assert info.checkpoint.source.name == "model.ckpt-10"
    assert same_logits(path / "model.ckpt-10", batch, expected)
    assert same_logits(path / "model.ckpt-10" / "model", batch, expected)
    (path / "model.ckpt-10" / "model" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"but no \.metadata"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"mean"', '"max"', "pooled by max"),
        ("group_type: DEEP", "sequence_groups { }", "group with sequences"),
        ("feature_groups", "feature_group", "no feature groups"),
    ],
)
def test_what_a_config_asks_for_and_cannot_have(save, old, new, says):
    path, *_ = save(tzrec_models.Dlrm(TABLES, FEATURES, 3), f"{GROUPS} dlrm {{}}")
    config = path / "pipeline.config"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ArchitectureError, match=says):
        infer_model(open_checkpoint(path))


@pytest.mark.parametrize("text", ["a {", "a: }", "a", "a: [1", 'a: "x', "a {" * 100, "{}", "a:: 1"])
def test_text_that_is_no_message_is_refused(text):
    from dmt_convert.checkpoint.readers.documents import parse_protobuf_text

    with pytest.raises(ValueError, match=r"."):
        parse_protobuf_text(text)


def test_messages_are_parsed():
    from dmt_convert.checkpoint.readers.documents import parse_protobuf_text

    text = "a: 1 a: -2.5e1f b { c: true, d: NAME; d: 'x' \"y\" } e: [1, 0x1F] [x.y/z]: inf # f"
    assert parse_protobuf_text(text) == {
        "a": [1, -25.0],
        "b": [{"c": [True], "d": ["NAME", "xy"]}],
        "e": [1, 31],
        "[x.y/z]": ["inf"],
    }


def test_protobuf_text_takes_no_longer_than_it_is_long():
    from dmt_convert.checkpoint.readers.documents import parse_protobuf_text

    begin = time.process_time()
    for text in ("a: " + "1" * 50_000 + "x", 'a: "' + "b" * 50_000, "a" + " " * 50_000 + "'"):
        with pytest.raises(ValueError, match=r"line 1|a value"):
            parse_protobuf_text(text)
    assert time.process_time() - begin < 1
