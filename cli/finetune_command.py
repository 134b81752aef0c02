"""`dmt finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmt_convert.config import FinetuneConfig

from .console import Output
from .options import command

NAME = "finetune"


@command(FinetuneConfig)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle to start from; it is not changed.")],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the torchrun command and run nothing.")
    ] = False,
    config: FinetuneConfig,
    output: Output,
) -> None:
    """Train a bundle further on labelled rows, on the ranks of one host or several.

    Starts `torchrun` on the recipe `finetune_dmt.py`, which you can copy and change.

    Example: `dmt finetune ckpt-dmt16 --data clicks --nproc 8`
    """
