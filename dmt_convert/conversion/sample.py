"""Inputs on which towers are fitted and measured: calibration rows, or rows drawn from tables.

Letters: n sampled rows, D dense inputs, F features, M widths' sum of all pooled embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from dmt_convert.arrays import Float32Array, IntArray
from dmt_convert.checkpoint import TensorInfo, find_outlier, gather_rows, outlier_error
from dmt_convert.conversion.drawn_inputs import draw_dense, draw_rows, estimate_scale
from dmt_convert.data import (
    Bag,
    Batch,
    adapt_batches,
    join_batches,
    open_inputs,
    take_rows,
    uniform_offsets,
)
from dmt_convert.documents import InputRecord
from dmt_convert.errors import CheckpointError, DataError
from dmt_convert.families import FlatModelInfo, read_initial_value
from dmt_convert.spec import FeatureSpec, ModelSpec

_POOLED_BYTES: Final = 64 << 20
_BLOCK_ROWS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """n rows of input with the embeddings that the flat model pools for them."""

    batch: Batch
    """The rows, bags in the model's feature order."""
    pooled: Float32Array
    """Pooled embeddings side by side in feature order, shape (n, M), float32."""
    source: Literal["calibration", "tables"]
    """Origin of the rows."""
    description: str
    """How they were drawn, in one line."""
    inputs: InputRecord | None = None
    """Which columns of the calibration data feed the model."""

    @property
    def ids_per_bag(self) -> dict[str, float]:
        """Mean ids per bag of every feature."""
        rows = max(1, self.batch.num_rows)
        bags = zip(self.batch.feature_names, self.batch.bags, strict=True)
        return {name: len(bag.values) / rows for name, bag in bags}

    def split(self, fraction: float) -> tuple[Sample, Sample]:
        """Split off the last `fraction` of the rows, as held-out rows."""
        cut = max(1, int(self.batch.num_rows * (1 - fraction)))
        return self._rows(0, cut), self._rows(cut, self.batch.num_rows)

    def first(self, rows: int) -> Sample:
        """Take the first rows, or all if there are fewer."""
        return self._rows(0, min(rows, self.batch.num_rows))

    def per_feature(self, spec: ModelSpec) -> list[Float32Array]:
        """Pooled embeddings of every feature, each (n, N_f)."""
        cuts = np.cumsum(spec.feature_dims)[:-1]
        return list(np.split(self.pooled, cuts, axis=1))

    def _rows(self, begin: int, end: int) -> Sample:
        batch = take_rows(self.batch, slice(begin, end))
        return replace(self, batch=batch, pooled=self.pooled[begin:end])


def sample_size(spec: ModelSpec) -> int:
    """Choose n so that the pooled embeddings take at most 64 MiB (1,024 to 16,384 rows)."""
    width = sum(spec.feature_dims)
    return int(np.clip(_POOLED_BYTES // (4 * width), 1024, 16_384))


def draw_sample(
    info: FlatModelInfo,
    *,
    calibration: Path | None = None,
    rows: int | None = None,
    seed: int = 0,
    accept_outliers: bool = False,
) -> Sample:
    """Draw input rows and pool the model's embeddings for them.

    With calibration data, the rows are a random choice of its rows. Without, every feature draws
    one id on its own. If the checkpoint holds optimizer state that tells, rows are drawn by how
    often they were trained, and dense inputs are as large as in training; otherwise rows are drawn
    uniformly, and dense inputs in the form in which click models are commonly fed.

    Args:
        info: The flat model.
        calibration: Data set to draw from.
        rows: n; by default `sample_size`.
        seed: Seed of the draw.
        accept_outliers: Take values that are absurd as weights.

    Raises:
        DataError: The calibration data does not fit the model.
        CheckpointError: A row that was drawn holds NaN or Inf, or an absurd value.
    """
    count = sample_size(info.spec) if rows is None else rows
    if calibration is not None:
        batch, inputs = _calibration_rows(info, calibration, count, seed)
        description = f"{batch.num_rows} random rows of {calibration.name}"
        pooled = pool_batch(info, batch, accept_outliers=accept_outliers)
        return Sample(
            batch=batch,
            pooled=pooled,
            source="calibration",
            description=description,
            inputs=inputs,
        )
    batch = _drawn_rows(info, count, seed)
    by = "by how often they were trained" if info.row_state else "uniformly"
    sized = "assumed" if estimate_scale(info) is None else "scaled as in training"
    return Sample(
        batch=batch,
        pooled=pool_batch(info, batch, accept_outliers=accept_outliers),
        source="tables",
        description=f"{count} sampled inputs, table rows drawn {by}, dense inputs {sized}",
    )


def further_rows(
    info: FlatModelInfo,
    calibration: Path,
    rows: int,
    *,
    seed: int = 0,
    accept_outliers: bool = False,
) -> Iterator[Sample]:
    """Read rows of calibration data that `draw_sample`, with the same seed, did not draw.

    Args:
        info: The flat checkpoint.
        calibration: Data set.
        rows: Read at most this number.
        seed: Seed of the draw.
        accept_outliers: Take values that are absurd as weights.

    Yields:
        Blocks of rows whose embeddings take no more than those of a sample.

    Raises:
        DataError: The data does not fit the model.
        CheckpointError: A row that is looked up holds NaN or Inf, or an absurd value.
    """
    drawn = sample_size(info.spec)
    dataset = open_inputs(calibration, info.spec, info.inputs)
    batches = dataset.batches(
        min(drawn, _BLOCK_ROWS), shuffle_seed=seed, start_row=drawn, max_rows=rows
    )
    for batch in adapt_batches(dataset, info.spec, batches):
        yield Sample(
            batch=batch,
            pooled=pool_batch(info, batch, accept_outliers=accept_outliers),
            source="calibration",
            description=f"{batch.num_rows} further rows of {calibration.name}",
        )


def _calibration_rows(
    info: FlatModelInfo, path: Path, count: int, seed: int
) -> tuple[Batch, InputRecord | None]:
    dataset = open_inputs(path, info.spec, info.inputs)
    batches = dataset.batches(min(count, _BLOCK_ROWS), shuffle_seed=seed, max_rows=count)
    found = list(adapt_batches(dataset, info.spec, batches))
    if not found:
        raise DataError(
            f"{path} holds no rows",
            expected="a few thousand rows for calibration",
            hint="name a data set with rows, or leave --calibration out",
        )
    return join_batches(found), dataset.inputs


def _drawn_rows(info: FlatModelInfo, count: int, seed: int) -> Batch:
    spec = info.spec
    offsets = uniform_offsets(count, 1)
    bags = []
    for i, feature in enumerate(spec.features):
        rng = np.random.default_rng((seed, i))
        state = info.row_state.get(feature.table)
        initial = 0.0 if state is None else read_initial_value(info.checkpoint, state)
        rows = spec.table(feature.table).rows
        ids = draw_rows(rows, state, count, rng, initial=initial)
        bags.append(Bag(values=ids, offsets=offsets))
    rng = np.random.default_rng((seed, len(spec.features)))
    return Batch(
        dense=draw_dense(info, count, rng),
        feature_names=spec.feature_names,
        bags=tuple(bags),
    )


def pool_batch(info: FlatModelInfo, batch: Batch, *, accept_outliers: bool = False) -> Float32Array:
    """Pool the embeddings of all features from disk.

    Returns:
        Pooled embeddings side by side, shape (B, M), float32.

    Raises:
        CheckpointError: A row that is touched holds NaN or Inf, or an absurd value.
    """
    spec = info.spec
    out = np.zeros((batch.num_rows, sum(spec.feature_dims)), dtype=np.float32)
    column = 0
    for feature, dim, bag in zip(spec.features, spec.feature_dims, batch.bags, strict=True):
        table = info.table_info(feature.table)
        ids, inverse = np.unique(bag.values, return_inverse=True)
        rows = gather_rows(table, ids)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise CheckpointError(
                f"table {feature.table!r} holds NaN or Inf in row {ids[np.argmin(finite)]}",
                expected="finite weights",
                hint="the training diverged or the file is damaged; use another checkpoint",
            )
        if not accept_outliers:
            _check_outliers(table, feature.table, rows, ids)
        _pool(rows, inverse, bag, feature, out[:, column : column + dim])
        column += dim
    return out


def _check_outliers(info: TensorInfo, table: str, rows: Float32Array, ids: IntArray) -> None:
    outlier = find_outlier(rows)
    if outlier is not None:
        row, column = divmod(outlier.index, rows.shape[1])
        found = replace(outlier, index=int(ids[row]) * rows.shape[1] + column)
        raise outlier_error(f"table {table!r} ({info.path})", found, info.shape)


def _pool(
    rows: Float32Array,
    inverse: npt.NDArray[np.intp],
    bag: Bag,
    feature: FeatureSpec,
    out: Float32Array,
) -> None:
    lengths = np.diff(bag.offsets)
    filled = np.flatnonzero(lengths)
    for begin in range(0, len(filled), 1024):
        part = filled[begin : begin + 1024]
        first, last = int(bag.offsets[part[0]]), int(bag.offsets[part[-1] + 1])
        vectors = rows[inverse[first:last]]
        if bag.weights is not None:
            vectors = vectors * bag.weights[first:last, None]
        sums = np.add.reduceat(vectors, bag.offsets[part] - first, axis=0)
        out[part] = sums / lengths[part, None] if feature.pooling == "mean" else sums
