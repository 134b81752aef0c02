"""`dmt plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dmt_convert as dmt
from dmt_convert.config import PlanConfig

from .console import Output, counted, grid, human_bytes, table
from .options import command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dmt_convert.placement import TowerPlan

NAME = "plan"


@command(PlanConfig)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle.")],
    *,
    config: PlanConfig,
    output: Output,
) -> None:
    """Place a bundle's towers on the hosts of a cluster, and predict its steps there.

    Example: `dmt plan ckpt-dmt16 --hosts 16 --ranks-per-host 8 --out plan.json`

    Example: `dmt plan ckpt-dmt16 --hosts 16 --ranks-per-host 8 --predict --gpu h100`
    """
    plan = dmt.plan(bundle, config=config)
    predicted = config.predict or config.predict_scaling
    value, tables = plan.to_json(), _tables(plan, estimate=not predicted)
    if predicted:
        from .prediction_tables import show_prediction

        report = dmt.predict(bundle, config=config)
        value["prediction"] = report.to_json()
        if config.plot is not None:
            value["prediction"]["files"] = [str(config.plot)]
        tables += show_prediction(report)
    output.result(value, *tables)
    advice = _advice(bundle, plan)
    if advice is not None:
        output.remark(f"note: {advice}")


def _advice(bundle: Path, plan: TowerPlan) -> str | None:
    from dmt_convert.placement import advise_replication

    return advise_replication(dmt.open_bundle(bundle).manifest.model, plan.cluster)


def _tables(plan: TowerPlan, *, estimate: bool) -> list[RenderableType]:
    from dmt_convert.placement import BATCH, describe_cached, describe_replication

    cluster, traffic, held = plan.cluster, plan.traffic, describe_replication(plan)
    moved = describe_cached(plan)
    rows = [
        [
            str(t),
            ", ".join(map(str, placed)) or "all",
            str(len(plan.ranks_of(t))),
            human_bytes(sum(plan.bytes_per_rank[r] for r in plan.ranks_of(t))),
        ]
        for t, placed in enumerate(plan.tower_hosts)
    ]
    facts = [
        (
            "cluster",
            f"{counted(cluster.hosts, 'host')} x {counted(cluster.ranks_per_host, 'rank')}, "
            f"{cluster.hbm_bytes / 2**30:g} GiB each",
        ),
        (
            "fullest rank",
            f"{human_bytes(max(plan.bytes_per_rank))} of "
            f"{human_bytes(cluster.usable_bytes)} usable",
        ),
        (
            "across hosts",
            f"{human_bytes(traffic.flat_cross_bytes)} flat, "
            f"{human_bytes(traffic.dmt_cross_bytes)} in towers (per sample and host), "
            f"{human_bytes(traffic.gradient_cross_bytes)} of gradients back",
        ),
        *((("on every rank", held),) if held else ()),
        *((("in host memory", moved),) if moved else ()),
    ]
    if estimate:
        times = plan.estimate(BATCH)
        facts.append(
            (
                "modelled",
                f"{times.flat_seconds * 1e3:.2f} ms flat, {times.dmt_seconds * 1e3:.2f} ms in "
                f"towers of communication per step of {BATCH} samples per rank (bandwidth only)",
            )
        )
    columns = ["tower", "hosts", "ranks>", "bytes of its ranks>"]
    return [grid(facts), table("\nTowers", columns, rows)]
