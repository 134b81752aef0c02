"""Tables in memory that are trained row by row: a step costs the rows it touches.

Tables of one embedding dim lie one after the other in one tensor, so that a batch needs one lookup
and one update for all of them. A table that serves several features exists once.

Letters: B batch, F features of one dim, N embedding dim, R rows of all tables of that dim,
U different rows that a batch touches, n ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmt_convert.arrays import IntArray
from dmt_convert.checkpoint import TensorInfo
from dmt_convert.data import Bag, Batch
from dmt_convert.model import to_tensor
from dmt_convert.spec import FeatureSpec, ModelSpec


@dataclass(slots=True, kw_only=True, eq=False)
class TableGroup:
    """All tables of one embedding dim."""

    weight: Tensor
    """Their rows, shape (R, N), float32."""
    starts: dict[str, int]
    """Table -> its first row."""
    features: tuple[FeatureSpec, ...]
    """What is looked up in them, in the model's order."""
    looked_up: list[_Lookup] = field(default_factory=list)
    """Lookups since `forget_gradients`, with gradients once there are any."""
    slots: npt.NDArray[np.int32]
    """Scratch, shape (R,): where in a batch a row was seen last."""
    saved: Tensor
    """Whether a row's values at the last `keep` are in `journal`, shape (R,), bool."""
    journal: list[_Change] = field(default_factory=list)
    """What changed since the last `keep`."""
    sums: Tensor | None = None
    """Sums of squared gradients, where the tables' optimizer is Adagrad, shape (R, 1) or (R, N)."""
    summed: frozenset[str] = frozenset()
    """Tables whose part of `sums` is known; of others it is once a batch has shown gradients."""
    kept_summed: frozenset[str] = frozenset()
    """`summed` at the last `keep`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Change:
    """What some rows of a group held at the last `keep`."""

    rows: Tensor
    """The rows, shape (U,)."""
    weight: Tensor
    """Their values, shape (U, N)."""
    sums: Tensor | None
    """Their sums of squared gradients, where there were any, shape (U, 1) or (U, N)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lookup:
    """What one batch looked up in a group."""

    ids: IntArray
    """Rows of the group, shape (n,)."""
    bags: IntArray | None
    """Bag of every id, shape (n,), counted over features, then samples; None: one id each."""
    scales: Tensor | None
    """What every id's row is multiplied by, shape (n,); None: 1."""
    pooled: Tensor
    """The result, shape (F, B, N); carries the gradient after backward."""

    def row_gradients(self) -> Tensor:
        """Gradient of every looked-up row, shape (n, N)."""
        assert self.pooled.grad is not None
        gradient = self.pooled.grad.flatten(0, 1)
        if self.bags is not None:
            gradient = gradient.index_select(0, torch.from_numpy(self.bags))
        return gradient if self.scales is None else gradient * self.scales.unsqueeze(1)


class TableStore:
    """All tables of a model, on the CPU.

    Args:
        spec: The model; its tables are left uninitialised.
        accumulators: Table -> the sums of squared gradients that its rows come with, in a file,
            shape (rows, 1). Adagrad starts from them.
    """

    def __init__(
        self, spec: ModelSpec, accumulators: Mapping[str, TensorInfo] | None = None
    ) -> None:
        self.spec = spec
        self.accumulators = dict(accumulators or {})
        dims = {table.name: table.dim for table in spec.tables}
        self.groups: list[TableGroup] = []
        for dim in dict.fromkeys(dims.values()):
            tables = [table for table in spec.tables if table.dim == dim]
            starts = np.cumsum([0, *(table.rows for table in tables)])
            rows = int(starts[-1])
            self.groups.append(
                TableGroup(
                    weight=torch.empty(rows, dim),
                    starts={table.name: int(a) for table, a in zip(tables, starts, strict=False)},
                    features=tuple(f for f in spec.features if dims[f.table] == dim),
                    slots=np.empty(rows, dtype=np.int32),
                    saved=torch.zeros(rows, dtype=torch.bool),
                )
            )

    def table(self, name: str) -> Tensor:
        """Return the rows of a table, shape (rows, N); shares memory."""
        group = next(group for group in self.groups if name in group.starts)
        start = group.starts[name]
        return group.weight[start : start + self.spec.table(name).rows]

    def sums(self, name: str) -> Tensor | None:
        """Return the sums of squared gradients of a table, shape (rows, 1) or (rows, N).

        They belong to the rows as they are now, and share memory. None where nothing kept any.
        """
        group = next(group for group in self.groups if name in group.starts)
        if group.sums is None or name not in group.summed:
            return None
        start = group.starts[name]
        return group.sums[start : start + self.spec.table(name).rows]

    def forget_sums(self) -> None:
        """Keep no sums of squared gradients any longer."""
        for group in self.groups:
            group.sums, group.summed, group.kept_summed = None, frozenset(), frozenset()

    def pool(self, batch: Batch) -> dict[str, Tensor]:
        """Look up a batch.

        Returns:
            Feature -> pooled embeddings, shape (B, N). Where gradients are enabled, what comes
            back to them is kept for `gradients`.
        """
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        pooled: dict[str, Tensor] = {}
        for group in self.groups:
            found = _look_up(group, [bags[feature.name] for feature in group.features])
            if torch.is_grad_enabled():
                found.pooled.requires_grad_()
                group.looked_up.append(found)
            vectors = found.pooled.unbind(0)
            pooled |= {f.name: vector for f, vector in zip(group.features, vectors, strict=True)}
        return pooled

    def gradients(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield what backward left: group, its touched rows (U,), their gradients (U, N).

        Every row occurs once; gradients of ids that occur several times are summed.
        """
        for index, group in enumerate(self.groups):
            used = [found for found in group.looked_up if found.pooled.grad is not None]
            if not used or not sum(len(found.ids) for found in used):
                continue
            ids = used[0].ids if len(used) == 1 else np.concatenate([f.ids for f in used])
            each = [found.row_gradients() for found in used]
            gradients = each[0] if len(each) == 1 else torch.cat(each)
            yield index, *sum_by_row(ids, gradients, group.slots)

    def forget_gradients(self) -> None:
        """Start anew, as `zero_grad` does."""
        for group in self.groups:
            group.looked_up.clear()

    def note_update(self, index: int, rows: Tensor) -> None:
        """Be told, before rows are changed, which: what they hold is kept for `restore`.

        Args:
            index: The group.
            rows: Rows of the group, shape (U,), each once.
        """
        group = self.groups[index]
        fresh = rows[~group.saved.index_select(0, rows)]
        if len(fresh):
            sums = None if group.sums is None else group.sums.index_select(0, fresh)
            weight = group.weight.index_select(0, fresh)
            group.journal.append(_Change(rows=fresh, weight=weight, sums=sums))
            group.saved.index_fill_(0, fresh, True)

    def keep(self) -> None:
        """Remember the present state; later changes are journalled, nothing is copied now."""
        for group in self.groups:
            for change in group.journal:
                group.saved.index_fill_(0, change.rows, False)
            group.journal.clear()
            group.kept_summed = group.summed

    def restore(self) -> None:
        """Return to the state of the last `keep`."""
        for group in self.groups:
            for change in group.journal:
                group.weight.index_copy_(0, change.rows, change.weight)
                if group.sums is not None and change.sums is not None:
                    group.sums.index_copy_(0, change.rows, change.sums)
            group.summed = group.kept_summed
        self.keep()


def sum_by_row(
    ids: IntArray, gradients: Tensor, slots: npt.NDArray[np.int32]
) -> tuple[Tensor, Tensor]:
    """Sum the gradients of equal ids, without sorting.

    Args:
        ids: Rows, shape (n,).
        gradients: Their gradients, shape (n, N).
        slots: Scratch with an element per row of the table; needs no initial values.

    Returns:
        The different rows, shape (U,), and their summed gradients, shape (U, N); rows in the
        order in which they occur last.
    """
    places = np.arange(len(ids), dtype=np.int32)
    slots[ids] = places  # of equal ids the last one stays
    last = slots[ids]
    firsts = np.flatnonzero(last == places)
    rows = torch.from_numpy(ids[firsts])
    if len(firsts) == len(ids):
        return rows, gradients
    slots[ids[firsts]] = places[: len(firsts)]
    number = torch.from_numpy(slots[ids].astype(np.int64))
    return rows, torch.zeros(len(firsts), gradients.shape[1]).index_add_(0, number, gradients)


def _look_up(group: TableGroup, bags: Sequence[Bag]) -> _Lookup:
    """Pool the bags of all features of a group; the result carries no gradient yet."""
    starts = [group.starts[feature.table] for feature in group.features]
    size, dim = len(bags[0].offsets) - 1, group.weight.shape[1]
    if all(bag.weights is None for bag in bags) and _hold_one_id_each(bags):
        ids = np.stack([bag.values for bag in bags])
        ids += np.array(starts, dtype=np.int64)[:, None]
        ids = ids.reshape(-1)
        with torch.no_grad():
            rows = group.weight.index_select(0, torch.from_numpy(ids))
        return _Lookup(ids=ids, bags=None, scales=None, pooled=rows.view(len(bags), size, dim))
    ids = np.concatenate([bag.values + start for bag, start in zip(bags, starts, strict=True)])
    lengths = np.concatenate([np.diff(bag.offsets) for bag in bags])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scales = _scales(group.features, bags)
    with torch.no_grad():
        pooled = torch.nn.functional.embedding_bag(
            torch.from_numpy(ids),
            group.weight,
            torch.from_numpy(offsets),
            mode="sum",
            per_sample_weights=scales,
            include_last_offset=True,
        )
    return _Lookup(
        ids=ids,
        bags=np.repeat(np.arange(len(lengths)), lengths),
        scales=scales,
        pooled=pooled.view(len(bags), size, dim),
    )


def _hold_one_id_each(bags: Sequence[Bag]) -> bool:
    checked: IntArray | None = None
    for bag in bags:
        if bag.offsets is checked:
            continue  # readers of one id per row share the offsets
        checked = bag.offsets
        if checked[-1] != len(checked) - 1 or not (np.diff(checked) == 1).all():
            return False
    return True


def _scales(features: Sequence[FeatureSpec], bags: Sequence[Bag]) -> Tensor | None:
    """Weight of every id, over the length of its bag where the mean is taken; None: all 1."""
    if all(bag.weights is None for bag in bags) and all(f.pooling == "sum" for f in features):
        return None
    parts = []
    for feature, bag in zip(features, bags, strict=True):
        scale = np.ones(len(bag.values), dtype=np.float32) if bag.weights is None else bag.weights
        if feature.pooling == "mean":
            lengths = np.diff(bag.offsets)
            scale = np.divide(scale, np.repeat(lengths, lengths), dtype=np.float32)
        parts.append(scale)
    return to_tensor(np.concatenate(parts))
