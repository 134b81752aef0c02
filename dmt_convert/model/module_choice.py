"""Which module stands over every tower: what the user asks for, and what else would fit. No torch.

Letters: F features, N embedding dim, T towers, K_t vectors that a tower emits, D output dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from dmt_convert.errors import ConfigError
from dmt_convert.model.dmt_spec import DmtSpec, TowerModuleSpec, TowerSpec
from dmt_convert.spec import ModelSpec

_MAX_FEATURES: Final = 128
"""Features up to which alternatives are tried: each costs one more closed form."""


def module_spec(
    spec: ModelSpec,
    kind: Literal["auto", "passthrough", "dlrm", "dcn", "linear"],
    *,
    num_towers: int,
    c: int | None = None,
    p: int | None = None,
    dim: int | None = None,
    compression: float | None = None,
) -> TowerModuleSpec:
    """Choose a tower module.

    `auto` is the architecture's own: dcn for DCNv2, linear for networks, dlrm for all others; with
    nothing else said c = 1, p = 0, D = N / 2 (compression 2), or 1 where that is less.

    Args:
        spec: The flat model.
        kind: Kind of module.
        num_towers: Number of towers.
        c: Vectors per feature.
        p: Vectors per tower.
        dim: Output dim D.
        compression: Ratio of what would cross hosts to what does; instead of `dim`.

    Raises:
        ConfigError: The options contradict each other or cannot be had.
    """
    own = {"dcn": "dcn", "network": "linear"}.get(spec.interaction.kind, "dlrm")
    chosen = own if kind == "auto" else kind
    if chosen == "passthrough":
        if any(value is not None for value in (c, p, dim, compression)):
            raise ConfigError(
                "--tower-module passthrough with --c, --p, --dim or --compression",
                expected="no compression: passthrough emits the embeddings as they are",
                hint="leave these options out, or choose --tower-module auto",
            )
        return TowerModuleSpec(kind="passthrough")
    if chosen not in (own, "linear"):
        raise ConfigError(
            f"--tower-module {chosen} for a model with {spec.interaction.kind} interaction",
            expected=" or ".join(dict.fromkeys((f"--tower-module {own}", "linear", "passthrough"))),
            hint="leave --tower-module at auto",
        )
    if chosen == "linear":
        return _linear_module(spec, num_towers, c=c, p=p, dim=dim, compression=compression)
    if chosen == "dcn" and (c not in (None, 1) or p not in (None, 0)):
        raise ConfigError(
            f"a dcn tower module with c={c}, p={p}",
            expected="one vector per feature (c = 1, p = 0)",
            hint="set its size with --dim or --compression",
        )
    if dim is not None and compression is not None:
        raise ConfigError(
            f"--dim {dim} and --compression {compression:g} together",
            expected="one of the two",
            hint="--dim sets D, --compression computes it",
        )
    per_feature, per_tower = 1 if c is None else c, 0 if p is None else p
    if dim is None:
        ratio = 2.0 if compression is None else compression
        if compression is None and (c, p) == (None, None):
            ratio = min(ratio, sum(spec.feature_dims) / len(spec.features))
        dim = _dim_for(spec, num_towers, per_feature, per_tower, ratio)
    if chosen == "dcn":
        rank = min(spec.interaction.cross_rank, max(spec.feature_dims))
        return TowerModuleSpec(kind="dcn", dim=dim, cross_layers=1, cross_rank=rank)
    return TowerModuleSpec(kind="dlrm", c=per_feature, p=per_tower, dim=dim)


def _linear_module(
    spec: ModelSpec,
    num_towers: int,
    *,
    c: int | None,
    p: int | None,
    dim: int | None,
    compression: float | None,
) -> TowerModuleSpec:
    """Choose the elements that a tower emits on average; compression 1 is passthrough."""
    if c is not None or p is not None or (dim is not None and compression is not None):
        raise ConfigError(
            "a linear tower module with --c or --p, or with both --dim and --compression",
            expected="--dim D, the elements that a tower emits, or --compression",
            hint="2 is the default compression",
        )
    if compression == 1:
        return TowerModuleSpec(kind="passthrough")
    if dim is None:
        ratio = 2.0 if compression is None else compression
        dim = int(sum(spec.feature_dims) / (num_towers * ratio) + 1e-9) if ratio > 1 else 0
        dim = max(dim, 1) if compression is None else dim
    if dim < 1:
        raise ConfigError(
            f"--compression {compression or 0:g} for {num_towers} towers that hold "
            f"{sum(spec.feature_dims)} elements",
            expected=f"between 1 and {sum(spec.feature_dims) / num_towers:g}",
            hint="2 is the default; 4 and 8 trade quality for bytes",
        )
    return TowerModuleSpec(kind="linear", dim=dim)


def converted_spec(
    flat: ModelSpec, towers: Sequence[tuple[str, ...]], module: TowerModuleSpec
) -> DmtSpec:
    """Put a module over every tower; a linear one emits in proportion to what its tower holds.

    Args:
        flat: The flat model.
        towers: Features of every tower.
        module: What `module_spec` chose; a linear one's D is the mean over the towers.
    """
    modules = [module] * len(towers)
    if module.kind == "linear":
        dims = dict(zip(flat.feature_names, flat.feature_dims, strict=True))
        widths = [sum(dims[name] for name in features) for features in towers]
        share = module.dim * len(widths) / sum(widths)
        modules = [
            replace(module, dim=min(width, max(1, int(width * share + 1e-9)))) for width in widths
        ]
    pairs = zip(towers, modules, strict=True)
    return DmtSpec(
        flat=flat, towers=tuple(TowerSpec(features=names, module=own) for names, own in pairs)
    )


def _dim_for(spec: ModelSpec, num_towers: int, c: int, p: int, compression: float) -> int:
    """Return the largest D that compresses at least so much: sum N_f / ((c F + p T) D)."""
    vectors = c * len(spec.features) + p * num_towers
    total = sum(spec.feature_dims)
    dim = int(total / (vectors * compression) + 1e-9) if vectors > 0 and compression > 0 else 0
    if compression < 1 or dim < 1:
        raise ConfigError(
            f"--compression {compression:g} with {vectors} vectors out of {num_towers} towers",
            expected=f"between 1 and {total / max(vectors, 1):g}",
            hint="2 is the default; 4 and 8 trade quality for bytes; --c and --p set the number "
            "of vectors",
        )
    return dim


def alternative_modules(
    spec: ModelSpec, module: TowerModuleSpec, *, num_towers: int, compression: float
) -> tuple[TowerModuleSpec, ...]:
    """Modules that emit as little, for a model whose features do not compress one by one.

    For dot interaction a tower may emit p combinations of its features of nearly N elements each
    (c = 0) instead of one short vector per feature: better where the embeddings need all their
    dims but the towers hold features that say much the same.

    Args:
        spec: The flat model.
        module: What `module_spec` chose.
        num_towers: T.
        compression: What has to be reached.
    """
    features, dim = len(spec.features), spec.input_dims[0]
    if module.kind != "dlrm" or spec.interaction.kind != "dot" or features > _MAX_FEATURES:
        return ()
    fewest = math.ceil(features / (num_towers * compression))
    choices = {fewest, 2 * fewest}
    found = []
    for p in sorted(choices):
        width = min(dim, int(features * dim / (p * num_towers * compression) + 1e-9))
        if p <= features // num_towers and width >= 1:
            found.append(TowerModuleSpec(kind="dlrm", c=0, p=p, dim=width))
    return tuple(found)
