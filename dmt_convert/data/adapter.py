"""From a data set's columns to a model's features: matching, and checks of every id.

Letters: B batch, D dense inputs, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.data.batch import Bag, Batch
from dmt_convert.data.column_names import count_columns
from dmt_convert.data.dataset import Dataset, RowBatches
from dmt_convert.errors import DataError
from dmt_convert.spec import ModelSpec, TableSpec

_log = logging.getLogger(__name__)

_MAX_NAMES: Final = 8
"""Names that a message lists before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMatch:
    """Which column of the data feeds which feature of the model."""

    columns: tuple[int, ...]
    """Index of the data's bag for every feature of the model, in the model's order."""
    by: Literal["name", "position"]
    """How they were matched."""
    dropped: tuple[str, ...]
    """Data columns that the model does not have."""
    constant_dense: bool
    """Whether the model's one dense input is fed 1.0 because the data has none."""


def match_features(dataset: Dataset, spec: ModelSpec) -> FeatureMatch:
    """Match the data's columns to the model's features.

    By name; if no name matches and one side's names only count columns (`f0`, `f1`, ...), by
    position. If both sides' names do, `f7` is the eighth column, wherever it stands in the model.
    How they were matched is logged, unless the columns are the features as they stand.

    Raises:
        DataError: Features are missing, or the number of dense inputs differs.
    """
    constant_dense = _match_dense(dataset, spec)
    index = {name: i for i, name in enumerate(dataset.feature_names)}
    missing = [name for name in spec.feature_names if name not in index]
    if not missing:
        used = set(spec.feature_names)
        dropped = tuple(name for name in dataset.feature_names if name not in used)
        if dropped:
            _log.info("%s: columns dropped: %s", dataset.path, _list_names(dropped))
        return FeatureMatch(
            columns=tuple(index[name] for name in spec.feature_names),
            by="name",
            dropped=dropped,
            constant_dense=constant_dense,
        )
    counted = count_columns(spec.feature_names)
    in_order = tuple(range(len(spec.features)))
    if dataset.names_are_positional:
        counted = counted or in_order
    elif counted != in_order:
        counted = None  # names that mean something are not put in another order
    if len(missing) == len(spec.features) == len(index) and counted is not None:
        _log.info(
            "%s: no name matches, columns are matched by position: %s is fed to %s, and so on",
            dataset.path,
            dataset.feature_names[counted[0]],
            spec.feature_names[0],
        )
        return FeatureMatch(
            columns=counted,
            by="position",
            dropped=(),
            constant_dense=constant_dense,
        )
    raise _missing_features(dataset, spec, missing)


def adapt_batches(dataset: Dataset, spec: ModelSpec, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Turn batches of a data set into batches of the model's features, in its order.

    Args:
        dataset: The data set that the batches come from.
        spec: The model.
        batches: What `dataset.batches` gives.

    Returns:
        Batches whose ids all lie inside the tables.

    Raises:
        DataError: The data do not fit the model (at once), or an id is out of its table's range
            (as the batch comes).
    """
    match = match_features(dataset, spec)
    return _adapt(dataset, spec, match, batches)


def _adapt(
    dataset: Dataset, spec: ModelSpec, match: FeatureMatch, batches: Iterable[Batch]
) -> Iterator[Batch]:
    by_name = {table.name: table for table in spec.tables}
    tables = [by_name[feature.table] for feature in spec.features]
    seen = 0
    is_hash_logged = False
    for batch in batches:
        bags = []
        for name, table, column in zip(spec.feature_names, tables, match.columns, strict=True):
            bag = batch.bags[column]
            # Read as unsigned, a negative id is a very large one: one comparison for both ends.
            if len(bag.values) and int(bag.values.view(np.uint64).max()) >= table.rows:
                if not dataset.hash_ids:
                    raise _bad_id(dataset, batches, seen, name, table, bag)
                if not is_hash_logged:
                    is_hash_logged = True
                    _log.info("%s: ids are taken modulo the tables' rows", dataset.path)
                bag = Bag(values=bag.values % table.rows, offsets=bag.offsets, weights=bag.weights)
            bags.append(bag)
        dense: Float32Array = batch.dense
        if match.constant_dense:
            dense = np.ones((batch.num_rows, 1), dtype=np.float32)
        yield Batch(
            dense=dense,
            feature_names=spec.feature_names,
            bags=tuple(bags),
            labels=batch.labels,
            logits=batch.logits,
        )
        seen += batch.num_rows


def _match_dense(dataset: Dataset, spec: ModelSpec) -> bool:
    """Check the dense width; tell whether to feed the constant 1.0."""
    if dataset.num_dense == 0 and spec.num_dense == 1:
        _log.info("%s has no dense inputs: the model's one is fed 1.0", dataset.path)
        return True
    if dataset.num_dense != spec.num_dense:
        raise DataError(
            f"{dataset.path} has {dataset.num_dense} dense inputs, the model takes "
            f"{spec.num_dense}",
            expected=f"{spec.num_dense} dense columns",
            hint="give the data that the model was trained on; `dmt inspect` shows the model",
        )
    return False


def _bad_id(
    dataset: Dataset, batches: Iterable[Batch], seen: int, name: str, table: TableSpec, bag: Bag
) -> DataError:
    at = int(np.flatnonzero((bag.values < 0) | (bag.values >= table.rows))[0])
    index = int(np.searchsorted(bag.offsets, at, side="right")) - 1
    if isinstance(batches, RowBatches):
        row = f"row {int(batches.rows[index])} (from 0)"
    else:
        row = f"row {seen + index} of those read (from 0)"
    return DataError(
        f"{dataset.path}: feature {name!r}, {row}: id {int(bag.values[at])}, but table "
        f"{table.name!r} has {table.rows} rows",
        expected=f"ids in [0, {table.rows})",
        hint="give the data that the model was trained on, with ids mapped as for training",
    )


def _missing_features(dataset: Dataset, spec: ModelSpec, missing: list[str]) -> DataError:
    return DataError(
        f"{dataset.path} lacks {len(missing)} of the model's {len(spec.features)} features",
        expected="every feature of the model as a column, by name; or, if the names on one "
        "side only count columns (f0, f1, ...), as many columns as features",
        hint="rename the columns, or name the features with --model-config",
        details=[
            f"missing: {_list_names(missing)}",
            f"the data have {len(dataset.feature_names)}: {_list_names(dataset.feature_names)}",
        ],
    )


def _list_names(names: tuple[str, ...] | list[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
