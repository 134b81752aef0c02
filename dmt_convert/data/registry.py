"""All readers, and the choice among them by what a path holds."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from dmt_convert.data.criteo_npy_reader import CriteoNpyReader
from dmt_convert.data.criteo_tsv_reader import CriteoTsvReader
from dmt_convert.data.data_files import data_files, refuse_splits
from dmt_convert.data.dataset import DataReader, Dataset
from dmt_convert.data.dlrm_npz_reader import DlrmNpzReader
from dmt_convert.data.parquet_reader import ParquetReader
from dmt_convert.data.probe_npz_reader import ProbeNpzReader
from dmt_convert.data.repository_npz_reader import RepositoryNpzReader
from dmt_convert.data.stored_arrays import npz_names
from dmt_convert.errors import DataError

READERS: Final[tuple[DataReader, ...]] = (
    ProbeNpzReader(),
    DlrmNpzReader(),
    CriteoNpyReader(),
    RepositoryNpzReader(),
    ParquetReader(),
    CriteoTsvReader(),
)

_EXPECTED: Final = (
    "parquet; npz with dense, sparse, label; npz with X_int, X_cat, y; a probe npz; "
    "*_dense.npy, *_sparse.npy, *_labels.npy; or Criteo lines (tab-separated, may be gzip)"
)


def open_data(path: Path) -> Dataset:
    """Open a data set with the reader that knows it.

    Raises:
        DataError: The path is missing, empty, damaged, holds several splits, or no reader knows it.
    """
    path = Path(path)
    _check_path(path)
    for reader in READERS:
        if reader.can_read(path):
            dataset = reader.open(path)
            if not dataset.num_rows:
                raise DataError(
                    f"{path} ({reader.format}) holds no rows",
                    expected="at least one row",
                    hint="check how the file was written",
                )
            return dataset
    raise _unknown(path)


def _check_path(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"{path} does not exist", expected="a data file or directory", hint="check the path"
        )
    if path.is_dir():
        refuse_splits(path)
    elif not path.stat().st_size:
        raise DataError(
            f"{path} is empty", expected="a data file", hint="copy or download the file again"
        )
    elif path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is not a whole npz (zip) file",
            expected="a zip archive of npy files",
            hint="copy or download the file again; compare its size with the original's",
        )


def _unknown(path: Path) -> DataError:
    if path.is_dir():
        files = data_files(path)
        return DataError(
            f"the files of {path} do not form a data set",
            expected=_EXPECTED,
            hint=f"give one of its files: {', '.join(str(file) for file in files[:5])}"
            if files
            else "give a file, or a directory of *.parquet or *.npy files",
        )
    names = sorted(npz_names(path))
    found = f"with the arrays {', '.join(names[:12])}" if names else "of an unknown format"
    return DataError(
        f"{path} is a file {found}",
        expected=_EXPECTED,
        hint="write the data in one of these formats",
    )
