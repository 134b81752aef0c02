"""Which files of a folder are the rows of a parquet data set, and which folders are something else.

Other readers of such folders (pyarrow, Spark, DuckDB) skip names that begin with `_` or `.`: they
belong to writers. A table of Delta Lake, Iceberg or Hudi is not the files in its folder: its log
says which of them still count.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from dmt_convert.data.data_files import natural_key
from dmt_convert.errors import DataError

_SUFFIXES: Final = (".parquet", ".pq", ".parq")
_MAGIC: Final = b"PAR1"
_SPARK: Final = 'spark.read.format("{}").load("{}").write.parquet("rows")'

_LOGS: Final[tuple[tuple[str, Callable[[Path], bool], str], ...]] = (
    (
        "Delta Lake",
        lambda folder: (folder / "_delta_log").is_dir(),
        "import deltalake, pyarrow.parquet as pq; "
        'pq.write_table(deltalake.DeltaTable("{}").to_pyarrow_table(), "rows.parquet")',
    ),
    (
        "Apache Iceberg",
        lambda folder: any((folder / "metadata").glob("*.metadata.json")),
        _SPARK.format("iceberg", "{}"),
    ),
    ("Apache Hudi", lambda folder: (folder / ".hoodie").is_dir(), _SPARK.format("hudi", "{}")),
    (
        "Spark's streaming sink",
        lambda folder: (folder / "_spark_metadata").is_dir(),
        'spark.read.parquet("{}").write.parquet("rows")',
    ),
)
"""Kinds of tables whose log says which files count: name, how to tell one, how to write its rows
as plain files."""


def is_parquet(path: Path) -> bool:
    """Tell by magic bytes (a file) or by what a folder holds."""
    if path.is_dir():
        return bool(_own_files(path) or _folders(path) or _table_kind(path))
    return path.is_file() and _is_parquet_file(path)


def parquet_files(path: Path) -> list[Path]:
    """Return the files of a data set, in natural order of their names.

    Args:
        path: One file, or a folder.

    Raises:
        DataError: The folder is a table with a log, holds folders of parquet, or no rows.
    """
    if not path.is_dir():
        return [path]
    _refuse_tables(path)
    files, folders = _own_files(path), _folders(path)
    if folders:
        raise _nested(path, files, folders)
    return files


def _own_files(folder: Path) -> list[Path]:
    files = [file for file in _visible(folder) if file.is_file() and _is_parquet_file(file)]
    return sorted(files, key=lambda file: natural_key(file.name))


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder that hold parquet, directly or one level below."""
    found = [
        child
        for child in _visible(folder)
        if child.is_dir()
        and (
            _holds_parquet(child)
            or any(below.is_dir() and _holds_parquet(below) for below in _visible(child))
        )
    ]
    return sorted(found, key=lambda child: natural_key(child.name))


def _holds_parquet(folder: Path) -> bool:
    return any(file.suffix.lower() in _SUFFIXES and file.is_file() for file in _visible(folder))


def _visible(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if not child.name.startswith(("_", "."))]


def _is_parquet_file(file: Path) -> bool:
    if file.suffix.lower() in _SUFFIXES:
        return True
    with file.open("rb") as opened:
        return opened.read(4) == _MAGIC


def _table_kind(folder: Path) -> tuple[str, str] | None:
    return next(((name, command) for name, tells, command in _LOGS if tells(folder)), None)


def _refuse_tables(path: Path) -> None:
    """Refuse the folder of a table, and a partition inside one."""
    folder = path.absolute()
    while True:
        kind = _table_kind(folder)
        if kind is not None:
            name, command = kind
            raise DataError(
                f"{path} belongs to a table of {name}: its log says which files still count, and "
                "files that were removed are among them",
                expected="plain parquet files, all of whose rows count",
                hint=f"write the table's rows as plain files first: {command.format(folder)}",
            )
        if "=" not in folder.name:  # partitions are folders such as dt=2024-01-01
            return
        folder = folder.parent


def _nested(path: Path, files: list[Path], folders: list[Path]) -> DataError:
    names = [folder.name for folder in folders]
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    partitions = all("=" in name for name in names)
    found = "partitions (hive folders)" if partitions else "folders of parquet files"
    beside = f" beside {len(files)} parquet files" if files else ""
    write = (
        "; or write all rows into one folder: pyarrow.dataset.write_dataset("
        f'pyarrow.dataset.dataset("{path}"), "rows", format="parquet")'
    )
    return DataError(
        f"{path} holds {found}{beside}: {listed}",
        expected="one data set: a file, or a folder whose files are the rows",
        hint=f"give one of them, for example {folders[0]}" + (write if partitions else ""),
    )
