"""From a flat checkpoint to a bundle: the flow of all stages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmt_convert.bundle import (
    Bundle,
    Documents,
    Manifest,
    accumulator_bytes,
    describe_accumulators,
    plan_accumulator_files,
    plan_table_files,
    table_bytes,
    write_bundle,
)
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion import (
    Sample,
    choose_modules,
    default_strategy,
    draw_sample,
    may_allot,
)
from dmt_convert.conversion.partition import (
    Partition,
    PartitionConfig,
    figure_svg,
    measure_affinity,
    partition_features,
    tells_pairs,
)
from dmt_convert.convert_config import ConvertConfig
from dmt_convert.errors import BundleError, DataError, PlanError
from dmt_convert.families import FlatModelInfo, infer_model
from dmt_convert.files import check_checksums, check_space, check_target
from dmt_convert.model import DmtSpec, TowerModuleSpec, converted_spec
from dmt_convert.placement import Cluster, TowerPlan, default_cluster, plan_towers

if TYPE_CHECKING:
    from dmt_convert.conversion import Quality, StartedModel

logger = logging.getLogger(__name__)

__all__ = [
    "Conversion",
    "ConvertConfig",
    "Preview",
    "Progress",
    "convert_checkpoint",
    "default_out",
    "partition_sample",
    "preview_conversion",
]

Progress = Callable[[str, int, int], None]
"""Told of the current step, and of units done and in all (0 where unknown)."""
_MIN_ROWS: Final = 16
_MAX_HOSTS_PER_TOWER: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a conversion would do, from headers alone."""

    info: FlatModelInfo
    """The flat model."""
    out: Path
    """Where the bundle would go."""
    module: TowerModuleSpec
    """Module of every tower."""
    alternatives: tuple[TowerModuleSpec, ...]
    """Modules that emit as little: the best of all is taken once the weights are known."""
    num_towers: int
    """Number of towers."""
    compression: float
    """What would cross hosts uncompressed, over what does."""
    table_bytes: int
    """Bytes of all tables in the bundle."""
    accumulator_bytes: int
    """Bytes of the accumulators that go with them."""
    partition: Partition | None
    """The towers, where they can be told without reading weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did."""

    bundle: Bundle
    """The bundle it wrote."""
    info: FlatModelInfo
    """The flat model."""
    partition: Partition
    """The towers."""
    quality: Quality
    """How well the converted model agrees with the flat one."""


def default_out(source: Path, num_towers: int | None) -> Path:
    """Return `ckpt-dmt16` beside `ckpt.pt`."""
    if source.name == ".metadata" or source.suffix == ".distcp":
        source = source.parent  # one file of a directory names the directory
    if source.name in ("", ".."):
        source = source.resolve()
    stem = source.name if source.is_dir() else source.stem
    return source.parent / f"{stem or 'model'}-dmt{num_towers or ''}"


def preview_conversion(source: Path, out: Path, config: ConvertConfig) -> Preview:
    """Say what a conversion would do; reads headers only, writes nothing.

    Raises:
        DmtError: The conversion would be refused.
    """
    info = infer_model(open_checkpoint(source), config.model_config)
    _check_out(info.checkpoint.source, out, force=config.force)
    size = table_bytes(info, config.dtype)
    summed = accumulator_bytes(info) if config.optimizer_state == "keep" else 0
    check_space(out, size + summed)
    partition = None
    if isinstance(config.partition.strategy, Path) or config.partition.strategy == "round-robin":
        partition = partition_features(info.spec, config.partition)
    else:
        # towers are found from weights; that there can be so many is known now
        round_robin = PartitionConfig(
            num_towers=config.partition.num_towers,
            strategy="round-robin",
            together=config.partition.together,
            apart=config.partition.apart,
            groups=config.partition.groups,
        )
        sizes = partition_features(info.spec, round_robin).assignment.towers
    towers = sizes if partition is None else partition.assignment.towers
    module, alternatives = choose_modules(
        info,
        len(towers),
        tower_module=config.tower_module,
        c=config.c,
        p=config.p,
        dim=config.dim,
        compression=config.compression,
    )
    return Preview(
        info=info,
        out=out,
        module=module,
        alternatives=alternatives,
        num_towers=len(towers),
        compression=converted_spec(info.spec, towers, module).compression,
        table_bytes=size,
        accumulator_bytes=summed,
        partition=partition,
    )


def convert_checkpoint(
    source: Path, out: Path, *, config: ConvertConfig, progress: Progress = lambda *_: None
) -> Conversion:
    """Convert a flat checkpoint into a bundle.

    Args:
        source: The checkpoint.
        out: The bundle's folder, put in place whole or not at all.
        config: What is asked for.
        progress: Told of the steps.

    Raises:
        DmtError: The checkpoint, the options or the target cannot be had; nothing is changed.
    """
    preview = preview_conversion(source, out, config)
    info = preview.info
    for tensor in info.dense_tensors.values():
        check_checksums(tensor, tensor.path)
    progress("sampling", 0, 0)
    sample = draw_sample(info, calibration=config.calibration, seed=config.seed)
    _check_enough(sample)
    progress("partitioning", 0, 0)
    partition = partition_sample(info, sample, _strategy(config, preview))
    specs = [
        converted_spec(info.spec, partition.assignment.towers, module)
        for module in (preview.module, *preview.alternatives)
    ]
    # that the cluster holds the tables is known before anything is written
    plan = _plan(info, specs[0], partition, config.cluster)
    # tables stream to the disk while the small weights are being computed
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool, _set_on_error(stopped):
        starting = pool.submit(_start, info, specs, sample, partition, config, progress, stopped)
        bundle = _write(info, out, starting, sample, partition, plan, config, progress)
    return Conversion(
        bundle=bundle, info=info, partition=partition, quality=starting.result().quality
    )


@contextmanager
def _set_on_error(event: threading.Event) -> Iterator[None]:
    """Tell another thread to stop when this one fails or is interrupted."""
    try:
        yield
    except BaseException:
        event.set()
        raise


def _strategy(config: ConvertConfig, preview: Preview) -> PartitionConfig:
    if config.own_strategy:
        return config.partition
    chosen = default_strategy(preview.info.spec, preview.module, preview.alternatives)
    return replace(config.partition, strategy=chosen) if chosen == "diverse" else config.partition


def partition_sample(info: FlatModelInfo, sample: Sample, config: PartitionConfig) -> Partition:
    """Partition a checkpoint's features, by a sample of its inputs.

    Raises:
        PartitionError: The request cannot be met.
    """
    if config.affinity == "weights" and not tells_pairs(info.spec):
        config = replace(config, affinity="cosine")
    affinity = measure_affinity(info, sample, config.affinity)
    return partition_features(info.spec, config, affinity)


def _check_enough(sample: Sample) -> None:
    if sample.batch.num_rows < _MIN_ROWS:
        raise DataError(
            f"--calibration holds {sample.batch.num_rows} rows",
            expected=f"at least {_MIN_ROWS}, better some thousand: a quarter is held out",
            hint="give more rows, or leave --calibration out to draw inputs from the tables",
        )


def _check_out(source: Path, out: Path, *, force: bool) -> None:
    check_target(out, force=force)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise BundleError(
            f"--out {out} lies in the checkpoint {source}",
            expected="a path outside the checkpoint",
            hint="choose another --out; the checkpoint is never changed",
        )


def _plan(
    info: FlatModelInfo, spec: DmtSpec, partition: Partition, cluster: Cluster | None
) -> TowerPlan:
    """Plan for the given cluster, or for the smallest default one that holds the tables."""

    def attempt(candidate: Cluster) -> TowerPlan:
        return plan_towers(
            info.spec, partition.assignment, candidate, tower_widths=spec.tower_widths
        )

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


def _start(
    info: FlatModelInfo,
    specs: list[DmtSpec],
    sample: Sample,
    partition: Partition,
    config: ConvertConfig,
    progress: Progress,
    stopped: threading.Event,
) -> StartedModel:
    # imports torch, which takes seconds: here, tables are being copied meanwhile
    from dmt_convert.conversion import start_model

    def on_step(done: int, total: int) -> None:
        if stopped.is_set():
            raise CancelledError
        progress("distilling", done, total)

    started = start_model(
        info,
        specs[0],
        sample,
        alternatives=specs[1:],
        allot=may_allot(specs[0].towers[0].module, config.compression),
        distill_steps=config.distill_steps,
        stored_as=config.dtype,
        seed=config.seed,
        on_step=on_step,
    )
    figure_svg(info.spec, partition)  # drawn once and kept: the documents want it at the end
    return started


def _write(
    info: FlatModelInfo,
    out: Path,
    starting: Future[StartedModel],
    sample: Sample,
    partition: Partition,
    plan: TowerPlan,
    config: ConvertConfig,
    progress: Progress,
) -> Bundle:
    from dmt_convert.report import describe_conversion, describe_manifest

    towers, keep = partition.assignment.towers, config.optimizer_state == "keep"
    tables = plan_table_files(info, towers, dtype=config.dtype)
    accumulators = plan_accumulator_files(info, towers) if keep else {}
    total = sum(source.nbytes for sources in tables.values() for source in sources)
    total += sum(source.nbytes for sources in accumulators.values() for source in sources)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if done < total:
            progress("writing", done, total)
        else:
            progress("initialising", 0, 0)

    def describe() -> tuple[Manifest, TowerPlan, Documents]:
        started = starting.result()
        manifest = describe_manifest(info, partition, started, sample)
        groups = {name: list(features) for name, features in config.partition.groups}
        manifest = replace(
            manifest,
            partition={**manifest.partition, "groups": groups},
            optimizer_state=describe_accumulators(info, accumulators, keep=keep),
        )
        # the towers may emit less, or otherwise, than was asked for
        final = _plan(info, started.spec, partition, plan.cluster)
        return (
            manifest,
            final,
            lambda done: describe_conversion(done, info, partition, final, started.quality, out),
        )

    return write_bundle(
        out,
        tables,
        small=lambda: starting.result().weights,
        describe=describe,
        accumulators=accumulators,
        force=config.force,
        on_bytes=on_bytes,
    )
