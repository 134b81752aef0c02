"""What ranks do in the tests of the engine; run by `rank_server`."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmt_convert.cluster import (
    ShardedModel,
    Transport,
    fused_parameters,
    shard_model,
    table_shards,
    to_jagged,
)
from dmt_convert.cluster.index_route import carries_weights
from dmt_convert.cluster.replicated import ReplicatedOptimizer
from dmt_convert.placement import TowerPlan
from dmt_convert.placement.predict.cost_model import planned_load
from support.cluster.cluster_cases import (
    Case,
    join_shards,
    largest_difference,
    own_shards,
    whole_tables,
)
from support.cluster.emulated_gpu import make_transport
from support.cluster.flat_torchrec import flat_shards, shard_flat
from support.cluster.sabotage import sabotage
from support.cluster.trainer_scenarios import (
    meet,
    train_on_gpu,
    train_with_trainer,
    trainer_against_one_process,
)

_loss = nn.functional.binary_cross_entropy_with_logits
shards_to_fill = table_shards


def shard_case(case: Case, *, comm_dtype: str | None = None) -> tuple[ShardedModel, TowerPlan]:
    """Spread a case's model over the ranks that are there, with its weights."""
    ranks_per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    plan = case.plan(dist.get_world_size() // ranks_per_host, ranks_per_host)
    os.environ["TORCHREC_RESOLVED_POD_SIZE"] = str(plan.hosts_per_tower)
    model = case.model()
    tables = whole_tables(model)
    sharded = shard_model(
        model,
        plan,
        transport=make_transport(),
        fused_params=fused_parameters(case.optimizer, lr=case.table_lr),
        comm_dtype=comm_dtype,
        weighted=case.weights or carries_weights(model.spec.flat),
    )
    with torch.no_grad():
        for name, top, left, part in shards_to_fill(sharded):
            part.copy_(tables[name][top : top + len(part), left : left + part.shape[1]])
    return sharded, plan


def whole_shards(case: Case, sharded: ShardedModel) -> dict[str, Tensor]:
    """All tables, whole, the same on every rank."""
    shapes = {table.name: (table.rows, table.dim) for table in case.spec().tables}
    return join_shards(shapes, own_shards(sharded))


class Movers:
    """SGD for the dense parts, and what moves the tables that every rank holds."""

    def __init__(self, sharded: ShardedModel, case: Case) -> None:
        self._sgd = torch.optim.SGD(sharded.dense_parameters().values(), lr=case.dense_lr)
        self._replicated = ReplicatedOptimizer(sharded.replicated, case.optimizer)
        self._replicated.lr = case.table_lr

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Set all gradients to zero."""
        self._sgd.zero_grad(set_to_none=set_to_none)
        self._replicated.zero_grad()

    def step(self) -> None:
        """Move all."""
        self._sgd.step()
        self._replicated.step()


def _replicas(sharded: ShardedModel) -> dict[str, str]:
    """Digests of the tables that every rank holds."""
    return {name: _digest(weight) for name, weight in sharded.replicated.items()}


def train_against_flat(
    broken: str | None = None, comm_dtype: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train a passthrough model and the flat one on the same batches from the same weights."""
    case = Case.from_json(options)
    with sabotage(broken):
        return _train_against_flat(case, *shard_case(case, comm_dtype=comm_dtype))


def _train_against_flat(case: Case, sharded: ShardedModel, plan: TowerPlan) -> dict[str, Any]:
    start, spec = whole_tables(case.model()), case.spec()
    flat = shard_flat(
        case.model(),
        start,
        world_size=dist.get_world_size(),
        fused_params=fused_parameters(case.optimizer, lr=case.table_lr),
        column_cuts={
            t.table: len(t.shards)
            for t in plan.tables
            # a shard has the squared gradients of its own columns, in TorchRec as here
            if t.sharding_type == "table_column_wise" and case.optimizer != "sgd"
        },
    )
    dense = [v for k, v in flat.named_parameters() if ".embedding_bags." not in k]
    flat_sgd = torch.optim.SGD(dense, lr=case.dense_lr)
    sgd = Movers(sharded, case)
    losses: list[tuple[float, float]] = []
    for step in range(case.steps):
        batch = case.own_batch(step)
        ours = to_jagged(batch, spec, sharded.transport, weighted=sharded.weighted)
        theirs = to_jagged(batch, spec, Transport("cpu", "gloo"), weighted=False)
        losses.append(
            (
                _take_step(sgd, sharded(ours), ours.labels),
                _take_step(flat_sgd, flat(theirs.dense, theirs.sparse), ours.labels),
            )
        )
    shapes = {name: tuple(table.shape) for name, table in start.items()}
    wanted = join_shards(shapes, flat_shards(flat))
    return {
        "losses": max(abs(mine - theirs) for mine, theirs in losses),
        "tables": largest_difference(whole_shards(case, sharded), wanted),
        "dense": largest_difference(_weights(sharded.core.head), _weights(flat.module.head)),
        "moved": largest_difference(wanted, start),
        "moved_least": _least_move(sharded, start),
        "replicas": _replicas(sharded),
        **_describe(plan),
    }


def _least_move(sharded: ShardedModel, start: dict[str, Tensor]) -> float:
    """How far the table moved that moved least, of those that every rank holds."""
    moves = [
        float((w.detach() - start[name]).abs().max()) for name, w in sharded.replicated.items()
    ]
    return min(moves, default=0.0)


def _take_step(sgd: Any, logits: Tensor, labels: Tensor | None) -> float:
    assert labels is not None
    loss = _loss(logits, labels)
    sgd.zero_grad(set_to_none=False)
    loss.backward()
    sgd.step()
    return float(loss.detach())


def _weights(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in head.named_parameters()}


def _describe(plan: TowerPlan) -> dict[str, Any]:
    return {
        "order": plan.tower_order,
        "hosts_per_tower": plan.hosts_per_tower,
        "cached": [t.table for t in plan.tables if t.cached is not None],
        "cuts": sorted({f"{t.sharding_type} {len(t.shards)}" for t in plan.tables}),
    }


def train_against_plain(
    broken: str | None = None, comm_dtype: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train a compressed model, and the same in plain torch on the whole global batch."""
    case = Case.from_json(options)
    with sabotage(broken):
        sharded, plan = shard_case(case, comm_dtype=comm_dtype)
    plain, spec = case.model(), case.spec()
    own = sharded.dense_parameters()
    names = {name: _plain_name(name, plan) for name in own}
    wanted = dict(plain.named_parameters())
    plain_sgd = torch.optim.SGD(
        [
            {"params": [v for k, v in wanted.items() if (".tables." in k) == is_table], "lr": lr}
            for is_table, lr in ((False, case.dense_lr), (True, case.table_lr))
        ]
    )
    sgd = Movers(sharded, case)
    first, found = case.rows_per_rank * dist.get_rank(), {"logits": 0.0, "gradients": 0.0}
    flips = 0
    digests: dict[str, str] = {}
    for step in range(case.steps):
        whole = case.global_batch(step)
        logits = plain(whole)
        _take_step(plain_sgd, logits, torch.from_numpy(whole.labels))
        ours = to_jagged(case.own_batch(step), spec, sharded.transport, weighted=sharded.weighted)
        mine = sharded(ours)
        _take_step(sgd, mine, ours.labels)
        theirs = logits[first : first + case.rows_per_rank]
        gaps = (mine - theirs).abs().detach()
        found["logits"] = max(found["logits"], float(gaps.max()))
        flips += int((gaps > 1e-6).sum())
        for name, parameter in own.items():
            expected = wanted[names[name]].grad  # none of a layer that is not used
            gap = float((parameter.grad - (0.0 if expected is None else expected)).abs().max())
            found["gradients"] = max(found["gradients"], gap)
            if step == 0:
                digests[names[name]] = _digest(parameter.grad)
    end, start = whole_tables(plain), whole_tables(case.model())
    return {
        **found,
        "tables": largest_difference(whole_shards(case, sharded), end),
        "dense": largest_difference(
            {names[name]: value.detach() for name, value in own.items()},
            {names[name]: wanted[names[name]].detach() for name in own},
        ),
        "moved": largest_difference(end, start),
        "flips": flips,
        "digests": digests,
        "replicas": _replicas(sharded),
        **_describe(plan),
    }


def _plain_name(name: str, plan: TowerPlan) -> str:
    """What the plain model calls a parameter of the cluster's."""
    parts = name.split(".")
    if parts[0] == "head":
        return ".".join(parts[1:])
    tower = plan.tower_order[int(parts[2])]
    return f"towers.{tower}.tower_module." + ".".join(parts[5:])


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()[:16]


def compare_wires(dtypes: list[str], loss_factor: float = 1.0, **options: Any) -> dict[str, Any]:
    """Take one step in every precision; say how far logits and tables are from those of fp32.

    The loss is multiplied by the factor: gradients are as small as those of a larger batch.
    """
    case = Case.from_json(options)
    jagged = to_jagged(case.own_batch(0), case.spec(), make_transport(), weighted=False)
    start = whole_tables(case.model())
    results = {}
    for dtype in ["fp32", *dtypes]:
        sharded, _ = shard_case(case, comm_dtype=dtype)
        logits = sharded(jagged)
        (_loss(logits, jagged.labels) * loss_factor).backward()
        end = whole_shards(case, sharded)
        results[dtype] = (logits.detach(), {name: end[name] - start[name] for name in end})
    exact, moves = results["fp32"]
    largest = max(float(move.abs().max()) for move in moves.values())
    return {
        dtype: {
            "logits": float((logits - exact).abs().max() / exact.abs().max()),
            "moves": largest_difference(moved, moves) / largest,
        }
        for dtype, (logits, moved) in results.items()
    }


def count_bytes(comm_dtype: str | None = None, **options: Any) -> dict[str, Any]:
    """Take one step; count what this rank hands to the process group for every other rank.

    Ids are whole numbers; tower outputs and gradients are bytes. Beside it what the plan says, and
    the bytes per message that say whether its levels are of finite numbers.
    """
    case = Case.from_json(options)
    sharded, plan = shard_case(case, comm_dtype=comm_dtype)
    jagged = to_jagged(case.own_batch(0), case.spec(), sharded.transport, weighted=sharded.weighted)
    sent = [0] * dist.get_world_size()
    send = dist.ProcessGroup.send

    def counted(group: Any, tensors: list[Tensor], peer: int, tag: int) -> Any:
        if tensors[0].dtype == torch.uint8:
            sent[dist.get_global_rank(group, peer)] += sum(t.numel() for t in tensors)
        return send(group, tensors, peer, tag)

    dist.ProcessGroup.send = counted
    try:
        logits = sharded(jagged)
        forward = list(sent)
        _loss(logits, jagged.labels).backward()
    finally:
        dist.ProcessGroup.send = send
    spec, exchange = case.dmt_spec(), sharded.towers._exchange
    traffic = planned_load(spec, plan, 1.0, comm_dtype=comm_dtype).traffic
    if comm_dtype is None:
        assert traffic.tower_outputs == plan.traffic.tower_outputs
        assert traffic.output_gradients == plan.traffic.output_gradients
    busiest = (traffic.tower_outputs.cross_bytes, traffic.output_gradients.cross_bytes)
    return {
        "forward": forward,
        "backward": [after - before for after, before in zip(sent, forward, strict=True)],
        "tower bytes": [spec.bytes_sent(comm_dtype), spec.gradient_bytes(comm_dtype)],
        "busiest": busiest,
        "mean": (traffic.dmt_cross_bytes, traffic.gradient_cross_bytes),
        "marks": exchange.forward_wires[exchange.rank].mark_bytes,
    }


def diverge(**options: Any) -> dict[str, Any]:
    """Return the share of logits that are lost if rows of the first rank's tables are infinite."""
    case = Case.from_json(options)
    sharded, _ = shard_case(case)
    if dist.get_rank() == 0:
        with torch.no_grad():
            for _, _, _, part in shards_to_fill(sharded):
                part[0] = torch.inf
    jagged = to_jagged(case.own_batch(0), case.spec(), sharded.transport, weighted=sharded.weighted)
    jagged.sparse.values().zero_()
    with torch.no_grad():
        return {"lost": float(sharded(jagged).isnan().float().mean())}


def send_ahead(pattern: str, comm_dtype: str | None = None, **options: Any) -> dict[str, Any]:
    """Train with ids sent ahead as `pattern` says; return losses and a digest of the tables.

    none: not at all. next: those of the step that comes, in both parts. started: without the
    second part. two: those of two steps. measured: another batch is looked up in between.
    forgotten: all that was sent, again and again. changed: they are written over afterwards, which
    is seen only where they are sent anew; unsent: the same without having been sent.
    """
    case = Case.from_json(options)
    sharded, _ = shard_case(case, comm_dtype=comm_dtype)
    spec, towers = case.spec(), sharded.towers
    batches = [
        to_jagged(case.own_batch(step), spec, sharded.transport, weighted=sharded.weighted)
        for step in range(case.steps + 2)
    ]
    other = to_jagged(case.own_batch(1000), spec, sharded.transport, weighted=sharded.weighted)
    sgd = torch.optim.SGD(sharded.dense_parameters().values(), lr=case.dense_lr)
    losses = []
    if pattern == "two":
        towers.start_input(batches[0].sparse)
        towers.start_input(batches[1].sparse)
    for step in range(case.steps):
        if pattern == "forgotten":
            towers.forget_input()
        logits = sharded(batches[step])
        if pattern in ("next", "started", "measured", "forgotten", "changed"):
            towers.start_input(batches[step + 1].sparse)
        if pattern == "two":
            towers.start_input(batches[step + 2].sparse)
        if pattern in ("next", "measured", "two", "changed"):
            towers.advance_input()
        if pattern in ("changed", "unsent"):
            batches[step + 1].sparse.values().zero_()
        losses.append(_take_step(sgd, logits, batches[step].labels))
        if pattern == "measured" and step % 2:
            with torch.no_grad():
                sharded(other)
    towers.forget_input()
    towers.forget_input()
    towers.advance_input()
    tables = whole_shards(case, sharded)
    return {"losses": losses, "tables": {name: _digest(t) for name, t in tables.items()}}


SCENARIOS = {
    "compare_wires": compare_wires,
    "count_bytes": count_bytes,
    "diverge": diverge,
    "meet": meet,
    "send_ahead": send_ahead,
    "train_against_flat": train_against_flat,
    "train_against_plain": train_against_plain,
    "train_on_gpu": train_on_gpu,
    "train_with_trainer": train_with_trainer,
    "trainer_against_one_process": trainer_against_one_process,
}
