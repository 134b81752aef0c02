"""From a flat checkpoint to a bundle: the steps of a conversion, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dmt_convert.bundle import (
    Bundle,
    BundleWriter,
    StreamedWeights,
    accumulator_bytes,
    open_bundle,
    plan_accumulator_files,
    plan_table_files,
    table_bytes,
)
from dmt_convert.checkpoint import check_finite, check_outliers, open_checkpoint, read_tensor
from dmt_convert.config import ConvertConfig, ModelOptions, PartitionConfig, PartitionOptions
from dmt_convert.conversion.memory import check_memory, weight_bytes
from dmt_convert.conversion.module_choice import (
    choose_modules,
    default_strategy,
    how_to_choose,
    planned_elements,
)
from dmt_convert.conversion.partition import (
    JointCodes,
    Partition,
    measure_affinity,
    partition_features,
    tells_pairs,
)
from dmt_convert.conversion.record import describe_manifest, describe_partition
from dmt_convert.conversion.replication import (
    choose_replicated,
    fit_for_replication,
    partition_beside,
    spec_of,
)
from dmt_convert.conversion.sample import Sample, draw_sample, further_rows
from dmt_convert.data import open_data
from dmt_convert.documents import Frontier
from dmt_convert.errors import BundleError, DataError, PlanError, UsageError
from dmt_convert.families import (
    FlatModelInfo,
    LiveModel,
    ModelConfig,
    infer_model,
    open_live,
    read_model_options,
)
from dmt_convert.files import (
    FIGURE_FILE,
    PARTITION_FILE,
    FileKind,
    check_checksums,
    check_distinct,
    check_output,
    check_space,
    check_target,
    staged_file,
    write_text,
)
from dmt_convert.free_memory import available_bytes
from dmt_convert.model import DmtSpec, TowerModuleSpec
from dmt_convert.placement import Cluster, TowerPlan, default_cluster, make_cluster, plan_model
from dmt_convert.progress import Progress, no_progress
from dmt_convert.report import plot_frontier, plot_partition

if TYPE_CHECKING:
    from dmt_convert.conversion.frontier import FrontierRequest
    from dmt_convert.conversion.start import StartedModel

_MIN_ROWS: Final = 16
_MAX_HOSTS_PER_TOWER: Final = 64


def convert_checkpoint(
    source: Path | LiveModel, config: ConvertConfig, progress: Progress = no_progress
) -> Bundle:
    """Convert a flat checkpoint into a bundle, which is put in place whole or not at all.

    Args:
        source: The checkpoint, or a module in memory.
        config: The settings.
        progress: Called as work goes on.

    Raises:
        DmtError: The checkpoint, the settings or the target cannot be used; nothing is changed.
    """
    from dmt_convert.report import render_documents

    flat = describe_flat(source, config)
    out = _check_out(flat, config)
    _check_resources(flat, config, out)
    _check_dense(flat, config)
    progress("sampling", 0, 0)
    sample = _draw_sample(flat, config)
    progress("partitioning", 0, 0)
    modules = _candidate_modules(flat, config)
    replicated = choose_replicated(flat.spec, config, modules[0], sample.ids_per_bag)
    partition = find_towers(flat, sample, config, modules, replicated)
    assert {name for names in partition.everywhere for name in names} == set(replicated)
    specs = [spec_of(flat.spec, partition, module) for module in modules]
    # made before anything is written, because the cluster may be too small for the tables
    plan = _plan(specs[0], _requested_cluster(config))
    weights = _streamed_weights(flat, partition, config)
    with BundleWriter(out, weights, force=config.force, progress=progress) as writer:
        started = _start(flat, specs, sample, partition, config, _checked(progress, writer))
        progress("initialising", 0, 0)
        writer.wait()
        manifest = describe_manifest(
            flat, partition, sample, started, weights=weights, config=config
        )
        # the towers may emit less than the ones planned for
        final_plan = _plan(started.spec, plan.cluster)
        writer.finish(
            started.weights,
            manifest,
            final_plan,
            lambda final: render_documents(final, final_plan, out, affinity=partition.affinity),
        )
        flat.checkpoint.check_unchanged()
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
    replicated: tuple[str, ...]
    """Features whose tables would be on every rank, in towers of their own."""
    compression: float
    """Bytes that would cross hosts uncompressed, over bytes that do."""
    table_bytes: int
    """Bytes of all tables in the bundle."""
    accumulator_bytes: int
    """Bytes of the accumulators that go with them."""
    weight_bytes: int
    """Bytes of all other weights in the bundle."""
    memory_bytes: Mapping[str, int]
    """Estimated peak of memory, by purpose."""
    free_memory_bytes: int | None
    """Memory that is free now; None: unknown."""
    partition: Partition | None
    """The towers, if they are known without reading weights."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<Preview of {self.out}: {self.num_towers} towers, {self.table_bytes:,} bytes>"


def preview_conversion(source: Path | LiveModel, config: ConvertConfig) -> Preview:
    """Say what a conversion would do; reads headers only, writes nothing.

    Raises:
        DmtError: The conversion would be refused.
    """
    flat = describe_flat(source, config)
    out = _check_out(flat, config)
    if config.calibration is not None:
        open_data(config.calibration)
    modules = _candidate_modules(flat, config)
    dealt = _dealt_towers(flat, config, modules[0])
    spec = spec_of(flat.spec, dealt, modules[0])
    return Preview(
        flat=flat,
        out=out,
        modules=modules,
        num_towers=len(dealt.towers),
        replicated=tuple(name for names in dealt.everywhere for name in names),
        compression=spec.compression,
        table_bytes=table_bytes(flat, config.dtype),
        accumulator_bytes=_accumulator_bytes(flat, config),
        weight_bytes=weight_bytes(flat, spec),
        memory_bytes=_check_resources(flat, config, out),
        free_memory_bytes=available_bytes(),
        partition=dealt if _knows_towers(config) else None,
    )


def _knows_towers(config: ConvertConfig) -> bool:
    """Whether the towers are known without reading weights."""
    return isinstance(config.partition, Path) or config.partition == "round-robin"


def _dealt_towers(flat: FlatModelInfo, config: ConvertConfig, module: TowerModuleSpec) -> Partition:
    """Return the towers, or as many of the same size if they are found from the weights later."""
    options = config if _knows_towers(config) else config.replace(partition="round-robin")
    replicated = choose_replicated(flat.spec, config, module)
    return partition_beside(flat.spec, options, None, replicated)


def _check_resources(flat: FlatModelInfo, config: ConvertConfig, out: Path) -> Mapping[str, int]:
    """Refuse a conversion that the disk or the memory cannot hold; return the memory it takes.

    Raises:
        BundleError: The disk has too little space.
        ConfigError: There is too little memory.
    """
    module = _candidate_modules(flat, config)[0]
    spec = spec_of(flat.spec, _dealt_towers(flat, config, module), module)
    tables = table_bytes(flat, config.dtype) + _accumulator_bytes(flat, config)
    check_space(out, tables + weight_bytes(flat, spec))
    return check_memory(flat, spec, config)


def describe_flat(source: Path | LiveModel, options: ModelOptions) -> FlatModelInfo:
    """Open a flat checkpoint by its headers, with what the user says about the model.

    Args:
        source: The checkpoint, or a module in memory, which is captured.
        options: What the user says.

    Raises:
        DmtError: It cannot be read, or is not a known model.
    """
    facts = read_model_options(options)
    if isinstance(source, Path):
        return infer_model(open_checkpoint(source), facts)
    if options.model is not None:
        raise UsageError("a module and a file that describes one (model)", expected="one of them")
    facts = (facts or ModelConfig()).model_copy(update={"builder": source})
    return infer_model(open_live(source.module), facts)


def default_out(source: Path, num_towers: int | None) -> Path:
    """Return `ckpt-dmt16` beside `ckpt.pt`."""
    if source.name == ".metadata" or source.suffix == ".distcp":
        source = source.parent  # one file of a directory stands for the directory
    if source.name in ("", ".."):
        source = source.resolve()
    stem = source.name if source.is_dir() else source.stem
    return source.parent / f"{stem or 'model'}-dmt{num_towers or ''}"


def _check_out(flat: FlatModelInfo, config: ConvertConfig) -> Path:
    """Return the folder of the bundle, after checking that it can be written there.

    Raises:
        BundleError: The target is taken, or lies in the checkpoint.
    """
    source = flat.checkpoint.source
    out = config.out or default_out(source, config.towers)
    check_target(out, force=config.force)
    here, there = out.resolve(), source.resolve()
    if here == there or there in here.parents or here in there.parents:
        lies = "holds" if here in there.parents else "lies in"
        raise BundleError(
            f"--out {out} {lies} the checkpoint {source}",
            expected="a path outside the checkpoint",
            hint="choose another --out; the checkpoint is never changed",
        )
    return out


def _accumulator_bytes(flat: FlatModelInfo, config: ConvertConfig) -> int:
    return accumulator_bytes(flat) if config.optimizer_state == "keep" else 0


def _check_dense(flat: FlatModelInfo, options: PartitionOptions) -> None:
    """Read all weights outside tables once, before anything is computed from them.

    Raises:
        CheckpointError: Bytes changed since the checkpoint was written; a weight is NaN or Inf, or
            absurd beside all others.
    """
    for tensor in flat.dense_tensors.values():
        check_checksums(tensor, tensor.path)
        array = read_tensor(tensor)
        check_finite(array, tensor.path)
        if options.outliers == "refuse":
            check_outliers(array, tensor.path)


def _draw_sample(flat: FlatModelInfo, options: PartitionOptions) -> Sample:
    """Draw the rows that towers are fitted to and measured on.

    Raises:
        DataError: The calibration data holds too few rows, or does not fit the model.
        CheckpointError: A row that was drawn holds NaN or Inf, or an absurd value.
    """
    sample = draw_sample(
        flat,
        calibration=options.calibration,
        seed=options.seed,
        accept_outliers=options.outliers == "accept",
    )
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
    replicated: tuple[str, ...] = (),
) -> Partition:
    """Partition a checkpoint's features, by a sample of its inputs.

    Args:
        flat: The flat model.
        sample: Rows on which affinity is measured.
        options: The settings.
        modules: Candidates for the tower module, which decide on the default strategy and on how
            many elements towers are planned to emit.
        replicated: Features whose tables every rank holds; the others are partitioned.

    Raises:
        PartitionError: The request cannot be met.
    """
    if options.partition is None:
        options = options.replace(partition=default_strategy(flat.spec, modules))
    if options.partition == "loss":
        return _find_towers_by_loss(flat, sample, options, modules, replicated)
    if options.affinity == "weights" and not tells_pairs(flat.spec):
        options = options.replace(affinity="cosine")
    # what overflows is refused by name: affinities must be finite
    with np.errstate(all="ignore"):
        affinity = measure_affinity(flat, sample, options.affinity)
    found = partition_beside(flat.spec, options, affinity, replicated)
    return replace(found, sample=sample.description)


def _find_towers_by_loss(
    flat: FlatModelInfo,
    sample: Sample,
    options: PartitionOptions,
    modules: tuple[TowerModuleSpec, ...],
    replicated: tuple[str, ...],
) -> Partition:
    # imports torch, which takes seconds
    from dmt_convert.conversion.felt import measure_felt

    assert options.towers is not None
    elements = planned_elements(flat.spec, modules, options.towers, options.compression)
    # what overflows is refused by name: logits must be finite
    with np.errstate(all="ignore"):
        felt = measure_felt(flat, sample)
        partition = partition_beside(
            flat.spec,
            options,
            None,
            replicated,
            measure_codes=lambda kept: JointCodes(felt.only(kept), elements),
        )
    return replace(partition, sample=sample.description)


def _candidate_modules(flat: FlatModelInfo, config: ConvertConfig) -> tuple[TowerModuleSpec, ...]:
    """Return the requested tower module, and alternatives that emit as little.

    Raises:
        ConfigError: The settings contradict each other, or the model cannot have such a module.
    """
    modules = choose_modules(flat, config, config.towers or _towers_in_file(flat, config))
    return fit_for_replication(modules, config)


def _towers_in_file(flat: FlatModelInfo, config: ConvertConfig) -> int:
    return len(partition_features(flat.spec, config).assignment.towers)


def _requested_cluster(config: ConvertConfig) -> Cluster | None:
    """Return the cluster that the settings describe, if they do."""
    if config.hosts is None and config.ranks_per_host is None and config.hbm_gib is None:
        return None
    return make_cluster(config, hosts=config.towers or 1)


def _plan(spec: DmtSpec, cluster: Cluster | None) -> TowerPlan:
    """Plan for the given cluster, or for the smallest default one that holds the tables."""
    if cluster is not None:
        return plan_model(spec, cluster)
    base = default_cluster(len(spec.sending_towers))
    hosts = base.hosts
    while True:
        is_last = hosts >= base.hosts * _MAX_HOSTS_PER_TOWER
        candidate = Cluster(hosts=hosts, ranks_per_host=base.ranks_per_host)
        try:
            return plan_model(spec, candidate, host_memory=is_last)
        except PlanError:
            if is_last:
                raise
            hosts *= 2


def _streamed_weights(
    flat: FlatModelInfo, partition: Partition, config: ConvertConfig
) -> StreamedWeights:
    towers = partition.towers
    kept = config.optimizer_state == "keep"
    return StreamedWeights(
        tables=plan_table_files(
            flat, towers, dtype=config.dtype, accept_outliers=config.outliers == "accept"
        ),
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
    partition: Partition,
    config: ConvertConfig,
    progress: Progress,
) -> StartedModel:
    # imports torch, which takes seconds: only now, while tables are being copied
    from dmt_convert.conversion.start import start_model

    # what overflows is refused by name: logits must be finite, and closed forms be solved
    with np.errstate(all="ignore"):
        return start_model(
            flat,
            specs[0],
            sample,
            alternatives=specs[1:],
            choice=how_to_choose(config, [spec.sending_towers[0].module for spec in specs]),
            frontier=_request_frontier(flat, partition, config),
            distill_steps=config.distill_steps,
            stored_as=config.dtype,
            seed=config.seed,
            on_step=lambda done, total: progress("distilling", done, total),
        )


def _request_frontier(
    flat: FlatModelInfo, partition: Partition, config: ConvertConfig
) -> FrontierRequest:
    from dmt_convert.conversion.frontier import plan_frontier

    def further(rows: int) -> Iterator[Sample]:
        if config.calibration is None:
            return iter(())
        return further_rows(
            flat,
            config.calibration,
            rows,
            seed=config.seed,
            accept_outliers=config.outliers == "accept",
        )

    return plan_frontier(
        flat,
        config,
        len(partition.sending),
        lambda module: spec_of(flat.spec, partition, module),
        further,
    )


def measure_checkpoint(
    source: Path | LiveModel,
    config: ConvertConfig,
    *,
    plot: Path | None = None,
    progress: Progress = no_progress,
) -> Frontier:
    """Measure what fewer bytes between hosts cost, without writing a bundle.

    Args:
        source: The checkpoint.
        config: The settings of a conversion.
        plot: Draw it into this .svg or .png file.
        progress: Called as work goes on.

    Raises:
        DmtError: The checkpoint or the settings cannot be used, or the file not be written.
    """
    idle = [*config.set_modules]
    idle += [f"--{name}" for name in ("out", "force") if getattr(config, name)]
    idle += ["--distill-steps"] if config.distill_steps is not None else []
    if idle:
        raise UsageError(
            f"--frontier beside {', '.join(idle)}",
            expected="no such option: it measures the closed form of many compressions, in the "
            "modules and precisions that --compression chooses, and writes no bundle",
            hint="leave it out",
        )
    flat = describe_flat(source, config)
    if plot is not None:
        _check_file(flat, config, plot, FIGURE_FILE, "--plot")
    _check_dense(flat, config)
    modules = _candidate_modules(flat, config)
    progress("sampling", 0, 0)
    sample = _draw_sample(flat, config)
    progress("partitioning", 0, 0)
    replicated = choose_replicated(flat.spec, config, modules[0], sample.ids_per_bag)
    partition = find_towers(flat, sample, config, modules, replicated)
    check_memory(flat, spec_of(flat.spec, partition, modules[0]), config)
    progress("initialising", 0, 0)
    from dmt_convert.conversion.frontier import measure_frontier
    from dmt_convert.conversion.start import open_starter

    with np.errstate(all="ignore"):
        request = _request_frontier(flat, partition, config)
        found = measure_frontier(open_starter(flat, sample), request)
    if plot is not None:
        with staged_file(plot) as staged:
            plot_frontier(staged, found)
    return found


def partition_checkpoint(
    source: Path, config: PartitionConfig, progress: Progress = no_progress
) -> Partition:
    """Find towers for a flat checkpoint; write and draw them if the settings say so.

    Args:
        source: The checkpoint.
        config: The settings.
        progress: Called as work goes on.

    Raises:
        DmtError: The request cannot be met, or a file cannot be written.
    """
    flat = describe_flat(source, config)
    _check_files(flat, config)
    progress("sampling", 0, 0)
    _check_dense(flat, config)
    sample = draw_sample(
        flat,
        calibration=config.calibration,
        seed=config.seed,
        accept_outliers=config.outliers == "accept",
    )
    progress("partitioning", 0, 0)
    partition = find_towers(flat, sample, config)
    if config.out is not None:
        towers = {"towers": partition.towers}
        write_text(config.out, json.dumps(towers, indent=1, ensure_ascii=False) + "\n")
    if config.plot is not None:
        with staged_file(config.plot) as staged:
            plot_partition(
                staged,
                flat.spec,
                partition.towers,
                describe_partition(partition),
                partition.affinity,
            )
    return partition


def _check_files(flat: FlatModelInfo, config: PartitionConfig) -> None:
    """Refuse files to write that are read, or are something else.

    Raises:
        ConfigError: One is.
    """
    check_distinct(out=config.out, plot=config.plot)
    if config.out is not None:
        _check_file(flat, config, config.out, PARTITION_FILE, "--out")
    if config.plot is not None:
        _check_file(flat, config, config.plot, FIGURE_FILE, "--plot")


def _check_file(
    flat: FlatModelInfo,
    config: ConvertConfig | PartitionConfig,
    path: Path,
    kind: FileKind,
    option: str,
) -> None:
    """Refuse a file to write that is read, or is something else."""
    read = (config.calibration, config.partition, config.model_facts, config.model)
    check_output(
        path,
        kind,
        models=(flat.checkpoint.source, *flat.checkpoint.files),
        inputs=[value for value in read if isinstance(value, Path)],
        option=option,
    )
