"""DeepCTR-Torch: every model scores as its trainer's code does, flat and through towers."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import ArchitectureError
from dmt_convert.families import FeatureConfig, ModelConfig, infer_model
from dmt_convert.families.layer_stacks import ACTIVATIONS
from dmt_convert.model.networks import layers
from support.trainers import deepctr_models
from support.trainers.comparison import draw_rows, pad, same_logits, stir

ROWS = {"user": 11, "item": 7, "tags": 9}
SAME = dict.fromkeys(ROWS, 4)
MIXED = {"user": 4, "item": 3, "tags": 2}


@pytest.fixture
def save(tmp_path):
    """Save a model as `torch.save(model.state_dict(), 'model.h5')`; give its logits too."""

    def save(dims=SAME, num_dense=3, edit=None, **options):
        model = stir(deepctr_models.DeepCtr(ROWS, dims, num_dense, **options))
        batch = draw_rows(ROWS, num_dense, multi=("tags",))
        ids = dict(zip(batch.feature_names, batch.bags, strict=True))
        padded = {name: pad(bag, 3 if name == "tags" else 1) for name, bag in ids.items()}
        expected = model(padded, torch.from_numpy(batch.dense))
        state = copy.deepcopy(model.state_dict())
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
def test_models_score_as_their_trainer_does(save, options, network):
    path, batch, expected = save(**options)
    info = same_logits(path, batch, expected)
    facts = {fact.subject: fact.value for fact in info.facts}
    assert facts.get("cross network") == network
    assert info.spec.final_sigmoid and info.spec.feature_names == tuple(ROWS)


@pytest.mark.parametrize("fm", [True, False])
def test_deepfm_and_wdl_differ_in_a_module_without_tensors(fm, save, tmp_path):
    path, batch, expected = save(fm=fm)
    info = same_logits(path, batch, expected)
    assert ("FM term", str(fm).lower(), "read") in [
        (f.subject, f.value, f.source) for f in info.facts
    ]
    # a dict that was put together anew has no modules
    torch.save(dict(torch.load(path)), tmp_path / "plain.h5")
    features = tuple(FeatureConfig(name=name) for name in ROWS)
    with pytest.raises(ArchitectureError, match="a DeepFM or a WDL") as caught:
        infer_model(open_checkpoint(tmp_path / "plain.h5"), ModelConfig(features=features))
    assert "fm: false" in caught.value.hint
    config = ModelConfig(features=features, fm=fm)
    info = same_logits(tmp_path / "plain.h5", batch, expected, config)
    assert ("FM term", str(fm).lower(), "given") in [
        (f.subject, f.value, f.source) for f in info.facts
    ]


def test_a_swapped_expert_shows(save):
    def swap(state):
        state["crossnet.V_list"][0] = state["crossnet.V_list"][0].flip(0)

    path, batch, expected = save(cross="mix", edit=swap)
    with pytest.raises(AssertionError, match="Mismatch"):
        same_logits(path, batch, expected)


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


def test_activations_are_given_by_name(save):
    path, batch, expected = save(cross="vector")
    with pytest.raises(AssertionError, match="Mismatch"):
        same_logits(path, batch, expected, ModelConfig(activation="tanh"))
    with pytest.raises(ArchitectureError, match="the activation 'dice'"):
        infer_model(open_checkpoint(path), ModelConfig(activation="dice"))
    assert set(ACTIVATIONS) == {*layers.ACTIVATIONS, "prelu"}


def test_other_models_of_the_trainer_are_refused(save):
    path, *_ = save(wide=False)  # a PNN has no linear model, and products without parameters
    with pytest.raises(ArchitectureError, match="neither a cross network nor a linear model"):
        infer_model(open_checkpoint(path))


def test_order_of_the_file_counts_though_names_are_numbered(tmp_path):
    rows = {"C1": 7, "C10": 8, "C2": 9}  # `sorted(columns)`, with which the model was built
    rows |= {f"C{i}": 5 for i in range(3, 10)}
    model = stir(deepctr_models.DeepCtr(rows, dict.fromkeys(rows, 4), 2, cross="vector"))
    batch = draw_rows(rows, 2)
    padded = {n: pad(b, 1) for n, b in zip(batch.feature_names, batch.bags, strict=True)}
    torch.save(model.state_dict(), tmp_path / "model.h5")
    info = same_logits(tmp_path / "model.h5", batch, model(padded, torch.from_numpy(batch.dense)))
    assert info.spec.feature_names[:3] == ("C1", "C10", "C2")


def test_features_without_a_given_pooling_keep_the_trainers(save):
    path, *_ = save(cross="vector")
    info = infer_model(open_checkpoint(path), ModelConfig(pooling={"item": "sum"}))
    assert [f.pooling for f in info.spec.features] == ["mean", "sum", "mean"]


class SparseFeat(tuple):
    """A named tuple of the trainer, as far as a pickle shows it."""

    def __reduce__(self):
        return SparseFeat, tuple(self)

    def __new__(cls, *args):
        return super().__new__(cls, args)


class VarLenSparseFeat(SparseFeat):
    def __reduce__(self):
        return VarLenSparseFeat, tuple(self)


class DenseFeat(SparseFeat):
    def __reduce__(self):
        return DenseFeat, tuple(self)


def columns(combiner, dense, names=ROWS):
    sparse = [SparseFeat(name, ROWS[name], 4, False, "int32", name, "g") for name in names]
    sparse[-1] = VarLenSparseFeat(sparse[-1], 3, combiner, None)
    return [*sparse, *(DenseFeat(name, 1, "float32") for name in dense)]


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """Save a model as `torch.save(model, 'model.h5')`, with the columns it was built of."""

    def save(combiner, linear=("a", "b", "c"), act=nn.ReLU, name="DeepFM", **options):
        model = stir(deepctr_models.DeepCtr(ROWS, SAME, 3, **options))
        model.dnn_feature_columns = columns(combiner, "abc")
        listed = columns(combiner, linear)
        model.linear_model.sparse_feature_columns = listed[:2]
        model.linear_model.varlen_sparse_feature_columns = listed[2:3]
        model.linear_model.dense_feature_columns = listed[3:]
        layers = model.dnn.activation_layers
        model.dnn.activation_layers = nn.ModuleList(act() for _ in layers)
        batch = draw_rows(ROWS, 3, multi=("tags",))
        ids = dict(zip(batch.feature_names, batch.bags, strict=True))
        padded = {n: pad(bag, 3 if n == "tags" else 1) for n, bag in ids.items()}
        dense = torch.from_numpy(batch.dense)
        weight = model.linear_model.weight
        if combiner == "sum":
            padded["tags"] = ids["tags"]
        expected = model(padded, dense)
        order = ["abc".index(name) for name in linear]
        expected = expected + dense[:, order] @ weight[: len(order)] - dense @ weight
        model.linear_model.weight = nn.Parameter(weight[: len(order)].clone())
        cls = type(name, (type(model),), {"__module__": "deepctr_torch.models.any"})
        model.__class__ = cls
        monkeypatch.setitem(sys.modules, deepctr_models.__name__, deepctr_models)
        for package in ("deepctr_torch", "deepctr_torch.models", cls.__module__):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        setattr(sys.modules[cls.__module__], name, cls)
        torch.save(model, tmp_path / "model.h5")
        return tmp_path / "model.h5", batch, expected

    return save


def test_a_pickled_model_says_what_tensors_do_not(pickled):
    path, batch, expected = pickled("sum", ("c", "a"), nn.Sigmoid, "WDL")
    info = same_logits(path, batch, expected)
    facts = {fact.subject: (fact.value, fact.source) for fact in info.facts}
    assert facts["FM term"] == ("false", "read") and facts["activation"] == ("sigmoid", "read")
    assert [f.pooling for f in info.spec.features] == ["mean", "mean", "sum"]
    assert info.inputs is not None and info.inputs.dense == ("a", "b", "c")


def test_a_pickled_model_that_cannot_be_converted_is_refused(pickled):
    path, *_ = pickled("max", fm=True)
    with pytest.raises(ArchitectureError, match="the feature tags is pooled by 'max'"):
        infer_model(open_checkpoint(path))
    path, *_ = pickled("mean", name="xDeepFM")
    with pytest.raises(ArchitectureError, match="a pickled xDeepFM"):
        infer_model(open_checkpoint(path))
    path, *_ = pickled("mean", act=nn.Hardtanh)
    with pytest.raises(ArchitectureError, match="the activation Hardtanh"):
        infer_model(open_checkpoint(path))
