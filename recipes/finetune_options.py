"""The options of `finetune_dmt.py`, and what it prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dmt_convert.adapter import load_adapter
from dmt_convert.spec import COMM_DTYPES
from dmt_convert.training import (
    Decay,
    DenseOptimizerKind,
    FinetuneConfig,
    TableOptimizerKind,
    merge_settings,
    read_settings,
)

if TYPE_CHECKING:
    from dmt_convert.cluster import RankLayout
    from dmt_convert.placement import TowerPlan
    from dmt_convert.training import Evaluation, Finetuned, TrainingData, TrainResult

Say = Callable[[str], None]


def make_parser(description: str) -> argparse.ArgumentParser:
    """Describe the options; settings of training default to those of `FinetuneConfig`.

    Args:
        description: What the recipe does, one line.
    """
    parser = argparse.ArgumentParser(prog="finetune_dmt", description=description)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle to start from; it is not changed")
    add("--data", type=Path, required=True, help="labelled rows, or a folder with train.npz")
    add("--valid", type=Path, help="validation rows; without, the last tenth of DATA")
    add("--out", type=Path, required=True, help="bundle to write")
    add("--config", type=Path, help="YAML file with settings, as recipes/configs has them")
    add(
        "--log", type=Path, help="folder for metrics.jsonl and TensorBoard (ranks: CHECKPOINTS/log)"
    )
    add("--model", type=Path, help="Python file that the bundle's own model is defined by; is run")
    add("--force", action="store_true", help="replace a bundle and checkpoints that are there")
    add("--json", action="store_true", help="print one JSON document, and nothing else")
    add("--quiet", action="store_true", help="print no progress")
    _add_settings(parser)
    _add_ranks(parser)
    return parser


def load_model_file(options: argparse.Namespace) -> None:
    """Run the user's file that defines the bundle's model, where one is given."""
    if options.model is not None:
        load_adapter(options.model)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the rows (1)")
    length.add_argument("--max-steps", type=int, help="steps, instead of passes")
    add("--batch-size", type=int, help="rows per step, over all ranks (512)")
    add("--eval-every", type=int, help="steps between evaluations (a tenth of a pass)")
    add("--patience", type=int, help="evaluations without improvement before the end (10)")
    add("--dense-lr", type=float, help="learning rate of everything but tables (5e-4); 0: none")
    add("--dense-optimizer", choices=get_args(DenseOptimizerKind), help="adam")
    add("--table-lr", type=float, help="learning rate of the tables (0.02); 0: none")
    add("--table-optimizer", choices=get_args(TableOptimizerKind), help="rowwise-adagrad")
    add("--initial-accumulator", type=float, help="Adagrad: start of squared gradients (bundle's)")
    add("--warmup-steps", type=int, help="steps over which learning rates rise (0)")
    add("--lr-decay", choices=get_args(Decay), help="how learning rates fall (linear)")
    add("--clip-norm", type=float, help="largest norm of the gradient of everything but tables")
    add("--seed", type=int, help="seed of the order of rows (0)")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("over ranks, started by torchrun")
    add = group.add_argument
    add("--plan", type=Path, help="plan.json to place towers by; the bundle's, or a new one")
    add("--backend", choices=("nccl", "gloo"), help="how ranks talk (nccl where there are GPUs)")
    add("--comm-dtype", choices=COMM_DTYPES, help="precision of what crosses hosts (fp32)")
    add("--checkpoints", type=Path, help="folder of training checkpoints (OUT.checkpoints)")
    add("--checkpoint-every", type=int, help="steps between checkpoints (only the best states)")
    add("--keep-checkpoints", type=int, help="checkpoints kept beside the best one (2)")
    add("--async-checkpoints", action="store_true", default=None, help="write while training")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add(
        "--no-prefetch",
        dest="prefetch",
        action="store_false",
        default=None,
        help="send a batch's ids only when it is trained on",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long ranks wait for each other before they give up (600)",
    )


def read_config(options: argparse.Namespace) -> FinetuneConfig:
    """Make the settings: defaults, then `--config`, then options."""
    base = {} if options.config is None else read_settings(options.config)
    names = {field.name for field in fields(FinetuneConfig)}
    return merge_settings(base, {n: v for n, v in vars(options).items() if n in names})


def make_printer(*, silent: bool) -> Say:
    """Make what prints a line, or nothing."""
    if silent:
        return lambda text: None
    return lambda text: print(text, flush=True)


def say_rows(say: Say, data: TrainingData, config: FinetuneConfig) -> None:
    """Say on what the model is trained."""
    total = config.total_steps(data.train.num_rows)
    say(
        f"{data.train.num_rows:,} rows to train on ({data.train_name}), {data.valid.num_rows:,} to "
        f"measure on ({data.valid_name}); at most {total:,} steps of {config.batch_size} rows"
    )


def say_cluster(
    say: Say, layout: RankLayout, plan: TowerPlan, config: FinetuneConfig, checkpoints: Path
) -> None:
    """Say over what the model is spread."""
    wire = "" if config.comm_dtype == "fp32" else f", {config.comm_dtype} between hosts"
    shared = f", each over {plan.hosts_per_tower} hosts" if plan.hosts_per_tower > 1 else ""
    say(
        f"{_count(layout.hosts, 'host')} x {_count(layout.ranks_per_host, 'rank')}, "
        f"{layout.backend}{wire}; {_count(len(plan.tower_hosts), 'tower')}{shared}; checkpoints in "
        f"{checkpoints}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def say_start(say: Say, step: int) -> None:
    """Say where training goes on, if it does."""
    if step:
        say(f"going on from the checkpoint of step {step:,}")


def together(*listeners: Callable[..., None]) -> Callable[..., None]:
    """Make one listener of several."""

    def tell(*what: Any) -> None:
        for listener in listeners:
            listener(*what)

    return tell


def say_evaluation(say: Say, found: Evaluation) -> None:
    """Say how good the model is now."""
    say(
        f"step {found.step:>6}: AUC {show(found.auc)}, NE {show(found.ne)}, log loss "
        f"{found.log_loss:.5f}"
        + ("" if found.train_loss is None else f"; training loss {found.train_loss:.5f}")
    )


def say_result(say: Say, out: Path, result: TrainResult, written: Finetuned) -> None:
    """Say what came of it."""
    before, after = written.before, written.after
    for note in written.notes:
        say(f"note: {note}")
    say(
        f"{result.steps:,} steps at {result.ms_per_step:.1f} ms, best after {after.step:,}: "
        f"validation AUC {show(before.auc)} -> {show(after.auc)}, NE {show(before.ne)} -> "
        f"{show(after.ne)}"
    )
    say(f"wrote {out}")


def show(value: float | None) -> str:
    """Write a metric, or a dash where there is none."""
    return "-" if value is None else f"{value:.5f}"


def summarise(
    options: argparse.Namespace, result: TrainResult, written: Finetuned, data: TrainingData
) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "bundle": str(options.out),
        "parent": str(options.bundle),
        "steps": result.steps,
        "best_step": written.after.step,
        "improved": written.after.step > 0,
        "ms_per_step": result.ms_per_step,
        "before": written.before.to_json(),
        "after": written.after.to_json(),
        "history": [evaluation.to_json() for evaluation in result.history],
        "data": data.to_json(),
        "notes": list(written.notes),
    }


@contextmanager
def show_steps(total: int, *, silent: bool) -> Iterator[Callable[[int, float], None]]:
    """Show progress on a terminal; in a pipe, show none."""
    if silent or not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Fine-tuning"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    bars = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # lines meant for a pipe go there
    )
    with bars:
        task = bars.add_task("steps", total=total, loss=0.0)
        yield lambda step, loss: bars.update(task, completed=step, loss=loss)
