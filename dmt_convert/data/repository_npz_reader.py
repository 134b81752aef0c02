"""Reader of this repository's npz: `dense` (n, D), `sparse` (n, F), `label` (n,).

A `schema.json` beside the file names the columns; without it names are positional.
"""

from __future__ import annotations

from pathlib import Path

from dmt_convert.data.array_blocks import ArrayBlocks, ArrayPart
from dmt_convert.data.feature_names import check_unique
from dmt_convert.data.row_blocks import BlockDataset
from dmt_convert.data.schema import Schema, read_schema
from dmt_convert.data.stored_arrays import npz_names, open_npz
from dmt_convert.errors import DataError


class RepositoryNpzReader:
    """Reads `dense`, `sparse` and `label` (`dense` and `label` may be absent)."""

    format = "repository-npz"

    def can_read(self, path: Path) -> bool:
        """Tell by the names of the arrays."""
        return path.is_file() and "sparse" in npz_names(path)

    def open(self, path: Path) -> BlockDataset:
        """Open the file, reading headers only.

        Raises:
            DataError: Arrays are damaged, or do not fit each other or the schema.
        """
        arrays = open_npz(path)
        part = ArrayPart(
            dense=arrays.get("dense"),
            ids=(arrays["sparse"],),
            is_matrix=True,
            labels=arrays.get("label"),
        )
        schema = read_schema(path.parent)
        sparse = schema.sparse_features if schema is not None else None
        dense = schema.dense_features if schema is not None else None
        if schema is not None:
            _check_counts(path, part, schema)
        features = sparse or tuple(f"f{i}" for i in range(part.num_features))
        source = ArrayBlocks(
            parts=(part,),
            feature_names=check_unique(features, path),
            dense_names=dense or tuple(f"dense[{i}]" for i in range(part.num_dense)),
        )
        return BlockDataset(
            path=path,
            format=self.format,
            num_dense=part.num_dense,
            feature_names=source.feature_names,
            names_are_positional=not sparse,
            has_labels=part.labels is not None,
            source=source,
        )


def _check_counts(path: Path, part: ArrayPart, schema: Schema) -> None:
    details = [
        f"{noun}: {found} in {path.name}, {len(names)} in {schema.file.name}"
        for noun, found, names in (
            ("dense columns", part.num_dense, schema.dense_features),
            ("features", part.num_features, schema.sparse_features),
        )
        if names is not None and len(names) != found
    ]
    if details:
        raise DataError(
            f"{path} and {schema.file} disagree",
            expected="as many names in the schema as columns in the data",
            hint="take the schema.json that was written with the data",
            details=details,
        )
