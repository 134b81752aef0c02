"""DeepCTR-Torch: every model scores as its trainer's code does, flat and through towers."""

from __future__ import annotations

import pytest
import torch

from dmt_convert.architectures import FeatureConfig, ModelConfig, infer_model
from dmt_convert.architectures.trainer_tensors import ACTIVATIONS
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import ArchitectureError
from dmt_convert.towers.networks import layers

ROWS = {"user": 11, "item": 7, "tags": 9}
SAME = dict.fromkeys(ROWS, 4)
MIXED = {"user": 4, "item": 3, "tags": 2}


@pytest.fixture
def save(deepctr, tools, tmp_path):
    """Save a model as `torch.save(model.state_dict(), 'model.h5')`; give its logits too."""

    def save(dims=SAME, num_dense=3, edit=None, **options):
        model = tools.stir(deepctr.DeepCtr(ROWS, dims, num_dense, **options))
        batch = tools.make_batch(ROWS, num_dense, multi=("tags",))
        ids = dict(zip(batch.feature_names, batch.bags, strict=True))
        padded = {name: tools.pad(bag, 3 if name == "tags" else 1) for name, bag in ids.items()}
        expected = model(padded, torch.from_numpy(batch.dense))
        state = dict(model.state_dict())
        if edit is not None:
            edit(state)
        torch.save(state, tmp_path / "model.h5")
        return tmp_path / "model.h5", batch, expected

    return save


@pytest.mark.parametrize(
    ("options", "network"),
    [
        ({"cross": "vector"}, "vector, 2 layers"),
        ({"cross": "vector", "listed": True, "wide": False}, "vector, 2 layers"),
        ({"cross": "matrix", "bn": True}, "matrix, 2 layers"),
        ({"cross": "mix", "dims": MIXED}, "mix of 3 experts, 2 layers of rank 4"),
        ({"cross": "mix", "listed": True, "prelu": True}, "mix of 3 experts, 2 layers of rank 4"),
        ({"cross": "vector", "layers": 0, "dims": MIXED}, None),
        ({"fm": True, "bn": True}, None),
        ({"fm": True, "hidden": ()}, None),
        ({"dims": MIXED, "num_dense": 1}, None),
    ],
)
def test_models_score_as_their_trainer_does(save, tools, options, network):
    path, batch, expected = save(**options)
    info = tools.same_logits(path, batch, expected)
    facts = {fact.subject: fact.value for fact in info.facts}
    assert facts.get("cross network") == network
    assert info.spec.final_sigmoid and info.spec.feature_names == tuple(ROWS)


def test_wdl_has_to_be_said(save, tools):
    path, batch, expected = save(fm=False)
    with pytest.raises(AssertionError, match="Mismatch"):
        tools.same_logits(path, batch, expected)
    info = tools.same_logits(path, batch, expected, ModelConfig(fm=False))
    assert ("FM term", "false", "given") in [(f.subject, f.value, f.source) for f in info.facts]


def test_a_swapped_expert_shows(save, tools):
    def swap(state):
        state["crossnet.V_list"][0] = state["crossnet.V_list"][0].flip(0)

    path, batch, expected = save(cross="mix", edit=swap)
    with pytest.raises(AssertionError, match="Mismatch"):
        tools.same_logits(path, batch, expected)


def test_features_that_share_a_table_are_given(save):
    def share(state):
        del state["embedding_dict.item.weight"], state["linear_model.embedding_dict.item.weight"]

    path, *_ = save(cross="vector", num_dense=3, edit=share)
    with pytest.raises(ArchitectureError, match="the linear model takes 3 dense inputs"):
        infer_model(open_checkpoint(path))
    names = [("user", "user"), ("item", "user"), ("tags", "tags")]
    config = ModelConfig(features=tuple(FeatureConfig(name=n, table=t) for n, t in names))
    assert infer_model(open_checkpoint(path), config).spec.num_dense == 3


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda state: state.pop("dnn_linear.weight"), "missing: dnn_linear.weight"),
        (lambda state: state.pop("dnn.bn.1.running_var"), "missing: dnn.bn.1.running_var"),
        (lambda state: state.update({"cin.filter": torch.ones(2)}), "extra: cin.filter"),
        (lambda state: state.update({"out.bias": torch.ones(2)}), "out.bias has shape"),
        (lambda state: state.pop("crossnet.gating.1.weight"), "missing: crossnet.gating.1"),
    ],
)
def test_what_does_not_fit_is_listed(save, edit, says):
    path, *_ = save(cross="mix", bn=True, edit=edit)
    with pytest.raises(ArchitectureError) as caught:
        infer_model(open_checkpoint(path))
    assert any(says in line for line in caught.value.details)


def test_activations_are_given_by_name(save, tools):
    path, batch, expected = save(cross="vector")
    with pytest.raises(AssertionError, match="Mismatch"):
        tools.same_logits(path, batch, expected, ModelConfig(activation="tanh"))
    with pytest.raises(ArchitectureError, match="the activation 'dice'"):
        infer_model(open_checkpoint(path), ModelConfig(activation="dice"))
    assert set(ACTIVATIONS) == {*layers.ACTIVATIONS, "prelu"}


def test_other_models_of_the_trainer_are_refused(save):
    path, *_ = save(wide=False)  # a PNN has no linear model, and products without parameters
    with pytest.raises(ArchitectureError, match="neither a cross network nor a linear model"):
        infer_model(open_checkpoint(path))
