"""The `dmt` command."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from . import (
    convert_command,
    data_command,
    evaluate_command,
    export_command,
    finetune_command,
    inspect_command,
    partition_command,
    plan_command,
    score_command,
    selftest_command,
    unshard_command,
    verify_command,
)
from .console import drop, json_text, steady_streams, visible

_INTERRUPT_CODE: Final = 130
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED: Final = "interrupted; nothing half-written was left in place"

app = typer.Typer(
    name="dmt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn trained flat recommendation models (DLRM, DCNv2) into Disaggregated Multi-Tower "
    "models.\n\nExample, to start with: `dmt convert ckpt.pt --towers 16`.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 something you can mend, 4 verification found a "
    "difference.",
)


def _show_version(value: bool) -> None:
    if value:
        from dmt_convert import __version__

        print(f"dmt-convert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


for _module in (
    inspect_command,
    convert_command,
    partition_command,
    plan_command,
    data_command,
    score_command,
    evaluate_command,
    verify_command,
    finetune_command,
    export_command,
    unshard_command,
    selftest_command,
):
    app.command(_module.NAME)(_module.run)


def main() -> None:
    """Run `dmt`; what goes wrong is printed, and told by the exit code."""
    for name in ("stdout", "stderr"):  # closed by who called: nothing is to be printed
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    with steady_streams():
        _run()


def _run() -> None:
    from dmt_convert.errors import DmtError

    as_json = "--json" in sys.argv[1:]
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        # standalone, typer prints usage errors for people; otherwise it raises them
        code = app(prog_name="dmt", standalone_mode=not as_json)
        if code == _INTERRUPT_CODE:
            raise KeyboardInterrupt
        sys.exit(code)
    except DmtError as error:
        _fail(error.to_json(), str(error), code=error.exit_code, as_json=as_json)
    except typer.TyperException as error:
        found = error.format_message()
        value = _parts("UsageError", found, "a command and options that it knows", "dmt --help")
        _fail(value, found, code=2, as_json=as_json)
    except KeyboardInterrupt:
        value = _parts("Interrupted", "interrupted", "to run to the end", "run it again")
        _fail(value, _INTERRUPTED, code=_INTERRUPT_CODE, as_json=as_json)
    except SystemExit as stop:
        if stop.code == _INTERRUPT_CODE:  # what typer makes of an interrupt
            with suppress(OSError):  # the terminal is gone
                print(_INTERRUPTED, file=sys.stderr)
        raise
    except Exception as error:
        if os.environ.get("DMT_TRACEBACK") == "1":
            traceback.print_exc()
        _fail_unexpected(error, as_json=as_json)


def _interrupt(*_: object) -> None:
    for number in _ENDING:  # a terminal that closes sends several; tidying up must not be stopped
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail_unexpected(error: Exception, *, as_json: bool) -> None:
    found = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        value = _parts(
            type(error).__name__,
            f"{name}{error.strerror}",
            "files and folders that can be read and written",
            "check the path, its owner and its permissions; nothing half-written was left",
        )
        text = f"{value['found']}\nexpected: {value['expected']}\ntry: {value['hint']}"
        _fail(value, text, code=3, as_json=as_json)
    value = _parts(
        type(error).__name__,
        f"this is a bug in dmt: {type(error).__name__}: {found}",
        "no such error, whatever the input",
        "run it again with DMT_TRACEBACK=1 in the environment, and report what it prints",
    )
    _fail(value, f"{value['found']}\ntry: {value['hint']}", code=1, as_json=as_json)


def _parts(error: str, found: str, expected: str, hint: str) -> dict[str, object]:
    return {"error": error, "found": found, "expected": expected, "hint": hint, "details": []}


def _fail(value: Mapping[str, object], text: str, *, code: int, as_json: bool) -> NoReturn:
    if as_json:
        try:
            print(json_text(value), flush=True)
        except OSError:  # closed, or on a full disk: stderr still says it
            drop(sys.stdout)
    with suppress(OSError):  # the terminal is gone
        print(f"error: {visible(text)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
