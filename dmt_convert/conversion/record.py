"""What a conversion says of itself in `dmt.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dmt_convert.bundle import Manifest, StreamedWeights, describe_accumulators, digest_dense
from dmt_convert.config import ConvertConfig
from dmt_convert.conversion.partition import Partition
from dmt_convert.conversion.sample import Sample
from dmt_convert.data import merge_records
from dmt_convert.documents import (
    Initialisation,
    PartitionRecord,
    Source,
    SourceFile,
    TowerLoadRecord,
)
from dmt_convert.families import FlatModelInfo

if TYPE_CHECKING:
    from dmt_convert.conversion.start import StartedModel


def describe_manifest(
    flat: FlatModelInfo,
    partition: Partition,
    sample: Sample,
    started: StartedModel,
    *,
    weights: StreamedWeights,
    config: ConvertConfig,
) -> Manifest:
    """Say all that `dmt.json` says, except for the weights.

    Args:
        flat: The flat model.
        partition: The towers.
        sample: The rows that the model was fitted to.
        started: The converted model.
        weights: The accumulators that the bundle gets; they must have been written.
        config: What was asked for.
    """
    return Manifest(
        model=started.spec,
        source=describe_source(flat),
        facts=flat.facts,
        ignored_tensors=flat.ignored_tensors,
        other_dicts=flat.ignored,
        inputs=merge_records(flat.inputs, sample.inputs),
        partition=describe_partition(partition, dict(config.group)),
        initialisation=Initialisation(
            method=started.method, sample=sample.description, notes=tuple(started.notes)
        ),
        optimizer_state=describe_accumulators(
            flat, weights.accumulators, keep=config.optimizer_state == "keep"
        ),
        quality=started.quality,
        frontier=started.frontier,
        config={"command": config.command, **config.record()},
    )


def describe_source(flat: FlatModelInfo) -> Source:
    """Say where a bundle comes from, without absolute paths."""
    checkpoint = flat.checkpoint
    return Source(
        format=checkpoint.format,
        name=checkpoint.source.name,
        files=tuple(
            SourceFile(name=path.name, bytes=path.stat().st_size) for path in checkpoint.files
        ),
        bytes=checkpoint.nbytes,
        dense_digest=digest_dense(flat),
    )


def describe_partition(
    partition: Partition, groups: Mapping[str, tuple[str, ...]] | None = None
) -> PartitionRecord:
    """Say how the towers were chosen.

    Args:
        partition: The towers.
        groups: Group -> its features; features of different groups share no tower.
    """
    return PartitionRecord(
        strategy=partition.strategy,
        search=partition.search,
        lost=partition.lost,
        elements=partition.elements,
        affinity=partition.affinity_kind,
        within_affinity=partition.within_affinity,
        between_affinity=partition.between_affinity,
        loads=tuple(
            TowerLoadRecord(
                features=load.features, table_bytes=load.table_bytes, lookups=load.lookups
            )
            for load in partition.loads
        ),
        groups=groups or {},
    )
