"""How much memory a conversion takes, estimated before it begins. No torch.

Tables never count: they stream. What counts is the dense part, which is held several times as
float32, the sample, matrices over all pairs of features, and the blocks in which all else is
computed. `benchmarks/convert_memory.py` compares the estimate with what is measured.

Letters: F features, V vectors that interact, P inputs of over_arch, M sum of the embedding dims.
"""

from __future__ import annotations

import math
from typing import Final

from dmt_convert.config import ConvertConfig
from dmt_convert.conversion.sample import sample_size
from dmt_convert.errors import ConfigError
from dmt_convert.families import FlatModelInfo
from dmt_convert.free_memory import available_bytes, gib
from dmt_convert.model import DmtSpec

_MIB: Final = 1 << 20
_PROGRAM: Final = 350 * _MIB
_ITEM: Final = 4
_BLOCK: Final = 64 * _MIB
_BLOCK_ROWS: Final = 256
_STEP_ROWS: Final = 512
_PAIR_BYTES: Final = 40
"""Bytes per pair of features: affinity, importance, and what they are computed from."""
_SAMPLE_COPIES: Final = 2.5
"""The embeddings of the sample, their gradient, and what towers emit."""
_REFITTED: Final = 6_144
_KEPT: Final = 32 * _MIB
"""Most bytes of the inputs of a refitted layer, kept at once."""
_KEPT_DIRECTIONS: Final = 256 * _MIB
_DIRECTION_BYTES: Final = 32
"""Of a tower's directions, over the square of its width: four eigenproblems, there and back."""
_MOST_DISTILLED: Final = 1_300_000
"""Weights up to which a model is distilled unasked."""


def estimate_memory(flat: FlatModelInfo, spec: DmtSpec, config: ConvertConfig) -> dict[str, int]:
    """Estimate the peak of a conversion in bytes, by purpose.

    Args:
        flat: The flat checkpoint.
        spec: The converted model.
        config: The settings.
    """
    dense, written = dense_bytes(flat), weight_bytes(flat, spec)
    features, width = len(flat.spec.features), sum(flat.spec.input_dims)
    exact = spec.rules.exact
    paired = flat.spec.interaction.rules.pairs_vectors
    interacted = spec.interaction.output_width(spec.interaction_dims)
    rows = sample_size(flat.spec)
    # as built, as solved, and the yardstick
    copies = 1 if exact else 2
    work = min(_BLOCK, _BLOCK_ROWS * width * _ITEM * 8)
    if paired:
        work += min(3 * _BLOCK, 3 * _BLOCK_ROWS * (features + 1) ** 2 * _ITEM)
    if not exact:
        if interacted <= _REFITTED and not spec.keeps_network:
            work += 2 * interacted**2 * 8 + min(_KEPT, rows * interacted * _ITEM)
        if config.distill_steps != 0:
            small = written < _MOST_DISTILLED * _ITEM
            if config.distill_steps is not None or small:
                copies += 5
                work += min(4 * _BLOCK, _STEP_ROWS * (width + interacted) * _ITEM * 8)
        if spec.rules.restores or config.max_auc_loss is not None or config.min_r2 is not None:
            squares = sum(sum(dims) ** 2 for dims in spec.dims_by_tower)
            work += min(_KEPT_DIRECTIONS, _DIRECTION_BYTES * squares)
        if not paired:
            held = max(sum(dims) for dims in spec.dims_by_tower)
            work += 4 * min(rows, held) * held * 8
    return {
        "program": _PROGRAM,
        "dense part": dense + copies * written,
        "sample": int(rows * width * _ITEM * (1.5 if spec.is_passthrough else _SAMPLE_COPIES)),
        "pairs of features": features**2 * _PAIR_BYTES + (interacted * 24 if paired else 0),
        "blocks": work,
    }


def dense_bytes(flat: FlatModelInfo) -> int:
    """Bytes of the flat model's weights outside tables, as float32."""
    return sum(_ITEM * math.prod(tensor.shape) for tensor in flat.dense_tensors.values())


def weight_bytes(flat: FlatModelInfo, spec: DmtSpec) -> int:
    """Bytes of the converted model's weights outside tables, as float32."""
    parameters = 0
    for tower, dims in zip(spec.towers, spec.dims_by_tower, strict=True):
        work = tower.module.rules.work(tower.module, dims)
        parameters += 0 if work is None else work.parameters
        if spec.rules.restores and not tower.everywhere:
            parameters += (tower.module.width(dims) + 1) * sum(dims)
    work = spec.interaction.rules.work(spec.interaction, spec.interaction_dims)
    if spec.keeps_network or work is None:
        return dense_bytes(flat) + parameters * _ITEM
    if spec.dense_dim != flat.spec.input_dims[0]:  # the dense vector is projected
        parameters += (flat.spec.input_dims[0] + 1) * spec.dense_dim
    parameters += work.parameters + spec.over_arch.work.parameters
    return (parameters + spec.flat.dense_arch.work.parameters) * _ITEM


def check_memory(flat: FlatModelInfo, spec: DmtSpec, config: ConvertConfig) -> dict[str, int]:
    """Refuse a conversion that does not fit into the memory that is free; return the estimate.

    Raises:
        ConfigError: It does not.
    """
    needed, free = estimate_memory(flat, spec, config), available_bytes()
    total = sum(needed.values())
    if free is None or total <= free:
        return needed
    parts = ", ".join(f"{name} {gib(size)}" for name, size in needed.items())
    asked = ["leave --distill-steps out"] if config.distill_steps else []
    asked += [] if spec.is_passthrough else ["--tower-module passthrough, which fits nothing"]
    raise ConfigError(
        f"the conversion needs about {gib(total)} of memory ({parts})",
        expected=f"at most the {gib(free)} that are free; tables do not count",
        hint=", or ".join([*asked, "convert on a machine with more memory"]),
    )
