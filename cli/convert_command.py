"""`dmt convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import (
    JsonOption,
    Output,
    QuietOption,
    grid,
    human_bytes,
    make_output,
    number,
    table,
)
from .partition_options import (
    AdapterOption,
    AffinityOption,
    ApartOption,
    CalibrationOption,
    GroupOption,
    ModelConfigOption,
    SeedOption,
    TogetherOption,
    TowersOption,
    make_partition_config,
    read_model_options,
)

if TYPE_CHECKING:
    from dmt_convert.convert import Conversion, Preview
    from dmt_convert.documents import PartitionRecord
    from dmt_convert.model import TowerModuleSpec
    from dmt_convert.placement import Cluster

NAME = "convert"


def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    towers: TowersOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the bundle. [default: CKPT-dmtT beside SOURCE]"),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            "--partition",
            help="coherent, diverse, round-robin, or a JSON file with the towers. [coherent; "
            "diverse where a tower may emit combinations of its features: --c 0 or "
            "--compression, for dot]",
            metavar="coherent|diverse|round-robin|FILE",
        ),
    ] = None,
    affinity: AffinityOption = "weights",
    tower_module: Annotated[
        str,
        typer.Option(
            "--tower-module",
            help="auto is the architecture's own; passthrough computes exactly what the flat "
            "model computes.",
            metavar="auto|passthrough|dlrm|dcn|linear",
        ),
    ] = "auto",
    c: Annotated[int | None, typer.Option("--c", help="Vectors emitted per feature.")] = None,
    p: Annotated[int | None, typer.Option("--p", help="Vectors emitted per tower.")] = None,
    dim: Annotated[int | None, typer.Option("--dim", help="Output dim D of a vector.")] = None,
    compression: Annotated[
        float | None, typer.Option("--compression", help="Compression to reach, sets D. [2]")
    ] = None,
    together: TogetherOption = None,
    apart: ApartOption = None,
    group: GroupOption = None,
    calibration: CalibrationOption = None,
    distill_steps: Annotated[
        int | None,
        typer.Option(
            "--distill-steps",
            min=0,
            help="Steps of distillation after the closed form. [as many as cost little]",
        ),
    ] = None,
    hosts: Annotated[
        int | None, typer.Option("--hosts", help="Hosts of the cluster. [one per tower]")
    ] = None,
    ranks_per_host: Annotated[
        int | None, typer.Option("--ranks-per-host", help="Ranks (GPUs) per host. [8]")
    ] = None,
    hbm_gib: Annotated[
        float | None, typer.Option("--hbm-gib", help="Memory per rank in GiB. [80]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Store tables in this type. [as they are]", metavar="fp32|fp16|bf16"
        ),
    ] = None,
    optimizer_state: Annotated[
        str,
        typer.Option(
            "--optimizer-state",
            help="Keep Adagrad's accumulators of the tables, from which fine-tuning goes on.",
            metavar="keep|drop",
        ),
    ] = "keep",
    model_config: ModelConfigOption = None,
    adapter: AdapterOption = None,
    seed: SeedOption = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done; read headers, write nothing."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a flat checkpoint into a Disaggregated Multi-Tower bundle.

    The bundle holds the weights of every tower, a plan that puts towers on hosts, and a report
    that says what compression cost. Tables are streamed: memory stays small whatever their size.

    For example:

    `dmt convert ckpt.pt --towers 16`

    `dmt convert ckpt.pt --towers 16 --tower-module passthrough --out exact`

    `dmt convert ckpt.pt --towers 4 --compression 4 --calibration clicks/valid.npz`
    """
    from dmt_convert.convert import convert_checkpoint, default_out, preview_conversion
    from dmt_convert.convert_config import ConvertConfig

    output = make_output(json_=json_, quiet=quiet)
    config = ConvertConfig(
        partition=make_partition_config(
            towers=towers,
            partition=partition or "coherent",
            affinity=affinity,
            together=together,
            apart=apart,
            group=group,
            seed=seed,
        ),
        own_strategy=partition is not None,
        tower_module=_choice("--tower-module", tower_module, _MODULES),  # type: ignore[arg-type]
        c=c,
        p=p,
        dim=dim,
        compression=compression,
        calibration=calibration,
        distill_steps=distill_steps,
        cluster=_cluster(hosts, ranks_per_host, hbm_gib, towers),
        dtype=None if dtype is None else _choice("--dtype", dtype, _DTYPES),  # type: ignore[arg-type]
        optimizer_state=_choice("--optimizer-state", optimizer_state, _STATES),  # type: ignore[arg-type]
        model_config=read_model_options(model_config, adapter),
        seed=seed,
        force=force,
    )
    target = default_out(source, towers) if out is None else out
    if dry_run:
        _show_preview(output, preview_conversion(source, target, config))
        return
    with output.progress() as progress:
        conversion = convert_checkpoint(source, target, config=config, progress=progress)
    _show_conversion(output, source, conversion)


_MODULES = ("auto", "passthrough", "dlrm", "dcn", "linear")
_DTYPES = ("fp32", "fp16", "bf16")
_STATES = ("keep", "drop")


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> str:
    from dmt_convert.errors import ConfigError

    if value not in allowed:
        raise ConfigError(
            f"{option} {value}", expected="one of " + ", ".join(allowed), hint="choose one of these"
        )
    return value


def _cluster(
    hosts: int | None, ranks: int | None, hbm_gib: float | None, towers: int | None
) -> Cluster | None:
    from .cluster_options import make_cluster

    if hosts is None and ranks is None and hbm_gib is None:
        return None
    return make_cluster(
        hosts=hosts if hosts is not None else (towers or 1),
        ranks_per_host=8 if ranks is None else ranks,
        hbm_gib=hbm_gib,
    )


def _show_preview(output: Output, preview: Preview) -> None:
    spec, module = preview.info.spec, preview.module
    towers = None if preview.partition is None else preview.partition.assignment.towers
    value = {
        "dry_run": True,
        "out": str(preview.out),
        "spec": spec.to_json(),
        "facts": [asdict(fact) for fact in preview.info.facts],
        "towers": preview.num_towers,
        "assignment": towers,
        "tower_module": asdict(module),
        "alternatives": [asdict(other) for other in preview.alternatives],
        "compression": preview.compression,
        "table_bytes": preview.table_bytes,
        "accumulator_bytes": preview.accumulator_bytes,
    }
    facts = [[f.subject, f.value, f.source, f.reason] for f in preview.info.facts]
    rows = [
        ("would write", str(preview.out)),
        ("tables", f"{len(spec.tables)}, {human_bytes(preview.table_bytes)}"),
        ("accumulators", human_bytes(preview.accumulator_bytes)),
        ("features", f"{len(spec.features)} in {preview.num_towers} towers"),
        ("tower module", _module_text([module])),
        *(("  or", _module_text([other])) for other in preview.alternatives),
        ("compression", f"{preview.compression:.2f}"),
        ("towers", "found from the weights when converting" if towers is None else ""),
        *((f"  tower {t}", ", ".join(names)) for t, names in enumerate(towers or ())),
    ]
    facts_table = table("\nWhat is known, and how", ["what", "value", "how", "why"], facts)
    output.result(value, grid(rows), facts_table)


def _module_text(modules: Sequence[TowerModuleSpec]) -> str:
    module = modules[0]
    if module.kind == "passthrough":
        return "passthrough (exact)"
    dims = [str(other.dim) for other in modules]
    width = dims[0] if len(set(dims)) == 1 else "/".join(dims)
    if module.kind in ("dcn", "linear"):
        return f"{module.kind}, D={width}"
    return f"dlrm, c={module.c}, p={module.p}, D={width}"


def _partition_text(partition: PartitionRecord) -> str:
    chosen = partition.strategy in ("coherent", "diverse")
    return partition.strategy + (f" by {partition.affinity}" if chosen else "")


def _show_conversion(output: Output, source: Path, conversion: Conversion) -> None:
    from dmt_convert.adapter import model_option
    from dmt_convert.documents import to_json

    bundle, quality = conversion.bundle, conversion.quality
    manifest = bundle.manifest
    model = manifest.model
    value = {
        "bundle": str(bundle.path),
        "report": str(bundle.path / "report.html"),
        "towers": [list(tower.features) for tower in model.towers],
        "partition": {
            "strategy": manifest.partition.strategy,
            "affinity": manifest.partition.affinity,
        },
        "tower_module": asdict(model.towers[0].module),
        "tower_dims": [tower.module.dim for tower in model.towers],
        "compression": model.compression,
        "initialisation": to_json(manifest.initialisation),
        "optimizer_state": to_json(manifest.optimizer_state),
        "quality": quality.to_json(),
        "facts": [asdict(fact) for fact in manifest.facts],
    }
    rows = [
        ("bundle", str(bundle.path)),
        ("report", str(bundle.path / "report.html")),
        ("towers", f"{len(model.towers)} of {len(model.flat.features)} features"),
        ("partition", _partition_text(manifest.partition)),
        ("tower module", _module_text([tower.module for tower in model.towers])),
        ("compression", f"{model.compression:.2f}"),
        ("initialised", manifest.initialisation.method),
        ("optimizer state", f"accumulators of {len(bundle.accumulators)} tables"),
    ]
    columns = ["model", "R^2>", "max |diff|>", "rank corr.>"]
    columns += ["AUC>", "log loss>", "NE>"] if quality.labelled else []
    lines = []
    for row in quality.rows:
        cells = [row.name, number(row.r2), number(row.max_abs_diff), number(row.rank_correlation)]
        if quality.labelled:
            cells += [number(row.auc), number(row.log_loss), number(row.ne)]
        lines.append(cells)
    title = f"\nLogits against the flat model, {quality.count} held-out rows of {quality.data}"
    output.result(value, grid(rows), table(title, columns, lines))
    for note in manifest.optimizer_state.notes:
        output.remark(f"note: {note}")
    assumed = [f"{f.subject} = {f.value}" for f in manifest.facts if f.source == "assumed"]
    if assumed:
        output.remark("assumed: " + "; ".join(assumed) + "\n(say otherwise with --model-config)")
    if not model.is_passthrough:
        output.remark(
            f"exact model: dmt convert {source} --towers {len(model.towers)} "
            f"--tower-module passthrough{model_option(model.flat)}"
        )
