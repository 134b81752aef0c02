"""What all commands share: how results, errors and progress reach the user."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print no progress and no remarks.")]

Progress = Callable[[str, int, int], None]

_PIPE_WIDTH = 160
_VERBS = {
    "sampling": "Sampling inputs",
    "partitioning": "Partitioning features",
    "initialising": "Initialising towers",
    "distilling": "Distilling",
    "writing": "Writing the bundle",
    "scoring": "Scoring",
    "checking rows": "Checking rows",
    "checking": "Checking digests",
    "unsharding": "Writing tensors",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How this run talks to its user."""

    json: bool
    """Machines read: one JSON document on stdout."""
    quiet: bool
    """No progress, no remarks."""

    def result(self, value: Mapping[str, Any], *tables: RenderableType) -> None:
        """Print a result: as JSON, or as what people read."""
        try:
            self._print(value, *tables)
            sys.stdout.flush()
        except OSError:
            drop(sys.stdout)
            raise

    def _print(self, value: Mapping[str, Any], *tables: RenderableType) -> None:
        if self.json:
            print(json_text(finite(value), allow_nan=False))
            return
        from rich.console import Console

        # in a pipe lines are long, so that they can be searched
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        console = Console(highlight=False, width=width)
        for table in tables:
            console.print(table)

    def remark(self, text: str) -> None:
        """Say something beside the result, on stderr."""
        if not self.quiet and not self.json:
            print(visible(text), file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show progress on a terminal; in a pipe, show none."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda step, done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(step: str, done: int, total: int) -> None:
                if step not in tasks:
                    for other in tasks.values():
                        bars.update(other, visible=False)
                    tasks[step] = bars.add_task(_VERBS.get(step, step), total=total or None)
                bars.update(tasks[step], completed=done, total=total or None)

            yield show


class _SteadyStream:
    """A text stream that goes nowhere once nobody reads it any more (`dmt ... | head -1`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, as far as somebody reads it."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            drop(self._stream)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, as far as somebody reads it."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            drop(self._stream)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Let stdout and stderr take any text, and go nowhere once nobody reads them.

    What their encoding does not have is escaped, as Python does on stderr.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    steady = [cast(TextIO, _SteadyStream(stream)) for stream in streams]
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        written = [_can_flush(stream) for stream in steady]
        sys.stdout, sys.stderr = streams
        if not written[0]:
            print("error: the output could not be written", file=sys.stderr)
            raise SystemExit(3)


def _can_flush(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:  # a full disk: Python would try again at its end
        drop(stream)
        return False
    return True


def drop(stream: TextIO) -> None:
    """Let what is still buffered for a stream go nowhere, where it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def visible(text: str) -> str:
    """Spell out what a terminal would obey or cannot show: names come from files of others.

    Control characters but line ends, and lone surrogates, become their escapes in Python.
    """
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def json_text(value: object, *, allow_nan: bool = True) -> str:
    """Write JSON in ASCII, which every terminal and every locale can take."""
    return json.dumps(value, indent=1, allow_nan=allow_nan)


def finite(value: Any) -> Any:
    """Replace NaN and Inf, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def configure_logging(*, quiet: bool) -> None:
    """Let the library's remarks reach stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("dmt_convert")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def make_output(*, json_: bool, quiet: bool) -> Output:
    """Set up logging and return how to talk to the user."""
    configure_logging(quiet=quiet or json_)
    return Output(json=json_, quiet=quiet)


def grid(rows: list[tuple[str, str]]) -> RenderableType:
    """Make a two-column list of names and values."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(visible(value)))
    return table


def table(title: str, columns: list[str], rows: list[list[str]]) -> RenderableType:
    """Make a table; columns whose name ends with `>` are right-aligned."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        right = column.endswith(">")
        made.add_column(
            escape(column.removesuffix(">")),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
        )
    for row in rows:
        made.add_row(*(escape(visible(cell)) for cell in row))
    return made


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def human_bytes(count: float) -> str:
    """Write a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def number(value: float | None, digits: int = 6) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
