"""From a bundle to a model over the ranks: where its towers go, its shards, its weights.

Letters: R rows of a table, N its columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, gather_rows
from dmt_convert.cluster.cluster_model import ShardedModel, shard_model, table_of
from dmt_convert.cluster.index_route import carries_weights
from dmt_convert.cluster.optimizers import check_tables_optimizer, fused_parameters
from dmt_convert.cluster.ranks import RankLayout, Ranks
from dmt_convert.cluster.transport import Transport
from dmt_convert.config import TableOptimizerKind, TrainingConfig
from dmt_convert.errors import ConfigError, PlanError
from dmt_convert.free_memory import available_bytes
from dmt_convert.placement import (
    TowerPlan,
    optimizer_in_plan,
    plan_model,
    show_bytes,
    training_bytes,
)

_CHUNK_BYTES: Final = 8 << 20
"""Of a table, read at once."""


def choose_plan(
    bundle: Bundle,
    layout: RankLayout,
    given: TowerPlan | None,
    kind: TableOptimizerKind = "rowwise-adagrad",
) -> TowerPlan:
    """Choose where the towers go: the plan of the bundle, if it is of this cluster, or a new one.

    Args:
        bundle: What is trained.
        layout: The ranks that are there.
        given: The plan that was asked for, if any.
        kind: What moves the tables: its state takes memory, too.

    Raises:
        PlanError: The plan that was asked for is of another cluster or bundle, or the towers cannot
            be placed on this cluster.
    """
    plan = bundle.plan if given is None else given
    _check_fits(plan, bundle)
    found = (layout.hosts, layout.ranks_per_host)
    wanted = (plan.cluster.hosts, plan.cluster.ranks_per_host)
    if given is not None and found == wanted:
        return plan
    if given is not None:
        raise PlanError(
            f"a plan for {_count(*wanted)}, on {_count(*found)}",
            expected="the number of hosts and of ranks per host that torchrun starts",
            hint=f"make one with `dmt plan BUNDLE --hosts {found[0]} --ranks-per-host {found[1]}`, "
            "or leave the plan out",
        )
    model, optimizer = bundle.manifest.model, optimizer_in_plan(kind)
    memory = _device_memory(layout) or plan.cluster.hbm_bytes
    cluster = replace(plan.cluster, hosts=found[0], ranks_per_host=found[1], hbm_bytes=memory)
    needed = max(training_bytes(plan, model, optimizer))
    if found == wanted and needed <= cluster.usable_bytes:
        return plan
    return plan_model(model, cluster, optimizer=optimizer)


def _device_memory(layout: RankLayout) -> int | None:
    """Return the memory of this rank's GPU, in bytes; None on a CPU."""
    if layout.device_type == "cpu":
        return None
    return int(torch.cuda.get_device_properties(layout.device).total_memory)


def free_memory(layout: RankLayout) -> int | None:
    """Return what this rank may still allocate for tables, in bytes; None: unknown.

    That is the free memory of its GPU, or its part of the host's.
    """
    if layout.device_type == "cuda":
        return int(torch.cuda.mem_get_info(layout.device)[0])
    available = available_bytes()
    return None if available is None else available // layout.ranks_per_host


def check_memory(
    bundle: Bundle, plan: TowerPlan, kind: TableOptimizerKind, layout: RankLayout, ranks: Ranks
) -> None:
    """Refuse, before anything is allocated, what does not fit; all ranks at once.

    Raises:
        PlanError: The tables of a rank do not fit into its memory, or ranks have chosen other
            plans; with the numbers of all such ranks.
    """
    held = plan
    if layout.device_type == "cpu":  # there is no other memory to put rows into
        whole = (replace(t, cached=None, compute_kernel=t.plain_kernel) for t in plan.tables)
        held = replace(plan, tables=tuple(whole), bytes_per_rank=(0,) * plan.cluster.world_size)
    needed = training_bytes(held, bundle.manifest.model, optimizer_in_plan(kind))
    digest = hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest()
    found = ranks.on_all(lambda: (digest, free_memory(layout)))
    if len({chosen for chosen, _ in found}) > 1:
        raise PlanError(
            "ranks whose GPUs have different sizes place the towers differently",
            expected="the same plan on all ranks",
            hint="make one for the smallest GPU, `dmt plan BUNDLE --hbm-gib GIB --out FILE`, and "
            "give it to all hosts with --plan",
        )
    short = [
        f"rank {rank}: {show_bytes(size)} of tables and their state, {show_bytes(free)} free"
        for rank, (size, (_, free)) in enumerate(zip(needed, found, strict=True))
        if free is not None and size > free
    ]
    if short:
        where = "GPU" if layout.device_type == "cuda" else "host"
        raise PlanError(
            f"float32 tables and the state of {kind} take {show_bytes(max(needed))} of the fullest "
            f"rank, more than is free in the memory of its {where}",
            expected="tables that fit into memory; nothing was allocated",
            hint="use more ranks or hosts, a table optimizer with less state (rowwise-adagrad, "
            "sgd), or end what else uses this memory",
            details=short[:20],
        )


def _count(hosts: int, ranks: int) -> str:
    return f"{hosts} host{'s' * (hosts != 1)} x {ranks} rank{'s' * (ranks != 1)}"


def _check_fits(plan: TowerPlan, bundle: Bundle) -> None:
    """Refuse a plan that places other tables or towers than the bundle's.

    Raises:
        PlanError: It does; all differences are listed.
    """
    model = bundle.manifest.model
    tower_of = {
        model.flat.table_of(name).name: t
        for t, tower in enumerate(model.towers)
        for name in tower.features
    }
    wanted = {t.name: (t.rows, t.dim, tower_of[t.name]) for t in model.flat.tables}
    placed = {p.table: (p.rows, p.cols, p.tower) for p in plan.tables}
    problems = [
        f"table {name!r}: {_show_place(placed.get(name))} in the plan, "
        f"{_show_place(wanted.get(name))} in the bundle"
        for name in dict.fromkeys([*wanted, *placed])
        if placed.get(name) != wanted.get(name)
    ]
    if len(plan.tower_hosts) != len(model.towers):
        problems.insert(0, f"{len(plan.tower_hosts)} towers, the bundle has {len(model.towers)}")
    elif [not hosts for hosts in plan.tower_hosts] != [t.everywhere for t in model.towers]:
        problems.insert(0, "other towers are on every rank than in the bundle")
    if problems:
        raise PlanError(
            f"the plan does not fit the bundle {bundle.path}",
            expected="a plan of this bundle: its tables with their rows and columns, in its towers",
            hint=f"make one with `dmt plan {bundle.path} --hosts H --ranks-per-host R --out FILE`",
            details=problems[:20],
        )


def _show_place(place: tuple[int, int, int] | None) -> str:
    return "missing" if place is None else f"{place[0]} x {place[1]} in tower {place[2]}"


def shard_bundle(
    bundle: Bundle, plan: TowerPlan, layout: RankLayout, config: TrainingConfig, *, weighted: bool
) -> ShardedModel:
    """Spread a bundle's model over the ranks; all ranks at once.

    Args:
        bundle: The bundle; its dense weights are read.
        plan: Where its towers go.
        layout: This rank.
        config: The tables' optimizer, which TorchRec builds into them, and the precision between
            hosts.
        weighted: Whether the data has weights beside ids.

    Returns:
        The model; its tables are uninitialised, see `load_shards`.

    Raises:
        ConfigError: Ranks have no such optimizer for tables.
    """
    check_tables_optimizer(config.table_optimizer)
    set_precisions(config, layout)
    return shard_model(
        open_bundle_model(bundle).train(),
        plan,
        transport=Transport(layout.device, layout.backend),
        fused_params=fused_parameters(config.table_optimizer, lr=config.table_lr),
        comm_dtype=config.comm_dtype,
        dense_comm_dtype=config.dense_comm_dtype,
        weighted=weighted or carries_weights(bundle.manifest.model.flat),
    )


def set_precisions(config: TrainingConfig, layout: RankLayout) -> None:
    """Let float32 products be computed as asked for: on GPUs, unless it is said, in TF32.

    Raises:
        ConfigError: Gradients are to be averaged in a precision that gloo does not have.
    """
    if config.dense_comm_dtype == "bf16" and layout.backend == "gloo":
        raise ConfigError(
            "dense gradients averaged in bf16 over gloo",
            expected="--dense-comm-dtype fp32: torch averages in bf16 over NCCL alone",
            hint="leave --dense-comm-dtype out on CPUs",
        )
    if config.matmul_precision is not None or layout.device_type == "cuda":
        torch.set_float32_matmul_precision(config.matmul_precision or "high")


def load_shards(
    model: ShardedModel,
    infos: Mapping[str, TensorInfo],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill this rank's shards; every rank reads its own parts of the files.

    Args:
        model: The sharded model.
        infos: Table -> its tensor in a file; fp16 and bf16 become fp32.
        on_bytes: Called with the size of every piece that was read.
    """
    for table, top, left, part in table_shards(model):
        info = infos[table]
        rows, cols = part.shape
        step = max(1, _CHUNK_BYTES // (4 * max(1, info.shape[1])))
        with torch.no_grad():
            for first in range(0, rows, step):
                last = min(rows, first + step)
                values = gather_rows(info, np.arange(top + first, top + last))
                part[first:last] = torch.from_numpy(values[:, left : left + cols])
                on_bytes(values.nbytes)


def table_shards(model: ShardedModel) -> list[tuple[str, int, int, torch.Tensor]]:
    """List this rank's shards: table, first row, first column, rows of it (shares memory).

    Tables that every rank holds are a shard of each.
    """
    found = [(table, 0, 0, weight.detach()) for table, weight in model.replicated.items()]
    for name, value in model.trim(model.towers.state_dict()).items():
        if ".embedding_bags." not in name:
            continue
        table = table_of(name)
        found += [(table, *_place(shard)) for shard in value.local_shards()]
    return found


def _place(shard: Any) -> tuple[int, int, torch.Tensor]:
    top, left = shard.metadata.shard_offsets
    return int(top), int(left), shard.tensor
