"""From ids to what the towers of a host emit: lookup, exchange inside the host, tower modules.

Letters: P groups of hosts, L ranks per group, B samples of one rank, O elements emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.exchange import PeerExchange
from dmt_convert.cluster.index_route import Lookup
from dmt_convert.cluster.tower_head import LocalPart, TowerHead
from dmt_convert.cluster.transport import Transport
from dmt_convert.cluster.wire import Floats, Wire


class TowerRun(Protocol):
    """The towers of this rank's hosts."""

    columns: list[int]
    """Columns of all towers' joint output that come out, in their order."""

    def __call__(self, parts: Sequence[KeyedJaggedTensor]) -> Tensor:
        """Map ids, one part per lookup, to the towers' outputs for P * B samples."""


def make_tower_run(
    embeddings: Sequence[Any],
    modules: Sequence[nn.Module],
    heads: Sequence[TowerHead],
    lookups: Sequence[Sequence[Lookup]],
    group: dist.ProcessGroup,
    transport: Transport,
) -> TowerRun:
    """Choose how towers are run: compressed before the exchange, where that is the same.

    Args:
        embeddings: Sharded lookups, one per tower.
        modules: The towers' heads, data-parallel.
        heads: The same, bare.
        lookups: What every tower's lookups are, by way of cutting its tables.
        group: The ranks that share the towers.
        transport: How they exchange.
    """
    ranks = [names for found in lookups for lookup in found for names in lookup.by_rank]
    looked_up = [name for names in ranks for name in names]
    is_whole = len(looked_up) == len(set(looked_up)) and all(len(found) == 1 for found in lookups)
    if is_whole and all(head.maps_features for head in heads):
        return _EarlyRun(
            embeddings, modules, heads, [found[0] for found in lookups], group, transport
        )
    return _LateRun(embeddings, modules, heads)


class _LateRun:
    """Exchange, then tower modules: for modules over whole towers, and for tables that are cut."""

    def __init__(
        self, embeddings: Sequence[Any], modules: Sequence[nn.Module], heads: Sequence[TowerHead]
    ) -> None:
        self._towers = list(zip(embeddings, modules, strict=True))
        self.columns = [column for head in heads for column in head.block()]

    def __call__(self, parts: Sequence[KeyedJaggedTensor]) -> Tensor:
        each = iter(parts)
        pooled = []
        for embedding, _ in self._towers:
            found = [lookup(next(each)) for lookup in embedding._lookups]
            context = EmbeddingBagCollectionContext(sharding_contexts=[None] * len(found))
            pooled.append(embedding.output_dist(context, found))
        emitted = [
            module(vectors.wait())
            for vectors, (_, module) in zip(pooled, self._towers, strict=True)
        ]
        return emitted[0] if len(emitted) == 1 else torch.cat(emitted, dim=1)


class _EarlyRun:
    """Every feature is mapped on the rank that looked it up; the exchange follows."""

    def __init__(
        self,
        embeddings: Sequence[Any],
        modules: Sequence[nn.Module],
        heads: Sequence[TowerHead],
        lookups: Sequence[Lookup],
        group: dist.ProcessGroup,
        transport: Transport,
    ) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self._towers = [
            (embedding._lookups[0], module, LocalPart(head, lookup.by_rank[rank], size, transport))
            for embedding, module, head, lookup in zip(
                embeddings, modules, heads, lookups, strict=True
            )
        ]
        by_rank = [
            [
                column
                for head, lookup in zip(heads, lookups, strict=True)
                for column in head.columns(lookup.by_rank[other])
            ]
            for other in range(size)
        ]
        self.columns = [column for columns in by_rank for column in columns]
        wires = [Wire([Floats("fp32", len(columns))]) for columns in by_rank]
        self._exchange = PeerExchange(group, transport, list(zip(wires, wires, strict=True)))

    def __call__(self, parts: Sequence[KeyedJaggedTensor]) -> Tensor:
        emitted = [
            module(lookup(part), local)
            for part, (lookup, module, local) in zip(parts, self._towers, strict=True)
        ]
        joined = emitted[0] if len(emitted) == 1 else torch.cat(emitted, dim=1)
        if self._exchange.size == 1:
            return joined
        together: Tensor = self._exchange(joined).wait()
        return together
