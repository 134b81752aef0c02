"""`dmt plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, QuietOption, grid, human_bytes, make_output, table
from .partition_options import AdapterOption, read_model_options
from .prediction_options import (
    DEFAULT_IDS,
    AssumeOption,
    BatchOption,
    CommDtypeOption,
    GpuOption,
    IdsPerBagOption,
    PlotOption,
    PredictOption,
    PredictScalingOption,
    make_machine,
    refuse_idle_options,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dmt_convert.placement import TowerPlan

NAME = "plan"
_BATCH = 1024


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle.")],
    hosts: Annotated[int, typer.Option("--hosts", help="Hosts of the cluster.")],
    ranks_per_host: Annotated[int, typer.Option("--ranks-per-host", help="Ranks (GPUs) per host.")],
    hbm_gib: Annotated[
        float | None,
        typer.Option("--hbm-gib", help="Memory per rank in GiB, 80 if not given."),
    ] = None,
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
    predict: PredictOption = False,
    predict_scaling: PredictScalingOption = False,
    plot: PlotOption = None,
    gpu: GpuOption = None,
    batch: BatchOption = None,
    comm_dtype: CommDtypeOption = None,
    ids_per_bag: IdsPerBagOption = None,
    assume: AssumeOption = None,
    adapter: AdapterOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Place a bundle's towers on the hosts of a cluster, and predict its steps there.

    Example: `dmt plan ckpt-dmt16 --hosts 16 --ranks-per-host 8 --out plan.json`

    Example: `dmt plan ckpt-dmt16 --hosts 16 --ranks-per-host 8 --predict --gpu h100`
    """
    from dmt_convert.bundle import open_bundle
    from dmt_convert.placement import plan_towers

    from .cluster_options import make_cluster
    from .partition_command import write_text
    from .prediction_tables import show_prediction

    output = make_output(json_=json_, quiet=quiet)
    refuse_idle_options(
        predict=predict,
        scaling=predict_scaling,
        plot=plot,
        given={
            "--gpu": gpu,
            "--batch": batch,
            "--comm-dtype": comm_dtype,
            "--ids-per-bag": ids_per_bag,
            "--assume": assume,
        },
    )
    read_model_options(None, adapter)
    opened = open_bundle(bundle)
    cluster = make_cluster(
        hosts=hosts,
        ranks_per_host=ranks_per_host,
        hbm_gib=hbm_gib,
        intra_gbps=intra_gbps,
        inter_gbps=inter_gbps,
        gpu=gpu,
    )
    machine = make_machine(cluster, gpu=gpu, batch=batch, comm_dtype=comm_dtype, assume=assume)
    model = opened.manifest.model
    plan = plan_towers(model.flat, model.assignment, cluster, tower_widths=model.tower_widths)
    value = plan.to_json()
    if out is not None:
        write_text(out, json.dumps(value, indent=1) + "\n")
    tables = _tables(plan)
    if predict or predict_scaling:
        shown = show_prediction(
            model,
            plan,
            machine,
            ids_per_bag=DEFAULT_IDS if ids_per_bag is None else ids_per_bag,
            predict=predict,
            scaling=predict_scaling,
            plot=plot,
        )
        value["prediction"] = shown.value
        tables += shown.tables
    output.result(value, *tables)


def _tables(plan: TowerPlan) -> list[RenderableType]:
    cluster, estimate = plan.cluster, plan.estimate(_BATCH)
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
        (
            "cluster",
            f"{cluster.hosts} hosts x {cluster.ranks_per_host} ranks, "
            f"{cluster.hbm_bytes / 2**30:g} GiB each",
        ),
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
    return [grid(facts), table("\nTowers", columns, rows)]
