"""`dmt partition`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import dmt_convert as dmt
from dmt_convert.config import PartitionConfig

from .console import Output, counted, human_bytes, number, table
from .options import command

NAME = "partition"


@command(PartitionConfig)
def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    *,
    config: PartitionConfig,
    output: Output,
) -> None:
    """Find towers: which features belong together.

    Example: `dmt partition ckpt.pt --towers 4 --out towers.json --plot towers.png`
    """
    from dmt_convert.conversion import describe_partition
    from dmt_convert.documents import to_json

    with output.progress() as progress:
        found = dmt.partition(source, config=config, progress=progress)
    assignment = found.assignment.towers
    record = describe_partition(found, dict(config.group))
    value = {"towers": assignment, **to_json(record), "sample": found.sample}
    value["files"] = [str(path) for path in (config.out, config.plot) if path is not None]
    rows = [
        [
            str(t),
            str(load.features),
            human_bytes(load.table_bytes),
            f"{load.lookups:g}",
            ", ".join(names),
        ]
        for t, (names, load) in enumerate(zip(assignment, found.loads, strict=True))
    ]
    title = (
        f"{counted(len(assignment), 'tower')}, {found.strategy}; affinity within towers "
        f"{number(found.within_affinity, 3)}, between {number(found.between_affinity, 3)}"
    )
    if found.lost is not None:
        title += (
            f"; {counted(found.elements or 0, 'element')} sent by linear codes would lose "
            f"{found.lost:.3g} of the logits' variance. Found {found.search}"
        )
    columns = ["tower", "features>", "tables>", "lookups>", "names"]
    output.result(value, table(title, columns, rows))
