"""Reader of parquet: columns named as features, one row group at a time.

Integer columns hold one id per row (null: an empty bag), list columns of integers several.
`<feature>__weights` holds one weight per id. Float columns are dense inputs; a `schema.json`
beside the file lists integer columns that are dense too, and the order of the dense inputs.
`label` is the label. Other columns are left aside.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.arrays import AnyArray, Float32Array, IntArray
from dmt_convert.data.batch import Bag, Batch, take_rows
from dmt_convert.data.column_names import Schema, check_unique, read_schema
from dmt_convert.data.data_files import natural_key
from dmt_convert.data.dataset import Dataset, TakeRows
from dmt_convert.data.value_checks import (
    RowPlace,
    check_dense,
    check_ids,
    check_labels,
    check_weights,
    refuse_value,
)
from dmt_convert.errors import DataError

LABEL: Final = "label"
WEIGHTS_SUFFIX: Final = "__weights"

_log = logging.getLogger(__name__)


def is_parquet(path: Path) -> bool:
    """Tell by magic bytes (a file) or file names (a directory)."""
    if path.is_dir():
        return bool(_files(path))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


def read_parquet(path: Path) -> Dataset:
    """Open one file, or a directory of them in natural order of their names, reading footers only.

    Raises:
        DataError: pyarrow is missing, files are damaged, differ, or hold no features.
    """
    files = _files(path) if path.is_dir() else [path]
    opened = [_open_file(file) for file in files]
    schema = read_schema(path if path.is_dir() else path.parent)
    columns = _sort_columns(files[0], opened[0].schema_arrow, schema)
    for file, parquet in zip(files, opened, strict=True):
        if _sort_columns(file, parquet.schema_arrow, schema) != columns:
            raise DataError(
                f"{file} and {files[0].name} hold different columns",
                expected="the same names and kinds of columns in all files",
                hint="give one file, or write the files again with one schema",
            )
    if columns.ignored:
        _log.info("%s: columns left aside: %s", path, ", ".join(columns.ignored))
    groups = [
        group
        for file, parquet in zip(files, opened, strict=True)
        for group in _row_groups(file, parquet.metadata)
    ]
    return Dataset(
        path=path,
        format="parquet",
        num_dense=len(columns.dense),
        feature_names=columns.features,
        names_are_positional=False,
        has_labels=columns.has_label,
        source=ParquetBlocks(groups=tuple(groups), columns=columns),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What the columns of a file are."""

    dense: tuple[str, ...]
    """Dense inputs, in the order in which they are fed."""
    features: tuple[str, ...]
    """Features, in the order of the file."""
    weighted: frozenset[str]
    """Features that have a column of weights."""
    has_label: bool
    """Whether there is a label."""
    ignored: tuple[str, ...]
    """Columns that are neither."""

    @property
    def read(self) -> list[str]:
        """All columns that are read."""
        weights = [f + WEIGHTS_SUFFIX for f in self.features if f in self.weighted]
        return [*self.dense, *self.features, *weights, *([LABEL] if self.has_label else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """One row group."""

    file: Path
    """The file."""
    index: int
    """Its index in the file."""
    first_row: int
    """Its first row in the file."""
    num_rows: int
    """Number of rows."""

    @property
    def place(self) -> RowPlace:
        """Where its rows are."""
        rows = slice(self.first_row, self.first_row + self.num_rows)
        return RowPlace(file=self.file, rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetBlocks:
    """A `BlockSource` of row groups."""

    groups: tuple[RowGroup, ...]
    """All row groups."""
    columns: Columns
    """What the columns are."""

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of every row group."""
        return tuple(group.num_rows for group in self.groups)

    @property
    def keeps_block_order(self) -> bool:
        """Row groups can be read in any order."""
        return False

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Read the row groups asked for, one at a time."""
        pyarrow = _import_pyarrow("pyarrow")
        opened: dict[Path, Any] = {}
        for block in blocks:
            group = self.groups[block]
            if group.file not in opened:
                opened = {group.file: _open_file(group.file)}
            try:
                table = opened[group.file].read_row_group(group.index, columns=self.columns.read)
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(group.file, error) from error
            yield partial(take_rows, self._batch(table, group.place))

    def _batch(self, table: Any, place: RowPlace) -> Batch:
        numbers = [_numbers(table.column(name)) for name in self.columns.dense]
        dense = np.stack(numbers, axis=1) if numbers else np.zeros((table.num_rows, 0))
        return Batch(
            dense=check_dense(dense, place, self.columns.dense),
            feature_names=self.columns.features,
            bags=tuple(self._bag(table, name, place) for name in self.columns.features),
            labels=check_labels(_numbers(table.column(LABEL)), place, LABEL)
            if self.columns.has_label
            else None,
        )

    def _bag(self, table: Any, name: str, place: RowPlace) -> Bag:
        ids, offsets = _read_bags(table.column(name), place, name)
        weights: Float32Array | None = None
        if name in self.columns.weighted:
            column = name + WEIGHTS_SUFFIX
            raw, weight_offsets = _read_bags(table.column(column), place, column)
            if (weight_offsets != offsets).any():
                row = int(np.flatnonzero(np.diff(weight_offsets) != np.diff(offsets))[0])
                raise refuse_value(
                    place,
                    column,
                    row,
                    f"{np.diff(weight_offsets)[row]} weights for {np.diff(offsets)[row]} ids",
                    expected="one weight per id",
                    hint="write as many weights as ids in every row",
                )
            weights = check_weights(raw, offsets, place, column)
        return Bag(values=check_ids(ids, offsets, place, name), offsets=offsets, weights=weights)


def _read_bags(column: Any, place: RowPlace, name: str) -> tuple[AnyArray, IntArray]:
    """Return values (nnz,) and offsets (B + 1,) of a scalar or list column."""
    compute = _import_pyarrow("pyarrow.compute")
    types = _import_pyarrow("pyarrow.types")
    array = column.combine_chunks()
    offsets = np.zeros(len(array) + 1, dtype=np.int64)
    if not _is_list(types, array.type):
        np.cumsum(array.is_valid().to_numpy(zero_copy_only=False), out=offsets[1:])
        return array.drop_null().to_numpy(zero_copy_only=False), offsets
    lengths = compute.list_value_length(array).fill_null(0)
    np.cumsum(lengths.to_numpy(zero_copy_only=False), out=offsets[1:])
    values = array.flatten()
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise refuse_value(
            place,
            name,
            int(np.searchsorted(offsets, at, side="right")) - 1,
            "a null inside a list",
            expected="lists without nulls",
            hint="leave missing ids out of the list",
        )
    return values.to_numpy(zero_copy_only=False), offsets


def _numbers(column: Any) -> AnyArray:
    """Return a scalar column as floats, shape (B,), nulls as NaN."""
    values: AnyArray = column.cast("float64").to_numpy()
    return values


def _sort_columns(file: Path, arrow: Any, schema: Schema | None) -> Columns:
    """Say what every column is, by name and type.

    Raises:
        DataError: A name appears twice, a dense column of the schema is missing or no number,
            there is no feature, or a label or weight is not a number.
    """
    types = _import_pyarrow("pyarrow.types")
    kinds = {name: arrow.field(i).type for i, name in enumerate(check_unique(arrow.names, file))}
    listed = (schema.dense_features or ()) if schema is not None else ()
    wrong = [name for name in listed if name not in kinds or not _is_number(types, kinds[name])]
    if wrong:
        raise DataError(
            f"{file}: dense columns of the schema are missing or not numeric: {', '.join(wrong)}",
            expected="every dense feature of schema.json as a column of numbers",
            hint="correct the schema.json beside the data",
        )
    features = [
        name
        for name, kind in kinds.items()
        if name not in listed
        and name != LABEL
        and (
            types.is_integer(kind) or (_is_list(types, kind) and types.is_integer(kind.value_type))
        )
    ]
    if not features:
        raise DataError(
            f"{file} does not hold a column of ids",
            expected="integer or list<integer> columns named as the model's features",
        )
    weights = {name + WEIGHTS_SUFFIX for name in features} & set(kinds)
    _check_types(file, kinds, weights)
    floats = [
        name
        for name, kind in kinds.items()
        if types.is_floating(kind) and name not in (*listed, LABEL, *weights)
    ]
    known = {*listed, *floats, *features, *weights, LABEL}
    return Columns(
        dense=(*listed, *floats),
        features=tuple(features),
        weighted=frozenset(name.removesuffix(WEIGHTS_SUFFIX) for name in weights),
        has_label=LABEL in kinds,
        ignored=tuple(name for name in kinds if name not in known),
    )


def _check_types(file: Path, kinds: Mapping[str, Any], weights: Collection[str]) -> None:
    """Refuse weights that are not floats, and a label that is not a number."""
    types = _import_pyarrow("pyarrow.types")
    wrong = [name for name in sorted(weights) if not _is_weights(types, kinds[name])]
    if wrong:
        raise DataError(
            f"{file}: columns of weights that do not hold floats: {', '.join(wrong)}",
            expected="float or list<float> columns",
        )
    if LABEL in kinds and not _is_number(types, kinds[LABEL]):
        raise DataError(
            f"{file}: column {LABEL!r} has type {kinds[LABEL]}",
            expected="0 or 1, as integer, float or bool",
        )


def _is_list(types: Any, kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_number(types: Any, kind: Any) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_weights(types: Any, kind: Any) -> bool:
    return bool(types.is_floating(kind.value_type if _is_list(types, kind) else kind))


def _row_groups(file: Path, metadata: Any) -> Iterator[RowGroup]:
    first_row = 0
    for index in range(metadata.num_row_groups):
        num_rows = metadata.row_group(index).num_rows
        yield RowGroup(file=file, index=index, first_row=first_row, num_rows=num_rows)
        first_row += num_rows


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.parquet"), key=lambda file: natural_key(file.name))


def _open_file(file: Path) -> Any:
    pyarrow = _import_pyarrow("pyarrow")
    try:
        return _import_pyarrow("pyarrow.parquet").ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from error


def _import_pyarrow(module: str) -> Any:
    """Import a module of pyarrow late: it is an optional dependency."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"parquet cannot be read: {error}",
            expected="the package pyarrow",
            hint="pip install '.[parquet]' in a clone of the repository, or pip install pyarrow",
        ) from error


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} cannot be read: {error}",
        expected="a whole parquet file",
        hint="copy or download the file again; compare its size with the original's",
    )
