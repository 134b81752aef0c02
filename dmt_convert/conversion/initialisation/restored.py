"""Closed form of linear tower modules: the untouched network reads restored embeddings.

To first order the logit changes by g.(x^ - x), where g is its gradient. Taking g and x as
independent, the mean square of that is tr(G R) with G = E[g g^T] and R the covariance of what is
lost. It is least if the tower emits the leading eigenvectors of G^(1/2) C G^(1/2), C the
covariance of x, and the receiver regresses x on them: reduced-rank regression in the metric G.

Letters: n rows, M_t widths' sum of a tower's embeddings, D_t elements that it emits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.arrays import Float64Array, FloatArray
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.conversion.initialisation.closed_form import ClosedForm, Indices, Start, with_dims
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace, tower_moments
from dmt_convert.model import DmtSpec, to_tensor

_MAX_WIDTH: Final = 2048
"""Columns solved together: eigenvectors of more take minutes, so wider towers are solved in
blocks of features."""
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
    emit: Float64Array
    """Emitting maps as rows, to unit variance."""
    back: Float64Array
    """What the receiver makes of them, as columns."""


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
        mean = trace.pooled.mean(axis=0, dtype=np.float64)
        for t, (columns, (emit, back)) in enumerate(zip(_columns(spec), maps, strict=True)):
            dense[f"restore.{t}.weight"] = back
            dense[f"restore.{t}.bias"] = mean[columns] - back @ (emit @ mean[columns])
        said = "; ".join(f"{name}: R^2 {1 - lost:.6f}" for lost, name in tried)
        return Start(
            modules=[{"weight": emit} for emit, _ in maps],
            dense=dense,
            notes=(
                f"embeddings restored by regression, errors weighed by {best} (R^2 of logits "
                f"{1 - loss:.6f}), the best of: {said}",
            ),
        )

    def allot(self, trace: FlatTrace, spec: DmtSpec) -> DmtSpec:
        """Take the directions that save most, of all towers, at least one of each."""
        curves = []
        for columns in _columns(spec):
            blocks = _solve(trace, columns, "what the logit feels", slice(0, None))
            curves.append(np.sort(np.concatenate([block.values for block in blocks]))[::-1])
        towers = np.repeat(np.arange(len(curves)), [len(curve) - 1 for curve in curves])
        values = np.concatenate([curve[1:] for curve in curves])
        budget = sum(spec.tower_widths) - len(curves)
        chosen = np.argsort(-values, kind="stable")[: max(0, budget)]
        dims = 1 + np.bincount(towers[chosen], minlength=len(curves))
        return with_dims(spec, [int(dim) for dim in dims])


def _columns(spec: DmtSpec) -> list[Indices]:
    return [np.array(columns, dtype=np.intp) for columns in spec.columns_by_tower]


def _solve_towers(
    trace: FlatTrace, spec: DmtSpec, metric: str, rows: slice
) -> list[tuple[Float64Array, Float64Array]]:
    """Per tower: the emitting map (D_t, M_t), and the way back (M_t, D_t)."""
    maps = []
    for tower, columns in zip(spec.towers, _columns(spec), strict=True):
        width, dim = len(columns), tower.module.dim
        if dim >= width:
            maps.append((np.eye(dim, width), np.eye(width, dim)))
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
        maps.append((emit, back))
    return maps


def _solve(trace: FlatTrace, columns: Indices, metric: str, rows: slice) -> list[_Block]:
    """Find the directions of a tower, block of columns by block."""
    count = -(-len(columns) // _MAX_WIDTH)
    return [_solve_block(trace, part, metric, rows) for part in np.array_split(columns, count)]


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
    return _Block(columns=columns, values=saved * max(scale, 0.0), emit=emit, back=back)


def _root(matrix: Float64Array) -> Float64Array:
    values, axes = _eigen(matrix)
    root: Float64Array = (axes * np.sqrt(values)) @ axes.T
    return root


def _eigen(matrix: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Eigenvalues, largest first, and eigenvectors as columns."""
    values, axes = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), axes[:, ::-1]


def _lost(
    trace: FlatTrace, spec: DmtSpec, maps: Sequence[tuple[Float64Array, Float64Array]], rows: slice
) -> float:
    """1 - R^2 of the logits that the network gives on restored embeddings."""
    pooled, restored = trace.pooled[rows], np.empty_like(trace.pooled[rows])
    mean = trace.pooled.mean(axis=0, dtype=np.float64).astype(np.float32)
    for columns, (emit, back) in zip(_columns(spec), maps, strict=True):
        centred = pooled[:, columns] - mean[columns]
        restored[:, columns] = (centred @ emit.T.astype(np.float32)) @ back.T.astype(np.float32)
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
