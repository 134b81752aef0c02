"""How long one training step takes: flat, SPTT and DMT, on accelerators that are not here.

Letters: B samples per rank, P groups of hosts that hold towers together.

A step is the sum of what its rank computes and of what of its communication nothing hides:

    step = overhead + lookup + reshuffle + tower modules + dense + exposed

What may hide behind what (everything else follows each other):
- the exchange of the next batch's ids: interaction and over_arch;
- embeddings, forward: dense_arch, which needs none of them;
- their gradients, backward: dense_arch's backward pass;
- the all-reduce of dense gradients: what then is left of dense_arch's backward pass, the backward
  pass of the tower modules and the update of the tables; never an AlltoAll, which needs the same
  links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dmt_convert.errors import ConfigError
from dmt_convert.interactions import DenseWork
from dmt_convert.placement import ELEMENT_BYTES, Exchange
from dmt_convert.placement.predict.collectives import Network, Peers
from dmt_convert.placement.predict.model_work import BACKWARD
from dmt_convert.placement.predict.presets import Gpu
from dmt_convert.placement.predict.step_load import Lookup, StepLoad
from dmt_convert.spec import COMM_DTYPES, CommDtype

_COMM_BYTES: Final[Mapping[str, int]] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}

GRADIENT_BYTES: Final = 4
"""Gradients of dense parts are summed as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What steps run on, and how."""

    gpu: Gpu
    """The accelerator of every rank; its links and memory are the network's cluster's."""
    network: Network
    """The links."""
    batch: int
    """B."""
    comm_dtype: CommDtype = "fp32"
    """What embeddings, tower outputs and their gradients travel as; ids stay int64, gradients of
    dense parts float32."""

    def __post_init__(self) -> None:
        if type(self.batch) is not int or self.batch < 1:
            raise ConfigError(
                f"--batch {self.batch}",
                expected="samples per rank and step, at least 1",
                hint="1024 is the default",
            )
        if self.comm_dtype not in COMM_DTYPES:
            raise ConfigError(
                f"--comm-dtype {self.comm_dtype}",
                expected="one of " + ", ".join(COMM_DTYPES),
                hint="fp32 is the default; bf16 halves what crosses hosts",
            )

    def compute_seconds(self, flops: float) -> float:
        """Time for so many FLOPs."""
        return flops / (self.gpu.flops_per_s * self.network.assumptions.compute_efficiency)

    def memory_seconds(self, num_bytes: float) -> float:
        """Time to read or write so many bytes in random rows."""
        share = self.network.assumptions.lookup_efficiency
        return num_bytes / (self.gpu.hbm_bytes_per_s * share)

    def copy_seconds(self, num_bytes: float) -> float:
        """Time to read or write so many bytes in whole vectors."""
        return num_bytes / (self.gpu.hbm_bytes_per_s * self.network.assumptions.copy_efficiency)

    def vectors_seconds(self, exchange: Exchange, peers: Peers) -> float:
        """Time of one AlltoAll of vectors."""
        scale = _COMM_BYTES[self.comm_dtype] / ELEMENT_BYTES
        scaled = Exchange(
            cross_bytes=exchange.cross_bytes * scale, intra_bytes=exchange.intra_bytes * scale
        )
        return self.network.all_to_all(scaled, self.batch, peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Where the time of one step goes, in seconds."""

    overhead: float
    """Whatever does not depend on sizes."""
    lookup: float
    """Reading rows, pooling them, and updating them."""
    reshuffle: float
    """Bringing embeddings into another order after they were exchanged, and back; for towers also
    into the order of peers before (SPTT's steps c and e)."""
    tower: float
    """Tower modules, forward and backward."""
    dense: float
    """dense_arch, interaction and over_arch, forward and backward."""
    indices: float
    """Exchange of ids."""
    forward: float
    """Exchange of embeddings and tower outputs."""
    backward: float
    """Exchange of their gradients."""
    all_reduce: float
    """Sums of the gradients of dense parts."""
    exposed: float
    """What of these four exchanges nothing hides."""

    @property
    def communication(self) -> float:
        """All exchanges, hidden or not."""
        return math.fsum((self.indices, self.forward, self.backward, self.all_reduce))

    @property
    def compute(self) -> float:
        """Tower modules, dense parts and reshuffles."""
        return self.tower + self.dense + self.reshuffle

    @property
    def total(self) -> float:
        """The step."""
        return self.overhead + self.lookup + self.compute + self.exposed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What is added up to a step."""

    lookup: Lookup
    """Of the busiest rank."""
    dense_arch: DenseWork
    """Needs no embedding."""
    over: DenseWork
    """Needs all."""
    module_flops: float = 0.0
    """Tower modules, forward, per sample of a rank's own batch."""
    reshuffles: int
    """How often embeddings are brought into another order on their way forward."""
    indices: float
    """Exchange of ids, in seconds."""
    vectors: float
    """Exchange of embeddings and tower outputs, one way, in seconds."""
    all_reduce: float
    """In seconds."""


def step_time(load: StepLoad, machine: Machine) -> StepTime:
    """Predict a step: AlltoAlls inside the hosts of a tower, then among peers.

    Where there is one group of hosts only, as for the flat model, the first runs over all ranks,
    and there are no peers and nothing that comes into their order.
    """
    network, traffic, work = machine.network, load.traffic, load.work
    inside = Peers.of_hosts(network.cluster, load.group_hosts)
    between = Peers.between_groups(load.groups)
    shared = (work.dense_arch.parameters + work.over.parameters) * GRADIENT_BYTES
    return _assemble(
        machine,
        _Parts(
            lookup=load.lookup,
            dense_arch=work.dense_arch,
            over=work.over,
            module_flops=load.module.flops * load.groups,
            reshuffles=2 if load.groups > 1 else 1,
            indices=network.all_to_all(traffic.peer_indices, machine.batch, between)
            + network.all_to_all(traffic.tower_indices, machine.batch, inside),
            vectors=machine.vectors_seconds(traffic.tower_embeddings, inside)
            + machine.vectors_seconds(traffic.tower_outputs, between),
            all_reduce=network.all_reduce(shared, network.cluster.hosts)
            + network.all_reduce(load.module.parameters * GRADIENT_BYTES, load.group_hosts),
        ),
    )


def _assemble(machine: Machine, parts: _Parts) -> StepTime:
    """Add up a step and hide what can be hidden.

    A lookup reads rows and writes pooled vectors; its backward pass reads their gradients, reads
    and writes the rows. A reshuffle reads and writes, and again backward.
    """
    batch, known = machine.batch, machine.network.assumptions
    rows, pooled = parts.lookup.row_bytes * batch, parts.lookup.pooled_bytes * batch
    update = machine.memory_seconds(2 * rows + pooled)
    tower = machine.compute_seconds(parts.module_flops * batch)
    early = machine.compute_seconds(parts.dense_arch.flops * batch)
    late = machine.compute_seconds(parts.over.flops * batch)
    behind_gradients = min(parts.vectors, BACKWARD * early)
    behind_sum = BACKWARD * early - behind_gradients + BACKWARD * tower + update
    exposed = math.fsum(
        (
            parts.indices - min(known.prefetch * parts.indices, (1 + BACKWARD) * late),
            max(0.0, parts.vectors - early),
            parts.vectors - behind_gradients,
            max(0.0, parts.all_reduce - behind_sum),
        )
    )
    return StepTime(
        overhead=known.step_overhead_us * 1e-6,
        lookup=machine.memory_seconds(rows + pooled) + update,
        reshuffle=machine.copy_seconds(4 * parts.reshuffles * pooled),
        tower=(1 + BACKWARD) * tower,
        dense=(1 + BACKWARD) * (early + late),
        indices=parts.indices,
        forward=parts.vectors,
        backward=parts.vectors,
        all_reduce=parts.all_reduce,
        exposed=exposed,
    )
