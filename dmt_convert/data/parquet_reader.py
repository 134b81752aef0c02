"""Reader of parquet: columns named as features, one row group at a time.

Integer columns hold one id per row (null: an empty bag), list columns of integers several.
`<feature>__weights` holds one weight per id, `label` the label. Float columns may be dense inputs:
which of them are, and in which order, is settled by a `schema.json` beside the files, by names that
count, or by what a bundle was fed before (`mapping`). Other columns are left aside.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.arrays import AnyArray, Float32Array, IntArray
from dmt_convert.data.batch import Bag, Batch, take_rows
from dmt_convert.data.column_names import LABEL, SCHEMA_NAME, Schema, check_unique, read_schema
from dmt_convert.data.dataset import Dataset, TakeRows
from dmt_convert.data.dense_transforms import states_form, stored_form
from dmt_convert.data.parquet_files import parquet_files
from dmt_convert.data.value_checks import (
    RowPlace,
    check_dense,
    check_ids,
    check_labels,
    check_weights,
    refuse_value,
)
from dmt_convert.errors import DataError

WEIGHTS_SUFFIX: Final = "__weights"


def read_parquet(path: Path) -> Dataset:
    """Open one file, or a directory of them in natural order of their names, reading footers only.

    Raises:
        DataError: pyarrow is missing, files are damaged, differ, or hold no features.
    """
    files = parquet_files(path)
    schema = read_schema(path if path.is_dir() else path.parent)
    columns: Columns | None = None
    groups: list[RowGroup] = []
    for file in files:  # one at a time: there may be more files than a process may open
        with _open_file(file) as parquet:
            own = _sort_columns(file, parquet.schema_arrow, schema)
            groups += _row_groups(file, parquet.metadata)
        columns = own if columns is None else columns
        _check_same(files[0], columns, file, own)
    assert columns is not None
    dense_listed = schema is not None and schema.dense_features is not None
    features_listed = schema is not None and schema.sparse_features is not None
    return Dataset(
        path=path,
        format="parquet",
        num_dense=len(columns.dense),
        feature_names=columns.features,
        names_are_positional=False,
        has_labels=columns.has_label,
        feature_order="listed" if features_listed else "file",
        dense_names=columns.dense,
        dense_order="listed" if dense_listed else "file",
        dense_form=stored_form(schema),
        form_is_stated=states_form(schema),
        column_types=columns.types,
        source=ParquetBlocks(groups=tuple(groups), columns=columns),
        notes=(f"columns left aside: {', '.join(columns.ignored)}",) if columns.ignored else (),
    )


def _check_same(first: Path, columns: Columns, file: Path, own: Columns) -> None:
    """Refuse a file whose columns are not those of the first, naming them."""
    there, here = columns.roles, own.roles
    differing = [
        f"{name}: {columns.types.get(name, 'missing')} in {first.name}, "
        f"{own.types.get(name, 'missing')} in {file.name}"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise DataError(
            f"{file} and {first.name} hold different columns: {differing[0]}"
            + (f" and {len(differing) - 1} more" if len(differing) > 1 else ""),
            expected="the same names and kinds of columns in all files, in any order",
            hint="write the files again with one schema, or give them one by one",
            details=differing[1:20],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What the columns of a file are."""

    dense: tuple[str, ...]
    """Columns that are dense inputs, or may be."""
    features: tuple[str, ...]
    """Features, in the order of the file or of the schema."""
    weighted: frozenset[str]
    """Features that have a column of weights."""
    has_label: bool
    """Whether there is a label."""
    ignored: tuple[str, ...]
    """Columns that are neither."""
    types: Mapping[str, str]
    """Name -> type of every column of the file."""

    @property
    def roles(self) -> dict[str, str]:
        """Column that is read -> what it is."""
        roles = dict.fromkeys(self.features, "feature") | dict.fromkeys(self.dense, "dense")
        roles |= {name + WEIGHTS_SUFFIX: "weights" for name in self.weighted}
        return roles | ({LABEL: "label"} if self.has_label else {})

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

    def narrow(self, features: Sequence[str], dense: Sequence[str]) -> ParquetBlocks:
        """Return the same rows with some of the columns, in the order asked for."""
        columns = replace(
            self.columns,
            features=tuple(features),
            dense=tuple(dense),
            weighted=self.columns.weighted & {*features},
        )
        return replace(self, columns=columns)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold the rows."""
        return tuple(group.file for group in self.groups)

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
        opened: dict[Path, Any] = {}
        try:
            for block in blocks:
                group = self.groups[block]
                if group.file not in opened:
                    _close(opened)
                    opened = {group.file: _open_file(group.file)}
                table = _read_group(opened[group.file], group, self.columns.read)
                yield partial(take_rows, self._batch(table, group.place))
        finally:
            _close(opened)

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
    """Return a scalar column as floats, shape (B,), nulls as NaN; large integers are rounded."""
    values: AnyArray = column.cast("float64", safe=False).to_numpy()
    return values


def _sort_columns(file: Path, arrow: Any, schema: Schema | None) -> Columns:
    """Say what every column is, by name and type.

    Raises:
        DataError: A name appears twice, a column of the schema is missing or of the wrong type,
            there is no feature, or a label or weight is not a number.
    """
    types = _import_pyarrow("pyarrow.types")
    kinds = {name: arrow.field(i).type for i, name in enumerate(check_unique(arrow.names, file))}
    dense = schema.dense_features if schema is not None else None
    sparse = schema.sparse_features if schema is not None else None
    _check_listed(file, kinds, dense or (), sparse or ())
    features = sparse or tuple(
        name
        for name, kind in kinds.items()
        if name not in (*(dense or ()), LABEL) and _is_ids(types, kind)
    )
    if not features:
        held = ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:20])
        raise DataError(
            f"{file} does not hold a column of ids; it holds {held or 'no columns'}",
            expected="integer or list<integer> columns named as the model's features",
            hint="map values to row numbers first, as for training (docs/data.md shows how)",
        )
    weights = {name + WEIGHTS_SUFFIX for name in features} & set(kinds)
    _check_types(file, kinds, weights)
    if dense is None:
        dense = tuple(
            name
            for name, kind in kinds.items()
            if types.is_floating(kind) and name not in (*features, LABEL, *weights)
        )
    known = {*dense, *features, *weights, LABEL}
    return Columns(
        dense=dense,
        features=features,
        weighted=frozenset(name.removesuffix(WEIGHTS_SUFFIX) for name in weights),
        has_label=LABEL in kinds,
        ignored=tuple(name for name in kinds if name not in known),
        types={name: str(kind) for name, kind in kinds.items()},
    )


def _check_listed(
    file: Path, kinds: Mapping[str, Any], dense: Sequence[str], sparse: Sequence[str]
) -> None:
    """Refuse columns of the schema that are missing or of the wrong type."""
    types = _import_pyarrow("pyarrow.types")
    wrong = [
        f"{noun} {name} ({kinds.get(name, 'missing')})"
        for noun, names, is_right in (("dense", dense, _is_number), ("feature", sparse, _is_ids))
        for name in names
        if name not in kinds or not is_right(types, kinds[name])
    ]
    if wrong:
        raise DataError(
            f"{file}: columns of {SCHEMA_NAME} are missing or of another type: {', '.join(wrong)}",
            expected="every dense feature as a column of numbers, every other as a column of ids",
            hint=f"correct the {SCHEMA_NAME} beside the data",
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


def _is_ids(types: Any, kind: Any) -> bool:
    return bool(types.is_integer(kind.value_type if _is_list(types, kind) else kind))


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


def _open_file(file: Path) -> Any:
    pyarrow = _import_pyarrow("pyarrow")
    try:
        return _import_pyarrow("pyarrow.parquet").ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from error


def _close(opened: Mapping[Path, Any]) -> None:
    for file in opened.values():
        file.close()


def _read_group(opened: Any, group: RowGroup, columns: list[str]) -> Any:
    pyarrow = _import_pyarrow("pyarrow")
    try:
        table = opened.read_row_group(group.index, columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(group.file, error) from error
    if table.num_rows != group.num_rows:
        raise _damaged(group.file, ValueError("it changed while it was read"))
    return table


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
