"""Fine-tune a bundle, in one process or over the ranks that torchrun starts; write a new bundle.

    python -m dmt_convert.recipes.finetune_dmt --bundle ckpt-dmt4 --data clicks --out tuned
    torchrun --nnodes 2 --nproc-per-node 8 ... recipes/finetune_dmt.py --bundle ...

`dmt finetune` starts it by torchrun. DATA is anything that `dmt evaluate` reads, with labels; a
folder with `train.npz` and `valid.npz` is trained on the one and measured on the other. Without
validation rows the last tenth of DATA is held out. The state with the best normalised entropy on
the validation rows is written; the start counts, so that the new bundle is never worse there than
the old one. Settings: docs/finetune.md.

Exit codes are those of `dmt`: 0 done, 1 bug or a lost rank, 2 usage, 3 something you can mend.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmt_convert.bundle import open_bundle
from dmt_convert.errors import DmtError

if TYPE_CHECKING or __package__:
    from . import finetune_endings as ends
    from . import finetune_options as ui
    from .finetune_metrics import MetricsLog
else:  # torchrun runs the file itself
    import finetune_endings as ends
    import finetune_options as ui
    from finetune_metrics import MetricsLog


def finetune(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune in this process; returns what `--json` prints."""
    # imports torch, which takes seconds: options are checked before
    config = ui.read_config(options)
    from dmt_convert.training import (
        check_memory,
        check_out,
        load_bundle,
        open_training_data,
        train,
        write_finetuned,
    )

    # 1. What there is: the bundle, the rows, a place to write to
    ui.load_model_file(options)
    bundle = open_bundle(options.bundle)
    check_out(bundle, options.out, force=options.force)
    data = open_training_data(options.data, options.valid)
    check_memory(bundle.manifest.model.flat, config, data.train.num_rows)

    # 2. Everything into memory; tables in fp32
    model = load_bundle(bundle)
    silent = options.quiet or options.json
    say = ui.make_printer(silent=silent)
    ui.say_rows(say, data, config)

    # 3. The loop (dmt_convert/training/loop.py): the best state stays
    total = config.total_steps(data.train.num_rows)
    metrics = MetricsLog(options.log, config, total)
    metrics.start()
    with ui.show_steps(total, silent=silent) as on_step, closing(metrics):
        result = train(
            model,
            data.train,
            data.valid,
            config,
            on_step=ui.together(on_step, metrics.note_step),
            on_evaluation=ui.together(partial(ui.say_evaluation, say), metrics.note_evaluation),
        )

    # 4. A new bundle, whole or not at all
    written = write_finetuned(
        bundle, options.out, model, result, config=config, data=data, force=options.force
    )
    ui.say_result(say, options.out, result, written)
    return ui.summarise(options, result, written, data)


def finetune_over_ranks(options: argparse.Namespace) -> dict[str, Any] | None:
    """Fine-tune as one rank of several; rank 0 returns what `--json` prints."""
    config = ui.read_config(options)
    from dmt_convert.cluster import (
        ClusterJob,
        Listeners,
        choose_plan,
        finetune_on_cluster,
        read_layout,
        start_ranks,
        stop_ranks,
    )
    from dmt_convert.placement import read_plan
    from dmt_convert.training import open_training_data

    # 1. What there is: the ranks, the bundle and its plan, the rows
    layout = read_layout(options.backend)
    ui.load_model_file(options)
    bundle = open_bundle(options.bundle)
    plan = choose_plan(bundle, layout, None if options.plan is None else read_plan(options.plan))
    data = open_training_data(options.data, options.valid)
    checkpoints = options.checkpoints or Path(f"{options.out}.checkpoints")
    silent = options.quiet or options.json or layout.rank != 0
    say = ui.make_printer(silent=silent)

    # 2. Ranks find each other; every one reads its own shards (dmt_convert/engine)
    start_ranks(layout, hosts_per_tower=plan.hosts_per_tower, timeout_seconds=options.timeout)
    ui.say_cluster(say, layout, plan, config, checkpoints)
    ui.say_rows(say, data, config)
    job = ClusterJob(
        bundle=bundle,
        plan=plan,
        data=data,
        config=config,
        layout=layout,
        out=options.out,
        checkpoints=checkpoints,
        timeout_seconds=options.timeout,
        resume=options.resume,
        force=options.force,
    )

    # 3. The loop, its checkpoints, and the new bundle
    total = config.total_steps(data.train.num_rows)
    log = (options.log or checkpoints / "log") if layout.rank == 0 else None
    metrics = MetricsLog(log, config, total)
    with ui.show_steps(total, silent=silent) as on_step, closing(metrics):
        listeners = Listeners(
            on_step=ui.together(on_step, metrics.note_step),
            on_evaluation=ui.together(partial(ui.say_evaluation, say), metrics.note_evaluation),
            on_start=ui.together(metrics.start, partial(ui.say_start, say)),
        )
        result, written = finetune_on_cluster(job, listeners)
    stop_ranks()
    if written is None:
        return None
    ui.say_result(say, options.out, result, written)
    return ui.summarise(options, result, written, data)


def hush_engines() -> None:
    """Keep from the terminal what torch and torchrec say to their own developers."""
    warnings.simplefilter("ignore")
    for name in ("torch.fx._symbolic_trace", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_logging(*, quiet: bool) -> None:
    """Print notes, unless `quiet`, and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("dmt_convert")
    logger.handlers = [handler]
    # torchrec logs by the root logger, which would repeat
    logger.propagate = ends.find_rank() is None
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe; what goes wrong is printed, and told by the exit code."""
    options = ui.make_parser((__doc__ or "").splitlines()[0]).parse_args(arguments)
    rank = ends.find_rank()
    start_logging(quiet=options.quiet or options.json or rank not in (None, 0))
    if rank is None:
        signal.signal(signal.SIGTERM, _interrupt)
    else:
        ends.end_with_torchrun(options)
        if os.environ.get("DMT_TRACEBACK") != "1":
            hush_engines()
    try:
        result = finetune(options) if rank is None else finetune_over_ranks(options)
    except DmtError as error:
        ends.refuse(options, error)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        refusal = DmtError(
            f"{where}{error.strerror or error}",
            expected="files and folders that can be read and written",
            hint="check the path, its owner and its permissions; nothing half-written was left",
        )
        ends.refuse(options, refusal)
    except KeyboardInterrupt:
        ends.interrupt(options)
    except RuntimeError as error:
        if rank is None:
            raise
        ends.lose(options, error) if ends.is_loss(error) else ends.fail(error)
    except Exception as error:
        if rank is None:
            raise
        ends.fail(error)
    ends.say_done(options, result)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1:])
