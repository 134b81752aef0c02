"""Fine-tune a bundle in one process, and write a new bundle.

    python -m dmt_convert.recipes.finetune_dmt --bundle ckpt-dmt4 --data clicks --out tuned

DATA is anything that `dmt evaluate` reads, with labels; a folder with `train.npz` and `valid.npz`
is trained on the one and measured on the other. Without validation rows the last tenth of DATA is
held out. The state with the best normalised entropy on the validation rows is written; the start
counts, so that the new bundle is never worse there than the old one. Settings: docs/finetune.md.

Exit codes are those of `dmt`: 0 done, 1 bug, 2 usage, 3 something you can mend.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args

from dmt_convert.bundle import open_bundle
from dmt_convert.errors import ConfigError, DmtError
from dmt_convert.finetune import FinetuneConfig, merge_settings, read_settings
from dmt_convert.finetune.finetune_config import Decay, TableOptimizerKind

if TYPE_CHECKING:
    from dmt_convert.finetune import Evaluation, TrainingData, TrainResult
    from dmt_convert.finetune.finetuned_bundle import Finetuned

_INTERRUPT_CODE: Final = 130


def finetune(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune as the options say; returns what `--json` prints."""
    # imports torch, which takes seconds: options are checked before
    config = read_config(options)
    check_one_process()
    from dmt_convert.finetune import (
        check_memory,
        load_bundle,
        open_training_data,
        train,
        write_finetuned,
    )
    from dmt_convert.finetune.finetuned_bundle import check_out

    # 1. What there is: the bundle, the rows, a place to write to
    bundle = open_bundle(options.bundle)
    check_out(bundle, options.out, force=options.force)
    data = open_training_data(options.data, options.valid)
    spec = bundle.manifest.model.flat
    check_memory(spec, config, data.train.num_rows)

    # 2. Everything into memory; tables in fp32
    model = load_bundle(bundle)
    total = config.total_steps(data.train.num_rows)
    say = make_printer(options)
    say(
        f"{data.train.num_rows:,} rows to train on ({data.train_name}), {data.valid.num_rows:,} to "
        f"measure on ({data.valid_name}); at most {total:,} steps of {config.batch_size} rows"
    )

    # 3. The loop (dmt_convert/finetune/loop.py): the best state stays
    with show_steps(total, quiet=options.quiet or options.json) as on_step:
        result = train(
            model,
            data.train,
            data.valid,
            config,
            on_step=on_step,
            on_evaluation=lambda found: say_evaluation(say, found),
        )

    # 4. A new bundle, whole or not at all
    written = write_finetuned(
        bundle, options.out, model, result, config=config, data=data, force=options.force
    )
    say_result(say, options.out, result, written)
    return summarise(options, result, written, data)


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


def say_result(
    say: Callable[[str], None], out: Path, result: TrainResult, written: Finetuned
) -> None:
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


def say_evaluation(say: Callable[[str], None], found: Evaluation) -> None:
    """Say how good the model is now."""
    say(
        f"step {found.step:>6}: validation AUC {show(found.auc)}, NE {show(found.ne)}, log loss "
        f"{found.log_loss:.5f}"
        + ("" if found.train_loss is None else f", training loss {found.train_loss:.5f}")
    )


def read_config(options: argparse.Namespace) -> FinetuneConfig:
    """Make the settings: defaults, then `--config`, then options."""
    base = {} if options.config is None else read_settings(options.config)
    names = {field.name for field in fields(FinetuneConfig)}
    return merge_settings(base, {n: v for n, v in vars(options).items() if n in names})


def check_one_process() -> None:
    """Refuse to be one of several ranks; `torchrun --nproc-per-node 1` is fine.

    Raises:
        ConfigError: There are several.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ConfigError(
            f"WORLD_SIZE is {world_size}: training over several ranks is not there yet",
            expected="one process",
            hint="run it without torchrun, or with --nnodes 1 --nproc-per-node 1",
        )


def show(value: float | None) -> str:
    """Write a metric, or a dash where there is none."""
    return "-" if value is None else f"{value:.5f}"


def make_printer(options: argparse.Namespace) -> Callable[[str], None]:
    """Make what prints a line; nothing with `--quiet` or `--json`."""
    if options.quiet or options.json:
        return lambda text: None
    return lambda text: print(text, flush=True)


@contextmanager
def show_steps(total: int, *, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """Show progress on a terminal; in a pipe, show none."""
    if quiet or not sys.stderr.isatty():
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


def make_parser() -> argparse.ArgumentParser:
    """Describe the options; settings of training default to those of `FinetuneConfig`."""
    parser = argparse.ArgumentParser(
        prog="finetune_dmt", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle to start from; it is not changed")
    add("--data", type=Path, required=True, help="labelled rows, or a folder with train.npz")
    add("--valid", type=Path, help="validation rows; without, the last tenth of DATA")
    add("--out", type=Path, required=True, help="bundle to write")
    add("--config", type=Path, help="YAML file with settings, as recipes/configs has them")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the rows (1)")
    length.add_argument("--max-steps", type=int, help="steps, instead of passes")
    add("--batch-size", type=int, help="rows per step (512)")
    add("--eval-every", type=int, help="steps between evaluations (a tenth of a pass)")
    add("--patience", type=int, help="evaluations without improvement before the end (10)")
    add("--dense-lr", type=float, help="learning rate of everything but tables (5e-4); 0: none")
    add("--table-lr", type=float, help="learning rate of the tables (0.02); 0: none")
    add("--table-optimizer", choices=get_args(TableOptimizerKind), help="rowwise-adagrad")
    add("--initial-accumulator", type=float, help="Adagrad: start of squared gradients (measured)")
    add("--warmup-steps", type=int, help="steps over which learning rates rise (0)")
    add("--lr-decay", choices=get_args(Decay), help="how learning rates fall (linear)")
    add("--clip-norm", type=float, help="largest norm of the gradient of everything but tables")
    add("--seed", type=int, help="seed of the order of rows (0)")
    add("--force", action="store_true", help="replace a bundle that is there")
    add("--json", action="store_true", help="print one JSON document, and nothing else")
    add("--quiet", action="store_true", help="print no progress")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe; what goes wrong is printed, and told by the exit code."""
    options = make_parser().parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("dmt_convert")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if options.quiet or options.json else logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = finetune(options)
    except DmtError as error:
        fail(options, error, str(error), code=3)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        refusal = DmtError(
            f"{where}{error.strerror or error}",
            expected="files and folders that can be read and written",
            hint="check the path, its owner and its permissions; nothing half-written was left",
        )
        fail(options, refusal, str(refusal), code=3)
    except KeyboardInterrupt:
        stopped = DmtError("interrupted", expected="to run to the end", hint="run it again")
        text = "interrupted; nothing half-written was left in place"
        fail(options, stopped, text, code=_INTERRUPT_CODE)
    if options.json:
        print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))


def fail(options: argparse.Namespace, error: DmtError, text: str, *, code: int) -> NoReturn:
    """Say what went wrong, with `--json` also as a document, and end."""
    if options.json:
        print(json.dumps(error.to_json(), indent=1, ensure_ascii=False))
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1:])
