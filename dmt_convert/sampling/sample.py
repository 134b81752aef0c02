"""Inputs on which a model is looked at: calibration rows, or rows drawn from its tables.

Letters: n sampled rows, D dense inputs, F features, M widths' sum of all pooled embeddings.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from dmt_convert.architectures import FlatModelInfo
from dmt_convert.checkpoint import (
    ITEM_BYTES,
    Piece,
    TensorInfo,
    gather_rows,
    resolve_segments,
)
from dmt_convert.data import (
    Bag,
    Batch,
    adapt_batches,
    join_batches,
    open_data,
    take_rows,
    uniform_offsets,
)
from dmt_convert.errors import CheckpointError, DataError
from dmt_convert.spec import FeatureSpec, ModelSpec

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
_POOLED_BYTES: Final = 64 << 20
_MAX_CANDIDATES: Final = 8_192
_RUN_ROWS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """n rows of input with the embeddings that the flat model pools for them."""

    batch: Batch
    """The rows, bags in the model's feature order."""
    pooled: FloatArray
    """Pooled embeddings side by side in feature order, shape (n, M), float32."""
    source: Literal["calibration", "tables"]
    """Where the rows come from."""
    description: str
    """How they were drawn, one line."""

    def split(self, fraction: float) -> tuple[Sample, Sample]:
        """Split off the last `fraction` of the rows, as held-out rows."""
        cut = max(1, int(self.batch.num_rows * (1 - fraction)))
        return self._rows(0, cut), self._rows(cut, self.batch.num_rows)

    def per_feature(self, spec: ModelSpec) -> list[FloatArray]:
        """Pooled embeddings of every feature, each (n, N_f)."""
        cuts = np.cumsum(spec.feature_dims)[:-1]
        return list(np.split(self.pooled, cuts, axis=1))

    def _rows(self, begin: int, end: int) -> Sample:
        return Sample(
            batch=take_rows(self.batch, slice(begin, end)),
            pooled=self.pooled[begin:end],
            source=self.source,
            description=self.description,
        )


def sample_size(spec: ModelSpec) -> int:
    """Choose n so that the pooled embeddings take at most 64 MiB (1,024 to 16,384 rows)."""
    width = sum(spec.feature_dims)
    return int(np.clip(_POOLED_BYTES // (4 * width), 1024, 16_384))


def draw_sample(
    info: FlatModelInfo, *, calibration: Path | None = None, rows: int | None = None, seed: int = 0
) -> Sample:
    """Draw input rows and pool the model's embeddings for them.

    With calibration data the rows are a random choice of its rows. Without, every feature draws
    one id on its own: rows by how often they were trained, where the checkpoint holds optimizer
    state that tells, else uniformly; dense inputs are drawn as log(1 + x) of log-normal counts,
    the form in which click models are commonly fed.

    Args:
        info: The flat model.
        calibration: Data set to draw from.
        rows: n; by default as many as `sample_size` says.
        seed: Seed of the draw.

    Raises:
        DataError: The calibration data does not fit the model.
        CheckpointError: A row that was drawn holds NaN or Inf.
    """
    count = sample_size(info.spec) if rows is None else rows
    if calibration is not None:
        batch = _calibration_rows(info.spec, calibration, count, seed)
        description = f"{batch.num_rows} random rows of {calibration.name}"
        pooled = pool_batch(info, batch)
        return Sample(batch=batch, pooled=pooled, source="calibration", description=description)
    batch = _drawn_rows(info, count, seed)
    by = "by how often they were trained" if info.row_state else "uniformly"
    return Sample(
        batch=batch,
        pooled=pool_batch(info, batch),
        source="tables",
        description=f"{count} sampled inputs, table rows drawn {by}, dense inputs assumed",
    )


def _calibration_rows(spec: ModelSpec, path: Path, count: int, seed: int) -> Batch:
    dataset = open_data(path)
    batches = dataset.batches(min(count, 4096), shuffle_seed=seed, max_rows=count)
    found = list(adapt_batches(dataset, spec, batches))
    if not found:
        raise DataError(
            f"{path} holds no rows",
            expected="a few thousand rows for calibration",
            hint="name a data set with rows, or leave --calibration out",
        )
    return join_batches(found)


def _drawn_rows(info: FlatModelInfo, count: int, seed: int) -> Batch:
    spec = info.spec
    offsets = uniform_offsets(count, 1)
    bags = []
    for i, feature in enumerate(spec.features):
        rng = np.random.default_rng((seed, i))
        ids = draw_rows(
            spec.table(feature.table).rows, info.row_state.get(feature.table), count, rng
        )
        bags.append(Bag(values=ids, offsets=offsets))
    rng = np.random.default_rng((seed, len(spec.features)))
    counts = rng.lognormal(mean=0.5, sigma=1.5, size=(count, spec.num_dense))
    return Batch(
        dense=np.log1p(counts).astype(np.float32),
        feature_names=spec.feature_names,
        bags=tuple(bags),
    )


def draw_rows(
    rows: int, state: TensorInfo | None, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw row ids of one table, with repetition.

    Args:
        rows: Rows of the table.
        state: Its optimizer accumulator, shape (rows,) or (rows, N): rows are drawn in
            proportion to it (Adam's decaying average only says which rows were ever trained).
        count: How many ids.
        rng: Source of randomness.
    """
    candidates = _candidate_rows(rows, rng)
    if state is None:
        return rng.choice(candidates, size=count)
    table = state if len(state.shape) == 2 else _as_column(state)
    weight = gather_rows(table, candidates).mean(axis=1, dtype=np.float64)
    if state.name.endswith("exp_avg_sq"):
        weight = (weight > 0).astype(np.float64)
    weight = np.where(np.isfinite(weight), np.maximum(weight, 0.0), 0.0)
    if weight.sum() <= 0:
        return rng.choice(candidates, size=count)
    return rng.choice(candidates, size=count, p=weight / weight.sum())


def _candidate_rows(rows: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows to draw from: all of a small table, short runs all over a large one.

    A disk reads a run as fast as one row, and ids that are neighbours have nothing in common in
    hashed or frequency-sorted tables, so runs cost little in variety.
    """
    if rows <= _MAX_CANDIDATES:
        return np.arange(rows, dtype=np.int64)
    starts = rng.integers(0, rows - _RUN_ROWS + 1, size=_MAX_CANDIDATES // _RUN_ROWS)
    return np.unique(starts[:, None] + np.arange(_RUN_ROWS, dtype=np.int64))


def _as_column(info: TensorInfo) -> TensorInfo:
    """Describe a vector as a table of one column, so that single elements can be gathered."""
    pieces = tuple(
        Piece(
            path=segment.path,
            offset=segment.offset,
            length=segment.sizes[0] * ITEM_BYTES[info.dtype],
            starts=(*segment.starts, 0),
            sizes=(*segment.sizes, 1),
            strides=None if segment.strides is None else (*segment.strides, 1),
        )
        for segment in resolve_segments(info)
    )
    return TensorInfo(
        name=info.name,
        container=info.container,
        dtype=info.dtype,
        shape=(*info.shape, 1),
        pieces=pieces,
    )


def pool_batch(info: FlatModelInfo, batch: Batch) -> FloatArray:
    """Pool the embeddings of all features from disk.

    Returns:
        Pooled embeddings side by side, shape (B, M), float32.

    Raises:
        CheckpointError: A row that is touched holds NaN or Inf.
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
        _pool(rows, inverse, bag, feature, out[:, column : column + dim])
        column += dim
    return out


def _pool(
    rows: FloatArray, inverse: npt.NDArray[np.intp], bag: Bag, feature: FeatureSpec, out: FloatArray
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
