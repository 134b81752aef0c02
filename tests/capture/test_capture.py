"""What is captured of a live module, and what is refused with which reason."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dmt_convert.capture import Captured, capture_module, flow
from dmt_convert.errors import ArchitectureError, ConfigError
from support import captured_models as models

HISTORY = {
    "item": torch.tensor([1, 2, 24]),
    "other": torch.tensor([3, 3, 0]),
    "history": torch.tensor([[1, 2, 0, 0], [5, 0, 0, 0], [7, 8, 24, 1]]),
}
SILENT = {
    models.Functional: r"a look-up is hidden in aten\.embedding\.default \({line}\)",
    models.Indexed: r"a look-up is hidden in aten\.index\.Tensor \({line}\)",
    models.Tied: r"the table table\.weight is also read behind .* \({line}\)",
    models.Chained: r"the ids of the look-up 'table' are computed from what another look-up gives",
    models.Hashed: r"the ids of the look-up 'table' are computed by aten\.remainder.* \({line}\)",
    models.Random: r"draws at random in eval mode: aten\.native_dropout\.default \({line}\)",
    models.Counting: r"the module writes to seen",
    models.Masked: r"the ids 'b' are also used behind the look-ups, by aten\.ne.* \({line}\)",
    models.Branching: r"cannot trace the module \({line}\): GuardOnDataDependent",
    models.Mixing: r"outputs depend on the other rows of the batch: 7 rows alone and among 64",
    models.Probable: r"look like probabilities",
    models.Ordering: r"operators that cannot be captured: aten\.special_bessel_j0.* \({line}\)",
}
PLAIN = {
    models.TwoHeads: r"several logits: tensors of shapes \[6, 1\], \[6, 1\]",
    models.Raising: r"cannot be run on the example \({line}\): ValueError: not today",
    models.NoTables: r"NoTables has no embeddings",
    models.Half: "the parameter weight is of type float16",
}


def line_of(kind: type[nn.Module]) -> str:
    lines, first = inspect.getsourcelines(kind)
    found = [first + i for i, line in enumerate(lines) if "# HERE" in line]
    return f"captured_models.py, line {found[0]}" if found else "nowhere"


def refuse(kind: type[nn.Module], pattern: str) -> None:
    torch.manual_seed(0)
    module = kind()
    with pytest.raises(ArchitectureError, match=pattern.replace("{line}", line_of(kind))):
        capture_module(module, models.pair())
    assert module.training and "forward" not in vars(module)
    assert nn.Embedding.forward.__name__ == "forward" and not hasattr(
        nn.Embedding.forward, "__wrapped__"
    )


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_not_such_a_model_is_refused(kind: type[nn.Module]) -> None:
    refuse(kind, PLAIN[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SILENT)
def test_what_would_be_silently_wrong_is_refused(kind: type[nn.Module]) -> None:
    refuse(kind, SILENT[kind])


@pytest.mark.slow
def test_tables_of_one_input_become_one_table() -> None:
    torch.manual_seed(0)
    captured = capture_module(models.DeepFm(), (models.matrix(),))
    assert [feature.name for feature in captured.features] == ["x_0", "x_1", "x_2"]
    assert [table.dim for table in captured.tables] == [5, 5, 5]
    assert [column.name for column in captured.dense] == ["x_3", "x_4"]
    assert captured.final_sigmoid
    trained = {name for name, w in captured.config["weights"].items() if w["trained"]}
    assert {*captured.config["weights"]} - trained == {"dnn.1.running_mean", "dnn.1.running_var"}


@pytest.mark.slow
def test_a_table_with_offsets_is_cut_and_positions_stay() -> None:
    torch.manual_seed(0)
    example = {
        "fields": models.fields(6),
        "price": torch.rand(6),
        "age": torch.tensor([20, 30, 40, 50, 60, 70]),
    }
    captured = capture_module(models.Dcn(), (example,))
    assert [feature.name for feature in captured.features] == ["fields_0", "fields_1", "fields_2"]
    ends = [(part.begin, part.end) for table in captured.tables for part in table.parts]
    assert ends == [(0, 30), (30, 70), (70, 90)]
    assert [column.name for column in captured.dense] == ["price", "age"]
    assert "position.weight" in captured.weights
    assert any(subject == "look-ups without a batch" for subject, _, _ in captured.notes)


@pytest.mark.slow
def test_a_bag_leaves_its_padding_out_and_tables_are_shared() -> None:
    torch.manual_seed(0)
    captured = capture_module(models.History(), HISTORY)
    features = {feature.name: feature for feature in captured.features}
    assert features["history"].padding == 0 and features["history"].pooling == "mean"
    assert features["item"].table == features["other"].table
    assert features["item"].single and not features["history"].single


@pytest.mark.slow
def test_a_module_that_fails_on_one_row_is_told_so() -> None:
    captured = capture_module(models.Squeezing(), models.pair())
    assert ("batches of one row", "not compared") in [note[:2] for note in captured.notes]


def other_weight(captured: Captured) -> Captured:
    bias = captured.weights["head.bias"].detach() + 1e-3
    return replace(captured, weights={**captured.weights, "head.bias": bias})


def cut_gradient(captured: Captured) -> Captured:
    text = json.dumps(captured.config).replace('"feature.0"', '"cut"')
    config = json.loads(text)
    config["nodes"].insert(0, ["cut", "aten.detach.default", [{"node": "feature.0"}], {}])
    return replace(captured, config=config)


def swapped(captured: Captured) -> Captured:
    first, second = captured.features
    return replace(captured, features=(second, first))


SABOTEURS = {
    other_weight: "the outputs at 64 rows differ by",
    cut_gradient: r"the gradients by table\.weight differ by",
    swapped: "the outputs at 64 rows differ by",
}


@pytest.mark.slow
@pytest.mark.parametrize("saboteur", SABOTEURS)
def test_a_graph_that_answers_otherwise_is_not_accepted(saboteur, monkeypatch) -> None:
    torch.manual_seed(0)
    check = flow.check_captured
    monkeypatch.setattr(flow, "check_captured", lambda m, i, c: check(m, i, saboteur(c)))
    with pytest.raises(ArchitectureError, match="answer like the module: " + SABOTEURS[saboteur]):
        capture_module(models.Pair(), models.pair())


def test_an_example_must_fit() -> None:
    module = models.Pair()
    with pytest.raises(ArchitectureError, match="missing 1 required positional argument: 'b'"):
        capture_module(module, (models.pair()[0],))
    with pytest.raises(ConfigError, match=r"do not have the same number of rows \(a: 6, b: 5\)"):
        capture_module(module, (models.pair()[0], models.pair(5)[1]))
    with pytest.raises(ConfigError, match="holds no tensors"):
        capture_module(module, (3,))
