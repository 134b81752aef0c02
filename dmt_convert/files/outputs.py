"""Where a command may write a file: never over what it reads, nor over a file of another kind."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmt_convert.errors import ConfigError

_MAX_DOCUMENT_BYTES: Final = 64 << 20
_MAX_LOOKED_AT: Final = 20_000
"""Files of an input folder that are compared with the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """One kind of file that commands write."""

    noun: str
    """What it is called."""
    is_one: Callable[[Path], bool]
    """Whether a file is of this kind, so that a new one may replace it."""


def check_output(
    out: Path,
    kind: FileKind,
    *,
    models: Iterable[Path] = (),
    inputs: Iterable[Path | None] = (),
    option: str = "--out",
) -> None:
    """Refuse a file that must not be written, before any work is done.

    Args:
        out: The file.
        kind: What will be written.
        models: Models that the command reads: files, or folders into which nothing is written.
        inputs: What else it reads: files, or folders whose files are kept.
        option: What the user gave it with.

    Raises:
        ConfigError: Its folder does not exist; it is an input, under any name, or lies in a model's
            folder; or a file of another kind is there.
    """
    if not out.parent.is_dir() or out.name in ("", ".."):
        raise ConfigError(
            f"{option} {out}: the folder {out.parent} does not exist",
            expected="a file in an existing folder",
            hint=f"mkdir -p {out.parent}",
        )
    for path in models:
        if path.is_dir() and path.resolve() in out.resolve().parents:
            raise _is_read(f"{option} {out} lies in {path}", option)
        _check_input(out, path, option)
    for source in inputs:
        if source is not None:
            _check_input(out, source, option)
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_file():
        what = "a symbolic link" if out.is_symlink() else "a folder" if out.is_dir() else "a device"
        raise ConfigError(
            f"{option} {out} is {what}",
            expected=f"a file to write: {kind.noun}",
            hint=f"name a file of its own with {option}",
        )
    if out.stat().st_size and not _is_one(out, kind):
        raise ConfigError(
            f"{option} {out} exists and is not {kind.noun}",
            expected=f"a path where nothing is, or {kind.noun} that may be replaced",
            hint=f"choose another {option}, or remove the file first",
        )


def check_distinct(**outs: Path | None) -> None:
    """Refuse one file for two outputs; keywords are options.

    Raises:
        ConfigError: Two are the same.
    """
    given = [(name, path) for name, path in outs.items() if path is not None]
    for (a, first), (b, second) in itertools.combinations(given, 2):
        if first.resolve() == second.resolve():
            raise ConfigError(
                f"--{a} and --{b} are the same file, {first}",
                expected="a file of its own for each",
                hint=f"choose another --{b}",
            )


def _check_input(out: Path, source: Path, option: str) -> None:
    with suppress(OSError):
        here = out.stat()
        if any(os.path.samestat(here, other) for other in _stats(source)):
            whose = "is" if source.is_file() else "is a file of"
            raise _is_read(f"{option} {out} {whose} {source}", option)


def _is_read(found: str, option: str) -> ConfigError:
    return ConfigError(
        f"{found}, which is read",
        expected="a file of its own to write",
        hint=f"choose another {option}; what is read is never changed",
    )


def _stats(source: Path) -> Iterator[os.stat_result]:
    paths: Iterator[Path] = iter([source])
    if source.is_dir():
        paths = (Path(folder, name) for folder, _, names in os.walk(source) for name in names)
    for path in itertools.islice(paths, _MAX_LOOKED_AT):
        with suppress(OSError):
            yield path.stat()


def _is_one(out: Path, kind: FileKind) -> bool:
    try:
        return kind.is_one(out)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile):
        return False


def _keys(path: Path) -> set[str]:
    """Keys of a JSON object."""
    if path.stat().st_size > _MAX_DOCUMENT_BYTES:
        return set()
    value = json.loads(path.read_text("utf-8"))
    return set(value) if isinstance(value, dict) else set()


def _arrays(path: Path) -> list[str]:
    """Names of the arrays in an npz."""
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _begins(path: Path, *starts: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(512).lstrip().startswith(starts)


PARTITION_FILE: Final = FileKind(
    noun="a partition as `dmt partition` writes it", is_one=lambda path: _keys(path) == {"towers"}
)
PLAN_FILE: Final = FileKind(
    noun="a plan as `dmt plan` writes it",
    is_one=lambda path: {"schema_version", "cluster", "tower_hosts"} <= _keys(path),
)
SCORES_FILE: Final = FileKind(
    noun="scores as `dmt score` writes them", is_one=lambda path: _arrays(path) == ["logits.npy"]
)
FIGURE_FILE: Final = FileKind(
    noun="a figure",
    is_one=lambda path: _begins(path, b"\x89PNG", b"<?xml", b"<svg", b"%PDF", b"%!PS"),
)
