"""Dot products of many vectors, computed part by part, are those of all pairs at once."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from dmt_convert.model import layers
from dmt_convert.model.interaction_modules import DotInteraction
from dmt_convert.spec import InteractionSpec


def build(order, self_pairs, count, dim=3, outputs=5):
    """An interaction of `count` vectors, a layer behind it, and six rows of input."""
    torch.manual_seed(0)
    spec = InteractionSpec(kind="dot", pair_order=order, self_pairs=self_pairs)
    dot = DotInteraction(spec, (dim,) * count)
    pairs = count * (count + (1 if self_pairs else -1)) // 2
    layer = nn.Linear(dim + pairs, outputs)
    inputs = [torch.randn(6, dim), torch.randn(6, (count - 1) * dim), torch.randn(6, dim)]
    return dot, layer, [tensor.requires_grad_(True) for tensor in inputs]


@pytest.mark.parametrize("order", ["tril", "triu"])
@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("rows_of_pairs", [1, 2, 5, 100])
def test_values_and_gradients(monkeypatch, order, self_pairs, rows_of_pairs):
    count = 9
    dot, layer, inputs = build(order, self_pairs, count)
    monkeypatch.setattr(layers, "_PART_ELEMENTS", 6 * count * rows_of_pairs)
    wanted = [*inputs, *layer.parameters()]
    expected = layer(dot(*inputs))
    direction = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), wanted)
    found = dot.map_output(layer, *inputs)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), wanted), expected_gradients, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(dot.map_output(layer, *inputs), expected)


def test_a_gradient_costs_a_few_times_a_forward_pass():
    """A gradient took two hundred times a forward pass once pairs were picked row by row."""
    dot, layer, inputs = build("triu", False, 400, dim=4)
    begin = time.process_time()
    with torch.no_grad():
        dot.map_output(layer, *inputs)
    forward = time.process_time() - begin
    begin = time.process_time()
    torch.autograd.grad(dot.map_output(layer, *inputs).sum(), inputs[1])
    assert time.process_time() - begin < 30 * forward + 1
