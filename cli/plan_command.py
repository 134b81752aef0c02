"""`dmt plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, QuietOption, grid, human_bytes, make_output, table

NAME = "plan"
_BATCH = 1024


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle.")],
    hosts: Annotated[int, typer.Option("--hosts", help="Hosts of the cluster.")],
    ranks_per_host: Annotated[int, typer.Option("--ranks-per-host", help="Ranks (GPUs) per host.")],
    hbm_gib: Annotated[float, typer.Option("--hbm-gib", help="Memory per rank in GiB.")] = 80.0,
    intra_gbps: Annotated[
        float | None, typer.Option("--intra-gbps", help="Link speed inside a host, Gbit/s.")
    ] = None,
    inter_gbps: Annotated[
        float | None,
        typer.Option("--inter-gbps", help="Link speed per rank to other hosts, Gbit/s."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the plan to this JSON file.")
    ] = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Place a bundle's towers on the hosts of a cluster.

    Example: `dmt plan ckpt-dmt16 --hosts 16 --ranks-per-host 8 --out plan.json`
    """
    from dmt_convert.bundle import open_bundle
    from dmt_convert.plan import plan_towers

    from .cluster_options import make_cluster
    from .partition_command import write_text

    output = make_output(json_=json_, quiet=quiet)
    opened = open_bundle(bundle)
    cluster = make_cluster(
        hosts=hosts,
        ranks_per_host=ranks_per_host,
        hbm_gib=hbm_gib,
        intra_gbps=intra_gbps,
        inter_gbps=inter_gbps,
    )
    model = opened.manifest.model
    plan = plan_towers(model.flat, model.assignment, cluster, tower_widths=model.tower_widths)
    value = plan.to_json()
    if out is not None:
        write_text(out, json.dumps(value, indent=1) + "\n")
    estimate = plan.estimate(_BATCH)
    rows = [
        [
            str(t),
            ", ".join(map(str, placed)),
            str(len(plan.ranks_of(t))),
            human_bytes(sum(plan.bytes_per_rank[r] for r in plan.ranks_of(t))),
        ]
        for t, placed in enumerate(plan.tower_hosts)
    ]
    facts = [
        ("cluster", f"{hosts} hosts x {ranks_per_host} ranks, {hbm_gib:g} GiB each"),
        (
            "fullest rank",
            f"{human_bytes(max(plan.bytes_per_rank))} of "
            f"{human_bytes(cluster.usable_bytes)} usable",
        ),
        (
            "across hosts",
            f"{human_bytes(plan.traffic.flat_cross_bytes)} flat, "
            f"{human_bytes(plan.traffic.dmt_cross_bytes)} in towers (per sample and host)",
        ),
        (
            "modelled",
            f"{estimate.flat_seconds * 1e3:.2f} ms flat, "
            f"{estimate.dmt_seconds * 1e3:.2f} ms in towers of communication per step of {_BATCH} "
            "samples per rank (bandwidth only)",
        ),
    ]
    columns = ["tower", "hosts", "ranks>", "bytes of its ranks>"]
    output.result(value, grid(facts), table("\nTowers", columns, rows))
