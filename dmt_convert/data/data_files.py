"""Files of a data directory: their order, and splits that must not be mixed."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Final

from dmt_convert.errors import DataError

_SUFFIXES: Final = (".npz", ".npy", ".parquet")
_SPLITS: Final = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "eval": "test",
}


def natural_key(name: str) -> list[tuple[int, str]]:
    """Key that sorts numbers inside names by value: `day_2` before `day_10`."""
    return [(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", name)]


def data_files(directory: Path) -> list[Path]:
    """Files of a directory that may hold data, in natural order."""
    files = [
        file
        for file in directory.iterdir()
        if file.suffix in _SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    return sorted(files, key=lambda file: natural_key(file.name))


def refuse_splits(directory: Path) -> None:
    """Refuse a directory whose file names say that it holds several splits.

    Raises:
        DataError: There are files of two or more of train, valid and test.
    """
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in data_files(directory):
        first_word = re.split(r"[^A-Za-z]", file.stem, maxsplit=1)[0].lower()
        if first_word in _SPLITS:
            splits[_SPLITS[first_word]].append(file)
    if len(splits) > 1:
        firsts = [files[0] for files in splits.values()]
        raise DataError(
            f"{directory} holds several splits: {', '.join(file.name for file in firsts)}",
            expected="one data set",
            hint=f"give one of them: {', '.join(str(file) for file in firsts)}",
        )


def refuse_mixtures(directory: Path) -> None:
    """Refuse a directory of parquet beside files of numpy: only one kind would be read.

    Raises:
        DataError: There are files of both kinds.
    """
    files = data_files(directory)
    firsts = [
        next((f for f in files if (f.suffix == ".parquet") is of), None) for of in (True, False)
    ]
    known = [file for file in firsts if file is not None]
    if len(known) > 1:
        raise DataError(
            f"{directory} holds parquet and numpy files: {', '.join(f.name for f in known)}",
            expected="one data set",
            hint=f"give one of them: {', '.join(map(str, known))}",
        )
