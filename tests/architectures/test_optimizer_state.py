"""Where the accumulators of the tables are found, in every layout that trainers write."""

from __future__ import annotations

import pytest

from dmt_convert.architectures import infer_model

EBC = "sparse_arch.embedding_bag_collection.embedding_bags"


def paths(info):
    return {table: tensor.path for table, tensor in info.row_state.items()}


@pytest.mark.parametrize("name", ["sum", "exp_avg_sq", "momentum"])
def test_states_by_index(name, facebook, checkpoint):
    shapes = facebook((3, 4))
    groups = [
        (f"opt_state_dict.state.{i}", {"step": (), name: shape})
        for i, shape in enumerate(shapes.values())
    ]
    info = infer_model(checkpoint(("state_dict", shapes), *groups))
    assert paths(info) == {str(i): f"opt_state_dict.state.{i}.{name}" for i in range(2)}
    assert info.ignored == (f"opt_state_dict: {2 * len(shapes)} tensors",)


def test_row_wise_states_by_index(facebook, checkpoint):
    groups = [(f"opt_state_dict.state.{i}", {"momentum": (rows,)}) for i, rows in enumerate((3, 4))]
    info = infer_model(checkpoint(("state_dict", facebook((3, 4))), *groups))
    assert info.row_state["1"].shape == (4,)


def test_groups_in_another_order_are_not_trusted(facebook, checkpoint):
    shapes = [*facebook((3, 4)).values()]
    turned = [*shapes[2:], *shapes[:2]]  # the MLPs first
    groups = [(f"optimizer.state.{i}", {"sum": shape}) for i, shape in enumerate(turned)]
    assert paths(infer_model(checkpoint(("model", facebook((3, 4))), *groups))) == {}


def test_one_optimizer_for_the_tables_and_one_for_the_rest(facebook, checkpoint):
    shapes = [*facebook((3, 4)).values()]
    groups = [(f"sparse.state.{i}", {"sum": shape}) for i, shape in enumerate(shapes[:2])]
    groups += [(f"dense.state.{i}", {"sum": shape}) for i, shape in enumerate(shapes[2:])]
    info = infer_model(checkpoint(("model", facebook((3, 4))), *groups))
    assert paths(info) == {"0": "sparse.state.0.sum", "1": "sparse.state.1.sum"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
def test_fused_states_by_name(ordered, shape, torchrec, checkpoint):
    shapes = torchrec({"t_1": 3, "t_10": 3}, prefix="model.")
    state = {f"{EBC}.t_10.weight.t_10.momentum1": shape}
    named = {f"model.{name}": size for name, size in state.items()}
    for group in (("optimizer.state", named), ("optimizer.state", state)):
        info = infer_model(checkpoint(("model", shapes), group, ordered=ordered))
        assert set(info.row_state) == {"t_10"}
    wrapped = {f"_dmp_wrapped_module.module.model.{name}": size for name, size in state.items()}
    info = infer_model(checkpoint(("model", shapes), ("optimizer.state", wrapped), ordered=ordered))
    assert set(info.row_state) == {"t_10"}


def test_states_by_parameter_name(torchrec, checkpoint):
    group = (f"optimizer.state.{EBC}.t_a.weight", {"exp_avg": (3, 4), "exp_avg_sq": (3, 4)})
    info = infer_model(checkpoint(("model", torchrec()), group))
    assert {t.name for t in info.row_state.values()} == {"exp_avg_sq"}


@pytest.mark.parametrize("shape", [(6,), (4,), (3, 4, 1), (3, 2), ()])
def test_states_of_other_shapes_are_passed_over(shape, torchrec, checkpoint):
    group = ("optimizer.state", {f"{EBC}.t_a.weight.t_a.momentum1": shape})
    assert paths(infer_model(checkpoint(("model", torchrec()), group))) == {}


def test_no_state(torchrec, checkpoint):
    info = infer_model(checkpoint(("", torchrec())))
    assert not info.row_state and not info.ignored
