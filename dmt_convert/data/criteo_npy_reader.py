"""Reader of TorchRec's binary Criteo files: `*_dense.npy`, `*_sparse.npy`, `*_labels.npy`.

Ids are `*_sparse.npy` (n, F), `*_sparse_contig_freq.npy`, or the MLPerf multi-hot
`*_sparse_multi_hot.npz` with one array (n, L) per feature under the keys `0`, `1`, ...
Files of several days follow each other in natural order. Dense inputs are already transformed
in the files. Ids may be unhashed: TorchRec's loader takes them modulo the table's rows
[torchrec, `datasets/criteo.py`, `InMemoryBinaryCriteoIterDataPipe`], so `hash_ids` is set.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dmt_convert.data.array_blocks import ArrayBlocks, ArrayPart
from dmt_convert.data.data_files import natural_key
from dmt_convert.data.row_blocks import BlockDataset
from dmt_convert.data.stored_arrays import StoredArray, open_npy, open_npz
from dmt_convert.errors import DataError

_FILE_NAME: Final = re.compile(
    r"(?:(?P<stem>.*)_)?"
    r"(?P<kind>dense|labels|sparse|sparse_contig_freq|sparse_multi_hot)\.(?:npy|npz)"
)
_SPARSE_KINDS: Final = ("sparse", "sparse_contig_freq", "sparse_multi_hot")


class CriteoNpyReader:
    """Reads a directory of such files, or the set that one of them belongs to."""

    format = "criteo-npy"

    def can_read(self, path: Path) -> bool:
        """Tell by file names: a set has at least its dense and one sparse file."""
        return bool(_find_sets(path))

    def open(self, path: Path) -> BlockDataset:
        """Memory-map the files.

        Raises:
            DataError: Files are damaged, missing, ambiguous, or do not fit each other.
        """
        parts = [_open_part(path, stem, files) for stem, files in _find_sets(path)]
        shapes = {(part.num_dense, part.num_features, part.labels is None) for part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"{path}: sets of files with different columns",
                expected="the same dense columns, features and labels in all sets",
                hint="give one set, by one of its files",
                details=[
                    f"{part.ids[0].file.name}: {part.num_dense} dense, {part.num_features} "
                    f"features, {'no labels' if part.labels is None else 'labels'}"
                    for part in parts
                ],
            )
        first = parts[0]
        source = ArrayBlocks(
            parts=tuple(parts),
            feature_names=tuple(f"cat_{i}" for i in range(first.num_features)),
            dense_names=tuple(f"int_{i}" for i in range(first.num_dense)),
            # Older TorchRec wrote 32-bit hashes as int32: some are negative, and hashed later.
            allow_negative=True,
        )
        return BlockDataset(
            path=path,
            format=self.format,
            num_dense=first.num_dense,
            feature_names=source.feature_names,
            names_are_positional=True,
            has_labels=first.labels is not None,
            hash_ids=True,
            source=source,
        )


def _find_sets(path: Path) -> list[tuple[str, dict[str, Path]]]:
    """Find the sets of files, by stem, in natural order (day_2 before day_10)."""
    is_directory = path.is_dir()
    given = None if is_directory else _FILE_NAME.fullmatch(path.name)
    if not is_directory and (given is None or not path.is_file()):
        return []
    sets: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in (path if is_directory else path.parent).iterdir():
        match = _FILE_NAME.fullmatch(file.name)
        if match is not None:
            sets[match["stem"] or ""][match["kind"]] = file
    if given is not None:
        files = sets[given["stem"] or ""]
        if given["kind"] in _SPARSE_KINDS:
            files = {kind: f for kind, f in files.items() if kind not in _SPARSE_KINDS}
            files[given["kind"]] = path
        sets = defaultdict(dict, {given["stem"] or "": files})
    complete = {
        stem: files
        for stem, files in sets.items()
        if "dense" in files and any(kind in files for kind in _SPARSE_KINDS)
    }
    return sorted(complete.items(), key=lambda item: natural_key(item[0]))


def _open_part(path: Path, stem: str, files: dict[str, Path]) -> ArrayPart:
    sparse = [files[kind] for kind in _SPARSE_KINDS if kind in files]
    if len(sparse) > 1:
        raise DataError(
            f"{path}: several files of ids for {stem!r}",
            expected="one of *_sparse.npy, *_sparse_contig_freq.npy, *_sparse_multi_hot.npz",
            hint="give the file of ids instead of the directory",
            details=[file.name for file in sparse],
        )
    labels = files.get("labels")
    is_matrix = sparse[0].suffix == ".npy"
    ids = (open_npy(sparse[0]),) if is_matrix else _multi_hot(sparse[0], open_npz(sparse[0]))
    return ArrayPart(
        dense=open_npy(files["dense"]),
        ids=ids,
        is_matrix=is_matrix,
        labels=None if labels is None else open_npy(labels),
    )


def _multi_hot(file: Path, arrays: dict[str, StoredArray]) -> tuple[StoredArray, ...]:
    keys: Sequence[str] = [str(i) for i in range(len(arrays))]
    if not arrays or set(keys) != set(arrays):
        raise DataError(
            f"{file}: arrays {', '.join(sorted(arrays)) or '(none)'}",
            expected="one array (n, L) per feature under the keys 0, 1, ...",
            hint="write the file as TorchRec's multi-hot materialisation does",
        )
    return tuple(arrays[key] for key in keys)
