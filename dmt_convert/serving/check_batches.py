"""Batches to run graphs on: every form of input, empty bags, first and last rows, bad ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dmt_convert.data import Bag, Batch
from dmt_convert.serving.graph_inputs import FeatureInput, GraphInputs
from dmt_convert.spec import ModelSpec


def generate_batch(
    spec: ModelSpec,
    inputs: GraphInputs,
    rows: int,
    *,
    seed: int,
    longest: int = 0,
    first_rows: int | None = None,
) -> Batch:
    """Make rows that fit the forms of the inputs.

    Where the form allows it, bags hold 0 to 4 ids, the first one none; the first and the last row
    of every table occur. Features that come once per request have the same bag in every row.

    Args:
        spec: The model.
        inputs: Forms of the inputs.
        rows: How many rows.
        seed: What to draw with.
        longest: Ids in the last bag of every jagged feature; 0 for as many as in others.
        first_rows: How many rows of a table are looked up, beside its last one; by default all.
            Every page that a lookup maps counts as resident.
    """
    rng = np.random.default_rng((seed, rows))
    bags = []
    for feature in inputs.features:
        once = feature.feature in inputs.per_request
        table_rows = spec.table_of(feature.feature).rows
        bag = _bag(rng, feature, 1 if once else rows, table_rows, longest, first_rows)
        bags.append(_repeat(bag, rows) if once else bag)
    dense = rng.standard_normal((1 if inputs.dense_per_request else rows, spec.num_dense))
    return Batch(
        dense=np.broadcast_to(dense, (rows, spec.num_dense)).astype(np.float32),
        feature_names=spec.feature_names,
        bags=tuple(bags),
    )


def _bag(
    rng: np.random.Generator,
    feature: FeatureInput,
    rows: int,
    table_rows: int,
    longest: int,
    first_rows: int | None,
) -> Bag:
    if feature.form == "single":
        lengths = np.ones(rows, dtype=np.int64)
    elif feature.form == "fixed":
        lengths = np.full(rows, rng.integers(1, 5))
    else:
        lengths = rng.integers(0, 5, size=rows)
        lengths[0] = 0 if rows > 1 else rng.integers(0, 3)
        if longest and feature.form == "jagged":
            lengths[-1] = longest
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    drawn = min(table_rows, first_rows or table_rows)
    values = rng.integers(0, drawn, size=int(offsets[-1]), dtype=np.int64)
    if len(values):
        values[0], values[-1] = 0, table_rows - 1
    weights = rng.standard_normal(len(values)).astype(np.float32) if feature.weighted else None
    return Bag(values=values, offsets=offsets, weights=weights)


def _repeat(bag: Bag, rows: int) -> Bag:
    length = len(bag.values)
    return Bag(
        values=np.tile(bag.values, rows),
        offsets=np.arange(rows + 1, dtype=np.int64) * length,
        weights=None if bag.weights is None else np.tile(bag.weights, rows),
    )


def bad_ids(spec: ModelSpec, inputs: GraphInputs, batch: Batch) -> Iterator[tuple[Batch, str]]:
    """Yield batches with one id outside its table, for some features, and what it is.

    The first and the last feature of every form: below the table, just behind it, far behind it.
    """
    tried: dict[tuple[str, bool], list[int]] = {}
    for i, feature in enumerate(inputs.features):
        tried.setdefault((feature.form, feature.weighted), []).append(i)
    for members in tried.values():
        for i in dict.fromkeys((members[0], members[-1])):
            rows = spec.table_of(inputs.features[i].feature).rows
            low = -2 if inputs.features[i].form == "padded" else -1
            for value in (low, rows, 2**40):
                name = inputs.features[i].feature
                yield _with_id(batch, i, value), f"id {value} of {name} ({rows} rows)"


def _with_id(batch: Batch, feature: int, value: int) -> Batch:
    bag = batch.bags[feature]
    if not len(bag.values):
        offsets = np.minimum(np.arange(len(bag.offsets), dtype=np.int64), 1)
        weights = None if bag.weights is None else np.ones(1, dtype=np.float32)
        changed = Bag(values=np.array([value]), offsets=offsets, weights=weights)
    else:
        values = bag.values.copy()
        values[0] = value
        changed = replace(bag, values=values)
    bags = list(batch.bags)
    bags[feature] = changed
    return replace(batch, bags=tuple(bags))


def clipped(spec: ModelSpec, batch: Batch) -> Batch:
    """Return the batch with every id moved into its table."""
    bags = [
        replace(bag, values=bag.values.clip(0, spec.table_of(name).rows - 1))
        for name, bag in zip(batch.feature_names, batch.bags, strict=True)
    ]
    return replace(batch, bags=tuple(bags))
