"""FuxiCTR: every model scores as its trainer's code does, flat and through towers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import ArchitectureError, CheckpointError
from dmt_convert.families import ModelConfig, infer_model
from support.trainers import deepctr_models, fuxictr_models
from support.trainers.comparison import draw_rows, pad, same_logits, stir

DIM = 4
PLAIN = {
    "user": {"type": "categorical", "vocab_size": 11, "padding_idx": 0},
    "price": {"type": "numeric"},
    "item": {"type": "categorical", "vocab_size": 7, "padding_idx": 0},
    "age": {"type": "numeric"},
    "day": {"type": "categorical", "vocab_size": 5, "padding_idx": 0},
}
RICH = PLAIN | {
    "seen": {
        "type": "sequence",
        "vocab_size": 7,
        "share_embedding": "item",
        "feature_encoder": "layers.MaskedAveragePooling()",
    },
    "tags": {
        "type": "sequence",
        "vocab_size": 9,
        "feature_encoder": "layers.MaskedSumPooling()",
    },
}
DENSELESS = {name: spec for name, spec in PLAIN.items() if spec["type"] != "numeric"}


@pytest.fixture
def save(tmp_path):
    """Save a model and its descriptions as the trainer does; give its logits too."""

    def save(model, specs, params=None, described=True):
        stir(model)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight[0] = 0
        sizes = {n: s["vocab_size"] for n, s in specs.items() if s["type"] != "numeric"}
        numeric = [n for n, s in specs.items() if s["type"] == "numeric"]
        batch = draw_rows(sizes, len(numeric), multi=("seen", "tags"))
        ids = {
            name: pad(bag, 3 if specs[name]["type"] == "sequence" else 1)
            for name, bag in zip(batch.feature_names, batch.bags, strict=True)
        }
        dense = dict(zip(numeric, torch.from_numpy(batch.dense).T, strict=True))
        torch.save(model.state_dict(), tmp_path / "expid.model")
        if described:
            document = {"features": [{name: spec} for name, spec in specs.items()]}
            (tmp_path / "feature_map.json").write_text(json.dumps(document))
        if params is not None:
            (tmp_path / "params.json").write_text(json.dumps(params))
        return tmp_path if described else tmp_path / "expid.model", batch, model(ids, dense)

    return save


@pytest.mark.parametrize("pairs", [True, False])
def test_a_dlrm_with_dense_inputs_is_the_plain_one(save, pairs):
    model = fuxictr_models.Dlrm(PLAIN, DIM, pairs=pairs, dropout=True)
    info = same_logits(*save(model, PLAIN, {"task": "binary_classification"}))
    assert info.spec.interaction.kind == ("dot" if pairs else "cat")
    assert info.spec.dense_arch.widths == (2, 5, 4) and info.spec.final_sigmoid
    assert info.spec.feature_names == ("user", "item", "day")
    assert info.inputs is not None and info.inputs.dense == ("price", "age")


@pytest.mark.parametrize(
    ("specs", "options", "params"),
    [
        (DENSELESS, {}, None),
        (DENSELESS, {"pairs": False, "bn": True}, None),
        (PLAIN, {"bn": True, "dropout": True}, None),
        (PLAIN, {"act": nn.PReLU}, None),
        (PLAIN, {"act": lambda units: nn.PReLU(units)}, None),
        (
            PLAIN,
            {"act": nn.Tanh},
            {"top_mlp_activations": "Tanh", "bottom_mlp_activations": ["Tanh", "tanh"]},
        ),
        (RICH, {}, {"task": "regression"}),
    ],
)
def test_other_dlrms_are_networks(save, specs, options, params):
    info = same_logits(*save(fuxictr_models.Dlrm(specs, DIM, **options), specs, params))
    kind = "dot" if specs is RICH else "network"
    assert info.spec.interaction.kind == kind
    assert info.spec.final_sigmoid is not (params == {"task": "regression"})


@pytest.mark.parametrize(
    ("structure", "mix"),
    [
        ("crossnet_only", False),
        ("stacked", False),
        ("parallel", False),
        ("stacked_parallel", False),
        ("parallel", True),
    ],
)
def test_a_dcn_scores_as_its_trainer_does(save, structure, mix):
    cross = (lambda width: deepctr_models.Cross("mix", width, 2, listed=True)) if mix else None
    model = fuxictr_models.DcnV2(RICH, DIM, structure, cross=cross, bn=structure == "stacked")
    info = same_logits(*save(model, RICH))
    facts = {fact.subject: fact.value for fact in info.facts}
    assert facts["model structure"] == structure
    assert info.spec.num_dense == 2
    assert info.spec.table_of("seen").name == "item"


@pytest.mark.parametrize("specs", [DENSELESS, PLAIN])
def test_without_a_feature_map_the_order_of_the_file_counts(save, specs):
    model = fuxictr_models.DcnV2(specs, DIM, "parallel")
    path, batch, expected = save(model, specs, described=False)
    info = same_logits(path, batch, expected)
    assert info.checkpoint.format == "torch"
    kinds = [kind for kind, *_ in info.spec.interaction.network.config["inputs"]]
    assert kinds == [
        "scaled" if spec["type"] == "numeric" else "feature" for spec in specs.values()
    ]


def test_a_feature_map_in_another_order_is_refused(save):
    path, *_ = save(fuxictr_models.DcnV2(PLAIN, DIM, "parallel"), PLAIN)
    turned = {"features": [{name: PLAIN[name]} for name in reversed(PLAIN)]}
    (path / "feature_map.json").write_text(json.dumps(turned))
    with pytest.raises(ArchitectureError, match="stand in another order"):
        infer_model(open_checkpoint(path))


def test_params_choose_and_change_features(save):
    """`use_features` and `feature_specs` count above the feature map, which is the data set's."""
    used = ["tags", "day", "age", "user"]
    model = fuxictr_models.DcnV2({name: RICH[name] for name in used}, DIM, "parallel")
    path, batch, expected = save(model, {name: RICH[name] for name in used})
    document = {"features": [{name: spec} for name, spec in RICH.items()]}
    document["features"][-1]["tags"] = {**RICH["tags"], "feature_encoder": None}
    (path / "feature_map.json").write_text(json.dumps(document))
    with pytest.raises(ArchitectureError):
        infer_model(open_checkpoint(path))
    encoder = {"name": ["tags"], "feature_encoder": "layers.MaskedSumPooling()"}
    params = {"use_features": used, "feature_specs": [encoder]}
    (path / "params.json").write_text(json.dumps(params))
    assert same_logits(path, batch, expected).spec.feature_names == ("tags", "day", "user")


def test_a_table_is_shared_with_features_behind_it(save):
    specs = DENSELESS | {"user": {**PLAIN["user"], "share_embedding": "later"}}
    specs |= {"later": PLAIN["item"], "last": {**PLAIN["item"], "share_embedding": "later"}}
    model = fuxictr_models.DcnV2(specs, DIM, "parallel")
    info = same_logits(*save(model, specs))
    assert [f.table for f in info.spec.features] == ["user", "item", "day", "later", "later"]


def test_features_that_cannot_be_converted_are_named(save):
    path, *_ = save(fuxictr_models.Dlrm(DENSELESS, DIM), DENSELESS)
    document = json.loads((path / "feature_map.json").read_text())
    document["features"][1]["item"]["pretrained_emb"] = "item.npz"
    (path / "feature_map.json").write_text(json.dumps(document))
    with pytest.raises(ArchitectureError, match="features item of a kind"):
        infer_model(open_checkpoint(path))
    document["features"][1]["item"] = {**DENSELESS["item"], "feature_encoder": "nn.Tanh()"}
    (path / "feature_map.json").write_text(json.dumps(document))
    with pytest.raises(ArchitectureError, match="features item of a kind"):
        infer_model(open_checkpoint(path))
    document["features"][1]["item"] = {
        "type": "sequence",
        "feature_encoder": "layers.KMaxPooling()",
    }
    (path / "feature_map.json").write_text(json.dumps(document))
    with pytest.raises(ArchitectureError, match="KMaxPooling"):
        infer_model(open_checkpoint(path))
    assert infer_model(open_checkpoint(path), ModelConfig(pooling="sum")).spec.features


def test_a_table_that_the_feature_map_does_not_know_is_named(save):
    path, *_ = save(fuxictr_models.Dlrm(DENSELESS, DIM), DENSELESS)
    document = json.loads((path / "feature_map.json").read_text())
    document["features"] = document["features"][1:]
    (path / "feature_map.json").write_text(json.dumps(document))
    with pytest.raises(ArchitectureError) as caught:
        infer_model(open_checkpoint(path))
    assert "user is not in feature_map.json" in "\n".join(
        [caught.value.found, *caught.value.details]
    )


def test_folders_that_are_not_clear_are_refused(save):
    path, *_ = save(fuxictr_models.Dlrm(DENSELESS, DIM), DENSELESS)
    other = path / "other.model"
    other.write_bytes((path / "expid.model").read_bytes())
    with pytest.raises(CheckpointError, match=r"2 checkpoints: expid\.model, other\.model"):
        open_checkpoint(path)
    assert open_checkpoint(other).format == "fuxictr"
    (path / "feature_map.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"feature_map\.json cannot be read"):
        open_checkpoint(other)
