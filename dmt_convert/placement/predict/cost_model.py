"""How long one training step takes: flat, SPTT and DMT, on accelerators that are not here.

First the work of a model's dense parts, counted from its spec (`count_work`); then what one step
asks of the busiest rank (`StepLoad`); then the time for it (`step_time`).

Letters: B samples per rank, F features, N embedding dim, D output dim, K vectors emitted, r rank of
a cross layer, H hosts, R ranks per host, W = H * R, P groups of k hosts that hold towers together
(P = H, k = 1 unless there are fewer towers). The flat model is one tower over all hosts that emits
its embeddings as they are: P = 1, k = H. A product of a (m, n) matrix with a vector is 2 m n FLOPs;
biases, ReLUs and the loss are left out.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dmt_convert.interactions import NO_WORK, DenseWork, InteractionSpec, linear_work
from dmt_convert.model import DmtSpec, TowerModuleSpec, one_tower
from dmt_convert.placement import (
    ELEMENT_BYTES,
    ID_BYTES,
    Cluster,
    Exchange,
    TableLoad,
    TowerPlan,
    Traffic,
    measure_ranks,
    measure_traffic,
    tower_loads,
)
from dmt_convert.placement.predict.machine import Machine, Peers
from dmt_convert.spec import DTYPE_BYTES, CommDtype, ModelSpec

GRADIENT_BYTES: Final = 4
"""Gradients of dense parts are summed as float32."""

SWEEPS: Final = 6
"""How often a step passes over a table that every rank holds: its gradient is cleared, filled, sent
and read, its rows are read and written, touched or not."""
BACKWARD: Final = 2.0
"""The backward pass computes gradients of inputs and of weights: twice the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """What all dense parts of a model cost."""

    dense_arch: DenseWork
    """MLP over the dense inputs: needs no embedding."""
    over: DenseWork
    """Interaction and over_arch, and the projection of the dense vector."""
    towers: tuple[DenseWork, ...]
    """The module of every tower."""

    @property
    def flops(self) -> float:
        """Floating-point operations per sample, forward."""
        return self.dense_arch.flops + self.over.flops + sum(work.flops for work in self.towers)


def count_work(model: DmtSpec) -> ModelWork:
    """Count FLOPs and parameters. Those of a passthrough model are the flat model's."""
    flat, pairs = model.flat, list(zip(model.towers, model.dims_by_tower, strict=True))
    over = _interaction_work(model) + model.over_arch.work
    if model.rules.restores:
        for tower, dims in pairs:
            if not tower.everywhere:
                over += linear_work(tower.module.width(dims), sum(dims))
    if model.dense_dim != flat.input_dims[0]:
        over += linear_work(flat.input_dims[0], model.dense_dim)
    return ModelWork(
        dense_arch=flat.dense_arch.work,
        over=over,
        towers=tuple(
            tower.module.rules.work(tower.module, dims) or _built_work(tower.module, dims)
            for tower, dims in pairs
        ),
    )


def _interaction_work(model: DmtSpec) -> DenseWork:
    spec, dims = model.interaction, model.interaction_dims
    return spec.rules.work(spec, dims) or _built_work(spec, dims)


def _built_work(spec: InteractionSpec | TowerModuleSpec, dims: tuple[int, ...]) -> DenseWork:
    """Count a module without a formula as if all its parameters were weights of linear layers."""
    from dmt_convert.model import count_parameters

    parameters = count_parameters(spec, dims)
    return DenseWork(flops=2.0 * parameters, parameters=parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the busiest rank reads of its tables in one step."""

    row_bytes: float
    """Bytes of table rows, per sample of a rank's own batch."""
    mean_row_bytes: float
    """The same of a mean rank."""
    pooled_bytes: float
    """Bytes of the pooled embeddings, as float32, per sample of a rank's own batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """A model in towers on a cluster."""

    groups: int
    """P."""
    group_hosts: int
    """k."""
    traffic: Traffic
    """All exchanges: embeddings in float32, tower outputs and their gradients as they travel."""
    lookup: Lookup
    """Of the busiest rank."""
    module: DenseWork
    """Tower modules of the busiest group of hosts: a rank runs them for P * B samples."""
    work: ModelWork
    """All dense parts."""
    replicated_elements: int = 0
    """Elements of the tables that every rank holds."""


def planned_load(
    model: DmtSpec,
    plan: TowerPlan,
    ids_per_bag: float,
    *,
    comm_dtype: CommDtype | None = None,
    even_ranks: bool = False,
) -> StepLoad:
    """Describe a model as a plan places it.

    Args:
        model: The converted model; its passthrough twin gives SPTT alone.
        plan: Where its tables lie.
        ids_per_bag: Mean number of ids per sample and feature.
        comm_dtype: Precision of tower outputs without a code, and of gradients, see `Machine`.
        even_ranks: Whether the ranks of a group of hosts share its tables evenly, instead of as
            the plan says; groups stay as uneven as their towers.
    """
    ids = dict.fromkeys(model.flat.feature_names, ids_per_bag)
    towers = tower_loads(model.flat, model.assignment, ids)
    loads = {table.name: table for tables in towers for table in tables}
    placed = {placement.table: placement for placement in plan.tables}
    world = plan.cluster.world_size
    rank_widths: Sequence[float]
    _, rank_ids, rank_widths = measure_ranks(loads, placed, world)
    rank_rows: Sequence[float] = _rank_row_bytes(loads, plan)
    resident = [table for table in loads.values() if placed[table.name].is_everywhere]
    local_rows = math.fsum(table.ids * table.dim * table.element_bytes for table in resident)
    local_width = sum(table.dim * table.num_features for table in resident)
    elements = sum(table.rows * table.dim for table in resident)
    if even_ranks:
        size = plan.hosts_per_tower * plan.cluster.ranks_per_host
        rank_ids, rank_rows = _even_out(rank_ids, size), _even_out(rank_rows, size)
        rank_widths = _even_out(rank_widths, size)
    work = count_work(model)
    group_of = {hosts: i for i, hosts in enumerate(sorted({h for h in plan.tower_hosts if h}))}
    groups = [_Group() for _ in group_of]
    sent = zip(model.bytes_sent(comm_dtype), model.gradient_bytes(comm_dtype), strict=True)
    for hosts, tables, both_ways, module in zip(
        plan.tower_hosts, towers, sent, work.towers, strict=True
    ):
        if hosts:
            groups[group_of[hosts]].add(tables, both_ways, module)
    return StepLoad(
        groups=len(groups),
        group_hosts=plan.hosts_per_tower,
        traffic=measure_traffic(
            plan.cluster,
            group_hosts=plan.hosts_per_tower,
            group_bytes=[group.sent for group in groups],
            gradient_bytes=[group.returned for group in groups],
            rank_widths=rank_widths,
            rank_ids=rank_ids,
            flat_width=sum(model.flat.feature_dims),
            ids=[group.ids for group in groups],
            replicated_elements=elements,
            replicated_ids=math.fsum(table.ids for table in resident),
        ),
        lookup=Lookup(
            row_bytes=world * max(rank_rows) + local_rows,
            mean_row_bytes=math.fsum(rank_rows) + local_rows,
            pooled_bytes=float((world * max(rank_widths) + local_width) * ELEMENT_BYTES),
        ),
        module=max((group.work for group in groups), key=lambda work: work.flops),
        work=work,
        replicated_elements=elements,
    )


def _even_out(per_rank: Sequence[float], size: int) -> list[float]:
    """Give every rank of a group of `size` ranks the group's mean."""
    means: list[float] = []
    for first in range(0, len(per_rank), size):
        means += [math.fsum(per_rank[first : first + size]) / size] * size
    return means


def even_load(
    model: DmtSpec, cluster: Cluster, ids_per_bag: float, *, comm_dtype: CommDtype | None = None
) -> StepLoad:
    """Describe a model whose towers and tables are spread perfectly evenly.

    Args:
        model: The converted model; its towers are as many as hosts, or a divisor of them, or more.
        cluster: Where it runs.
        ids_per_bag: Mean number of ids per sample and feature.
        comm_dtype: Precision of tower outputs without a code, and of gradients, see `Machine`.
    """
    groups = min(len(model.towers), cluster.hosts)
    work = count_work(model)
    rows, pooled = _flat_bytes(model.flat, ids_per_bag)
    ids = len(model.flat.features) * ids_per_bag
    width = sum(model.flat.feature_dims)
    modules = sum(work.towers, NO_WORK)
    hosts = cluster.hosts // groups
    return StepLoad(
        groups=groups,
        group_hosts=hosts,
        traffic=_even_traffic(
            cluster,
            groups,
            (sum(model.bytes_sent(comm_dtype)), sum(model.gradient_bytes(comm_dtype))),
            width,
            ids,
        ),
        lookup=Lookup(row_bytes=rows, mean_row_bytes=rows, pooled_bytes=pooled),
        module=DenseWork(
            flops=modules.flops / groups, parameters=math.ceil(modules.parameters / groups)
        ),
        work=work,
    )


def _even_traffic(
    cluster: Cluster, groups: int, sent: tuple[int, int], width: int, ids: float
) -> Traffic:
    """Return what `measure_traffic` gives if every rank holds the same."""
    hosts, ranks, world = cluster.hosts, cluster.ranks_per_host, cluster.world_size
    group_hosts = hosts // groups
    group_ranks = group_hosts * ranks

    def among(per_sample: float, all_ranks: int) -> Exchange:
        return Exchange(
            cross_bytes=per_sample * (all_ranks - ranks) / all_ranks,
            intra_bytes=per_sample * (ranks - 1) / all_ranks,
        )

    def between(per_sample: float) -> Exchange:
        return Exchange(cross_bytes=per_sample * (groups - 1) / groups, intra_bytes=0.0)

    embeddings, id_bytes = float(width * ELEMENT_BYTES), ids * ID_BYTES
    outputs, gradients = (between(float(total)) for total in sent)
    inside = among(embeddings, group_ranks)
    flat = among(embeddings, world)
    return Traffic(
        flat_cross_bytes=flat.cross_bytes,
        dmt_cross_bytes=outputs.cross_bytes + inside.cross_bytes,
        flat_indices=among(id_bytes, world),
        flat_embeddings=flat,
        peer_indices=between(id_bytes),
        tower_indices=among(id_bytes, group_ranks),
        tower_embeddings=inside,
        tower_outputs=outputs,
        tower_gradients=gradients,
        dmt_gradient_bytes=gradients.cross_bytes + inside.cross_bytes,
    )


def as_passthrough(model: DmtSpec) -> DmtSpec:
    """Return the model with the same towers and no compression: SPTT alone."""
    bare = TowerModuleSpec(kind="passthrough")
    return replace(model, towers=tuple(replace(tower, module=bare) for tower in model.towers))


def as_flat(flat: ModelSpec) -> DmtSpec:
    """Return a flat model as one tower."""
    return one_tower(flat)


class _Group:
    """Sums over the towers of one group of hosts."""

    def __init__(self) -> None:
        self.sent, self.returned, self.ids, self.work = 0, 0, 0.0, NO_WORK

    def add(
        self, tables: Sequence[TableLoad], both_ways: tuple[int, int], module: DenseWork
    ) -> None:
        self.sent += both_ways[0]
        self.returned += both_ways[1]
        self.ids += math.fsum(table.ids for table in tables)
        self.work += module


def _flat_bytes(spec: ModelSpec, ids_per_bag: float) -> tuple[float, float]:
    sizes = {table.name: table.dim * DTYPE_BYTES[table.dtype] for table in spec.tables}
    rows = ids_per_bag * sum(sizes[feature.table] for feature in spec.features)
    return rows, float(sum(spec.feature_dims) * ELEMENT_BYTES)


def _rank_row_bytes(loads: Mapping[str, TableLoad], plan: TowerPlan) -> list[float]:
    """Bytes of rows that each rank reads per sample of the global batch."""
    found = [0.0] * plan.cluster.world_size
    for placement in plan.tables:
        if placement.is_everywhere:
            continue
        load = loads[placement.table]
        parts = len(placement.shards) if placement.sharding_type == "table_row_wise" else 1
        for shard in placement.shards:
            found[shard.rank] += load.ids / parts * shard.cols * load.element_bytes
    return found


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
    forward: float
    """Exchange of embeddings and tower outputs, in seconds."""
    backward: float
    """Exchange of their gradients, in seconds."""
    swept_bytes: float
    """Memory that is read or written once to move whole tables, in bytes."""
    all_reduce: float
    """In seconds."""


def step_time(load: StepLoad, machine: Machine, *, copies: int = 1) -> StepTime:
    """Predict a step: AlltoAlls inside the hosts of a tower, then among peers.

    Where there is one group of hosts only, as for the flat model, the first runs over all ranks,
    and there are no peers and nothing that comes into their order.

    Args:
        load: What the step asks of the busiest rank.
        machine: What it runs on.
        copies: Clusters like the machine's that run it side by side, and sum the gradients of
            dense parts.
    """
    network, traffic, work = machine.network, load.traffic, load.work
    inside = Peers.of_hosts(network.cluster, load.group_hosts)
    between = Peers.between_groups(load.groups)
    shared = (work.dense_arch.parameters + work.over.parameters) * GRADIENT_BYTES
    replicated = load.replicated_elements * GRADIENT_BYTES
    embeddings = network.all_to_all(_embeddings(load, machine), machine.batch, inside)
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
            forward=embeddings + network.all_to_all(traffic.tower_outputs, machine.batch, between),
            backward=embeddings
            + network.all_to_all(traffic.output_gradients, machine.batch, between),
            swept_bytes=float(SWEEPS * replicated),
            all_reduce=network.all_reduce(shared + replicated, network.cluster.hosts * copies)
            + network.all_reduce(load.module.parameters * GRADIENT_BYTES, load.group_hosts),
        ),
    )


def crossing_bytes(load: StepLoad, machine: Machine) -> tuple[float, float]:
    """Bytes per sample that the busiest rank moves over its link: forward, and gradients back."""
    inside = _embeddings(load, machine).cross_bytes
    traffic = load.traffic
    return inside + traffic.tower_outputs.cross_bytes, inside + traffic.output_gradients.cross_bytes


def _embeddings(load: StepLoad, machine: Machine) -> Exchange:
    """The exchange of pooled embeddings: of the flat model, or inside the hosts of a tower."""
    found = load.traffic.tower_embeddings
    return machine.in_transit(found) if load.groups == 1 else found


def _assemble(machine: Machine, parts: _Parts) -> StepTime:
    """Add up a step and hide what can be hidden.

    A lookup reads rows and writes pooled vectors; its backward pass reads their gradients, reads
    and writes the rows. A reshuffle reads and writes, and again backward.
    """
    batch, known = machine.batch, machine.network.assumptions
    rows, pooled = parts.lookup.row_bytes * batch, parts.lookup.pooled_bytes * batch
    update = machine.memory_seconds(2 * rows + pooled) + machine.copy_seconds(parts.swept_bytes)
    tower = machine.compute_seconds(parts.module_flops * batch)
    early = machine.compute_seconds(parts.dense_arch.flops * batch)
    late = machine.compute_seconds(parts.over.flops * batch)
    behind_gradients = min(parts.backward, BACKWARD * early)
    behind_sum = BACKWARD * early - behind_gradients + BACKWARD * tower + update
    exposed = math.fsum(
        (
            parts.indices - min(known.prefetch * parts.indices, (1 + BACKWARD) * late),
            max(0.0, parts.forward - early),
            parts.backward - behind_gradients,
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
        forward=parts.forward,
        backward=parts.backward,
        all_reduce=parts.all_reduce,
        exposed=exposed,
    )
