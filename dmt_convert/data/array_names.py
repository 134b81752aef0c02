"""Data sets of arrays: what their columns are called, and in what form dense inputs are fed."""

from __future__ import annotations

from pathlib import Path

from dmt_convert.data.column_names import Schema, check_unique, read_schema
from dmt_convert.data.dataset import Dataset
from dmt_convert.data.dense_transforms import (
    TRANSFORMS,
    choose_transform,
    states_form,
    stored_form,
)
from dmt_convert.data.stored_arrays import ArrayBlocks, ArrayPart
from dmt_convert.errors import DataError


def open_arrays(
    path: Path,
    format: str,  # noqa: A002 (the field's name)
    parts: tuple[ArrayPart, ...],
    *,
    feature_name: str = "f{}",
    dense_name: str = "dense[{}]",
    transform: str | None = None,
    hash_ids: bool = False,
) -> Dataset:
    """Make a data set of arrays, with the names of a `schema.json` beside them.

    Args:
        path: What was opened.
        format: Name of the format.
        parts: The arrays; all parts have the same columns.
        feature_name: Name of column {} of the ids, if the schema gives none.
        dense_name: Name of column {} of the dense inputs, if the schema gives none.
        transform: What is computed from raw dense inputs, unless the schema says otherwise. None:
            they are fed as stored.
        hash_ids: Whether ids are taken modulo the table's rows; some may be negative then.

    Raises:
        DataError: The schema is damaged, or names more or fewer columns.
    """
    schema = read_schema(path if path.is_dir() else path.parent)
    names = name_columns(path, schema, parts[0].num_features, parts[0].num_dense)
    form = stored_form(schema) if transform is None else choose_transform(schema, transform)
    features = names.sparse_features
    dense = names.dense_features
    source = ArrayBlocks(
        parts=parts,
        feature_names=features or made_up(feature_name, parts[0].num_features),
        dense_names=dense or made_up(dense_name, parts[0].num_dense),
        transform=None if transform is None else TRANSFORMS[form],
        allow_negative=hash_ids,
    )
    return Dataset(
        path=path,
        format=format,
        num_dense=parts[0].num_dense,
        feature_names=source.feature_names,
        names_are_positional=features is None,
        has_labels=parts[0].labels is not None,
        hash_ids=hash_ids,
        feature_order="array" if features is None and not hash_ids else "listed",
        dense_names=source.dense_names,
        dense_order="array" if dense is None else "listed",
        dense_form=form,
        form_is_stated=states_form(schema),
        source=source,
    )


def made_up(pattern: str, count: int) -> tuple[str, ...]:
    """Return names that count columns."""
    return tuple(pattern.format(i) for i in range(count))


def name_columns(path: Path, schema: Schema | None, num_features: int, num_dense: int) -> Schema:
    """Return the names that a schema gives to the columns of arrays; None where it gives none.

    Raises:
        DataError: It names more or fewer columns than there are.
    """
    if schema is None:
        return Schema(file=path)
    details = [
        f"{noun}: {found} in {path.name}, {len(names)} in {schema.file.name}"
        for noun, found, names in (
            ("dense columns", num_dense, schema.dense_features),
            ("features", num_features, schema.sparse_features),
        )
        if names is not None and len(names) != found
    ]
    if details:
        raise DataError(
            f"{path} and {schema.file} disagree",
            expected="as many names in the schema as columns in the data",
            hint="use the schema.json that was written with the data",
            details=details,
        )
    check_unique(schema.sparse_features or (), path)
    return schema
