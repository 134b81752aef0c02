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
    extra: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the torchrun command and run nothing.")
    ] = False,
    config: FinetuneConfig,
    output: Output,
) -> None:
    """Train a bundle further on labelled rows, on the ranks of one host or several.

    Starts `torchrun` on the recipe `finetune_dmt.py`, which you can copy and change. What
    follows `--` goes to the recipe as it is.

    Example: `dmt finetune ckpt-dmt16 --data clicks --nproc 8`
    """
    from dmt_convert.cluster import FinetuneJob, RanksFailedError, run_finetune, show_command

    if extra and "--" not in sys.argv:
        raise typer.BadParameter(f"unexpected {extra[0]}; arguments of the recipe follow --")
    job = FinetuneJob(
        bundle=dmt.open_bundle(bundle),
        config=config,
        capture=output.json,
        quiet=output.quiet,
        extra=extra or (),
    )
    if dry_run:
        if output.json:
            output.result({"dry_run": True, "command": job.command})
        else:
            print(show_command(job.command))
        return
    try:
        done = run_finetune(job)
    except RanksFailedError as error:
        if output.json:
            output.result(error.to_json())
        if not error.said:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.code) from None
    if output.json:
        output.result(done.summary or {"bundle": str(job.out), "node_rank": config.node_rank})
