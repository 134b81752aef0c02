"""From a flat checkpoint to a bundle."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmt_convert.bundle import (
    Bundle,
    BundleWriter,
    Documents,
    Manifest,
    StreamedWeights,
    accumulator_bytes,
    describe_accumulators,
    open_bundle,
    plan_accumulator_files,
    plan_table_files,
    table_bytes,
)
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.config import (
    ConvertConfig,
    ModelOptions,
    PartitionConfig,
    PartitionOptions,
    PlanConfig,
)
from dmt_convert.conversion import (
    Sample,
    choose_modules,
    default_strategy,
    draw_sample,
    may_allot,
)
from dmt_convert.conversion.partition import (
    Partition,
    measure_affinity,
    partition_features,
    plot_partition,
    tells_pairs,
)
from dmt_convert.errors import BundleError, DataError, PlanError
from dmt_convert.families import FlatModelInfo, infer_model, read_model_options
from dmt_convert.files import (
    check_checksums,
    check_space,
    check_target,
    staged_file,
    write_text,
)
from dmt_convert.model import DmtSpec, TowerModuleSpec, converted_spec
from dmt_convert.placement import (
    Cluster,
    TowerPlan,
    default_cluster,
    make_cluster,
    make_machine,
    plan_towers,
)
from dmt_convert.placement.predict import PredictionReport, plot_scaling, predict_bundle
from dmt_convert.progress import Progress, no_progress

if TYPE_CHECKING:
    from dmt_convert.conversion import StartedModel

logger = logging.getLogger(__name__)

_MIN_ROWS: Final = 16
_MAX_HOSTS_PER_TOWER: Final = 64


def convert_checkpoint(
    source: Path, config: ConvertConfig, progress: Progress = no_progress
) -> Bundle:
    """Convert a flat checkpoint into a bundle, which is put in place whole or not at all.

    Args:
        source: The checkpoint.
        config: What is asked for.
        progress: Told of the steps.

    Raises:
        DmtError: The checkpoint, the settings or the target cannot be used; nothing is changed.
    """
    flat = describe_flat(source, config)
    out = check_out(flat, config)
    for tensor in flat.dense_tensors.values():
        check_checksums(tensor, tensor.path)
    progress("sampling", 0, 0)
    sample = draw_rows(flat, config)
    progress("partitioning", 0, 0)
    candidates = candidate_modules(flat, config)
    partition = find_towers(flat, sample, config, candidates)
    specs = [converted_spec(flat.spec, partition.assignment.towers, m) for m in candidates]
    # that the cluster can hold the tables is known before anything is written
    plan = _plan(specs[0], _cluster(config))
    weights = _stream(flat, partition, config)
    with BundleWriter(out, weights, force=config.force, progress=progress) as writer:
        started = _start(flat, specs, sample, config, _checked(progress, writer))
        progress("initialising", 0, 0)
        writer.wait()
        manifest = _describe(flat, partition, sample, started, weights, config)
        # the towers may emit less than was asked for, or something else
        final = _plan(started.spec, plan.cluster)
        documents = _documents(flat, partition, final, started, out)
        writer.finish(started.weights, manifest, final, documents)
    return open_bundle(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a conversion would do, known from headers alone."""

    flat: FlatModelInfo
    """The flat model."""
    out: Path
    """Where the bundle would go."""
    modules: tuple[TowerModuleSpec, ...]
    """Candidates for the tower module; the best one is taken once the weights are known."""
    num_towers: int
    """Number of towers."""
    compression: float
    """Bytes that would cross hosts uncompressed, over bytes that do."""
    table_bytes: int
    """Bytes of all tables in the bundle."""
    accumulator_bytes: int
    """Bytes of the accumulators that go with them."""
    partition: Partition | None
    """The towers, if they are known without reading weights."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<Preview of {self.out}: {self.num_towers} towers, {self.table_bytes:,} bytes>"


def preview_conversion(source: Path, config: ConvertConfig) -> Preview:
    """Say what a conversion would do; reads headers only, writes nothing.

    Raises:
        DmtError: The conversion would be refused.
    """
    flat = describe_flat(source, config)
    out = check_out(flat, config)
    known = isinstance(config.partition, Path) or config.partition == "round-robin"
    # towers are found from the weights later; that there can be so many is known now
    dealt = partition_features(
        flat.spec, config if known else config.replace(partition="round-robin")
    )
    modules = candidate_modules(flat, config)
    towers = dealt.assignment.towers
    return Preview(
        flat=flat,
        out=out,
        modules=modules,
        num_towers=len(towers),
        compression=converted_spec(flat.spec, towers, modules[0]).compression,
        table_bytes=table_bytes(flat, config.dtype),
        accumulator_bytes=_accumulator_bytes(flat, config),
        partition=dealt if known else None,
    )


def describe_flat(source: Path, options: ModelOptions) -> FlatModelInfo:
    """Open a flat checkpoint by its headers, with what the user says of the model.

    Raises:
        DmtError: It cannot be read, or is not a model that is known.
    """
    return infer_model(open_checkpoint(source), read_model_options(options))


def default_out(source: Path, num_towers: int | None) -> Path:
    """Return `ckpt-dmt16` beside `ckpt.pt`."""
    if source.name == ".metadata" or source.suffix == ".distcp":
        source = source.parent  # one file of a directory stands for the directory
    if source.name in ("", ".."):
        source = source.resolve()
    stem = source.name if source.is_dir() else source.stem
    return source.parent / f"{stem or 'model'}-dmt{num_towers or ''}"


def check_out(flat: FlatModelInfo, config: ConvertConfig) -> Path:
    """Return where the bundle goes, once that is known to be possible.

    Raises:
        BundleError: The target is taken, lies in the checkpoint, or the disk has too little space.
    """
    source = flat.checkpoint.source
    out = config.out or default_out(source, config.towers)
    check_target(out, force=config.force)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise BundleError(
            f"--out {out} lies in the checkpoint {source}",
            expected="a path outside the checkpoint",
            hint="choose another --out; the checkpoint is never changed",
        )
    check_space(out, table_bytes(flat, config.dtype) + _accumulator_bytes(flat, config))
    return out


def _accumulator_bytes(flat: FlatModelInfo, config: ConvertConfig) -> int:
    return accumulator_bytes(flat) if config.optimizer_state == "keep" else 0


def draw_rows(flat: FlatModelInfo, options: PartitionOptions) -> Sample:
    """Draw the rows that a model is looked at on.

    Raises:
        DataError: The calibration data holds too few rows, or does not fit the model.
    """
    sample = draw_sample(flat, calibration=options.calibration, seed=options.seed)
    if sample.batch.num_rows < _MIN_ROWS:
        raise DataError(
            f"--calibration holds {sample.batch.num_rows} rows",
            expected=f"at least {_MIN_ROWS}, better a few thousand: a quarter is held out",
            hint="give more rows, or leave --calibration out to draw inputs from the tables",
        )
    return sample


def find_towers(
    flat: FlatModelInfo,
    sample: Sample,
    options: PartitionOptions,
    modules: tuple[TowerModuleSpec, ...] = (),
) -> Partition:
    """Partition a checkpoint's features, by a sample of its inputs.

    Args:
        flat: The flat model.
        sample: Rows on which affinity is measured.
        options: What is asked for.
        modules: Candidates for the tower module. If towers may combine features, strongly paired
            features are better kept apart, so the default strategy is `diverse`.

    Raises:
        PartitionError: The request cannot be met.
    """
    if options.partition is None:
        options = options.replace(partition=default_strategy(flat.spec, modules))
    if options.affinity == "weights" and not tells_pairs(flat.spec):
        options = options.replace(affinity="cosine")
    affinity = measure_affinity(flat, sample, options.affinity)
    return replace(partition_features(flat.spec, options, affinity), sample=sample.description)


def candidate_modules(flat: FlatModelInfo, config: ConvertConfig) -> tuple[TowerModuleSpec, ...]:
    """Return the tower module that is asked for, and others that emit as little.

    Raises:
        ConfigError: The settings contradict each other, or the model cannot have such a module.
    """
    return choose_modules(flat, config, config.towers or _towers_in_file(flat, config))


def _towers_in_file(flat: FlatModelInfo, config: ConvertConfig) -> int:
    return len(partition_features(flat.spec, config).assignment.towers)


def _cluster(config: ConvertConfig) -> Cluster | None:
    """Return the cluster that is asked for, if any of it is."""
    if config.hosts is None and config.ranks_per_host is None and config.hbm_gib is None:
        return None
    return make_cluster(config, hosts=config.towers or 1)


def _plan(spec: DmtSpec, cluster: Cluster | None) -> TowerPlan:
    """Plan for the given cluster, or for the smallest default one that holds the tables."""

    def attempt(candidate: Cluster) -> TowerPlan:
        return plan_towers(spec.flat, spec.assignment, candidate, tower_widths=spec.tower_widths)

    if cluster is not None:
        return attempt(cluster)
    base = default_cluster(len(spec.towers))
    hosts = base.hosts
    while True:
        try:
            return attempt(Cluster(hosts=hosts, ranks_per_host=base.ranks_per_host))
        except PlanError:
            if hosts >= base.hosts * _MAX_HOSTS_PER_TOWER:
                raise
            hosts *= 2


def _stream(flat: FlatModelInfo, partition: Partition, config: ConvertConfig) -> StreamedWeights:
    towers = partition.assignment.towers
    kept = config.optimizer_state == "keep"
    return StreamedWeights(
        tables=plan_table_files(flat, towers, dtype=config.dtype),
        accumulators=plan_accumulator_files(flat, towers) if kept else {},
    )


def _checked(progress: Progress, writer: BundleWriter) -> Progress:
    """Report progress, and stop as soon as the bundle cannot be written any more."""

    def report(step: str, done: int, total: int) -> None:
        writer.check()
        progress(step, done, total)

    return report


def _start(
    flat: FlatModelInfo,
    specs: list[DmtSpec],
    sample: Sample,
    config: ConvertConfig,
    progress: Progress,
) -> StartedModel:
    # imports torch, which takes seconds: only now, while tables are being copied
    from dmt_convert.conversion import start_model

    return start_model(
        flat,
        specs[0],
        sample,
        alternatives=specs[1:],
        allot=may_allot(specs[0].towers[0].module, config.compression),
        distill_steps=config.distill_steps,
        stored_as=config.dtype,
        seed=config.seed,
        on_step=lambda done, total: progress("distilling", done, total),
    )


def _describe(
    flat: FlatModelInfo,
    partition: Partition,
    sample: Sample,
    started: StartedModel,
    weights: StreamedWeights,
    config: ConvertConfig,
) -> Manifest:
    """Say all that `dmt.json` says, but for the weights."""
    from dmt_convert.report import describe_manifest

    manifest = describe_manifest(flat, partition, started, sample)
    return replace(
        manifest,
        partition=replace(manifest.partition, groups=dict(config.group)),
        optimizer_state=describe_accumulators(
            flat, weights.accumulators, keep=config.optimizer_state == "keep"
        ),
        config={"command": config.command, **config.record()},
    )


def _documents(
    flat: FlatModelInfo,
    partition: Partition,
    plan: TowerPlan,
    started: StartedModel,
    out: Path,
) -> Documents:
    """Make the report and the picture of the towers from the final manifest."""
    from dmt_convert.report import describe_conversion

    return lambda manifest: describe_conversion(
        manifest, flat, partition, plan, started.quality, out
    )


def partition_checkpoint(
    source: Path, config: PartitionConfig, progress: Progress = no_progress
) -> Partition:
    """Find towers for a flat checkpoint; write and draw them if that is asked for.

    Args:
        source: The checkpoint.
        config: What is asked for.
        progress: Told of the steps.

    Raises:
        DmtError: The request cannot be met, or a file cannot be written.
    """
    flat = describe_flat(source, config)
    progress("sampling", 0, 0)
    sample = draw_sample(flat, calibration=config.calibration, seed=config.seed)
    progress("partitioning", 0, 0)
    partition = find_towers(flat, sample, config)
    if config.out is not None:
        towers = {"towers": partition.assignment.towers}
        write_text(config.out, json.dumps(towers, indent=1, ensure_ascii=False) + "\n")
    if config.plot is not None:
        with staged_file(config.plot) as staged:
            plot_partition(flat.spec, partition, staged)
    return partition


def plan_bundle(bundle: Bundle, config: PlanConfig) -> TowerPlan:
    """Place a bundle's towers on a cluster; write the plan if that is asked for.

    Raises:
        DmtError: The cluster cannot hold the towers, or the file cannot be written.
    """
    read_model_options(config)
    model = bundle.manifest.model
    plan = plan_towers(
        model.flat, model.assignment, make_cluster(config), tower_widths=model.tower_widths
    )
    if config.out is not None:
        write_text(config.out, json.dumps(plan.to_json(), indent=1) + "\n")
    return plan


def predict_plan(bundle: Bundle, plan: TowerPlan, config: PlanConfig) -> PredictionReport:
    """Predict the steps of a placed bundle; draw them if that is asked for.

    Raises:
        DmtError: The settings describe no machine, or the file cannot be written.
    """
    machine = make_machine(config, plan.cluster)
    report = predict_bundle(
        bundle.manifest.model,
        plan,
        machine,
        config.ids_per_bag or 1.0,
        predict=config.predict,
        scaling=config.predict_scaling,
    )
    if config.plot is not None and report.scaling is not None:
        with staged_file(config.plot) as staged:
            plot_scaling(report.scaling, machine.title, staged)
    return report
