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
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dmt_convert.bundle import open_bundle
from dmt_convert.errors import DataError, DmtError
from dmt_convert.finetune.outcome import write_outcome

if TYPE_CHECKING or __package__:
    from .finetune_options import (
        make_parser,
        make_printer,
        read_config,
        say_evaluation,
        say_result,
        say_rows,
        show_steps,
        summarise,
    )
else:  # torchrun runs the file itself
    from finetune_options import (
        make_parser,
        make_printer,
        read_config,
        say_evaluation,
        say_result,
        say_rows,
        show_steps,
        summarise,
    )

_INTERRUPT_CODE: Final = 130
_ENGINE_WORDS: Final = ("gloo", "NCCL", "Timed out", "Connection closed", "rank")


def finetune(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune in this process; returns what `--json` prints."""
    # imports torch, which takes seconds: options are checked before
    config = read_config(options)
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
    check_memory(bundle.manifest.model.flat, config, data.train.num_rows)

    # 2. Everything into memory; tables in fp32
    model = load_bundle(bundle)
    silent = options.quiet or options.json
    say = make_printer(silent=silent)
    say_rows(say, data, config)

    # 3. The loop (dmt_convert/finetune/loop.py): the best state stays
    with show_steps(config.total_steps(data.train.num_rows), silent=silent) as on_step:
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


def finetune_over_ranks(options: argparse.Namespace) -> dict[str, Any] | None:
    """Fine-tune as one rank of several; rank 0 returns what `--json` prints."""
    config = read_config(options)
    from dmt_convert.engine import start_ranks, stop_ranks
    from dmt_convert.engine.ranks import read_layout
    from dmt_convert.finetune import open_training_data
    from dmt_convert.finetune.cluster_run import (
        ClusterJob,
        Listeners,
        choose_plan,
        finetune_on_cluster,
        read_plan,
    )
    from dmt_convert.finetune.finetuned_bundle import check_out

    # 1. What there is: the ranks, the bundle and its plan, the rows, a place to write to
    layout = read_layout(options.backend)
    bundle = open_bundle(options.bundle)
    plan = choose_plan(bundle, layout, None if options.plan is None else read_plan(options.plan))
    check_out(bundle, options.out, force=options.force)
    data = open_training_data(options.data, options.valid)
    silent = options.quiet or options.json or layout.rank != 0
    say = make_printer(silent=silent)
    say(
        f"{layout.hosts} hosts x {layout.ranks_per_host} ranks, {layout.backend}; "
        f"{len(plan.tower_hosts)} towers"
        + (f", {plan.hosts_per_tower} hosts each" if plan.hosts_per_tower > 1 else "")
    )
    say_rows(say, data, config)

    # 2. Ranks find each other; every one reads its own shards (dmt_convert/engine)
    start_ranks(layout, hosts_per_tower=plan.hosts_per_tower, timeout_seconds=options.timeout)
    job = ClusterJob(
        bundle=bundle,
        plan=plan,
        data=data,
        config=config,
        layout=layout,
        checkpoints=options.checkpoints or Path(f"{options.out}.checkpoints"),
        timeout_seconds=options.timeout,
        resume=options.resume or _is_restart(),
        restart=options.force,
    )

    # 3. The loop, its checkpoints, and the new bundle
    with show_steps(config.total_steps(data.train.num_rows), silent=silent) as on_step:
        listeners = Listeners(
            on_step=on_step,
            on_evaluation=lambda found: say_evaluation(say, found),
            on_start=lambda step: (
                say(f"going on from the checkpoint of step {step:,}") if step else None
            ),
        )
        result, written = finetune_on_cluster(job, options.out, listeners, force=options.force)
    stop_ranks()
    if written is None:
        return None
    say_result(say, options.out, result, written)
    return summarise(options, result, written, data)


def hush_engines() -> None:
    """Keep from the terminal what torch and torchrec say to their own developers."""
    warnings.simplefilter("ignore")
    for name in ("torch.fx._symbolic_trace", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_restart() -> bool:
    """Whether torchrun starts the ranks anew, after one was lost."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _rank() -> int | None:
    """This process's rank, None where torchrun did not start it."""
    return int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else None


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe; what goes wrong is printed, and told by the exit code."""
    options = make_parser((__doc__ or "").splitlines()[0]).parse_args(arguments)
    rank = _rank()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("dmt_convert")
    logger.handlers = [handler]
    quiet = options.quiet or options.json or rank not in (None, 0)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    if rank is None:
        signal.signal(signal.SIGTERM, _interrupt)
    elif os.environ.get("DMT_TRACEBACK") != "1":
        hush_engines()
    try:
        result = finetune(options) if rank is None else finetune_over_ranks(options)
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
    except RuntimeError as error:
        if rank is None or not any(word in str(error) for word in _ENGINE_WORDS):
            raise
        fail_by_others(options, error)
    if not write_outcome(0, result=result) and options.json and result is not None:
        print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))


def fail(options: argparse.Namespace, error: DmtError, text: str, *, code: int) -> NoReturn:
    """Say what went wrong, with `--json` also as a document, and end.

    Ranks meet most errors alike: one of a host says so, or the one whose rows are wrong.
    """
    told = write_outcome(code, error=error)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DataError)
    if speaks and not told:
        if options.json and _rank() in (None, 0):
            print(json.dumps(error.to_json(), indent=1, ensure_ascii=False))
        whose = f"rank {_rank()}: " if _rank() else ""
        print(f"error: {whose}{text}", file=sys.stderr)
    _end(code)


def fail_by_others(options: argparse.Namespace, error: RuntimeError) -> NoReturn:
    """End because another rank has: it says why, or was killed."""
    if os.environ.get("DMT_TRACEBACK") == "1":
        traceback.print_exception(error)
    if not write_outcome(1) and _rank() == 0:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(
            f"error: another rank was lost, or did not answer within {options.timeout:g} s "
            f"({reason})\ntry: look at what it printed; with --max-restarts torchrun starts all "
            "again, and training goes on from the last whole checkpoint",
            file=sys.stderr,
        )
    _end(1)


def _end(code: int) -> NoReturn:
    if _rank() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # other ranks may be gone: nothing here waits for them


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1:])
