"""The `dmt` command."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from . import (
    convert_command,
    evaluate_command,
    inspect_command,
    partition_command,
    plan_command,
    score_command,
    verify_command,
)

app = typer.Typer(
    name="dmt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn trained flat recommendation models (DLRM, DCNv2) into Disaggregated Multi-Tower "
    "models.\n\nStart with `dmt convert ckpt.pt --towers 16`.",
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
    score_command,
    evaluate_command,
    verify_command,
):
    app.command(_module.NAME)(_module.run)


def main() -> None:
    """Run `dmt`; errors that a user can mend are printed, not raised."""
    from dmt_convert.errors import DmtError

    try:
        app()
    except DmtError as error:
        if "--json" in sys.argv[1:]:
            print(json.dumps(error.to_json(), indent=1, ensure_ascii=False))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left in place", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
