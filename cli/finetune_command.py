"""`dmt finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import dmt_convert as dmt
from dmt_convert.config import FinetuneConfig

from .console import Output
from .options import command

NAME = "finetune"


@command(FinetuneConfig)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle to start from; it is not changed.")],
    *,
    config: FinetuneConfig,
    output: Output,
) -> None:
    """Train a bundle further on labelled rows, on the ranks of one host or several.

    Starts `torchrun` on the recipe `finetune_dmt.py`, which you can copy and change.

    Example: `dmt finetune ckpt-dmt16 --data clicks --nproc 8`
    """
    dmt.finetune(bundle, config=config)
    output.result({})
