"""A captured graph that was edited by hand is refused before anything of it is run."""

from __future__ import annotations

import copy

import pytest
import torch

from dmt_convert.capture import CapturedNetwork, read_graph
from dmt_convert.errors import ArchitectureError

FEATURE = {"node": "feature.0"}
GRAPH = {
    "nodes": [
        ["joined", "aten.cat.default", [[FEATURE, {"node": "dense"}], 1], {}],
        ["turned", "aten.permute.default", [{"weight": "head.weight"}, [1, 0]], {}],
        [
            "logit",
            "aten.addmm.default",
            [{"weight": "head.bias"}, {"node": "joined"}, {"node": "turned"}],
            {},
        ],
    ],
    "weights": {
        "head.weight": {"shape": [1, 5], "dtype": "float32", "trained": True},
        "head.bias": {"shape": [1], "dtype": "float32", "trained": False},
    },
    "output": "logit",
}
SHAPES = {"head.weight": (1, 5), "head.bias": (1,)}


def edited(*path: object, to: object) -> dict:
    graph = copy.deepcopy(GRAPH)
    at = graph
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return graph


def added(op: str, *args: object, **kwargs: object) -> dict:
    graph = copy.deepcopy(GRAPH)
    graph["nodes"].append(["more", op, list(args), kwargs])
    return graph


REFUSED = {
    "an operator": (edited("nodes", 0, 1, to="aten.bernoulli.default"), "unknown operator"),
    "Python": (edited("nodes", 0, 1, to="builtins.eval"), "unknown operator 'builtins.eval'"),
    "a cycle": (edited("nodes", 0, 2, 0, 0, to={"node": "logit"}), "a cycle, or missing"),
    "two names": (edited("nodes", 1, 0, to="joined"), "two nodes are called 'joined'"),
    "a feature": (edited("nodes", 0, 2, 0, 0, to={"node": "feature.1"}), "'feature.1'"),
    "a weight": (edited("nodes", 1, 2, 0, to={"weight": "body"}), "'body', which is not listed"),
    "an object": (edited("nodes", 1, 2, 0, to={"module": "os"}), "has an argument"),
    "a node": (edited("nodes", 1, to=["turned"]), "node 1 is not"),
    "no list": (edited("nodes", to={}), "nodes is not a list"),
    "a number": (added("aten.add.Scalar", FEATURE, 1 << 80), "has a number"),
    "depth": (added("aten.view.default", FEATURE, [[[[[1]]]]]), "has an argument"),
    "an output": (edited("output", to="nothing"), "the output 'nothing' is not a node"),
    "a dtype": (edited("weights", "head.bias", "dtype", to="complex64"), "has no shape, known"),
    "a shape": (edited("weights", "head.bias", "shape", to=[-1]), "has no shape, known dtype"),
    "a huge weight": (edited("weights", "head.bias", "shape", to=[1 << 40]), "has shape"),
    "trained integers": (edited("weights", "head.weight", "dtype", to="int64"), "not float32"),
    "a name": (edited("weights", to={"..": GRAPH["weights"]["head.bias"]}), "has no name"),
    "another shape": (edited("weights", "head.bias", "shape", to=[2]), "stored is [1]"),
}
UNFIT = {
    "shapes": (edited("nodes", 1, 2, 1, to=[0, 1]), "RuntimeError"),
    "an argument": (added("aten.relu.default", FEATURE, FEATURE), "more"),
    "a huge result": (added("aten.full.default", [1 << 20, 1 << 20], 0.0), "would have shape"),
    "a huge repeat": (added("aten.repeat.default", FEATURE, [1 << 30, 1]), "would have shape"),
    "several columns": (edited("output", to="joined"), r"is a tensor of shape \[2, 5\]"),
    "a number as output": (edited("output", to="turned"), r"is a tensor of shape \[5, 1\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_edited_graph_is_refused_by_reading_it(what: str) -> None:
    graph, said = REFUSED[what]
    with pytest.raises(ArchitectureError, match="may not be run") as error:
        read_graph(graph, 1, SHAPES)
    assert said in "\n".join(error.value.details)


@pytest.mark.parametrize("what", UNFIT)
def test_a_graph_that_does_not_fit_together_is_refused(what: str) -> None:
    graph, said = UNFIT[what]
    read_graph(graph, 1)
    with pytest.raises(ArchitectureError, match=said if what != "an argument" else "relu"):
        CapturedNetwork(graph, (3,), 2)


def test_a_good_graph_is_run_and_trained() -> None:
    graph = read_graph(GRAPH, 1, SHAPES)
    assert graph.to_config() == GRAPH
    network = CapturedNetwork(GRAPH, (3,), 2)
    assert {name for name, _ in network.named_parameters()} == {"head.weight"}
    weight = torch.randn(1, 5)
    network.load_state_dict({"head.weight": weight, "head.bias": torch.ones(1)})
    dense, pooled = torch.randn(4, 2), torch.randn(4, 3)
    logits = network(dense, [pooled])
    torch.testing.assert_close(logits, torch.cat([pooled, dense], 1) @ weight[0] + 1)
    logits.sum().backward()
    assert network.head.weight.grad is not None
