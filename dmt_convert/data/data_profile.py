"""What a data set would feed a model, column by column: ranges, empty bags, faults.

Rows are streamed; memory is bounded by a batch and by the values that quantiles are taken of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.data.adapter import apply_map
from dmt_convert.data.batch import Bag, Batch
from dmt_convert.data.column_names import LABEL
from dmt_convert.data.dataset import Dataset
from dmt_convert.data.mapping import map_inputs
from dmt_convert.data.readers import open_data
from dmt_convert.data.value_checks import ValueFaults, collect_faults
from dmt_convert.documents import InputRecord
from dmt_convert.errors import DataError
from dmt_convert.progress import Progress, no_progress
from dmt_convert.spec import ModelSpec, TableSpec

_BATCH_ROWS: Final = 8192
_KEPT_VALUES: Final = 1 << 21
"""Dense values that quantiles are taken of, over all columns."""
QUANTILES: Final = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureProfile:
    """A column of ids. None stands for what no row shows."""

    column: str
    """The column."""
    feeds: str
    """The feature that it feeds."""
    type: str
    """Type of the column, if it has one of its own."""
    table: str
    """Table of the feature."""
    table_rows: int
    """Its rows."""
    min: int | None
    """Least id."""
    max: int | None
    """Largest id."""
    empty_share: float
    """Share of rows without an id."""
    ids_per_row: float
    """Mean number of ids of a row."""
    out_of_range: int
    """Ids outside the table; those taken modulo its rows are not counted."""
    first_out_of_range: int | None
    """First row with one, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseProfile:
    """A column of dense inputs, in the form in which they are fed."""

    column: str
    """The column."""
    feeds: str
    """The dense input that it feeds, counted from 0."""
    type: str
    """Type of the column, if it has one of its own."""
    min: float
    """Least value."""
    max: float
    """Largest value."""
    mean: float
    """Mean."""
    quantiles: tuple[float, ...]
    """At 1, 25, 50, 75 and 99 %; of evenly spaced rows if there are many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What a data set would feed a model."""

    path: Path
    """The data set."""
    format: str
    """Its format; empty if it could not be opened."""
    rows: int
    """Its rows."""
    checked_rows: int
    """Rows that were read."""
    inputs: InputRecord | None
    """Which columns feed the model; None if that is not settled."""
    features: tuple[FeatureProfile, ...]
    """The model's features, in its order; empty if columns do not fit."""
    dense: tuple[DenseProfile, ...]
    """The model's dense inputs, in their order; empty if there are none."""
    positive_share: float | None
    """Share of rows with label 1; None without labels."""
    unused: Mapping[str, str]
    """Column that feeds nothing -> its type."""
    notes: tuple[str, ...]
    """What a user should know, one line each."""
    faults: tuple[DataError, ...]
    """All that is in the way of using the data."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<DataReport of {self.path}: {self.checked_rows:,} rows, {len(self.faults)} faults>"

    @property
    def usable(self) -> bool:
        """Whether the model can be fed these data."""
        return not self.faults


def profile_data(
    path: Path,
    spec: ModelSpec,
    recorded: InputRecord | None = None,
    *,
    max_rows: int | None = None,
    progress: Progress = no_progress,
) -> DataReport:
    """Read a data set as a model would, and report on every column.

    Args:
        path: The data set.
        spec: The flat model.
        recorded: What is known of the columns that fed the model so far.
        max_rows: Read at most this many rows.
        progress: Told of the rows that are read.
    """
    try:
        dataset = open_data(path)
    except DataError as error:
        return _report(path, None, faults=[error])
    found, faults = map_inputs(dataset, spec, recorded)
    if found is None:
        return _report(path, dataset, unused=_all_columns(dataset), faults=faults)
    mapped = apply_map(dataset, spec, found)
    total = mapped.num_rows if max_rows is None else min(max_rows, mapped.num_rows)
    counts = _Counts(spec, mapped)
    with collect_faults() as values:
        try:
            for batch in mapped.batches(_BATCH_ROWS, max_rows=max_rows):
                counts.add(batch)
                progress("checking rows", counts.rows, total)
        except DataError as error:
            faults.append(error)
    used = {*found.record.features.values(), *mapped.dense_names, LABEL}
    others = {n: kind for n, kind in _all_columns(dataset).items() if n not in used}
    return _report(
        path,
        mapped,
        counts=counts,
        unused=others,
        notes=[*found.notes, *counts.notes()],
        faults=[*faults, *_value_faults(values), *counts.faults()],
    )


def _report(
    path: Path,
    dataset: Dataset | None,
    *,
    counts: _Counts | None = None,
    unused: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
    faults: Iterable[DataError] = (),
) -> DataReport:
    return DataReport(
        path=path,
        format="" if dataset is None else dataset.format,
        rows=0 if dataset is None else dataset.num_rows,
        checked_rows=0 if counts is None else counts.rows,
        inputs=None if dataset is None else dataset.inputs,
        features=() if counts is None else counts.features(),
        dense=() if counts is None else counts.dense(),
        positive_share=None if counts is None else counts.positive_share,
        unused=unused or {},
        notes=tuple(notes),
        faults=tuple(faults),
    )


def _all_columns(dataset: Dataset) -> dict[str, str]:
    known = dict(dataset.column_types)
    return known or {
        **dict.fromkeys(dataset.dense_names, "dense input"),
        **dict.fromkeys(dataset.feature_names, "ids"),
    }


def _value_faults(values: ValueFaults) -> Iterable[DataError]:
    for column, error in values.first.items():
        count = values.counts[column]
        more = f"; {count} rows of column {column!r} are like it" if count > 1 else ""
        yield DataError(error.found + more, expected=error.expected, hint=error.hint)


@dataclass(slots=True)
class _FeatureCounts:
    """What is counted of one feature."""

    table: TableSpec
    max_ids: int | None
    padding_id: int | None = None
    padded: int = 0
    low: int | None = None
    high: int | None = None
    ids: int = 0
    empty: int = 0
    outside: int = 0
    first: int | None = None
    example: int = 0
    longest: int = 0

    def add(self, bag: Bag, first_row: int, *, hashed: bool) -> None:
        self.ids += len(bag.values)
        lengths = np.diff(bag.offsets)
        self.empty += int((lengths == 0).sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        if not len(bag.values):
            return
        if self.padding_id is not None:
            self.padded += int((bag.values == self.padding_id).sum())
        low, high = int(bag.values.min()), int(bag.values.max())
        self.low = low if self.low is None else min(low, self.low)
        self.high = high if self.high is None else max(high, self.high)
        if hashed or (low >= 0 and high < self.table.rows):
            return
        outside = np.flatnonzero((bag.values < 0) | (bag.values >= self.table.rows))
        self.outside += len(outside)
        if self.first is None:
            at = int(outside[0])
            self.first = first_row + int(np.searchsorted(bag.offsets, at, side="right")) - 1
            self.example = int(bag.values[at])


@dataclass(slots=True)
class _Thinned:
    """Evenly spaced rows of dense inputs: of every `step`-th row, twice as far apart when full."""

    most: int
    step: int = 1
    seen: int = 0
    rows: list[Float32Array] = field(default_factory=list)

    def add(self, dense: Float32Array) -> None:
        self.rows.append(dense[-self.seen % self.step :: self.step].copy())
        self.seen += len(dense)
        while sum(map(len, self.rows)) > self.most:
            self.rows = [np.concatenate(self.rows)[::2].copy()]
            self.step *= 2

    def quantiles(self) -> Any:
        """Return the quantiles of every column's finite values, shape (5, D)."""
        kept = np.concatenate(self.rows).astype(np.float64)
        kept[~np.isfinite(kept)] = np.nan
        good = np.where(np.isnan(kept).all(axis=0), 0.0, kept)
        return np.nanquantile(good, QUANTILES, axis=0)


class _Counts:
    """What is counted while rows stream by."""

    def __init__(self, spec: ModelSpec, dataset: Dataset) -> None:
        assert dataset.inputs is not None
        self.rows = 0
        self._dataset, self._inputs = dataset, dataset.inputs
        tables = spec.tables_by_feature
        self._features = {
            f.name: _FeatureCounts(tables[f.name], f.max_ids, f.padding_id) for f in spec.features
        }
        width = 0 if self._inputs.dense == () else spec.num_dense
        self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
        self._sum, self._finite = np.zeros(width), np.zeros(width, dtype=np.int64)
        self._kept = _Thinned(most=max(256, _KEPT_VALUES // max(width, 1)))
        self._labels = self._positive = 0

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        for name, bag in zip(batch.feature_names, batch.bags, strict=True):
            self._features[name].add(bag, self.rows, hashed=self._dataset.hash_ids)
        if len(self._sum):
            dense = batch.dense.astype(np.float64)
            finite = np.isfinite(dense)
            self._low = np.minimum(self._low, np.where(finite, dense, np.inf).min(axis=0))
            self._high = np.maximum(self._high, np.where(finite, dense, -np.inf).max(axis=0))
            self._sum += np.where(finite, dense, 0).sum(axis=0)
            self._finite += finite.sum(axis=0)
            self._kept.add(batch.dense)
        if batch.labels is not None:
            self._labels += int(np.isfinite(batch.labels).sum())
            self._positive += int((batch.labels == 1).sum())
        self.rows += batch.num_rows

    @property
    def positive_share(self) -> float | None:
        """Share of rows with label 1."""
        return self._positive / self._labels if self._labels else None

    def features(self) -> tuple[FeatureProfile, ...]:
        """Describe the columns of ids."""
        rows = max(self.rows, 1)
        return tuple(
            FeatureProfile(
                column=self._inputs.features[name],
                feeds=name,
                type=self._type(self._inputs.features[name]),
                table=found.table.name,
                table_rows=found.table.rows,
                min=found.low,
                max=found.high,
                empty_share=found.empty / rows,
                ids_per_row=found.ids / rows,
                out_of_range=found.outside,
                first_out_of_range=found.first,
            )
            for name, found in self._features.items()
        )

    def dense(self) -> tuple[DenseProfile, ...]:
        """Describe the columns of dense inputs."""
        if not self.rows or not len(self._sum):
            return ()
        quantiles = self._kept.quantiles()
        names = self._dataset.dense_names
        return tuple(
            DenseProfile(
                column=name,
                feeds=str(i),
                type=self._type(name),
                min=float(self._low[i]),
                max=float(self._high[i]),
                mean=float(self._sum[i] / max(self._finite[i], 1)),
                quantiles=tuple(quantiles[:, i].tolist()),
            )
            for i, name in enumerate(names)
        )

    def notes(self) -> Iterable[str]:
        """Say what is odd, although the data can be used."""
        names = [n for n, found in self._features.items() if self.rows and not found.ids]
        if names:
            yield f"features without a single id: {', '.join(names)}"
        if self.rows > 1:
            same = [n for n, f in self._features.items() if f.ids > 1 and f.low == f.high]
            same += [p.column for p in self.dense() if p.min == p.max]
            if same:
                yield f"columns that hold one value only: {', '.join(same)}"
        if self.positive_share in (0.0, 1.0):
            yield f"all labels are {self.positive_share:g}: AUC and NE do not exist"

    def faults(self) -> Iterable[DataError]:
        """Name the features whose ids lie outside their tables, or whose bags are too long."""
        for name, found in self._features.items():
            if found.max_ids is not None and found.longest > found.max_ids:
                yield DataError(
                    f"{self._dataset.path}: feature {name!r} has bags of up to {found.longest} ids",
                    expected=f"at most {found.max_ids}: longer ones cannot be converted exactly",
                    hint="give one id per row",
                )
            if found.padded:
                yield DataError(
                    f"{self._dataset.path}: feature {name!r} holds the id {found.padding_id} "
                    f"{found.padded} times",
                    expected="bags without it: it is the original model's padding",
                    hint="leave it out of the data; a row without ids has an empty bag",
                )
            if found.outside:
                column = self._inputs.features[name]
                fed = "" if column == name else f" (column {column!r})"
                yield DataError(
                    f"{self._dataset.path}: feature {name!r}{fed}: {found.outside} ids outside "
                    f"table {found.table.name!r} of {found.table.rows} rows, the first in row "
                    f"{found.first} (from 0): id {found.example}",
                    expected=f"ids in [0, {found.table.rows})",
                    hint="map ids to the rows of the table, as for training",
                )

    def _type(self, column: str) -> str:
        return self._dataset.column_types.get(column, "")
