"""Closed form of linear tower modules: the untouched network reads restored embeddings.

To first order the logit changes by g.(x^ - x), where g is its gradient. Taking g and x as
independent, the mean square of that is tr(G R) with G = E[g g^T] and R the covariance of what is
lost. It is least if the tower emits the leading eigenvectors of G^(1/2) C G^(1/2), C the
covariance of x, and the receiver regresses x on them: reduced-rank regression in the metric G.

Letters: n rows, M_t widths' sum of a tower's embeddings, D_t elements that it emits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dmt_convert.arrays import Float32Array, Float64Array, FloatArray
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.conversion.initialisation.closed_form import (
    ClosedForm,
    Indices,
    Start,
    element_bytes,
    with_dims,
)
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace, tower_moments
from dmt_convert.model import DmtSpec, to_tensor

_MAX_WIDTH: Final = 2048
_MAX_WORK: Final = 1 << 35
"""Columns solved together, and their square times all columns: eigenvectors of more take minutes,
so wider towers are solved in blocks of features."""
MAX_KEPT_BYTES: Final = 256 << 20
"""Directions that are kept for the next budget; those of wider towers are found again."""
_ROUNDING: Final = {0: 1.0, 4: 1.2e-2, 8: 1e-4}
"""Variance that is lost of an element of unit variance, by its bits: uniform levels, Gaussian."""
_DAMPING: Final = 1e-3
_FLOOR: Final = 1e-12
_HELD_OUT: Final = 0.25
_METRICS: Final[dict[str, Callable[[Float64Array], Float64Array]]] = {
    "what the logit feels": lambda felt: felt,
    "each element's own gradient": lambda felt: np.diag(np.diag(felt)),
    "plain variance": lambda felt: np.eye(len(felt)),
}
"""How an error counts, from G; the one whose logits agree best is taken."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """Directions of some columns, best first."""

    columns: Indices
    """Columns of the flat pooled matrix."""
    values: Float64Array
    """Loss that each direction saves."""
    emit: Float32Array
    """Emitting maps as rows, to unit variance."""
    back: Float32Array
    """What the receiver makes of them, as columns."""

    @property
    def nbytes(self) -> int:
        """Bytes of the maps."""
        return self.emit.nbytes + self.back.nbytes


class RestoredForm(ClosedForm):
    """Maps from which the receiver restores embeddings; the network stays as it is."""

    def fits(self, spec: DmtSpec) -> bool:
        """Linear tower modules, in front of anything."""
        return spec.kind == "linear"

    def start(self, trace: FlatTrace, spec: DmtSpec) -> Start:
        """Solve every tower's map and its way back.

        The metric is chosen on held-out rows, by the logits of the flat model.
        """
        cut = max(1, int(len(trace.pooled) * (1 - _HELD_OUT)))
        tried = []
        for name in _METRICS:
            maps = _solve_towers(trace, spec, name, slice(0, cut))
            tried.append((_lost(trace, spec, maps, slice(cut, None)), name))
        loss, best = min(tried)
        maps = _solve_towers(trace, spec, best, slice(0, None))
        dense: dict[str, FloatArray] = {}
        modules: list[dict[str, FloatArray]] = []
        mean = trace.pooled.mean(axis=0, dtype=np.float64)
        for t, (columns, own) in enumerate(zip(_columns(spec), maps, strict=True)):
            modules.append({} if own is None else {"weight": own.emit})
            if own is not None:
                dense[f"restore.{t}.weight"] = own.back
                dense[f"restore.{t}.bias"] = mean[columns] - own.back @ (own.emit @ mean[columns])
        said = "; ".join(f"{name}: R^2 {1 - lost:.6f}" for lost, name in tried)
        return Start(
            modules=modules,
            dense=dense,
            notes=(
                f"embeddings restored by regression, errors weighed by {best} (R^2 of logits "
                f"{1 - loss:.6f}), the best of: {said}",
            ),
        )

    def allot(self, trace: FlatTrace, spec: DmtSpec, budget: int, *, mix: bool = True) -> DmtSpec:
        """Take the directions that save most, of all towers, at least one of each.

        Elements of an int8 code first take 4 bits, and 4 more where those save most, until the
        budget is spent.
        """
        curves = []
        for tower, columns in zip(spec.towers, _columns(spec), strict=True):
            blocks = (
                []
                if tower.everywhere
                else _solve(trace, columns, "what the logit feels", slice(0, None))
            )
            values = np.concatenate([np.empty(0), *(block.values for block in blocks)])
            curves.append(np.sort(values)[::-1])
        code = spec.sending_towers[0].module.code
        if mix and code is not None and code.precision == "int8":
            return _with_bits(spec, *allot_bits(curves, budget))
        sending = [t for t, curve in enumerate(curves) if len(curve)]
        towers = np.repeat(sending, [len(curves[t]) - 1 for t in sending])
        values = np.concatenate([curves[t][1:] for t in sending])
        left = max(0, budget // element_bytes(spec) - len(sending))
        chosen = np.argsort(-values, kind="stable")[:left]
        dims = 1 + np.bincount(towers[chosen], minlength=len(curves))
        return with_dims(spec, [int(dim) for dim in dims])


def allot_bits(curves: Sequence[Float64Array], budget: int) -> tuple[list[int], list[int]]:
    """Spend a budget on the directions of all towers, half a byte at a time.

    Every half byte goes where it saves most: to a direction that has none, or to one that has
    4 bits. What a direction loses falls convexly with its bits, so no other choice loses less.

    Args:
        curves: Per tower, the loss that each direction saves, largest first; empty for a tower that
            sends nothing.
        budget: Bytes in all. A tower that sends has one at least.

    Returns:
        Per tower, the elements that it emits, and how many of them take 4 bits.
    """
    towers, gains = [], []
    for t, curve in enumerate(curves):
        towers += [t] * (2 * len(curve))
        gains += [
            curve * (_ROUNDING[0] - _ROUNDING[4]),
            curve * (_ROUNDING[4] - _ROUNDING[8]),
        ]
    tower_of, gain = np.array(towers, dtype=np.intp), np.concatenate(gains)
    kinds = np.concatenate([np.repeat([0, 1], len(curve)) for curve in curves])
    counts = np.zeros((len(curves), 2), dtype=np.intp)
    counts[[t for t, curve in enumerate(curves) if len(curve)]] = 1  # one element of 8 bits
    left = budget - int(counts[:, 0].sum())
    rank = np.concatenate([np.tile(np.arange(len(curve)), 2) for curve in curves])
    for i in np.argsort(-gain, kind="stable"):
        if gain[i] <= 0:
            break
        if rank[i] == 0:
            continue  # given already
        t, kind = tower_of[i], kinds[i]
        before = _bytes(counts[t])
        counts[t, kind] += 1
        spent = _bytes(counts[t]) - before
        if spent > left:
            counts[t, kind] -= 1
        else:
            left -= spent
    return [int(n) for n in counts[:, 0]], [int(n - whole) for n, whole in counts]


def _bytes(count: Indices) -> int:
    """Bytes of a tower that emits so many elements, so many of them in 8 bits."""
    return int(count.sum() + 1) // 2


def _with_bits(spec: DmtSpec, dims: Sequence[int], half: Sequence[int]) -> DmtSpec:
    sized = with_dims(spec, dims)
    return replace(
        sized,
        towers=tuple(
            tower
            if tower.module.code is None
            else replace(
                tower,
                module=replace(tower.module, code=replace(tower.module.code, int4=int4)),
            )
            for tower, int4 in zip(sized.towers, half, strict=True)
        ),
    )


def _columns(spec: DmtSpec) -> list[Indices]:
    return [np.array(columns, dtype=np.intp) for columns in spec.columns_by_tower]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Maps:
    """A tower's emitting map, shape (D_t, M_t), and the way back, shape (M_t, D_t)."""

    emit: Float64Array
    back: Float64Array


def _solve_towers(trace: FlatTrace, spec: DmtSpec, metric: str, rows: slice) -> list[_Maps | None]:
    """Return the maps of every tower; None: its embeddings do not cross hosts."""
    maps: list[_Maps | None] = []
    for tower, columns in zip(spec.towers, _columns(spec), strict=True):
        width, dim, code = len(columns), tower.module.dim, tower.module.code
        if tower.everywhere:
            maps.append(None)
            continue
        if dim >= width and (code is None or not code.int4):
            maps.append(_Maps(emit=np.eye(dim, width), back=np.eye(width, dim)))
            continue
        blocks = _solve(trace, columns, metric, rows)
        place = np.argsort(columns)
        order = [
            (value, b, k) for b, block in enumerate(blocks) for k, value in enumerate(block.values)
        ]
        order.sort(key=lambda entry: -entry[0])
        emit, back = np.zeros((dim, width)), np.zeros((width, dim))
        for row, (_, b, k) in enumerate(order[:dim]):
            own = place[np.searchsorted(columns[place], blocks[b].columns)]
            emit[row, own] = blocks[b].emit[k]
            back[own, row] = blocks[b].back[:, k]
        maps.append(_Maps(emit=emit, back=back))
    return maps


def _solve(trace: FlatTrace, columns: Indices, metric: str, rows: slice) -> list[_Block]:
    """Find the directions of a tower, block of columns by block; they serve every budget."""
    key = (metric, rows.start, rows.stop, columns.tobytes())
    if key in trace.solved:
        known: list[_Block] = trace.solved[key]
        return known
    count = -(-len(columns) // widest_block(trace.pooled.shape[1]))
    blocks = [_solve_block(trace, part, metric, rows) for part in np.array_split(columns, count)]
    kept = sum(block.nbytes for found in trace.solved.values() for block in found)
    if kept + sum(block.nbytes for block in blocks) <= MAX_KEPT_BYTES:
        trace.solved[key] = blocks
    return blocks


def widest_block(width: int) -> int:
    """Columns that are solved together, of so many in all."""
    return min(_MAX_WIDTH, max(64, math.isqrt(_MAX_WORK // width)))


def _solve_block(trace: FlatTrace, columns: Indices, metric: str, rows: slice) -> _Block:
    covariance, felt = tower_moments(
        trace.pooled[rows][:, columns], trace.pooled_gradient[rows][:, columns]
    )
    weight = _METRICS[metric](felt)
    scale = float(np.trace(weight)) / len(weight)
    weight = weight / scale if scale > 0 else np.eye(len(weight))
    root = _root(weight + _DAMPING * np.eye(len(weight)))
    values, axes = _eigen(root @ covariance @ root)
    live = values > _FLOOR * max(float(values.max(initial=0.0)), 1e-30)
    spread = np.sqrt(np.where(live, values, 1.0))
    emit = np.where(live[:, None], (root @ axes).T / spread[:, None], 0.0)
    back = covariance @ emit.T
    saved = np.einsum("mk,mk->k", back, weight @ back)  # without the damping
    return _Block(
        columns=columns,
        values=saved * max(scale, 0.0),
        emit=emit.astype(np.float32),
        back=back.astype(np.float32),
    )


def _root(matrix: Float64Array) -> Float64Array:
    values, axes = _eigen(matrix)
    root: Float64Array = (axes * np.sqrt(values)) @ axes.T
    return root


def _eigen(matrix: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Eigenvalues, largest first, and eigenvectors as columns."""
    values, axes = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), axes[:, ::-1]


def _lost(trace: FlatTrace, spec: DmtSpec, maps: Sequence[_Maps | None], rows: slice) -> float:
    """1 - R^2 of the logits that the network gives on restored embeddings."""
    pooled, restored = trace.pooled[rows], np.empty_like(trace.pooled[rows])
    mean = trace.pooled.mean(axis=0, dtype=np.float64).astype(np.float32)
    for columns, own in zip(_columns(spec), maps, strict=True):
        centred = pooled[:, columns] - mean[columns]
        if own is not None:
            emitted = centred @ own.emit.T.astype(np.float32)
            centred = emitted @ own.back.T.astype(np.float32)
        restored[:, columns] = centred
    restored += mean
    dense, target = trace.dense_inputs[rows], trace.logits[rows].astype(np.float64)
    forward = trace.model.forward_pooled
    logits = np.concatenate(
        [
            forward(to_tensor(dense[block]), to_tensor(restored[block])).numpy()
            for block in row_blocks(spec.flat, len(dense))
        ]
    )
    spread = float(np.square(target - target.mean()).sum())
    error = float(np.square(logits - target).sum())
    return error / spread if spread > 0 else error
