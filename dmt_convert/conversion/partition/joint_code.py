"""What linear codes of several features together lose: the closed form's own measure of towers.

A tower emits the leading directions of W^1/2 C W^1/2, C the covariance of its embeddings and W =
E[g g^T] of the logit's gradient by them; what it loses are the eigenvalues left out
(`conversion/initialisation/restored.py`). Here every feature is brought into coordinates in which
its own covariance is the identity and its own W is diagonal. Eigenvalues stay what they are, and
directions that the data never take, or that the logit hardly feels, are left out.

Letters: n rows, M widths' sum of all embeddings, F features, k directions of a feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dmt_convert.arrays import Float32Array, Float64Array, IntArray

_RANK: Final = 1e-6
"""Variance of a direction, as a fraction of the feature's largest, that counts as none."""
_DAMPING: Final = 1e-5
"""Added to covariances, whose diagonal is 1: copies of one feature are not of full rank."""
_UNFELT: Final = 1e-3
"""Felt variance that may be ignored, as a fraction of what single features would lose."""
_TINY: Final = 1e-30
_MOST_DIRECTIONS: Final = 4096
_MATRIX_WIDTH: Final = 2048
"""Directions up to which moments of all pairs are kept: 32 MiB each."""
_PAIR_WORK: Final = 1_000_000_000
"""Cubed widths of the eigenproblems of all pairs, in total."""
_PAIR_BLOCK: Final = 1 << 23
"""Elements of all pairs' matrices that are held at once (64 MiB)."""
_PRICE: Final = 0.25
"""Price of an element, as a fraction of the least one that codes of single features would send:
joint codes need fewer. Chosen on DLRMs of Criteo and MovieLens; only the start depends on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """Embeddings of sampled rows, and what the logit feels of them."""

    pooled: Float32Array
    """Pooled embeddings side by side, shape (n, M)."""
    gradient: Float32Array
    """Gradient of the logit by them, shape (n, M)."""
    dims: tuple[int, ...]
    """Widths of the features' embeddings; their sum is M."""
    joint: bool
    """Whether rows are real. Otherwise features were drawn one by one, and share nothing."""
    spread: float = 1.0
    """Variance of the logit."""

    def only(self, features: Sequence[int]) -> Felt:
        """Return what is felt of some features alone."""
        if len(features) == len(self.dims):
            return self
        begins = np.cumsum([0, *self.dims])
        columns = np.concatenate([np.arange(begins[f], begins[f + 1]) for f in features])
        return replace(
            self,
            pooled=self.pooled[:, columns],
            gradient=self.gradient[:, columns],
            dims=tuple(self.dims[f] for f in features),
        )


class JointCodes:
    """Linear codes of any features together, and what they lose.

    Args:
        felt: Rows to measure on.
        elements: Elements that all towers emit together.
    """

    def __init__(self, felt: Felt, elements: int) -> None:
        self.elements, self.joint, self._rows = elements, felt.joint, len(felt.pooled)
        self._spread = felt.spread or 1.0
        bounds = np.cumsum([0, *felt.dims])
        found = [
            _find_directions(felt.pooled[:, a:b], felt.gradient[:, a:b])
            for a, b in itertools.pairwise(bounds)
        ]
        self.values = [values for _, _, values in found]
        """What the logit feels of every feature's directions, most first."""
        kept, capped = _count_felt(self.values, elements)
        self._ignored = sum(float(v[k:].sum()) for k, v in zip(kept, self.values, strict=True))
        self.measures_loss = not capped or sum(kept) >= 2 * elements
        """Whether what is lost lies in the directions that are kept."""
        self._begins = np.cumsum([0, *kept])
        self._scores, self._slopes = (
            np.concatenate([f[part][:, :k] for f, k in zip(found, kept, strict=True)], axis=1)
            for part in (0, 1)
        )
        self._moments: tuple[Float64Array, Float64Array] | None = None
        if self.width <= _MATRIX_WIDTH:
            self._moments = self._measure(np.arange(self.width), np.arange(self.width))

    @property
    def width(self) -> int:
        """Directions of all features."""
        return int(self._begins[-1])

    def widths(self) -> IntArray:
        """Directions of every feature, shape (F,)."""
        return np.asarray(np.diff(self._begins))

    def solve(self, features: Sequence[int]) -> Float64Array:
        """Eigenvalues of the code of some features, largest first."""
        columns = np.concatenate([np.arange(*self._begins[f : f + 2]) for f in features])
        covariance, weight = self._cross(columns, columns)
        if self.joint:
            covariance.flat[:: len(columns) + 1] += _DAMPING
            lower = np.linalg.cholesky(covariance)
            weight = lower.T @ weight @ lower
        return np.asarray(np.maximum(np.linalg.eigvalsh(weight)[::-1], 0.0))

    def lost(self, spectra: Sequence[Float64Array]) -> float:
        """Loss of towers: eigenvalues left out if those that save most are sent, one each at least.

        It is a part of the logits' variance. Directions that are ignored count as lost.

        Args:
            spectra: Eigenvalues of every tower, largest first.
        """
        rest = np.concatenate([values[1:] for values in spectra])
        left = len(rest) - max(0, self.elements - len(spectra))
        lost = float(np.sort(rest)[:left].sum()) if left > 0 else 0.0
        return (lost + self._ignored) / self._spread

    def price(self, spectra: Sequence[Float64Array]) -> float:
        """The least eigenvalue that is sent: what one element more or less is worth."""
        rest = np.sort(np.concatenate([values[1:] for values in spectra]))[::-1]
        sent = min(max(0, self.elements - len(spectra)), len(rest))
        return float(rest[sent - 1]) if sent else np.inf

    def savings(self) -> Float64Array:
        """What one code for two features saves, against one code each, shape (F, F).

        An element costs the price that it is worth, so a code loses the eigenvalues below the price
        and pays it for all others: sum of min(eigenvalue, price).
        """
        count = len(self.values)
        felt = np.sort(np.concatenate(self.values))[::-1]
        price = _PRICE * float(felt[min(self.elements, len(felt)) - 1])
        pairs = max(1, count * (count - 1) // 2)
        most = max(1, int((_PAIR_WORK / pairs) ** (1 / 3) / 2))
        widths = np.minimum(self.widths(), most)
        k = int(widths.max())
        live = np.arange(k) < widths[:, None]
        columns = np.where(live, self._begins[:-1, None] + np.arange(k), 0)
        values = np.zeros((count, k))
        values[live] = np.concatenate([v[:w] for v, w in zip(self.values, widths, strict=True)])
        alone = np.minimum(values, price).sum(axis=1)
        saved = np.zeros((count, count))
        for rows, others in _blocks(count, max(1, int(np.sqrt(_PAIR_BLOCK / (2 * k) ** 2)))):
            moments = self._cross(columns[rows].ravel(), columns[others].ravel())
            here = np.outer(live[rows], live[others])
            shape = (len(values[rows]), k, len(values[others]), k)
            cross = [np.where(here, m, 0).reshape(shape).swapaxes(1, 2) for m in moments]
            spectra = _solve_pairs(cross[0], cross[1], values[rows], values[others])
            joint = np.minimum(spectra, price).sum(axis=-1)
            saved[rows, others] = alone[rows, None] + alone[others] - joint
            saved[others, rows] = saved[rows, others].T
        np.fill_diagonal(saved, 0)
        return saved

    def _cross(self, rows: IntArray, columns: IntArray) -> tuple[Float64Array, Float64Array]:
        """C and W of some directions with others."""
        if self._moments is None:
            return self._measure(rows, columns)
        chosen = np.ix_(rows, columns)
        return self._moments[0][chosen], self._moments[1][chosen]

    def _measure(self, rows: IntArray, columns: IntArray) -> tuple[Float64Array, Float64Array]:
        weight = self._slopes[:, rows].T @ self._slopes[:, columns] / self._rows
        if self.joint:
            return self._scores[:, rows].T @ self._scores[:, columns] / self._rows, weight
        return (rows[:, None] == columns).astype(np.float64), weight


def _find_directions(
    vectors: Float32Array, gradient: Float32Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Scores of unit variance, the gradient by them, (n, k) each, and what the logit feels, (k,).

    A feature that never varies keeps one direction, which is zero.
    """
    centred = vectors.astype(np.float64)
    centred -= centred.mean(axis=0)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    live = variance > max(_RANK * float(variance[-1]), _TINY)
    live[-1] = True
    size = np.sqrt(np.where(live, np.maximum(variance, _TINY), 1.0))[live]
    slopes = gradient.astype(np.float64) @ (axes[:, live] * size)
    felt, turn = np.linalg.eigh(slopes.T @ slopes / len(slopes))
    turn = turn[:, ::-1]
    scores = centred @ (axes[:, live] / size @ turn)
    values = np.maximum(felt[::-1], 0.0)
    return scores, slopes @ turn, values


def _count_felt(values: Sequence[Float64Array], elements: int) -> tuple[list[int], bool]:
    """How many directions of every feature to keep, one at least; and whether more would count."""
    ordered = np.sort(np.concatenate(values))
    ignored = _UNFELT * ordered[: max(0, len(ordered) - elements)].sum()
    unfelt = int(np.searchsorted(np.cumsum(ordered), ignored, side="right"))
    capped = len(ordered) - unfelt > _MOST_DIRECTIONS
    unfelt = max(unfelt, len(ordered) - _MOST_DIRECTIONS)
    least = ordered[unfelt] if unfelt < len(ordered) else np.inf
    return [max(1, int((own >= least).sum())) for own in values], capped


def _solve_pairs(
    covariance: Float64Array, weight: Float64Array, left: Float64Array, right: Float64Array
) -> Float64Array:
    """Eigenvalues of the codes of pairs of features, shape (A, B, 2 k).

    Args:
        covariance: C of their directions, shape (A, B, k, k).
        weight: W, of the same shape.
        left: Felt directions of the first features, shape (A, k).
        right: Of the others, shape (B, k).
    """
    k = left.shape[1]
    whole = np.zeros((*covariance.shape[:2], 2 * k, 2 * k))
    both = np.zeros_like(whole)
    index = np.arange(k)
    whole[..., :k, :k] = whole[..., k:, k:] = (1 + _DAMPING) * np.eye(k)
    whole[..., k:, :k] = covariance.swapaxes(2, 3)
    both[..., index, index] = left[:, None]
    both[..., k + index, k + index] = right
    both[..., :k, k:] = weight
    both[..., k:, :k] = weight.swapaxes(2, 3)
    if covariance.any():
        lower = np.linalg.cholesky(whole)  # reads the lower triangle
        both = lower.swapaxes(2, 3) @ both @ lower
    return np.maximum(np.linalg.eigvalsh(both), 0.0)


def _blocks(count: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Blocks on and above the diagonal of an (F, F) matrix."""
    edges = [slice(a, min(a + step, count)) for a in range(0, count, step)]
    for i, rows in enumerate(edges):
        for others in edges[i:]:
            yield rows, others
