"""Start of a converted model whose interaction begins with a linear layer: cat, projection.

Letters: n rows, N embedding dim, H outputs of all first layers together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dmt_convert.towers.dmt_spec import DmtSpec
from dmt_convert.towers.initialisation.flat_trace import FlatTrace
from dmt_convert.towers.initialisation.linear_start import fit_outputs
from dmt_convert.towers.initialisation.ridge import refit_linear
from dmt_convert.towers.initialisation.start import Start

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
            emits += [x @ emit.T for (emit, _), (_, x) in zip(fitted, blocks, strict=True)]
            blocks = [
                (block - read @ emit, x)
                for (block, x), (emit, read) in zip(blocks, fitted, strict=True)
            ]
        if module.p:
            joined = np.concatenate([block for block, _ in blocks], axis=1)
            x = np.concatenate([x for _, x in blocks], axis=1)
            emit, read = fit_outputs(joined, x, module.p * module.dim)
            state["tower_weight"] = emit
            state["tower_bias"] = np.zeros(len(emit))
            reads.append(read)
            emits.append(x @ emit.T)
        emitted += emits
        modules.append(state)
    return _refit(
        trace, names, np.concatenate(reads, axis=1), np.concatenate(emitted, axis=1), modules
    )


def _refit(
    trace: FlatTrace,
    names: tuple[str, ...],
    prior: Array,
    emitted: npt.NDArray[np.floating],
    modules: list[dict[str, Array]],
) -> Start:
    dense: dict[str, npt.NDArray[np.floating]] = {}
    notes, row = [], 0
    for name in names:
        weight, bias = trace.weights[f"{name}.weight"], trace.weights[f"{name}.bias"]
        target = trace.inputs @ weight.T + bias
        fit = refit_linear(emitted, target, prior[row : row + len(weight)])
        dense[f"{name}.weight"], dense[f"{name}.bias"] = fit.weight, fit.bias
        notes.append(f"{name} refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}")
        row += len(weight)
    return Start(modules=modules, dense=dense, notes=tuple(notes))


def first_layers(spec: DmtSpec) -> tuple[str, ...]:
    """Names of the layers that read the concatenation."""
    if spec.flat.interaction.kind == "projection":
        return ("branch1.0", "branch2.0")
    return ("over_arch.0",)
