"""Dense inputs for a sample without data: as large as training saw them, where that is known.

The gradient of dense_arch's first weight W[h, d] is that of the bias times the input x_d. So the
optimizer's accumulators of squared gradients, v(W[h, d]) / v(b[h]), estimate E[x_d^2] (with the
rows weighted by their gradient). Letters: n rows, D dense inputs, h outputs of the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import TensorInfo, read_tensor
from dmt_convert.families import FlatModelInfo, read_initial_value, subtract_initial

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
_LIVE: Final = 1e-3
_CONSTANT: Final = 1e-3
_ROUNDED: Final = 1e-2
_OVER_INITIAL: Final = 0.01
_LARGEST: Final = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseScale:
    """What an optimizer's state tells of the dense inputs."""

    rms: Array
    """Root of E[x_d^2], shape (D,)."""
    constant: npt.NDArray[np.bool_]
    """Whether the input never varied, shape (D,)."""


def draw_dense(info: FlatModelInfo, count: int, rng: np.random.Generator) -> FloatArray:
    """Draw dense inputs, each on its own.

    Click models are fed non-negative inputs, mostly log(1 + count). Where the checkpoint's
    optimizer state tells their size, they are drawn uniformly from [0, sqrt(3) rms]: bounded, so
    that no fit leans on rare large values that are only assumed. Otherwise as log(1 + x) of
    log-normal counts.

    Returns:
        Inputs, shape (n, D), float32.
    """
    width = info.spec.num_dense
    scale = estimate_scale(info)
    if scale is None:
        counts = rng.lognormal(mean=0.5, sigma=1.5, size=(count, width))
        return np.log1p(counts).astype(np.float32)
    drawn = rng.random((count, width)) * np.sqrt(3.0)
    drawn[:, scale.constant] = 1.0
    scaled: FloatArray = (drawn * scale.rms).astype(np.float32)
    return scaled


def estimate_scale(info: FlatModelInfo) -> DenseScale | None:
    """Estimate the size of every dense input; None where the optimizer state does not tell."""
    states = [info.optimizer_state.get(f"dense_arch.0.{kind}") for kind in ("weight", "bias")]
    if states[0] is None or states[1] is None:
        return None
    initial = read_initial_value(info.checkpoint, states[1])
    weight, bias = (_read_gathered(state, initial) for state in states if state is not None)
    sound = all(np.isfinite(v).all() and v.min(initial=0.0) >= 0 for v in (weight, bias))
    # what is little beside the initial value was lost in rounding
    if not sound or bias.max(initial=0.0) <= _OVER_INITIAL * initial:
        return None
    live = bias > max(_LIVE * float(np.median(bias[bias > 0])), _OVER_INITIAL * initial)
    ratio = weight[live] / bias[live, None]
    square = np.median(ratio, axis=0)
    # a constant input scales all gradients alike; one that varies meets each unit in other rows
    spread = np.abs(ratio - square).max(axis=0, initial=0.0)
    rounding = _ROUNDED if states[0].dtype in ("fp16", "bf16") else _CONSTANT
    alike = (spread <= rounding * square) & (len(ratio) > 1)
    return None if square.max() > _LARGEST else DenseScale(rms=np.sqrt(square), constant=alike)


def _read_gathered(state: TensorInfo, initial: float) -> Array:
    values = np.asarray(read_tensor(state), dtype=np.float64)
    return subtract_initial(values, state.dtype, initial)
