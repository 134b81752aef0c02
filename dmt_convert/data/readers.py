"""The formats of data sets that can be read, and how one is chosen."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from dmt_convert.data.criteo_readers import (
    is_criteo_npy,
    is_criteo_tsv,
    read_criteo_npy,
    read_criteo_tsv,
)
from dmt_convert.data.data_files import data_files, refuse_mixtures, refuse_splits
from dmt_convert.data.dataset import Dataset
from dmt_convert.data.npz_readers import (
    is_dlrm_npz,
    is_probe_npz,
    is_repository_npz,
    read_dlrm_npz,
    read_probe_npz,
    read_repository_npz,
)
from dmt_convert.data.parquet_files import is_parquet
from dmt_convert.data.parquet_reader import read_parquet
from dmt_convert.data.stored_arrays import npz_names
from dmt_convert.data.unchanged_files import refuse_changes
from dmt_convert.errors import DataError
from dmt_convert.readers import Reader, with_plugins

READERS: Final[tuple[Reader[Dataset], ...]] = (
    Reader(format="probe-npz", can_read=is_probe_npz, read=read_probe_npz),
    Reader(format="dlrm-npz", can_read=is_dlrm_npz, read=read_dlrm_npz),
    Reader(format="criteo-npy", can_read=is_criteo_npy, read=read_criteo_npy),
    Reader(format="repository-npz", can_read=is_repository_npz, read=read_repository_npz),
    Reader(format="parquet", can_read=is_parquet, read=read_parquet),
    Reader(format="criteo-tsv", can_read=is_criteo_tsv, read=read_criteo_tsv),
)
"""All built-in formats. They are asked in this order, after those of plugins."""
ENTRY_POINTS: Final = "dmt_convert.data_readers"
"""Group of entry points to which other distributions add a `Reader[Dataset]`."""

_EXPECTED: Final = (
    "parquet; npz with dense, sparse, label; npz with X_int, X_cat, y; a probe npz; "
    "*_dense.npy, *_sparse.npy, *_labels.npy; or Criteo lines (tab-separated, may be gzip)"
)


def open_data(path: str | Path) -> Dataset:
    """Open a data set with the reader that knows it.

    Raises:
        DataError: The path is missing, empty, damaged, holds several splits, or no reader knows it.
        ConfigError: A reader of an installed plugin is broken.
    """
    path = Path(path)
    _check_path(path)
    for reader in with_plugins(READERS, group=ENTRY_POINTS, opens=Dataset):
        if reader.can_read(path):
            dataset = reader.read(path)
            if not dataset.num_rows:
                raise DataError(
                    f"{path} ({reader.format}) holds no rows",
                    expected="at least one row",
                    hint="check how the file was written",
                )
            return refuse_changes(dataset)
    raise _unknown(path)


def _check_path(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"{path} does not exist", expected="a data file or directory", hint="check the path"
        )
    if path.is_dir():
        refuse_splits(path)
        refuse_mixtures(path)
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
    )
