"""TorchRec's own models: the same logits, from every container, under every wrapper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.families import ModelConfig, infer_model
from support.checkpoints.containers import NESTED_SAVES
from support.originals import assert_agrees, difference, flat_logits, torchrec_original

RTOL = 1e-6


@pytest.mark.parametrize("kind", ["dot", "dcn", "projection", "train"])
def test_torchrec_models_in_every_container(kind, save, tmp_path):
    original = torchrec_original(kind, lengths=4)
    assert_agrees(save(original.state, tmp_path), original)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dot", "dcn", "projection"])
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": 1},
        {"dense": (), "over": (9, 7, 3, 1)},  # a bottom MLP of one layer
        {"dense": (4, 9, 2), "over": (2, 1)},
        {"rows": (13,)},  # a single feature
        {"rows": (1, 1, 1)},
        {"rows": tuple(range(1, 61)), "dim": 3},
        {"dim": 1},
        {"layers": 1},
        {"layers": 5, "dim": 13},
    ],
    ids=[
        "single-hot",
        "one bottom layer",
        "three bottom layers",
        "one feature",
        "tables of one row",
        "60 tables",
        "dim 1",
        "one cross layer",
        "five cross layers",
    ],
)
def test_torchrec_models_of_other_sizes(kind, options, tmp_path):
    original = torchrec_original(kind, **{"lengths": 3, **options})
    assert_agrees(NESTED_SAVES["pt"](original.state, tmp_path), original)


@pytest.mark.parametrize("kind", ["dot", "dcn"])
def test_mean_pooling(kind, tmp_path):
    original = torchrec_original(kind, lengths=5, pooling="mean")
    path = NESTED_SAVES["pt"](original.state, tmp_path)
    assert_agrees(path, original, ModelConfig(pooling="mean"))
    _, summed = flat_logits(infer_model(open_checkpoint(path)), original.batch)
    assert difference(summed, original.logits) > 100 * RTOL


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("container", ["pt", "legacy", "safetensors", "dcp"])
def test_half_tables(dtype, container, tmp_path):
    original = torchrec_original("dcn", dtype=dtype, lengths=2)
    path = NESTED_SAVES[container](original.state, tmp_path)
    assert infer_model(open_checkpoint(path)).spec.tables[0].dtype in ("fp16", "bf16")
    assert_agrees(path, original)


@pytest.mark.parametrize(
    "wrap",
    [
        "model.{}",
        "module.{}",
        "_orig_mod.{}",
        "_dmp_wrapped_module.{}",
        "_dmp_wrapped_module.module.model.{}",
        "module._orig_mod.model.{}",
        "net.dlrm.{}",
    ],
)
def test_wrappers_around_the_model(wrap, tmp_path):
    original = torchrec_original("dot", lengths=4)
    state = {wrap.format(name): tensor for name, tensor in original.state.items()}
    assert_agrees(NESTED_SAVES["pt"](state, tmp_path), original)


def test_wrappers_inside_the_model(tmp_path):
    original = torchrec_original("dcn", lengths=4)
    state = {
        name.replace("over_arch.", "over_arch._orig_mod.")
        .replace("dense_arch.", "dense_arch.module.")
        .replace("embedding_bag_collection.", "embedding_bag_collection._dmp_wrapped_module."): t
        for name, t in original.state.items()
    }
    assert len({*state} & {*original.state}) < len(state) // 2
    assert_agrees(NESTED_SAVES["pt"](state, tmp_path), original)


def test_real_wrappers(tmp_path):
    original = torchrec_original("train", lengths=4)
    parallel = nn.DataParallel(original.model)  # names as DistributedDataParallel gives them
    assert next(iter(parallel.state_dict())).startswith("module.model.sparse_arch")
    assert_agrees(NESTED_SAVES["pt"](parallel.state_dict(), tmp_path), original)
    compiled = torch.compile(original.model, backend="eager")
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    assert_agrees(NESTED_SAVES["pt"](compiled.state_dict(), tmp_path), original)


def _swap_tables(state: dict[str, torch.Tensor]) -> None:
    name = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"
    a, b = name.format(2), name.format(7)
    rows = min(len(state[a]), len(state[b]))
    state[a][:rows], state[b][:rows] = state[b][:rows].clone(), state[a][:rows].clone()


def _transpose_weight(state: dict[str, torch.Tensor]) -> None:
    weight = state["dense_arch.model._mlp.1._linear.weight"]
    assert weight.shape[0] == weight.shape[1]
    state["dense_arch.model._mlp.1._linear.weight"] = weight.t()


def _swap_pairs(state: dict[str, torch.Tensor]) -> None:
    weight = state["over_arch.model.0._mlp.0._linear.weight"]
    weight[:, [6, 7]] = weight[:, [7, 6]].clone()


@pytest.mark.parametrize("spoil", [_swap_tables, _transpose_weight, _swap_pairs])
def test_a_spoilt_checkpoint_is_noticed(spoil, tmp_path):
    original = torchrec_original("dot", lengths=4, dense=(6,))
    state = {name: tensor.clone() for name, tensor in original.state.items()}
    spoil(state)
    with pytest.raises(AssertionError):
        assert_agrees(NESTED_SAVES["pt"](state, tmp_path), original)


def test_the_other_order_of_pairs_is_noticed(tmp_path):
    original = torchrec_original("dot", lengths=4)
    with pytest.raises(AssertionError):
        assert_agrees(
            NESTED_SAVES["pt"](original.state, tmp_path), original, ModelConfig(pair_order="tril")
        )
