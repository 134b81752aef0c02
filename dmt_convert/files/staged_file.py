"""Write a single file whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmt_convert.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Give a file to write beside `path`; on success it becomes `path`, otherwise it goes away.

    The file has the same name as `path`, in a folder of its own, since some writers go by the name.

    Raises:
        ConfigError: It cannot be written.
    """
    folder = path.parent / f".dmt-tmp-{os.getpid()}"
    try:
        folder.mkdir()
        staged = folder / path.name
        yield staged
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})",
            expected="a file that can be written, in an existing folder, on a disk with space",
            hint="choose another file",
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
