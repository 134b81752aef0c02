"""From a data set's columns to a model's inputs: the rows as the model takes them.

Letters: B batch, D dense inputs, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dmt_convert.data.batch import Bag, Batch, Rows
from dmt_convert.data.dataset import BlockSource, Dataset, RowBatches, TakeRows
from dmt_convert.data.mapping import InputMap, list_names, map_inputs
from dmt_convert.data.readers import open_data
from dmt_convert.documents import InputRecord
from dmt_convert.errors import DataError
from dmt_convert.spec import ModelSpec, TableSpec

_log = logging.getLogger(__name__)


def open_inputs(
    path: str | Path,
    spec: ModelSpec,
    recorded: InputRecord | None = None,
    *,
    said: Collection[str] = (),
) -> Dataset:
    """Open a data set as the inputs of a model; see `open_data` and `match_inputs`."""
    return match_inputs(open_data(path), spec, recorded, said=said)


def match_inputs(
    dataset: Dataset,
    spec: ModelSpec,
    recorded: InputRecord | None = None,
    *,
    said: Collection[str] = (),
) -> Dataset:
    """Match a data set's columns to a model's inputs, and log how.

    Args:
        dataset: What a reader opened.
        spec: The flat model.
        recorded: What is known of the columns that fed the model so far. Other columns are refused.
        said: Notes that are not logged again.

    Returns:
        The same rows with the model's features and dense inputs, in its order. Its `inputs` say
        where they come from.

    Raises:
        DataError: Columns are missing or ambiguous, or are not those of the record. All faults are
            listed.
    """
    found, notes = _map_and_log(dataset, spec, recorded, said)
    return replace(apply_map(dataset, spec, found), notes=notes)


def _map_and_log(
    dataset: Dataset, spec: ModelSpec, recorded: InputRecord | None, said: Collection[str] = ()
) -> tuple[InputMap, tuple[str, ...]]:
    """Match columns, and log how; returns all notes, those that were said before as well."""
    found, faults = map_inputs(dataset, spec, recorded)
    if found is None:
        raise join_faults(dataset.path, faults)
    notes = (*dataset.notes, *found.notes)
    if found.unused:
        notes += (f"columns that feed nothing: {list_names(found.unused)}",)
    for note in notes:
        if note not in said:
            _log.info("%s: %s", dataset.path, note)
    return found, notes


def join_faults(path: Path, faults: Sequence[DataError]) -> DataError:
    """Return one error that says all that is wrong with a data set."""
    if len(faults) == 1:
        return faults[0]
    details: list[str] = []
    for fault in faults:
        details += [fault.found, *(f"  {line}" for line in fault.details)]
        details += [f"  expected: {fault.expected}", *([f"  try: {fault.hint}"] * bool(fault.hint))]
    return DataError(
        f"{path} does not fit the model: {len(faults)} faults",
        expected="columns for every input of the model",
        hint="mend them one by one; docs/data.md has the rules",
        details=details,
    )


def apply_map(dataset: Dataset, spec: ModelSpec, found: InputMap) -> Dataset:
    """Return a data set whose batches have a model's features and dense inputs, in its order."""
    source, features, dense = dataset.source, found.features, found.dense
    dense_names = tuple(dataset.dense_names[i] for i in dense)
    narrow = getattr(source, "narrow", None)
    if narrow is not None:  # columns that feed nothing are not read
        source = narrow([dataset.feature_names[i] for i in features], dense_names)
        features, dense = tuple(range(len(features))), tuple(range(len(dense)))
    found = replace(found, features=features, dense=dense)
    return replace(
        dataset,
        num_dense=spec.num_dense,
        dense_names=dense_names,
        feature_names=spec.feature_names,
        hash_ids=bool(found.record.hashed),
        source=_MappedSource(inner=source, names=spec.feature_names, map=found),
        inputs=found.record,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MappedSource:
    """The blocks of another source, with a model's inputs."""

    inner: BlockSource
    names: tuple[str, ...]
    map: InputMap

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """As the source."""
        return self.inner.block_sizes

    @property
    def keeps_block_order(self) -> bool:
        """As the source."""
        return self.inner.keeps_block_order

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Read blocks in the order asked for, one at a time."""
        for take in self.inner.read_blocks(blocks):
            yield partial(self._take, take)

    def _take(self, take: TakeRows, rows: Rows) -> Batch:
        return _map_batch(take(rows), self.names, self.map)


def _map_batch(batch: Batch, names: tuple[str, ...], found: InputMap) -> Batch:
    dense = batch.dense
    if found.constant:
        dense = np.ones((batch.num_rows, 1), dtype=np.float32)
    elif found.dense != tuple(range(dense.shape[1])):
        dense = np.ascontiguousarray(dense[:, found.dense])
    return replace(
        batch,
        dense=dense,
        feature_names=names,
        bags=tuple(batch.bags[i] for i in found.features),
    )


def adapt_batches(dataset: Dataset, spec: ModelSpec, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Turn batches of a data set into batches of the model's inputs, and check every id.

    Args:
        dataset: The data set that the batches come from, matched to the model or not.
        spec: The model.
        batches: What `dataset.batches` gives.

    Returns:
        Batches whose ids all lie inside the tables.

    Raises:
        DataError: The data do not fit the model (at once), or an id is out of its table's range
            (as the batch comes).
    """
    if dataset.inputs is not None:
        return _check_ids(dataset, spec, batches, batches)
    found, _ = _map_and_log(dataset, spec, None)
    dataset = replace(dataset, inputs=found.record)
    mapped = (_map_batch(batch, spec.feature_names, found) for batch in batches)
    return _check_ids(dataset, spec, mapped, batches)


def _check_ids(
    dataset: Dataset, spec: ModelSpec, batches: Iterable[Batch], numbered: Iterable[Batch]
) -> Iterator[Batch]:
    """Let no id past its table; `numbered` knows which rows the batches hold."""
    tables = list(spec.tables_by_feature.values())
    seen = 0
    for batch in batches:
        bags = []
        for feature, table, given in zip(spec.features, tables, batch.bags, strict=True):
            name, bag = feature.name, given
            feature.check_bags(bag.values, bag.offsets)
            # Read as unsigned, a negative id is a very large one: one comparison for both ends.
            if len(bag.values) and int(bag.values.view(np.uint64).max()) >= table.rows:
                if not dataset.hash_ids:
                    raise _bad_id(dataset, numbered, seen, name, table, bag)
                bag = replace(bag, values=bag.values % table.rows)
            bags.append(bag)
        yield replace(batch, bags=tuple(bags))
        seen += batch.num_rows


def _bad_id(
    dataset: Dataset, batches: Iterable[Batch], seen: int, name: str, table: TableSpec, bag: Bag
) -> DataError:
    at = int(np.flatnonzero((bag.values < 0) | (bag.values >= table.rows))[0])
    index = int(np.searchsorted(bag.offsets, at, side="right")) - 1
    if isinstance(batches, RowBatches):
        row = f"row {int(batches.rows[index])} (from 0)"
    else:
        row = f"row {seen + index} of those read (from 0)"
    column = name if dataset.inputs is None else dataset.inputs.features.get(name, name)
    fed = "" if column == name else f" (column {column!r})"
    return DataError(
        f"{dataset.path}: feature {name!r}{fed}, {row}: id {int(bag.values[at])}, but table "
        f"{table.name!r} has {table.rows} rows",
        expected=f"ids in [0, {table.rows})",
        hint="give the data that the model was trained on, with ids mapped as for training",
    )
