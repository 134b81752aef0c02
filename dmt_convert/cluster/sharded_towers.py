"""TorchRec's sharded towers, with what they lack.

What `ShardedEmbeddingTowerCollection` of torchrec 1.8.0 lacks, and gets here:
- it runs on CPUs (DistributedDataParallel is given no device ids there);
- ids reach their rank in one exchange, which can be started a step ahead;
- tower outputs cross hosts full duplex, in the bits of their towers' codes;
- all towers of a host look up at once and, if their modules allow it, compress before they
  exchange (`tower_run`);
- weights can be loaded with `load_state_dict`;
- the plan that it is given stays as it is.

Letters: P groups of hosts, L ranks per group, B samples of one rank, O elements emitted.

Source: torchrec/distributed/embedding_tower_sharding.py of torchrec 1.8.0.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import embedding_tower_sharding as stock
from torchrec.distributed.types import LazyAwaitable, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_tower import EmbeddingTowerCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.exchange import PeerExchange
from dmt_convert.cluster.index_route import Arriving, IndexRoute, describe_lookups
from dmt_convert.cluster.tower_run import make_tower_run
from dmt_convert.cluster.transport import Transport
from dmt_convert.cluster.wire import TowerFormat, digest_formats, make_wires
from dmt_convert.errors import BundleError


class ShardedTowers(stock.ShardedEmbeddingTowerCollection):  # type: ignore[misc]
    """Towers over the ranks of a cluster.

    Args:
        module: The towers, in the order of their hosts.
        parameter_sharding: Table -> its shards.
        sharder: The sharder that makes it.
        env: All ranks.
        device: Where this rank's shards lie.
        formats: How what every tower emits travels between hosts.

    Raises:
        BundleError: Ranks do not have the same formats.
    """

    def __init__(
        self,
        module: EmbeddingTowerCollection,
        parameter_sharding: Mapping[str, ParameterSharding],
        sharder: TowersSharder,
        env: ShardingEnv,
        *,
        device: torch.device | None,
        formats: Sequence[TowerFormat],
    ) -> None:
        with _data_parallel_on(device):
            super().__init__(
                module,
                copy.deepcopy(dict(parameter_sharding)),
                sharder._tower_sharder,
                env,
                sharder.fused_params,
                device,
            )
        assert self.embeddings, "every group of hosts has a tower"
        embeddings = list(self.embeddings.values())
        lookups = [describe_lookups([embedding]) for embedding in embeddings]
        joined = [lookup for found in lookups for lookup in found]
        self._route = IndexRoute(
            joined, self._cross_pg, dist.get_rank(self._intra_pg), sharder.transport
        )
        heads = [wrapped.module for wrapped in self.interactions.values()]
        self._towers = make_tower_run(
            embeddings,
            list(self.interactions.values()),
            heads,
            lookups,
            self._intra_pg,
            sharder.transport,
        )
        self._columns = _gather_columns(self._towers.columns, formats, self._cross_pg)
        mine = self._towers.columns
        order = sorted(range(len(mine)), key=mine.__getitem__)
        self._exchange = PeerExchange(
            self._cross_pg,
            sharder.transport,
            [make_wires(formats, columns) for columns in self._columns],
            () if order == list(range(len(mine))) else order,
        )
        self._ahead: deque[tuple[KeyedJaggedTensor, Arriving]] = deque()

    def arriving_columns(self) -> list[int]:
        """Columns of the towers' joint output, in the order in which they arrive."""
        return [column for columns in self._columns for column in columns]

    def start_input(self, features: KeyedJaggedTensor) -> None:
        """Start the exchange of a later batch's ids; `forward` takes it up when it comes."""
        self._ahead.append((features, self._route.start(features)))

    def advance_input(self) -> None:
        """Send the ids whose number has arrived: the second part of `start_input`."""
        for _, arriving in self._ahead:
            arriving.advance()

    def forget_input(self) -> None:
        """Wait for what was started and is no longer needed."""
        self.advance_input()
        while self._ahead:
            self._ahead.popleft()[1].wait()

    def forward(self, features: KeyedJaggedTensor) -> LazyAwaitable[Tensor]:
        """Look up, compress, exchange.

        Args:
            features: Ids of this rank's B samples, in host memory.

        Returns:
            An awaitable of all towers' outputs, shape (B, sum of O).
        """
        # a batch that is measured comes before one that is sent ahead for training
        started = [i for i, (sent, _) in enumerate(self._ahead) if sent is features]
        if started:
            arriving = self._ahead[started[0]][1]
            del self._ahead[started[0]]
        else:
            arriving = self._route.start(features)
        # shape (P * B, own O)
        emitted = self._towers(self._route.split(arriving.wait()))
        return self._exchange(emitted)

    def input_dist(self, *_: Any) -> NoReturn:
        """Refuse TorchRec's pipelines, which would exchange ids twice."""
        raise NotImplementedError("ids are sent ahead with start_input")

    def forget_cached_rows(self) -> None:
        """Drop rows that accelerators keep of tables in host memory: these were written to."""
        for embedding in self.embeddings.values():
            for lookup in embedding._lookups:
                lookup.purge()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy weights in, by the names of `state_dict`; shards have to be cut alike."""
        own = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing: {missing}; unexpected: {unexpected}")
        with torch.no_grad():
            for name in own.keys() & state_dict.keys():
                for mine, given in _pairs(own[name], state_dict[name]):
                    mine.copy_(given)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)


class TowersSharder(stock.EmbeddingTowerCollectionSharder):  # type: ignore[misc]
    """Makes `ShardedTowers` of an `EmbeddingTowerCollection`.

    Args:
        fused_params: The tables' optimizer, as TorchRec's sharders take it.
        formats: How what every tower emits travels between hosts.
        transport: How ranks exchange.
    """

    def __init__(
        self,
        fused_params: dict[str, Any],
        *,
        formats: Sequence[TowerFormat],
        transport: Transport,
    ) -> None:
        super().__init__(fused_params=fused_params)
        self._formats, self.transport = formats, transport

    def shard(
        self,
        module: EmbeddingTowerCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedTowers:
        """Shard the towers; all ranks at once."""
        return ShardedTowers(module, params, self, env, device=device, formats=self._formats)


def _gather_columns(
    mine: Sequence[int], formats: Sequence[TowerFormat], peers: dist.ProcessGroup
) -> list[list[int]]:
    """Return the columns that every peer sends, in their order in messages: ascending.

    Raises:
        BundleError: A peer would read messages in another way than they are written.
    """
    found: list[Any] = [None] * dist.get_world_size(peers)
    dist.all_gather_object(found, (sorted(mine), digest_formats(formats)), group=peers)
    kinds = {digest for _, digest in found}
    if len(kinds) > 1:
        raise BundleError(
            f"{len(kinds)} different codes of the same towers on {len(found)} hosts",
            expected="the same bundle, with the same ranges of its codes, on every host",
            hint="copy the bundle to all hosts again",
        )
    return [columns for columns, _ in found]


@contextmanager
def _data_parallel_on(device: torch.device | None) -> Iterator[None]:
    """Let TorchRec's towers be data-parallel on a CPU, which has no device ids."""
    if device is None or device.type != "cpu":
        yield
        return

    def without_ids(**options: Any) -> DistributedDataParallel:
        return DistributedDataParallel(**{**options, "device_ids": None})

    kept = stock.DistributedDataParallel
    stock.DistributedDataParallel = without_ids
    try:
        yield
    finally:
        stock.DistributedDataParallel = kept


def _pairs(mine: Any, given: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if hasattr(mine, "local_shards"):
        for a, b in zip(mine.local_shards(), given.local_shards(), strict=True):
            yield a.tensor, b.tensor
    else:
        yield mine, given
