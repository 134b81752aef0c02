"""`dmt finetune`."""

from __future__ import annotations

import sys
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
    from dmt_convert.cluster import RanksFailedError, run_finetune, show_finetune

    opened = dmt.open_bundle(bundle)
    if dry_run:
        words, text = show_finetune(opened, config)
        if output.json:
            output.result({"dry_run": True, "command": words})
        else:
            print(text)
        return
    try:
        done = run_finetune(opened, config, capture=output.json, quiet=output.quiet)
    except RanksFailedError as error:
        if output.json:
            output.result(error.to_json())
        if not error.said:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.code) from None
    if output.json:
        output.result(done.summary or {"node_rank": config.node_rank})
