"""From a bundle to a model over the ranks: where its towers go, its shards, its weights.

Letters: R rows of a table, N its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, gather_rows
from dmt_convert.cluster.cluster_model import ShardedModel, shard_model, table_of
from dmt_convert.cluster.index_route import carries_weights
from dmt_convert.cluster.optimizers import fused_parameters
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.cluster.transport import Transport
from dmt_convert.config import TrainingConfig
from dmt_convert.errors import PlanError
from dmt_convert.placement import TowerPlan, plan_model

_CHUNK_BYTES: Final = 8 << 20
"""Of a table, read at once."""


def choose_plan(bundle: Bundle, layout: RankLayout, given: TowerPlan | None) -> TowerPlan:
    """Choose where the towers go: the plan of the bundle, if it is of this cluster, or a new one.

    Args:
        bundle: What is trained.
        layout: The ranks that are there.
        given: The plan that was asked for, if any.

    Raises:
        PlanError: The plan that was asked for is of another cluster or bundle, or the towers cannot
            be placed on this cluster.
    """
    plan = bundle.plan if given is None else given
    _check_fits(plan, bundle)
    found = (layout.hosts, layout.ranks_per_host)
    wanted = (plan.cluster.hosts, plan.cluster.ranks_per_host)
    if found == wanted:
        return plan
    if given is not None:
        raise PlanError(
            f"a plan for {_count(*wanted)}, on {_count(*found)}",
            expected="the number of hosts and of ranks per host that torchrun starts",
            hint=f"make one with `dmt plan BUNDLE --hosts {found[0]} --ranks-per-host {found[1]}`, "
            "or leave the plan out",
        )
    cluster = replace(plan.cluster, hosts=found[0], ranks_per_host=found[1])
    return plan_model(bundle.manifest.model, cluster)


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
    """
    return shard_model(
        open_bundle_model(bundle).train(),
        plan,
        transport=Transport(layout.device, layout.backend),
        fused_params=fused_parameters(
            config.table_optimizer, lr=config.table_lr, device_type=layout.device_type
        ),
        comm_dtype=config.comm_dtype,
        weighted=weighted or carries_weights(bundle.manifest.model.flat),
    )


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
