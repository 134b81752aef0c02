"""Fine-tune a bundle over ranks at every precision of what crosses hosts, and compare.

    python benchmarks/comm_precision.py --bundle ckpt-dmt4 --data criteo100k --steps 137 --seeds 0 1

If the bundle's towers carry codes, what they emit keeps its code at every precision, and what is
compared is the precision of the gradients; `code` leaves it to the engine.

Starts hosts x ranks gloo processes on this machine, once per precision and seed, each a training
from the same bundle on the same batches. Prints, per precision, AUC and NE after the last step
(mean over seeds, and the difference to fp32, seed by seed, with its range), and what rank 0 sends
to other hosts in a step: tower outputs and their gradients (beside it what the plan says, without
the byte per message of levels), ids, and, by calculation, the dense gradients (an all-reduce in
fp32 whatever the precision). Loopback has no rate: times say nothing.
Further options go to the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "code")
SECONDS = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--steps", type=int, default=137)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options, more = parser.parse_known_args()  # the rest goes to the recipe
    found = {
        precision: [train(options, precision, seed, more) for seed in options.seeds]
        for precision in options.precisions
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print_table(found)


def train(
    options: argparse.Namespace, precision: str, seed: int, more: Sequence[str]
) -> dict[str, Any]:
    """Train once; returns the last evaluation, and bytes per step and rank."""
    size = options.hosts * options.ranks_per_host
    with tempfile.TemporaryDirectory() as name, socket.create_server(("localhost", 0)) as probe:
        folder, port = Path(name), probe.getsockname()[1]
        probe.close()
        command = [
            *(sys.executable, __file__, "--worker", folder / "bytes.json"),
            *("--bundle", options.bundle, "--data", options.data),
            *(() if precision == "code" else ("--comm-dtype", precision)),
            *("--out", folder / "new", "--max-steps", options.steps, "--eval-every", options.steps),
            *("--seed", seed, "--batch-size", options.batch_size, "--json", *more),
        ]
        ranks = [
            subprocess.Popen(
                list(map(str, command)),
                env=os.environ
                | {"RANK": str(rank), "WORLD_SIZE": str(size)}
                | {"LOCAL_RANK": str(rank % options.ranks_per_host)}
                | {"LOCAL_WORLD_SIZE": str(options.ranks_per_host)}
                | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            sys.exit(f"{precision}, seed {seed}: the training failed")
        sent = json.loads((folder / "bytes.json").read_text())
        last = json.loads(printed[0])["history"][-1]
    print(f"{precision}, seed {seed}: AUC {last['auc']:.5f}, NE {last['ne']:.5f}", file=sys.stderr)
    return {
        "auc": last["auc"],
        "ne": last["ne"],
        "planned": planned_bytes(options, precision),
        **sent,
    }


def planned_bytes(options: argparse.Namespace, precision: Any) -> float:
    """Bytes of tower outputs and gradients that rank 0 sends to other hosts in a step, by plan."""
    from dmt_convert import open_bundle
    from dmt_convert.placement import Cluster, plan_model

    model = open_bundle(options.bundle).manifest.model
    asked = None if precision == "code" else precision
    hosts = plan_model(
        model, Cluster(hosts=options.hosts, ranks_per_host=options.ranks_per_host)
    ).tower_hosts
    ways = zip(hosts, model.bytes_sent(asked), model.gradient_bytes(asked), strict=True)
    a_sample = sum(out * (options.hosts - 1) if 0 in at else back for at, out, back in ways)
    return a_sample * options.batch_size / (options.hosts * options.ranks_per_host)


def be_rank(report: Path, arguments: Sequence[str]) -> None:
    """Run the recipe as one rank, and count what it sends to other hosts while it trains."""
    from dmt_convert.cluster import ClusterTrainer, Transport
    from dmt_convert.recipes import finetune_dmt

    counts = {"steps": 0, "tower outputs": 0, "ids": 0, "dense gradients": 0}
    training = [False]

    original = Transport.all_to_all

    def all_to_all(self: Any, group: Any, sent: Any, sizes: Any, parts: Any = None) -> Any:
        each = list(sent) if parts is None else sent.split(list(parts))
        what = "tower outputs" if each[0].element_size() == 1 else "ids"
        counts[what] += training[0] * bytes_to_others(group, each)
        return original(self, group, sent, sizes, parts)

    Transport.all_to_all = all_to_all  # type: ignore[method-assign]
    take_step = finetune_dmt.take_step

    def counted(trainer: ClusterTrainer, lr_factor: float) -> float:
        counts["steps"] += 1
        hosts, per_host = trainer.layout.hosts, trainer.layout.ranks_per_host
        named = trainer.dense._named.items()
        shared = sum(p.numel() for n, p in named if ".towers." not in f".{n}")
        # a ring sends everything nearly twice; one rank of a host's sends to the next host
        counts["dense gradients"] += int(8 * shared * (hosts - 1) / hosts / per_host)
        training[0] = True
        try:
            return take_step(trainer, lr_factor)
        finally:
            training[0] = False

    finetune_dmt.take_step = counted  # type: ignore[assignment]
    finetune_dmt.main(list(arguments))
    if os.environ["RANK"] == "0":
        steps = counts.pop("steps")
        report.write_text(json.dumps({key: value / steps for key, value in counts.items()}))


def bytes_to_others(group: Any, sent: Sequence[Any]) -> int:
    """Bytes of those parts that go to ranks of other hosts."""
    import torch.distributed as dist

    per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    own = int(os.environ["RANK"]) // per_host
    return sum(
        part.numel() * part.element_size()
        for peer, part in enumerate(sent)
        if dist.get_global_rank(group, peer) // per_host != own
    )


def print_table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print markdown."""
    print(
        "| precision | AUC | AUC - fp32 | NE | NE - fp32 | tower outputs | planned | ids "
        "| dense gradients |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for precision, runs in found.items():
        cells = [precision]
        for key in ("auc", "ne"):
            cells.append(f"{statistics.mean(run[key] for run in runs):.5f}")
            if "fp32" in found:
                apart = [
                    run[key] - base[key] for run, base in zip(runs, found["fp32"], strict=True)
                ]
                spread = f" ({max(apart) - min(apart):.5f})" if len(apart) > 1 else ""
                cells.append(f"{statistics.mean(apart):+.5f}{spread}")
            else:
                cells.append("-")
        names = ("tower outputs", "planned", "ids", "dense gradients")
        cells += [f"{runs[0][name] / 1024:,.1f} KiB" for name in names]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        be_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
