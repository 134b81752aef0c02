"""Bytes that cross hosts if tables are in towers, or on every rank, against what the plan says.

    python -m benchmarks.replicated_bytes --hosts 2 --ranks-per-host 2 --rows 200 1000 5000

Hosts are network namespaces of this machine, joined by a bridge; the kernel counts what leaves
each. Half of the features are in towers. The others are looked up in tables of as many rows as
asked, in the same towers or on every rank. What the sum of gradients takes is measured as the
difference to tables of one row.

Letters: B samples per rank.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.cluster.namespaces import find_mode, seal
from benchmarks.cluster.network import NIC, ClusterNetwork, address, read_counters
from dmt_convert.model import DmtModel, DmtSpec, TowerModuleSpec, converted_spec
from dmt_convert.placement import Cluster, StepCost, cheaper_everywhere, plan_model, step_bytes
from dmt_convert.spec import (
    FeatureSpec,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    TableSpec,
)

_ROOT: Final = Path(__file__).parents[1]
_DIM: Final = 16
_LARGE_ROWS: Final = 5000
_NUM_DENSE: Final = 4
_WARM_UP: Final = 4


def flat_spec(features: int, small_rows: int) -> ModelSpec:
    """Half of the tables large, half of them with `small_rows` rows."""
    names = [f"f{i}" for i in range(features)]
    width = _NUM_DENSE + features * _DIM
    return ModelSpec(
        family="torchrec-dlrm",
        tables=tuple(
            TableSpec(name=f"t{i}", rows=_LARGE_ROWS if i % 2 else small_rows, dim=_DIM)
            for i in range(features)
        ),
        features=tuple(FeatureSpec(name=f"f{i}", table=f"t{i}") for i in range(len(names))),
        dense_arch=MlpSpec(widths=(_NUM_DENSE,), final_relu=False),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=(width, 1), final_relu=False),
    )


def make_spec(flat: ModelSpec, hosts: int, *, everywhere: bool) -> DmtSpec:
    """A passthrough tower per host; the small tables in them, or on every rank."""
    names = flat.feature_names
    small = names[::2] if everywhere else ()
    rest = [name for name in names if name not in small]
    towers = [tuple(rest[t::hosts]) for t in range(hosts)]
    module = TowerModuleSpec(kind="passthrough")
    return converted_spec(flat, towers, module, everywhere=[small] if small else [])


class Rank:
    """One rank of the cluster."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cluster = Cluster(hosts=options.hosts, ranks_per_host=options.ranks_per_host)

    def measure(self, small_rows: int, *, everywhere: bool) -> tuple[float, float, float]:
        """Return bytes per host and step, those of gradients as planned; median ms of a step."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        from dmt_convert.cluster import (
            JaggedBatch,
            Transport,
            fused_parameters,
            shard_model,
            table_shards,
        )
        from dmt_convert.cluster.optimizers import FusedTables

        flat = flat_spec(self.options.features, small_rows)
        spec = make_spec(flat, self.cluster.hosts, everywhere=everywhere)
        plan = plan_model(spec, self.cluster)
        torch.manual_seed(0)
        sharded = shard_model(
            DmtModel(spec),
            plan,
            transport=Transport("cpu", "gloo"),
            fused_params=fused_parameters("rowwise-adagrad", lr=0.05),
        )
        with torch.no_grad():
            for _, _, _, part in table_shards(sharded):
                part.uniform_(-0.1, 0.1)
        tables = FusedTables(sharded, "rowwise-adagrad")
        tables.set_lr(0.05)
        generator = torch.Generator().manual_seed(dist.get_rank())
        batch, features = self.options.batch, len(flat.features)

        def step() -> None:
            rows = [flat.table_of(name).rows for name in flat.feature_names]
            ids = [torch.randint(0, count, (batch,), generator=generator) for count in rows]
            sparse = KeyedJaggedTensor(
                keys=list(flat.feature_names),
                values=torch.cat(ids),
                lengths=torch.ones(features * batch, dtype=torch.int32),
                stride=batch,
            )
            dense = torch.randn(batch, _NUM_DENSE, generator=generator)
            tables.replicated.zero_grad()
            sharded(JaggedBatch(dense=dense, sparse=sparse, labels=None)).square().mean().backward()
            tables.replicated.step()

        for _ in range(_WARM_UP):
            step()
        before = self._sent()
        seconds = []
        for _ in range(self.options.steps):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        sent = (self._sent() - before) / self.options.steps / self.cluster.hosts
        return sent, plan.traffic.replicated_step_bytes, 1e3 * statistics.median(seconds)

    def _sent(self) -> float:
        """Bytes that all hosts have sent so far, while all ranks stand still."""
        dist.barrier()
        own = read_counters()[NIC][1] if os.environ["LOCAL_RANK"] == "0" else 0
        total = torch.tensor(float(own), dtype=torch.float64)
        dist.barrier()
        dist.all_reduce(total)
        return float(total)

    def run(self) -> list[dict[str, Any]]:
        """Measure all that was asked for."""
        nothing, _, _ = self.measure(1, everywhere=True)
        found = []
        for rows in self.options.rows:
            flat = flat_spec(self.options.features, rows)
            cost = StepCost(cluster=self.cluster, batch=self.options.batch)
            small = {f"t{i}" for i in range(0, self.options.features, 2)}
            inside, _, inside_ms = self.measure(rows, everywhere=False)
            everywhere, planned, everywhere_ms = self.measure(rows, everywhere=True)
            found.append(
                {
                    "rows": rows,
                    "in_towers": inside,
                    "everywhere": everywhere,
                    "in_towers_ms": inside_ms,
                    "everywhere_ms": everywhere_ms,
                    "gradients": everywhere - nothing,
                    "planned_gradients": planned * (1 - 1 / rows),
                    "formula_in_towers": step_bytes(flat, cost),
                    "formula_everywhere": step_bytes(flat, cost, small),
                    "rule": small <= set(cheaper_everywhere(flat, cost)),
                }
            )
        return found


def run_rank(options: argparse.Namespace) -> None:
    """Measure as one rank; the first one prints."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ["TORCHREC_RESOLVED_POD_SIZE"] = "1"
    dist.init_process_group("gloo")
    found = Rank(options).run()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_stage(options: argparse.Namespace) -> None:
    """Build hosts in namespaces, and start their ranks."""
    network = ClusterNetwork(options.hosts)
    network.set_rate(options.mbit)
    started = []
    for host, namespace in enumerate(network.hosts):
        with namespace.entered():
            for local in range(options.ranks_per_host):
                own = {
                    "RANK": str(host * options.ranks_per_host + local),
                    "WORLD_SIZE": str(options.hosts * options.ranks_per_host),
                    "LOCAL_RANK": str(local),
                    "LOCAL_WORLD_SIZE": str(options.ranks_per_host),
                    "GROUP_RANK": str(host),
                    "MASTER_ADDR": address(0),
                    "MASTER_PORT": "29500",
                    "GLOO_SOCKET_IFNAME": NIC,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONWARNINGS": "ignore",
                }
                command = [sys.executable, "-m", "benchmarks.replicated_bytes", *sys.argv[1:]]
                command[command.index("--as") + 1] = "rank"
                started.append(subprocess.Popen(command, env={**os.environ, **own}))
    sys.exit(max(process.wait() for process in started))


def show(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a table."""
    print(
        f"{options.hosts} x {options.ranks_per_host} ranks, {options.batch} samples each, "
        f"{options.features} features of {_DIM} elements; bytes that a host sends in a step, "
        f"median ms at {options.mbit:g} Mbit/s"
    )
    print("| rows | in towers | on every rank | fewer | ms | gradients | planned | off | rule |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in found:
        off = row["gradients"] / row["planned_gradients"] - 1
        print(
            f"| {row['rows']:,} | {row['in_towers']:,.0f} (formula {row['formula_in_towers']:,.0f})"
            f" | {row['everywhere']:,.0f} (formula {row['formula_everywhere']:,.0f}) | "
            f"{row['in_towers'] / row['everywhere']:.2f} | "
            f"{row['in_towers_ms']:.1f} → {row['everywhere_ms']:.1f} | {row['gradients']:,.0f} | "
            f"{row['planned_gradients']:,.0f} | {off:+.1%} | "
            f"{'on every rank' if row['rule'] else 'in towers'} |"
        )


def main() -> None:
    """Run the whole, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--mbit", type=float, default=10_000.0, help="rate of every link")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--as", dest="role", choices=["user", "stage", "rank"], default="user")
    options = parser.parse_args()
    if options.role != "user":
        (run_stage if options.role == "stage" else run_rank)(options)
        return
    command = [sys.executable, "-m", "benchmarks.replicated_bytes", *sys.argv[1:], "--as", "stage"]
    done = subprocess.run(
        seal(find_mode(), command), stdout=subprocess.PIPE, text=True, cwd=_ROOT, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    show(json.loads(line.removeprefix("RESULT ")), options)


if __name__ == "__main__":
    main()
