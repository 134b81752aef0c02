"""How strongly two features interact: by their embeddings, or by the model's weights.

Letters: n sampled rows, F features, N_f embedding dim of feature f, M sum of the input widths,
r rank of a cross layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from dmt_convert.arrays import Float32Array, FloatArray
from dmt_convert.checkpoint import check_finite, read_tensor
from dmt_convert.config import AffinityKind
from dmt_convert.conversion import Sample
from dmt_convert.errors import ArchitectureError, PartitionError
from dmt_convert.families import FlatModelInfo
from dmt_convert.interactions import pair_rows
from dmt_convert.spec import ModelSpec

PairUse = Callable[[ModelSpec, Mapping[str, FloatArray], Sequence[FloatArray]], FloatArray]
"""Measures the use of all pairs, shape (F, F), from canonical weights and pooled embeddings."""
_BLOCK: Final = 2048
"""Features per side of a block: 16 MB of products; smaller ones drown in BLAS thread hand-offs."""
_CHUNK_ELEMENTS: Final = 1 << 25
"""Elements of stacked embeddings held at once (128 MB)."""
_MAX_ROWS: Final = 1024
_MIN_ROWS: Final = 64
_PAIR_BUDGET: Final = 1 << 31
"""Products of pairs of features, over all rows, that a measurement may take."""


def measure_affinity(info: FlatModelInfo, sample: Sample, kind: AffinityKind) -> Float32Array:
    """Measure how strongly the features of a checkpoint interact.

    Args:
        info: The flat model.
        sample: Rows with their pooled embeddings. At most 1,024 rows are used, and fewer for
            thousands of features, because the cost grows with n F^2.
        kind: `cosine_affinity` or `weights_affinity`.

    Returns:
        Affinity in [0, 1], symmetric, shape (F, F).

    Raises:
        CheckpointError: A weight that is used is NaN or Inf.
    """
    count = len(info.spec.features)
    rows = int(np.clip(_PAIR_BUDGET // count**2, _MIN_ROWS, _MAX_ROWS))
    pooled = [vectors[:rows] for vectors in sample.per_feature(info.spec)]
    if kind == "cosine":
        return cosine_affinity(pooled)
    weights = {}
    for name, tensor in info.dense_tensors.items():
        array = read_tensor(tensor)
        check_finite(array, tensor.path)
        weights[name] = np.asarray(array, dtype=np.float32)
    return weights_affinity(info.spec, weights, pooled)


def cosine_affinity(pooled: Sequence[FloatArray]) -> Float32Array:
    """Mean over a sample of |cos(e_i, e_j)| of the pooled embeddings.

    A row in which either vector is zero does not count for the pair; a pair without any other
    row gets 0. The shorter of two vectors is padded with zeros.

    Args:
        pooled: Pooled embeddings of every feature, each of shape (n, N_f).

    Returns:
        Affinity in [0, 1], shape (F, F), symmetric, diagonal 1.

    Raises:
        PartitionError: The features differ in their number of rows, or have no rows.

    Source: the DMT paper, "Tower Partitioner".
    """
    _check_rows(pooled)
    features = len(pooled)
    total = np.zeros((features, features), dtype=np.float32)
    count = np.zeros((features, features), dtype=np.float32)
    for stacked in _stack_chunks(pooled):
        norms = np.sqrt(np.einsum("nfd,nfd->nf", stacked, stacked))
        seen = norms > 0
        stacked /= np.where(seen, norms, 1)[..., None]
        flags = seen.astype(np.float32)
        count += flags.T @ flags
        for rows, columns in _block_pairs(features):
            block = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
            products = np.empty_like(block)
            for sample in stacked:
                np.matmul(sample[rows], sample[columns].T, out=products)
                block += np.abs(products, out=products)
            total[rows, columns] += block
    for rows, columns in _block_pairs(features):
        total[columns, rows] = total[rows, columns].T
    total /= np.maximum(count, 1)
    np.clip(total, 0, 1, out=total)
    np.fill_diagonal(total, 1)
    # Blocks on the diagonal come out of BLAS symmetric to the last bit only almost.
    return np.asarray((total + total.T) / 2, dtype=np.float32)


def weights_affinity(
    spec: ModelSpec, weights: Mapping[str, FloatArray], pooled: Sequence[FloatArray]
) -> Float32Array:
    """Measure how much the trained model uses every pair of features.

    - dot: the norm of the over_arch's first-layer column of the pair, times the standard
      deviation of the pair's dot over the sample.
    - dcn: sum over cross layers of the norm of block (i, j) of W_l V_l, averaged with block
      (j, i), times the spreads of both pooled embeddings (root of the variance averaged over
      their elements).
    - cat, projection: sum over first-layer units (of both branches) of the product of the
      standard deviations of what i and j add to the unit. With a ReLU, two inputs interact exactly
      if both move the same unit, so this is the Gram matrix of the first layer's blocks, weighted
      by the sample.

    Args:
        spec: The flat model.
        weights: Canonical tensors: `over_arch.0.weight` (dot, cat), `cross.{l}.v` and
            `cross.{l}.w` (dcn), `branch1.0.weight` and `branch2.0.weight` (projection).
        pooled: Pooled embeddings of every feature in model order, each of shape (n, N_f).

    Returns:
        Affinity in [0, 1] (the strongest pair is 1), shape (F, F), symmetric, diagonal 1.

    Raises:
        ArchitectureError: A tensor is missing or has another shape than the spec says.
        PartitionError: The features differ in their number of rows, or have no rows; or the
            interaction's weights do not show which pairs it uses.
    """
    _check_rows(pooled)
    _check_widths(pooled, spec)
    if not tells_pairs(spec):
        raise PartitionError(
            f"--affinity weights for a model with {spec.interaction.kind} interaction",
            expected="an interaction whose weights show how much each pair of features is used: "
            + ", ".join(_PAIR_USES),
            hint="use --affinity cosine",
        )
    use = _PAIR_USES[spec.interaction.kind](spec, weights, pooled)
    np.fill_diagonal(use, 0)
    affinity = use
    affinity /= float(use.max(initial=0.0)) or 1.0
    np.fill_diagonal(affinity, 1)
    return np.asarray(affinity, dtype=np.float32)


def _dot_use(
    spec: ModelSpec, weights: Mapping[str, FloatArray], pooled: Sequence[FloatArray]
) -> FloatArray:
    first = _tensor(weights, "over_arch.0.weight", spec)
    count, begin = len(spec.input_dims), spec.input_dims[0]
    interaction = spec.interaction
    norms = np.zeros((count, count))
    for row in pair_rows(count, interaction.pair_order, self_pairs=interaction.self_pairs):
        columns = first[:, begin:][:, row.columns].astype(np.float64)
        own = np.sqrt(np.einsum("op,op->p", columns, columns))
        norms[row.vector, row.others] = norms[row.others, row.vector] = own
    use = norms[1:, 1:]
    use *= _dot_spread(pooled)
    return use


def _dot_spread(pooled: Sequence[FloatArray]) -> FloatArray:
    """Standard deviation of every pair's dot over the sample, shape (F, F).

    Dots are taken relative to the first row's: the variance stays the same, and a small spread
    around a large mean does not lose its digits. With o the first row's embeddings and e = o + d,
    <e_i, e_j> - <o_i, o_j> = <[e_i, d_i], [d_j, o_j]>, one product without any cancellation.
    Embeddings are scaled to 1 by powers of two, exactly, so that no square overflows float32.
    """
    features, rows_seen = len(pooled), len(pooled[0])
    exponents = np.array([int(np.frexp(np.abs(e).max(initial=0.0))[1]) for e in pooled])
    scale = np.ldexp(1.0, exponents)
    pooled = [np.ldexp(e, -power) for e, power in zip(pooled, exponents, strict=True)]
    total = np.zeros((features, features), dtype=np.float32)
    squares = np.zeros((features, features), dtype=np.float32)
    origin = next(_stack_chunks([e[:1] for e in pooled]))[0]
    for stacked in _stack_chunks(pooled):
        for rows, columns in _block_pairs(features):
            products = np.empty_like(total[rows, columns], order="C")
            for sample in stacked:
                moved = sample - origin
                left = np.concatenate([sample[rows], moved[rows]], axis=1)
                right = np.concatenate([moved[columns], origin[columns]], axis=1)
                np.matmul(left, right.T, out=products)
                total[rows, columns] += products
                squares[rows, columns] += np.square(products, out=products)
    spread = np.empty((features, features))
    for rows, columns in _block_pairs(features):
        mean = total[rows, columns].astype(np.float64) / rows_seen
        variance = squares[rows, columns] / rows_seen - mean**2
        spread[rows, columns] = np.sqrt(np.maximum(variance, 0))
        spread[rows, columns] *= scale[rows, None] * scale[columns]
        spread[columns, rows] = spread[rows, columns].T
    return spread


def _cross_use(
    spec: ModelSpec, weights: Mapping[str, FloatArray], pooled: Sequence[FloatArray]
) -> FloatArray:
    spread = np.array([np.sqrt(e.var(axis=0, dtype=np.float64).mean()) for e in pooled])
    use = np.zeros((len(pooled), len(pooled)))
    for layer in range(spec.interaction.cross_layers):
        w = _tensor(weights, f"cross.{layer}.w", spec)
        v = _tensor(weights, f"cross.{layer}.v", spec)
        use += _block_norms(w, v, _bounds(spec))
    return np.asarray((use + use.T) / 2 * np.outer(spread, spread))


def _block_norms(w: FloatArray, v: FloatArray, bounds: Sequence[int]) -> FloatArray:
    """Frobenius norm of every block W_i V_j, without the (M, M) product.

    ||W_i V_j||^2 = tr((W_i' W_i)(V_j V_j')). The first of the two rank axes is cut into slices, so
    that only a few rows of all Gram matrices exist at once.
    """
    features, rank = len(bounds) - 1, w.shape[1]
    blocks = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    step = max(1, _CHUNK_ELEMENTS // max(1, 4 * features * rank))
    w, v = w.astype(np.float64), v.astype(np.float64)
    squares = np.zeros((features, features))
    for start in range(0, rank, step):
        part = slice(start, start + step)
        grams_w = np.stack([(w[b, part].T @ w[b]).ravel() for b in blocks])
        grams_v = np.stack([(v[part, b] @ v[:, b].T).ravel() for b in blocks])
        squares += grams_w @ grams_v.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _shared_unit_use(
    spec: ModelSpec, weights: Mapping[str, FloatArray], pooled: Sequence[FloatArray]
) -> FloatArray:
    bounds = _bounds(spec)
    layers = [
        _tensor(weights, f"{name}.weight", spec) for name in spec.interaction.rules.input_layers
    ]
    layer = np.concatenate(layers).astype(np.float64)
    moved = np.stack(
        [
            (e.astype(np.float64) @ layer[:, a:b].T).std(axis=0)
            for e, a, b in zip(pooled, bounds[:-1], bounds[1:], strict=True)
        ]
    )
    return np.asarray(moved @ moved.T)


_PAIR_USES: Final[Mapping[str, PairUse]] = {
    "dot": _dot_use,
    "dcn": _cross_use,
    "cat": _shared_unit_use,
    "projection": _shared_unit_use,
}
"""Interactions whose weights show how much each pair of features is used."""


def tells_pairs(spec: ModelSpec) -> bool:
    """Whether `weights_affinity` can be measured on a model."""
    return spec.interaction.kind in _PAIR_USES


def _bounds(spec: ModelSpec) -> list[int]:
    """Offsets of the features' blocks among the M inputs (dense comes first), then M."""
    return [int(b) for b in np.cumsum(spec.input_dims)]


def _tensor(weights: Mapping[str, FloatArray], name: str, spec: ModelSpec) -> FloatArray:
    width, rank = sum(spec.input_dims), spec.interaction.cross_rank
    if name == "over_arch.0.weight":
        expected = (spec.over_arch.widths[1], spec.over_arch.widths[0])
    elif name.startswith("cross."):
        expected = (rank, width) if name.endswith(".v") else (width, rank)
    else:
        branch = spec.interaction.branch1 if "1" in name[:7] else spec.interaction.branch2
        assert branch is not None
        expected = (branch.widths[1], branch.widths[0])
    if name not in weights or weights[name].shape != expected:
        found = "is missing" if name not in weights else f"has shape {weights[name].shape}"
        raise ArchitectureError(
            f"tensor {name} {found}",
            expected=f"shape {expected}",
            hint="pass the model's canonical tensors, or use --affinity cosine",
        )
    return weights[name]


def _check_rows(pooled: Sequence[FloatArray]) -> None:
    rows = sorted({len(e) for e in pooled})
    if len(rows) != 1 or rows[0] == 0:
        raise PartitionError(
            f"samples of {rows} rows for {len(pooled)} features",
            expected="the same number of rows, at least one, for every feature",
            hint="sample all features from the same rows",
        )


def _check_widths(pooled: Sequence[FloatArray], spec: ModelSpec) -> None:
    if tuple(e.shape[1] for e in pooled) != spec.feature_dims:
        raise PartitionError(
            f"sampled embeddings of widths {sorted({e.shape[1] for e in pooled})} for "
            f"{len(pooled)} features",
            expected=f"one sample per feature ({len(spec.features)}), as wide as its table",
            hint="sample the embeddings from the same model",
        )


def _stack_chunks(pooled: Sequence[FloatArray]) -> Iterator[Float32Array]:
    """Yield all features side by side, zero-padded, a few rows at a time: (rows, F, N_max)."""
    rows, width = len(pooled[0]), max(e.shape[1] for e in pooled)
    step = max(1, _CHUNK_ELEMENTS // (len(pooled) * width))
    for start in range(0, rows, step):
        chunk = np.zeros((min(step, rows - start), len(pooled), width), dtype=np.float32)
        for f, e in enumerate(pooled):
            chunk[:, f, : e.shape[1]] = e[start : start + step]
        yield chunk


def _block_pairs(features: int) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks on and above the diagonal of an (F, F) matrix."""
    edges = [slice(a, min(a + _BLOCK, features)) for a in range(0, features, _BLOCK)]
    for i, rows in enumerate(edges):
        for columns in edges[i:]:
            yield rows, columns
