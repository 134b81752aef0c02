"""`dmt finetune`."""
# ruff: noqa: ARG001 (options of the recipe are handed on together, out of the context)

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmt_convert.errors import DmtError

from .console import JsonOption, Output, QuietOption, make_output
from .partition_options import AdapterOption, read_model_options

if TYPE_CHECKING:
    from dmt_convert.cluster import Launched

NAME = "finetune"
CONTEXT = {"allow_extra_args": True}
"""What follows `--` goes to the recipe as it is."""
_LAUNCHING = frozenset(
    {
        "nproc",
        "nnodes",
        "node_rank",
        "rdzv_endpoint",
        "local_addr",
        "rdzv_timeout",
        "max_restarts",
        "dry_run",
    }
)
"""Options that are not the recipe's."""
_INTERRUPT_CODE = 130
_REFUSAL_CODE = 3
_SAID_CODES = frozenset({2, 3})
"""Exit codes of ranks that have printed what is wrong."""


def _recipe_option(help_: str, **more: Any) -> Any:
    return typer.Option(help=help_, rich_help_panel="Training", **more)


def _rank_option(help_: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel="Over ranks", **more)


def run(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Bundle to start from; it is not changed.")],
    data: Annotated[
        Path, typer.Option("--data", help="Labelled rows, or a folder with train.npz.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write. [default: BUNDLE-tuned]")
    ] = None,
    valid: Annotated[
        Path | None,
        typer.Option("--valid", help="Validation rows. [the last tenth of DATA]"),
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", help="Ranks (GPUs) on this host.")] = 1,
    nnodes: Annotated[
        int, typer.Option("--nnodes", help="Hosts; run the command on each of them.")
    ] = 1,
    node_rank: Annotated[
        int, typer.Option("--node-rank", help="Which of the hosts this is, from 0.")
    ] = 0,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint", help="Where hosts meet: host 0, any free port.", metavar="HOST:PORT"
        ),
    ] = None,
    local_addr: Annotated[
        str | None,
        typer.Option("--local-addr", help="Address of this host for the others. [its name]"),
    ] = None,
    rdzv_timeout: Annotated[
        int, typer.Option("--rdzv-timeout", help="Seconds that hosts wait for each other.")
    ] = 300,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", help="How often to go on when a rank is lost.")
    ] = 0,
    config: Annotated[Path | None, _recipe_option("YAML file with settings.")] = None,
    epochs: Annotated[int | None, _recipe_option("Passes over the rows. [1]")] = None,
    max_steps: Annotated[int | None, _recipe_option("Steps, instead of passes.")] = None,
    batch_size: Annotated[int | None, _recipe_option("Rows per step. [512]")] = None,
    eval_every: Annotated[
        int | None, _recipe_option("Steps between evaluations. [a tenth of a pass]")
    ] = None,
    patience: Annotated[
        int | None, _recipe_option("Evaluations without improvement before the end. [10]")
    ] = None,
    dense_lr: Annotated[
        float | None, _recipe_option("Learning rate of all but tables. [5e-4]")
    ] = None,
    table_lr: Annotated[float | None, _recipe_option("Learning rate of the tables. [0.02]")] = None,
    table_optimizer: Annotated[
        str | None,
        _recipe_option("Optimizer of the tables.", metavar="rowwise-adagrad|adagrad|sgd|adam"),
    ] = None,
    initial_accumulator: Annotated[
        float | None, _recipe_option("Adagrad: start of squared gradients. [measured]")
    ] = None,
    warmup_steps: Annotated[
        int | None, _recipe_option("Steps over which learning rates rise. [0]")
    ] = None,
    lr_decay: Annotated[
        str | None,
        _recipe_option("How learning rates fall.", metavar="linear|cosine|constant"),
    ] = None,
    clip_norm: Annotated[
        float | None, _recipe_option("Largest norm of the gradient of all but tables.")
    ] = None,
    seed: Annotated[int | None, _recipe_option("Seed of the order of rows. [0]")] = None,
    dense_optimizer: Annotated[
        str | None, _recipe_option("Optimizer of all but tables.", metavar="adam|sgd")
    ] = None,
    log: Annotated[
        Path | None,
        _recipe_option("Folder for metrics.jsonl and TensorBoard. [CHECKPOINTS/log]"),
    ] = None,
    plan: Annotated[
        Path | None, _rank_option("plan.json to place towers by. [the bundle's, or a new one]")
    ] = None,
    backend: Annotated[
        str | None,
        _rank_option("How ranks talk. [nccl where there are GPUs]", metavar="nccl|gloo"),
    ] = None,
    comm_dtype: Annotated[
        str | None,
        _rank_option("Precision of what crosses hosts. [fp32]", metavar="fp32|fp16|bf16|int8|fp8"),
    ] = None,
    checkpoints: Annotated[
        Path | None, _rank_option("Folder of training checkpoints. [OUT.checkpoints]")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _rank_option("Steps between checkpoints. [only the best states]")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _rank_option("Checkpoints kept beside the best one. [2]")
    ] = None,
    async_checkpoints: Annotated[
        bool, _rank_option("Write checkpoints while training goes on.", "--async-checkpoints")
    ] = False,
    resume: Annotated[
        bool, _rank_option("Go on from the newest checkpoint, if there is one.", "--resume")
    ] = False,
    no_prefetch: Annotated[
        bool, _rank_option("Send a batch's ids only when it is trained on.", "--no-prefetch")
    ] = False,
    timeout: Annotated[
        float | None, _rank_option("Seconds that ranks wait for each other. [600]")
    ] = None,
    model: AdapterOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle and checkpoints that are there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the torchrun command, and run nothing.")
    ] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a bundle further on labelled rows, on the ranks of one host or several.

    Launches `torchrun` on the recipe `finetune_dmt.py`. What follows `--` goes to the recipe.

    Example: `dmt finetune ckpt-dmt16 --data clicks --nproc 8`
    """
    from dmt_convert.adapter import user_file
    from dmt_convert.bundle import open_bundle
    from dmt_convert.cluster import (
        LaunchConfig,
        default_out,
        launch,
        show_command,
        torchrun_command,
    )

    if context.args and "--" not in sys.argv:
        raise typer.BadParameter(f"unexpected {context.args[0]}; options of the recipe follow --")
    output = make_output(json_=json_, quiet=quiet)
    launching = LaunchConfig(
        nproc=nproc,
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv_endpoint=rdzv_endpoint,
        local_addr=local_addr,
        rdzv_timeout=rdzv_timeout,
        max_restarts=max_restarts,
    )
    out = default_out(bundle) if out is None else out
    arguments = _recipe_arguments(context.params | {"out": out}, context.args)
    if dry_run:
        command = torchrun_command(launching, arguments)
        if json_:
            output.result({"dry_run": True, "command": list(command)})
        else:
            print(show_command(command))
        return
    # headers only: what is no bundle, or not to be had without --model, is refused at once
    spec = open_bundle(bundle).manifest.model.flat
    read_model_options(None, model)
    user_file(spec)
    done = launch(launching, arguments, capture=json_)
    _raise_failure(done, output)
    if json_:
        output.result(done.result or {"bundle": str(out), "node_rank": node_rank})


def _recipe_arguments(values: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    """Write the options of the recipe, which have the names that they have here."""
    arguments = []
    for name, value in values.items():
        if name in _LAUNCHING or value is None or value is False:
            continue
        option = f"--{name.removesuffix('_').replace('_', '-')}"
        arguments += [option] if value is True else [option, str(value)]
    return [*arguments, *extra]


def _raise_failure(done: Launched, output: Output) -> None:
    """End the command as the ranks ended."""
    if done.code == _INTERRUPT_CODE:
        raise KeyboardInterrupt
    if done.error is not None and done.code == _REFUSAL_CODE:
        raise done.error
    if not done.code:
        return
    error = done.error or DmtError(
        f"the ranks ended with exit code {done.code}",
        expected="0",
        hint="what they printed above says why",
    )
    if output.json:
        output.result(error.to_json())
    if done.error is not None or done.code not in _SAID_CODES:
        print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(done.code)
