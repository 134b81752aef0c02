"""`dmt partition`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, QuietOption, human_bytes, make_output, number, table
from .partition_options import (
    AdapterOption,
    AffinityOption,
    ApartOption,
    CalibrationOption,
    GroupOption,
    ModelConfigOption,
    PartitionOption,
    SeedOption,
    TogetherOption,
    TowersOption,
    make_partition_config,
    read_model_options,
)

NAME = "partition"


def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    towers: TowersOption = None,
    partition: PartitionOption = "coherent",
    affinity: AffinityOption = "weights",
    together: TogetherOption = None,
    apart: ApartOption = None,
    group: GroupOption = None,
    calibration: CalibrationOption = None,
    model_config: ModelConfigOption = None,
    adapter: AdapterOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the towers to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw affinity and towers.", metavar="FILE.svg|png"),
    ] = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find towers: which features belong together.

    Example: `dmt partition ckpt.pt --towers 4 --out towers.json --plot towers.png`
    """
    from dmt_convert.checkpoint import open_checkpoint
    from dmt_convert.conversion import draw_sample
    from dmt_convert.conversion.partition import plot_partition
    from dmt_convert.convert import partition_sample
    from dmt_convert.documents import to_json
    from dmt_convert.families import infer_model
    from dmt_convert.report import describe_partition

    output = make_output(json_=json_, quiet=quiet)
    request = make_partition_config(
        towers=towers,
        partition=partition,
        affinity=affinity,
        together=together,
        apart=apart,
        group=group,
        seed=seed,
    )
    config = read_model_options(model_config, adapter)
    info = infer_model(open_checkpoint(source), config)
    with output.progress() as progress:
        progress("sampling", 0, 0)
        sample = draw_sample(info, calibration=calibration, seed=seed)
        progress("partitioning", 0, 0)
        found = partition_sample(info, sample, request)
    assignment = found.assignment.towers
    if out is not None:
        write_text(out, json.dumps({"towers": assignment}, indent=1, ensure_ascii=False) + "\n")
    if plot is not None:
        with staged_file(plot) as staged:
            plot_partition(info.spec, found, staged)
    record = replace(describe_partition(found), groups=dict(request.groups))
    value = {"towers": assignment, **to_json(record), "sample": sample.description}
    value["files"] = [str(path) for path in (out, plot) if path is not None]
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
        f"{len(assignment)} towers, {found.strategy}; affinity within towers "
        f"{number(found.within_affinity, 3)}, between {number(found.between_affinity, 3)}"
    )
    columns = ["tower", "features>", "tables>", "lookups>", "names"]
    output.result(value, table(title, columns, rows))


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Give a file to write near `path`; on success it becomes `path`, else it goes away.

    Raises:
        ConfigError: It cannot be written.
    """
    from dmt_convert.errors import ConfigError

    folder = path.parent / f".dmt-tmp-{os.getpid()}"
    try:
        folder.mkdir()
        yield folder / path.name  # errors and the kind of picture go by the name
        (folder / path.name).replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})",
            expected="a file that can be written, in an existing folder, on a disk with space",
            hint="choose another file",
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
