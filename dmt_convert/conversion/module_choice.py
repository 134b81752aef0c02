"""Which module stands over every tower, what else would fit, and which partition suits it.

The choice is made in three steps: `choose_modules` reads the options before any weight is read;
`start_model` solves the closed form of every candidate and keeps the best; output dims are allotted
to towers if `may_allot` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dmt_convert.errors import ConfigError
from dmt_convert.families import FlatModelInfo
from dmt_convert.model import TowerModuleSpec, module_spec
from dmt_convert.spec import ModelSpec


def choose_modules(
    info: FlatModelInfo,
    num_towers: int,
    *,
    tower_module: str = "auto",
    c: int | None = None,
    p: int | None = None,
    dim: int | None = None,
    compression: float | None = None,
) -> tuple[TowerModuleSpec, tuple[TowerModuleSpec, ...]]:
    """Choose the module of all towers by what the user asks for.

    Args:
        info: The flat model.
        num_towers: Number of towers.
        tower_module: Kind of module, or `auto`.
        c: Vectors per feature.
        p: Vectors per tower.
        dim: Output dim D.
        compression: Ratio of what would cross hosts to what does; instead of `dim`.

    Returns:
        The module, and alternatives that emit as little. There are alternatives only if a
        compression is all that the user asks for.

    Raises:
        ConfigError: The options contradict each other, or do not fit the model.
    """
    sizes = {"--c": c, "--p": p, "--dim": dim}
    negative = [f"{name} {value}" for name, value in sizes.items() if (value or 0) < 0]
    if negative:
        raise ConfigError(
            ", ".join(negative),
            expected="numbers of vectors and a dim that are not negative",
            hint="the default is --c 1 --p 0 and half the embedding dim",
        )
    module = module_spec(
        info.spec,
        tower_module,
        num_towers=num_towers,
        c=c,
        p=p,
        dim=dim,
        compression=compression,
    )
    if compression is None or c is not None or p is not None:
        return module, ()
    return module, alternative_modules(
        info.spec, module, num_towers=num_towers, compression=compression
    )


def alternative_modules(
    spec: ModelSpec, module: TowerModuleSpec, *, num_towers: int, compression: float
) -> tuple[TowerModuleSpec, ...]:
    """Return modules that emit as little, for models whose features do not compress one by one.

    Args:
        spec: The flat model.
        module: The module that was chosen.
        num_towers: T.
        compression: What has to be reached.
    """
    return module.rules.alternatives(spec, module, num_towers=num_towers, compression=compression)


def default_strategy(
    spec: ModelSpec, module: TowerModuleSpec, alternatives: Sequence[TowerModuleSpec] = ()
) -> Literal["coherent", "diverse"]:
    """Choose how to partition, if the user does not say.

    A tower that emits combinations of its features loses least if they say much the same to the
    pairs behind it, so features that interact are parted. All other towers keep them together.
    """
    combines = any(each.rules.combines(each) for each in (module, *alternatives))
    pairs = spec.interaction.rules.pairs_vectors
    return "diverse" if combines and pairs else "coherent"


def may_allot(module: TowerModuleSpec, compression: float | None) -> bool:
    """Whether towers may have output dims of their own: if bytes are all that is asked for."""
    return compression is not None or module.rules.restores
