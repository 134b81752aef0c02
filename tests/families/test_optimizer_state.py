"""Where the optimizer's accumulators are found, in every layout that trainers write."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmt_convert.families import infer_model, read_initial_value
from support.checkpoints.shapes import facebook_shapes, make_checkpoint, torchrec_shapes

EBC = "sparse_arch.embedding_bag_collection.embedding_bags"


def paths(info):
    return {table: tensor.path for table, tensor in info.row_state.items()}


@pytest.mark.parametrize("name", ["sum", "exp_avg_sq", "momentum"])
def test_states_by_index(name):
    shapes = facebook_shapes((3, 4))
    groups = [
        (f"opt_state_dict.state.{i}", {"step": (), name: shape})
        for i, shape in enumerate(shapes.values())
    ]
    info = infer_model(make_checkpoint(("state_dict", shapes), *groups))
    assert paths(info) == {str(i): f"opt_state_dict.state.{i}.{name}" for i in range(2)}
    assert info.ignored == (f"opt_state_dict: {2 * len(shapes)} tensors",)


def test_row_wise_states_by_index():
    groups = [(f"opt_state_dict.state.{i}", {"momentum": (rows,)}) for i, rows in enumerate((3, 4))]
    info = infer_model(make_checkpoint(("state_dict", facebook_shapes((3, 4))), *groups))
    assert info.row_state["1"].shape == (4,)


def test_groups_in_another_order_are_not_trusted():
    shapes = [*facebook_shapes((3, 4)).values()]
    turned = [*shapes[2:], *shapes[:2]]  # the MLPs first
    groups = [(f"optimizer.state.{i}", {"sum": shape}) for i, shape in enumerate(turned)]
    assert paths(infer_model(make_checkpoint(("model", facebook_shapes((3, 4))), *groups))) == {}


def test_one_optimizer_for_the_tables_and_one_for_the_rest():
    shapes = [*facebook_shapes((3, 4)).values()]
    groups = [(f"sparse.state.{i}", {"sum": shape}) for i, shape in enumerate(shapes[:2])]
    groups += [(f"dense.state.{i}", {"sum": shape}) for i, shape in enumerate(shapes[2:])]
    info = infer_model(make_checkpoint(("model", facebook_shapes((3, 4))), *groups))
    assert paths(info) == {"0": "sparse.state.0.sum", "1": "sparse.state.1.sum"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
def test_fused_states_by_name(ordered, shape):
    shapes = torchrec_shapes({f"t_{i}": 3 for i in range(11)}, prefix="model.")
    state = {f"{EBC}.t_10.weight.t_10.momentum1": shape}
    named = {f"model.{name}": size for name, size in state.items()}
    for group in (("optimizer.state", named), ("optimizer.state", state)):
        info = infer_model(make_checkpoint(("model", shapes), group, ordered=ordered))
        assert set(info.row_state) == {"t_10"}
    wrapped = {f"_dmp_wrapped_module.module.model.{name}": size for name, size in state.items()}
    info = infer_model(
        make_checkpoint(("model", shapes), ("optimizer.state", wrapped), ordered=ordered)
    )
    assert set(info.row_state) == {"t_10"}


def test_states_by_parameter_name():
    group = (f"optimizer.state.{EBC}.t_a.weight", {"exp_avg": (3, 4), "exp_avg_sq": (3, 4)})
    info = infer_model(make_checkpoint(("model", torchrec_shapes()), group))
    assert {t.name for t in info.row_state.values()} == {"exp_avg_sq"}


@pytest.mark.parametrize("shape", [(6,), (4,), (3, 4, 1), (3, 2), ()])
def test_states_of_other_shapes_are_passed_over(shape):
    group = ("optimizer.state", {f"{EBC}.t_a.weight.t_a.momentum1": shape})
    assert paths(infer_model(make_checkpoint(("model", torchrec_shapes()), group))) == {}


def test_no_state():
    info = infer_model(make_checkpoint(("", torchrec_shapes())))
    assert not info.row_state and not info.ignored


def dense_paths(info):
    return {n: t.path for n, t in info.optimizer_state.items() if not n.startswith("tables.")}


@pytest.mark.parametrize("name", ["sum", "exp_avg_sq"])
def test_dense_states_by_index(name):
    shapes = facebook_shapes((3, 4))
    groups = [(f"optimizer.state.{i}", {name: shape}) for i, shape in enumerate(shapes.values())]
    info = infer_model(make_checkpoint(("model", shapes), *groups))
    assert set(info.optimizer_state) == set(info.tensors)
    for canonical, state in info.optimizer_state.items():
        assert state.shape == info.tensors[canonical].shape
        index = [*shapes].index(info.tensors[canonical].name)
        assert state.path == f"optimizer.state.{index}.{name}"


def test_dense_states_by_name_bear_the_names_of_the_tensors():
    """The last layer of over_arch stands apart in this family's names, but not in ours."""
    shapes = torchrec_shapes({"t_1": 3, "t_2": 5})
    groups = [
        (f"optimizer.state.{name}", {"exp_avg": shape, "exp_avg_sq": shape})
        for name, shape in shapes.items()
    ]
    for ordered in (True, False):
        info = infer_model(make_checkpoint(("model", shapes), *groups, ordered=ordered))
        assert set(info.optimizer_state) == set(info.tensors)
        assert "over_arch.1.weight" in info.optimizer_state
        for canonical, state in info.optimizer_state.items():
            assert state.path == f"optimizer.state.{info.tensors[canonical].name}.exp_avg_sq"


@pytest.mark.parametrize("shape", [(4,), (4, 1), (3, 4), (4, 3, 1), (5, 3), ()])
def test_dense_states_of_other_shapes_are_passed_over(shape):
    """A layer has no number per row: only a table's accumulator may be so short."""
    layer = "dense_arch.model._mlp.0._linear"
    groups = [
        (f"optimizer.state.{layer}.weight", {"sum": shape}),
        (f"optimizer.state.{layer}.bias", {"sum": (4,)}),
    ]
    assert set(
        dense_paths(infer_model(make_checkpoint(("model", torchrec_shapes()), *groups)))
    ) == {"dense_arch.0.bias"}


def test_a_state_of_the_right_shape_is_found_behind_a_wrong_one():
    name = f"{EBC}.t_a.weight"
    groups = [(f"one.state.{name}", {"sum": (6,)}), (f"two.state.{name}", {"sum": (3,)})]
    info = infer_model(make_checkpoint(("model", torchrec_shapes()), *groups))
    assert paths(info) == {"t_a": f"two.state.{name}.sum"}


@pytest.mark.parametrize("second", ["exp_avg_sq", "momentum2"])
@pytest.mark.parametrize("shape", [(3, 4), (3,)])
def test_fused_adams_average_of_gradients_is_not_taken_for_their_squares(second, shape):
    """TorchRec calls every fused optimizer's first state `momentum1`."""
    start = f"{EBC}.t_a.weight.t_a"
    states = {f"{start}.momentum1": (3, 4), f"{start}.{second}": shape}
    info = infer_model(make_checkpoint(("model", torchrec_shapes()), ("optimizer.state", states)))
    assert paths(info) == {"t_a": f"optimizer.state.{start}.{second}"}
    misfit = states | {f"{start}.{second}": (6,)}
    info = infer_model(make_checkpoint(("model", torchrec_shapes()), ("optimizer.state", misfit)))
    assert paths(info) == {}


def test_states_that_are_no_floats_are_passed_over():
    group = (f"optimizer.state.{EBC}.t_a.weight", {"sum": (3,)})
    info = infer_model(
        make_checkpoint(("model", torchrec_shapes()), group, dtypes={"sum": "int64"})
    )
    assert paths(info) == {}


@pytest.mark.parametrize(
    ("name", "scalars", "expected"),
    [
        ("sum", {"optimizer.param_groups.0.initial_accumulator_value": 0.1}, 0.1),
        ("exp_avg_sq", {"optimizer.param_groups.0.initial_accumulator_value": 0.1}, 0),
        ("sum", {"other.param_groups.0.initial_accumulator_value": 0.1}, 0),
        ("sum", {f"optimizer.param_groups.{i}.initial_accumulator_value": i for i in (1, 2)}, 0),
        ("sum", {"optimizer.param_groups.0.initial_accumulator_value": "much"}, 0),
        ("sum", {"optimizer.param_groups.0.initial_accumulator_value": float("nan")}, 0),
        ("sum", {"optimizer.param_groups.0.initial_accumulator_value": -1.0}, 0),
        ("sum", {"optimizer.param_groups.0.lr": 0.1}, 0),
    ],
)
def test_what_an_accumulator_held_before_training(name, scalars, expected):
    group = (f"optimizer.state.{EBC}.t_a.weight", {name: (3, 4)})
    opened = replace(make_checkpoint(("model", torchrec_shapes()), group), scalars=scalars)
    state = infer_model(opened).row_state["t_a"]
    assert read_initial_value(opened, state) == expected
