"""Whether a file keeps the order in which its model was built."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dmt_convert.checkpoint import open_checkpoint

NAMES = ("user", "item", "10", "2", "ad")


def build(*, bias: bool = True, half: bool = False) -> dict[str, torch.Tensor]:
    tables = {name: nn.EmbeddingBag(3 + len(name), 4) for name in NAMES}
    model = nn.ModuleDict(
        {
            "sparse": nn.ModuleDict(tables),
            "dense": nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Linear(4, 4, bias=bias)),
            "over": nn.Sequential(*(nn.Linear(4, 4, bias=bias) for _ in range(11))),
            "norm": nn.BatchNorm1d(4),
        }
    )
    if half:
        model["sparse"].half()
    return dict(model.state_dict())


def is_ordered(state, tmp_path) -> bool:
    torch.save(dict(state), tmp_path / "model.pt")
    return open_checkpoint(tmp_path / "model.pt").ordered


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"half": True}])
def test_what_a_module_lists_is_in_order(options, tmp_path):
    assert is_ordered(build(**options), tmp_path)
    state = build(**options)
    sums = {name: state[name] for name in sorted(state)}
    torch.save({"model": state, "optimizer": {"state": sums}}, tmp_path / "nested.pt")
    assert open_checkpoint(tmp_path / "nested.pt").ordered


def by_rank(state):
    """Tables on two ranks, the dense part after those of the first, as merged dicts leave it."""
    tables = [name for name in state if name.startswith("sparse")]
    rest = [name for name in state if name not in tables]
    return [*tables[::2], *rest, *tables[1::2]]


def dealt(state):
    """As DCP of a replicated model leaves it: every tensor on the rank that holds the least."""
    names = list(state)
    return [*names[::2], *names[1::2]]


def shuffled(state):
    return random.Random(3).sample(list(state), len(state))


@pytest.mark.parametrize(
    "rebuild",
    [
        by_rank,
        dealt,
        shuffled,
        sorted,
        lambda state: sorted(state, reverse=True),
        lambda state: [*state][::-1],
        lambda state: sorted(state, key=lambda name: state[name].numel()),
        lambda state: sorted(state, key=lambda name: -state[name].numel()),
        lambda state: sorted(state, key=lambda name: (len(name), name)),
    ],
)
def test_a_dict_that_was_put_together_anew_is_not(rebuild, tmp_path):
    state = build()
    assert not is_ordered({name: state[name] for name in rebuild(state)}, tmp_path)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"half": True}])
def test_what_went_through_safetensors_is_not(options, tmp_path):
    save_file(build(**options), tmp_path / "a.safetensors")
    assert not is_ordered(load_file(tmp_path / "a.safetensors"), tmp_path)


def test_numbered_modules_out_of_order_are_not(tmp_path):
    tables = {f"emb.{i}.weight": torch.ones(3, 2) for i in range(12)}
    assert is_ordered(tables, tmp_path)
    assert not is_ordered({name: tables[name] for name in sorted(tables)}, tmp_path)
    merged = [f"emb.{i}.weight" for i in (*range(0, 12, 2), *range(1, 12, 2))]
    assert not is_ordered({name: tables[name] for name in merged}, tmp_path)


def test_names_that_nest_without_end_cost_nothing(tmp_path):
    assert not is_ordered({"." * 4000: torch.ones(1), "a": torch.ones(1)}, tmp_path)
