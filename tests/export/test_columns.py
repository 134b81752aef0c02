"""Columns that are joined late: the same numbers as a matrix, whatever is done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dmt_convert.serving.columns import Columns, keep_values

BATCH, DIM = 6, 4
WIDTHS = (8, 4, 12)


def index(values: list[int]) -> Tensor:
    tensor = torch.tensor(values)
    keep_values(tensor)
    return tensor


ORDER = index(torch.arange(24).reshape(6, DIM)[[3, 0, 5, 1, 4, 2]].reshape(-1).tolist())
CELLS = index([6 * i + j for i in range(6) for j in range(i)])
SPARSE = index([0, 24, 24, 5, 23, 24, 7])
LINEAR, WIDE = nn.Linear(24, 5), nn.Linear(24 + len(CELLS), 5)


def dots(x: Any) -> Any:
    vectors = x[:, ORDER].reshape(-1, 6, DIM)
    return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, CELLS)


def parts(x: Any) -> list[Any]:
    return list(torch.split(x[:, ORDER], [8, 4, 12], dim=1))


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda x: x,
    "another order": lambda x: x[:, ORDER],
    "filled up with zeros": lambda x: functional.pad(x, (0, 1))[:, SPARSE],
    "a layer": LINEAR,
    "a layer over another order": lambda x: torch.relu(LINEAR(x[:, ORDER])),
    "cut": lambda x: torch.cat(parts(x)[::-1], dim=1),
    "a layer for a part": lambda x: torch.cat([torch.relu(p) for p in parts(x)], dim=1),
    "cross": lambda x: x * LINEAR.weight[0, 0] * x + x,
    "dot products": dots,
    "a layer over dot products": lambda x: WIDE(torch.cat((x, dots(x)), dim=1)),
    "all dot products": lambda x: torch.bmm(x.reshape(-1, 6, 4), x.reshape(-1, 6, 4).mT).sum(2),
    "vectors": lambda x: x.reshape(-1, 6, 4).sum(1),
    "other functions": lambda x: torch.softmax(x, dim=1).cumsum(1) @ LINEAR.weight.t(),
    "other methods": lambda x: x.square().unsqueeze(2).flatten(1)[:3],
    "other splits": lambda x: torch.cat(torch.split(x, 5, dim=1)[::-1], dim=1),
}


@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize(
    "once", [(False,) * 3, (True, False, False), (True, False, True), (True,) * 3], ids=str
)
def test_columns_are_what_a_matrix_is(what: str, once: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1 if o else BATCH, w) for o, w in zip(once, WIDTHS, strict=True)]
    joined = torch.cat([tensor.expand(BATCH, -1) for tensor in tensors], dim=1)
    columns = Columns.cat(
        [Columns.of(BATCH, tensor, once=o) for tensor, o in zip(tensors, once, strict=True)]
    )
    found = FUNCTIONS[what](columns)
    if isinstance(found, Columns):
        assert found.shape == FUNCTIONS[what](joined).shape
        found = found.joined()
    torch.testing.assert_close(found, FUNCTIONS[what](joined), rtol=1e-5, atol=1e-5)


def test_what_has_one_row_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer over columns of both kinds, and of dot products."""
    seen: list[int] = []
    plain = functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(x.shape[0])
        return plain(x, weight, bias)

    tensors = torch.randn(1, 16), torch.randn(BATCH, 8)
    user, items = (Columns.of(BATCH, t, once=len(t) == 1) for t in tensors)
    x = Columns.cat((user, items))
    monkeypatch.setattr(functional, "linear", linear)
    Columns.cat((x, dots(x))).linear(WIDE.weight, WIDE.bias)
    assert seen == [1, BATCH]
    assert [source.tensor.shape[0] for source in dots(x).sources] == [1, BATCH]
