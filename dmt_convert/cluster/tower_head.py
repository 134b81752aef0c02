"""A tower's module, on what the lookup gives.

Letters: B samples, F features of the tower, N embedding dim, O elements emitted per sample, c
vectors of D elements per feature, L ranks that share a tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dmt_convert.cluster.padding import Width, make_trim
from dmt_convert.cluster.transport import Transport
from dmt_convert.model import CodedModule, FeatureWise, map_features


class TowerHead(nn.Module):
    """A tower's module, after the exchange inside its hosts, or, feature by feature, before it.

    A module that maps every feature by itself gives the same on the rank that looked it up, and
    then what crosses between the ranks of a host is compressed as well.

    Args:
        features: The tower's features, in its order.
        dims: Their embedding dims, and how the lookup gives them.
        module: The tower module, which takes their pooled embeddings side by side.
        columns: Columns of the tower in the joint output of all towers: the first, and how many.
        transport: Of this rank.
    """

    def __init__(
        self,
        features: Sequence[str],
        dims: Sequence[Width],
        module: nn.Module,
        columns: tuple[int, int],
        transport: Transport,
    ) -> None:
        super().__init__()
        self.features, self.dims, self.module = list(features), [w.dim for w in dims], module
        self.looked_up = list(dims)
        self._trim = make_trim(dims, transport)
        # DistributedDataParallel refuses a module that has nothing to train
        has_none = not any(True for _ in module.parameters())
        self.anchor = nn.Parameter(torch.zeros(1)) if has_none else None
        self._start, self._width = columns
        self._feature_widths = module.feature_widths if isinstance(module, FeatureWise) else None

    @property
    def maps_features(self) -> bool:
        """Whether every feature is mapped by itself."""
        return self._feature_widths is not None

    def widths(self) -> list[int]:
        """Elements that every feature emits, if each is mapped by itself."""
        assert self._feature_widths is not None
        return list(self._feature_widths)

    def columns(self, names: Sequence[str]) -> list[int]:
        """Columns of the joint output that some features emit, in their order."""
        widths = self.widths()
        starts = dict(
            zip(self.features, torch.tensor([0, *widths]).cumsum(0).tolist(), strict=False)
        )
        width = dict(zip(self.features, widths, strict=True))
        return [
            self._start + starts[name] + column for name in names for column in range(width[name])
        ]

    def block(self) -> list[int]:
        """Columns of the joint output that the tower emits as a whole."""
        return list(range(self._start, self._start + self._width))

    def forward(self, embeddings: KeyedTensor | Tensor, part: LocalPart | None = None) -> Tensor:
        """Return what the tower emits, before it is rounded.

        Args:
            embeddings: The tower's pooled embeddings; with a part, those of its features alone,
                shape (B, their N).
            part: The features that this rank looked up, where the exchange is to follow.

        Returns:
            Shape (B, O); with a part, the columns of its features.
        """
        if part is not None:
            assert isinstance(embeddings, Tensor)
            emitted = part.apply(self.module, embeddings)
        else:
            assert isinstance(embeddings, KeyedTensor)
            module = self.module
            # the exchange rounds what it sends as the tower's code does
            emit = module.emit if isinstance(module, CodedModule) else module
            emitted = emit(self._join(embeddings))
        return emitted if self.anchor is None else anchor(emitted, self.anchor)

    def _join(self, embeddings: KeyedTensor) -> Tensor:
        values: Tensor = embeddings.values()
        if embeddings.keys() != self.features:
            by_name = embeddings.to_dict()
            values = torch.cat([by_name[name] for name in self.features], dim=1)
        return values if self._trim is None else self._trim(values)


class LocalPart:
    """The features of a tower that one rank looks up.

    Args:
        head: The tower's.
        names: The features, in the order of the lookup.
        sharers: L.
        transport: Of this rank.
    """

    def __init__(
        self, head: TowerHead, names: Sequence[str], sharers: int, transport: Transport
    ) -> None:
        places = [head.features.index(name) for name in names]
        starts = torch.tensor([0, *head.dims]).cumsum(0)
        self._features = transport.put(torch.tensor(places, dtype=torch.int64))
        self.dims = [head.dims[place] for place in places]
        self._trim = make_trim([head.looked_up[place] for place in places], transport)
        rows = [torch.arange(int(starts[p]), int(starts[p + 1])) for p in places]
        self._rows = transport.put(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64))
        self.sharers = sharers

    def apply(self, module: nn.Module, pooled: Tensor) -> Tensor:
        """Map the features as looked up, sum of N columns, to (B, features * c * D)."""
        if self._trim is not None:
            pooled = self._trim(pooled)
        assert isinstance(module, FeatureWise)
        maps = module.feature_maps()
        if maps is None:
            return pooled
        # The gradient of a weight comes from this rank alone, over the samples of all L ranks;
        # data-parallel takes the mean over L.
        weight, bias = (_scale(value, self.sharers) for value in maps)
        weight = weight.index_select(0, self._rows)
        bias = bias.index_select(0, self._features)
        if not self.dims:
            return pooled + 0 * (weight.sum() + bias.sum())
        return map_features(pooled, weight, bias, self.dims)


class _Scale(torch.autograd.Function):
    """Multiplies a gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _scale(value: Tensor, factor: int) -> Tensor:
    scaled: Tensor = _Scale.apply(value, factor)  # type: ignore[no-untyped-call]
    return scaled


class _Anchored(torch.autograd.Function):
    """Gives parameters that may do nothing a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, emitted: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [value.shape for value in parameters]
        return emitted.view_as(emitted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(gradient.new_zeros(shape) for shape in ctx.shapes)


def anchor(emitted: Tensor, *parameters: Tensor) -> Tensor:
    """Return what is emitted; parameters get a gradient, of zeros where they have no part in it."""
    anchored: Tensor = _Anchored.apply(emitted, *parameters)  # type: ignore[no-untyped-call]
    return anchored
