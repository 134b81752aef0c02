"""What an exported graph takes: the names and shapes of its inputs, and how a batch fills them.

Letters: B batch, D dense inputs, L ids per bag, nnz ids of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import numpy as np

from dmt_convert.arrays import AnyArray
from dmt_convert.config import InputForm
from dmt_convert.data import Bag, Batch, take_rows
from dmt_convert.documents import from_json, to_json
from dmt_convert.errors import DataError, ExportError
from dmt_convert.spec import ModelSpec

INPUT_FORMS: Final[tuple[str, ...]] = get_args(InputForm)
PADDING: Final = -1
"""The id that fills up padded bags; every other negative id is refused."""

_TIGHTEST: Final[tuple[InputForm, ...]] = ("single", "fixed", "padded", "jagged")
"""Bags of a form fit every form behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureInput:
    """How the bags of one feature reach a graph.

    | form | tensors | shape |
    |---|---|---|
    | single | `f` int64 | (B, 1): exactly one id |
    | fixed | `f` int64 | (B, L): exactly L ids, L >= 1 the same for all rows |
    | padded | `f` int64 | (B, L): up to L ids, the others `PADDING` |
    | jagged | `f.values` int64, `f.lengths` int64 | (nnz,), (B,) |

    Weighted bags have `f.weights` float32 as well, in the shape of the ids.
    """

    feature: str
    """Name of the feature."""
    form: InputForm
    """Shape in which its ids come."""
    weighted: bool = False
    """Whether every id comes with a weight."""

    @property
    def ids(self) -> str:
        """Name of the tensor of ids."""
        return f"{self.feature}.values" if self.form == "jagged" else self.feature

    @property
    def lengths(self) -> str | None:
        """Name of the tensor of lengths; jagged only."""
        return f"{self.feature}.lengths" if self.form == "jagged" else None

    @property
    def weights(self) -> str | None:
        """Name of the tensor of weights; weighted only."""
        return f"{self.feature}.weights" if self.weighted else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its tensors: ids, lengths, weights."""
        return tuple(name for name in (self.ids, self.lengths, self.weights) if name is not None)

    def fill(self, bag: Bag) -> Iterator[tuple[str, AnyArray]]:
        """Yield the tensors of one bag per row.

        Raises:
            DataError: The bags do not have this form.
        """
        lengths = np.diff(bag.offsets)
        weights = bag.weights
        if not self.weighted and weights is not None:
            raise DataError(
                f"the bags of feature {self.feature!r} have weights, but its input takes none",
                expected="unweighted bags",
                hint=f"export it again with --weighted {self.feature}",
            )
        if self.weighted and weights is None:
            weights = np.ones(len(bag.values), dtype=np.float32)
        if self.form == "jagged":
            ids = bag.values
            yield f"{self.feature}.lengths", lengths.astype(np.int64)
        else:
            ids, weights = self._rectangle(bag, lengths, weights)
        yield self.ids, np.ascontiguousarray(ids, dtype=np.int64)
        if self.weighted:
            assert weights is not None
            yield f"{self.feature}.weights", np.ascontiguousarray(weights, dtype=np.float32)

    def _rectangle(
        self, bag: Bag, lengths: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray | None]:
        width = max(1, int(lengths.max(initial=0)))
        expected = 1 if self.form == "single" else width
        if self.form != "padded" and (lengths != expected).any():
            row = int(np.flatnonzero(lengths != expected)[0])
            raise DataError(
                f"row {row} has {int(lengths[row])} ids of feature {self.feature!r}",
                expected="exactly one id"
                if self.form == "single"
                else f"{expected} ids, as others",
                hint=f"export it again with --pooling-input {self.feature}=padded or =jagged",
            )
        if self.form != "padded":
            shape = (len(lengths), expected)
            return bag.values.reshape(shape), None if weights is None else weights.reshape(shape)
        filled = np.arange(width) < lengths[:, None]
        ids = np.full(filled.shape, PADDING, dtype=np.int64)
        ids[filled] = bag.values
        if weights is None:
            return ids, None
        padded = np.zeros(filled.shape, dtype=np.float32)
        padded[filled] = weights
        return ids, padded


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInputs:
    """Everything that a whole-model graph takes."""

    num_dense: int
    """D: columns of the dense input; a graph for a model without dense inputs has no such input."""
    features: tuple[FeatureInput, ...]
    """One per feature, in the flat model's order."""
    per_request: tuple[str, ...] = ()
    """Request batching: features that come once per request, with batch 1; none otherwise."""
    dense_per_request: bool = False
    """Request batching: whether the dense inputs come once per request as well."""

    def __post_init__(self) -> None:
        counts = Counter(name for feature in self.features for name in feature.names)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ExportError(
                f"two inputs of the graph would be called {', '.join(map(repr, twice))}",
                expected="features whose tensors have names of their own",
                hint="choose another --pooling-input for these features",
            )

    @property
    def dense(self) -> str:
        """Name of the dense input: `dense`, unless a feature is called so."""
        taken = {name for feature in self.features for name in feature.names}
        name = "dense"
        while name in taken:
            name += "_"
        return name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs, in the graph's order."""
        names = tuple(name for feature in self.features for name in feature.names)
        return (self.dense, *names) if self.num_dense else names

    def feature(self, name: str) -> FeatureInput:
        """Return the input of a feature."""
        return next(feature for feature in self.features if feature.feature == name)

    def feeds(self, batch: Batch, features: Sequence[str] | None = None) -> dict[str, AnyArray]:
        """Fill the inputs of some features from a batch.

        Args:
            batch: Rows, features by name.
            features: The features wanted; all of them, and the dense inputs, by default. Of what
                comes once per request, the first row is taken.

        Raises:
            DataError: A bag does not have the form of its input.
        """
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        feeds = self.dense_feed(batch) if features is None else {}
        wanted = None if features is None else set(features)
        for feature in self.features:
            name = feature.feature
            if wanted is None or name in wanted:
                bag = _first_bag(bags[name]) if name in self.per_request else bags[name]
                feeds.update(feature.fill(bag))
        return feeds

    def dense_feed(self, batch: Batch) -> dict[str, AnyArray]:
        """Fill the dense input from a batch, if there is one."""
        if not self.num_dense:
            return {}
        dense = batch.dense[:1] if self.dense_per_request else batch.dense
        return {self.dense: np.ascontiguousarray(dense, dtype=np.float32)}

    def requests(self, batch: Batch) -> Iterator[Batch]:
        """Cut a batch into requests: runs of rows that agree in all that comes once per request.

        Without request batching the batch is one request.
        """
        if not self.per_request and not self.dense_per_request:
            yield batch
            return
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        once = [bags[name] for name in self.per_request]
        begin = 0
        for row in range(1, batch.num_rows + 1):
            if row < batch.num_rows and self._same_request(batch, once, begin, row):
                continue
            yield take_rows(batch, slice(begin, row))
            begin = row

    def _same_request(self, batch: Batch, once: Sequence[Bag], a: int, b: int) -> bool:
        if self.dense_per_request and not np.array_equal(batch.dense[a], batch.dense[b]):
            return False
        return all(_same_bag(bag, a, b) for bag in once)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` reads it back."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: object) -> GraphInputs:
        """Read what `to_json` wrote.

        Raises:
            ExportError: It does not describe inputs.
        """
        return from_json(cls, value, error=ExportError)


def join_inputs(spec: ModelSpec, exports: Sequence[GraphInputs]) -> GraphInputs:
    """Return inputs whose batches fit several exports of a model; without any, bags of any length.

    Args:
        spec: The model.
        exports: What the graphs of each export take.
    """
    features = []
    for name in spec.feature_names:
        own = [inputs.feature(name) for inputs in exports]
        forms = {feature.form for feature in own}
        features.append(
            FeatureInput(
                feature=name,
                form=next((form for form in _TIGHTEST if form in forms), "jagged"),
                weighted=bool(own) and all(feature.weighted for feature in own),
            )
        )
    once = {name for inputs in exports for name in inputs.per_request}
    return GraphInputs(
        num_dense=spec.num_dense,
        features=tuple(features),
        per_request=tuple(name for name in spec.feature_names if name in once),
        dense_per_request=any(inputs.dense_per_request for inputs in exports),
    )


def _first_bag(bag: Bag) -> Bag:
    end = int(bag.offsets[1])
    weights = None if bag.weights is None else bag.weights[:end]
    return Bag(values=bag.values[:end], offsets=bag.offsets[:2], weights=weights)


def _same_bag(bag: Bag, a: int, b: int) -> bool:
    first, second = (slice(bag.offsets[row], bag.offsets[row + 1]) for row in (a, b))
    if not np.array_equal(bag.values[first], bag.values[second]):
        return False
    return bag.weights is None or np.array_equal(bag.weights[first], bag.weights[second])
