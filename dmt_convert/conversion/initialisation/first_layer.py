"""Closed form for interactions whose first layer is linear in the embeddings (cat, projection).

That layer reads A x; what matters of a feature's embedding e_f is A_f e_f alone. The leading
left singular vectors U of A_f C_f^(1/2) say which combinations of outputs a feature reaches:
emit y = U^T A_f e_f and read it back through U. Exact once the output dim reaches A_f's rank.

Letters: n rows, N embedding dim, H outputs of all first layers together, k elements emitted.
"""

from __future__ import annotations

import numpy as np

from dmt_convert.arrays import Float32Array, Float64Array, FloatArray, IntArray
from dmt_convert.conversion.initialisation.closed_form import (
    ClosedForm,
    Loss,
    Start,
    every_step,
    sum_of_curves,
)
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.model import DmtSpec


class FirstLayerForm(ClosedForm):
    """Towers emit what the first layers read, and these are refitted on it."""

    def fits(self, spec: DmtSpec) -> bool:
        """Dlrm tower modules in front of layers that read all inputs side by side."""
        rules = spec.flat.interaction.rules
        return spec.kind == "dlrm" and bool(rules.input_layers) and not rules.pairs_vectors

    def start(self, trace: FlatTrace, spec: DmtSpec) -> Start:
        """Emit what the first layers read, and refit them on it."""
        return _start(trace, spec)

    def tower_loss(self, trace: FlatTrace, spec: DmtSpec) -> Loss | None:
        """Sum of the features' losses by the number of elements that each emits."""
        if spec.towers[0].module.p:
            return None
        columns = spec.flat.feature_columns
        curves = []
        for tower in spec.towers:
            blocks = [np.array(columns[name]) for name in tower.features]
            losses = _feature_losses(trace, spec, blocks)
            curves.append(every_step(losses, max(1, tower.module.c)))
        return sum_of_curves(curves)


def _start(trace: FlatTrace, spec: DmtSpec) -> Start:
    """Emit what the first layers read, and refit them on it."""
    names = spec.flat.interaction.rules.input_layers
    layers = [trace.weights[f"{name}.weight"].astype(np.float64) for name in names]
    stacked = np.concatenate(layers)
    starts = np.cumsum([0, *spec.flat.input_dims])
    columns = {
        name: slice(starts[i + 1], starts[i + 2]) for i, name in enumerate(spec.flat.feature_names)
    }
    inputs = trace.inputs
    modules, reads = [], [stacked[:, : starts[1]]]
    emitted: list[FloatArray] = [trace.dense]
    for tower in spec.towers:
        module = tower.module
        blocks = [(stacked[:, columns[f]], inputs[:, columns[f]]) for f in tower.features]
        state: dict[str, Float64Array] = {}
        emits = []
        if module.c:
            width = module.c * module.dim
            fitted = [fit_outputs(block, x, width) for block, x in blocks]
            state["feature_weight"] = np.concatenate([emit.T for emit, _ in fitted])
            state["feature_bias"] = np.zeros((len(blocks), width))
            reads += [read for _, read in fitted]
            emits += [_emit(x, emit) for (emit, _), (_, x) in zip(fitted, blocks, strict=True)]
        if module.p:
            if module.c:  # the tower's vectors carry what its features' own leave
                blocks = [
                    (block - read @ emit, x)
                    for (block, x), (emit, read) in zip(blocks, fitted, strict=True)
                ]
            joined = np.concatenate([block for block, _ in blocks], axis=1)
            x = np.concatenate([x for _, x in blocks], axis=1)
            emit, read = fit_outputs(joined, x, module.p * module.dim)
            state["tower_weight"] = emit
            state["tower_bias"] = np.zeros(len(emit))
            reads.append(read)
            emits.append(_emit(x, emit))
        emitted += emits
        modules.append(state)
    prior = np.concatenate(reads, axis=1)
    targets = [inputs @ trace.weights[f"{name}.weight"].T for name in names]
    del inputs, blocks
    return _refit(trace, names, prior, np.concatenate(emitted, axis=1), targets, modules)


def _emit(x: Float32Array, emit: Float64Array) -> Float32Array:
    return x @ emit.T.astype(np.float32)


def _refit(
    trace: FlatTrace,
    names: tuple[str, ...],
    prior: Float64Array,
    emitted: FloatArray,
    targets: list[Float32Array],
    modules: list[dict[str, Float64Array]],
) -> Start:
    dense: dict[str, FloatArray] = {}
    notes, row = [], 0
    for name, target in zip(names, targets, strict=True):
        count = target.shape[1]
        fit = refit_linear(emitted, target, prior[row : row + count])
        dense[f"{name}.weight"] = fit.weight
        dense[f"{name}.bias"] = fit.bias + trace.weights[f"{name}.bias"]
        notes.append(f"{name} refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}")
        row += count
    return Start(modules=modules, dense=dense, notes=tuple(notes))


def _feature_losses(trace: FlatTrace, spec: DmtSpec, blocks: list[IntArray]) -> Float64Array:
    """Return the loss if every feature of a tower emits 0, 1, ... elements."""
    dense = spec.flat.input_dims[0]
    layers = [trace.weights[f"{name}.weight"] for name in spec.flat.interaction.rules.input_layers]
    stacked = np.concatenate(layers).astype(np.float64)
    each = [output_losses(stacked[:, dense + own], trace.pooled[:, own]) for own in blocks]
    length = max(len(curve) for curve in each)
    total: Float64Array = np.sum(
        [np.pad(curve, (0, length - len(curve))) for curve in each], axis=0
    )
    return total


def fit_outputs(
    block: Float64Array, x: Float32Array, width: int
) -> tuple[Float64Array, Float64Array]:
    """Compress one block of columns of the first layer.

    Args:
        block: A_f, shape (H, N): the layer's columns for this feature (or tower).
        x: Its embeddings on sampled rows, shape (n, N).
        width: k, elements to emit.

    Returns:
        The emitting map (k, N) and the reading map (H, k). Emitted coordinates have unit
        variance if they vary at all; coordinates beyond the block's rank are zero.
    """
    axes, values = _principal_axes(block, x)
    take = min(width, len(values))
    leading, spread = axes[:, :take], values[:take]
    live = spread > 1e-7 * max(float(spread.max(initial=0.0)), 1e-30)
    scale = np.where(live, spread, 1.0)
    emit = np.zeros((width, block.shape[1]))
    read = np.zeros((block.shape[0], width))
    emit[:take] = np.where(live[:, None], leading.T @ block / scale[:, None], 0.0)
    read[:, :take] = np.where(live, leading * scale, 0.0)
    return emit, read


def output_losses(block: Float64Array, x: Float32Array) -> Float64Array:
    """Variance of the outputs that 0, 1, ... emitted elements leave out, as `fit_outputs` does.

    Args:
        block: A_f, shape (H, N).
        x: Embeddings on sampled rows, shape (n, N).

    Returns:
        Shape (min(H, N) + 1,), falling to 0.
    """
    _, spread = _principal_axes(block, x)
    return np.append(np.cumsum(np.square(spread)[::-1])[::-1], 0.0)


def _principal_axes(block: Float64Array, x: Float32Array) -> tuple[Float64Array, Float64Array]:
    """Principal axes of block x as columns, and the spread along each, largest first.

    By way of whichever covariance is smaller: that of x, or that of the outputs.
    """
    if block.shape[1] < block.shape[0]:
        values, axes = _eigen(x.astype(np.float64))
        left, spread, _ = np.linalg.svd(block @ (axes * np.sqrt(values)), full_matrices=False)
        return left, spread
    values, axes = _eigen(x.astype(np.float64) @ block.T)
    return axes, np.sqrt(values)


def _eigen(samples: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Eigenvalues of the covariance, largest first, and eigenvectors as columns."""
    centred = samples - samples.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred / max(1, len(samples)))
    return np.maximum(values[::-1], 0.0), axes[:, ::-1]
