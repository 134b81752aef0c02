"""Start of a converted model whose interaction begins with a linear layer: cat, projection.

Letters: n rows, N embedding dim, H outputs of all first layers together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.linear_start import fit_outputs
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.conversion.initialisation.start import Start
from dmt_convert.model import DmtSpec

Array = npt.NDArray[np.float64]


def start_linear(trace: FlatTrace, spec: DmtSpec) -> Start:
    """Emit what the first layers read, and refit them on it."""
    names = first_layers(spec)
    layers = [trace.weights[f"{name}.weight"].astype(np.float64) for name in names]
    stacked = np.concatenate(layers)
    starts = np.cumsum([0, *spec.flat.input_dims])
    columns = {
        name: slice(starts[i + 1], starts[i + 2]) for i, name in enumerate(spec.flat.feature_names)
    }
    inputs = trace.inputs
    modules, reads = [], [stacked[:, : starts[1]]]
    emitted: list[npt.NDArray[np.floating]] = [trace.dense]
    for tower in spec.towers:
        module = tower.module
        blocks = [(stacked[:, columns[f]], inputs[:, columns[f]]) for f in tower.features]
        state: dict[str, Array] = {}
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


def _emit(x: npt.NDArray[np.float32], emit: Array) -> npt.NDArray[np.float32]:
    return x @ emit.T.astype(np.float32)


def _refit(
    trace: FlatTrace,
    names: tuple[str, ...],
    prior: Array,
    emitted: npt.NDArray[np.floating],
    targets: list[npt.NDArray[np.float32]],
    modules: list[dict[str, Array]],
) -> Start:
    dense: dict[str, npt.NDArray[np.floating]] = {}
    notes, row = [], 0
    for name, target in zip(names, targets, strict=True):
        count = target.shape[1]
        fit = refit_linear(emitted, target, prior[row : row + count])
        dense[f"{name}.weight"] = fit.weight
        dense[f"{name}.bias"] = fit.bias + trace.weights[f"{name}.bias"]
        notes.append(f"{name} refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}")
        row += count
    return Start(modules=modules, dense=dense, notes=tuple(notes))


def first_layers(spec: DmtSpec) -> tuple[str, ...]:
    """Names of the layers that read the concatenation."""
    if spec.flat.interaction.kind == "projection":
        return ("branch1.0", "branch2.0")
    return ("over_arch.0",)
