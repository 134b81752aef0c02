"""Which module stands over every tower, what else would fit, and which partition suits it.

The choice is made in three steps: `choose_modules` reads the options before any weight is read;
`start_model` solves the closed form of every candidate and keeps the best; output dims are allotted
to towers if `may_allot` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dmt_convert.config import ConvertConfig
from dmt_convert.families import FlatModelInfo
from dmt_convert.model import TowerModuleSpec, module_spec
from dmt_convert.spec import ModelSpec


def choose_modules(
    info: FlatModelInfo, config: ConvertConfig, num_towers: int
) -> tuple[TowerModuleSpec, ...]:
    """Choose the module of all towers by what the user asks for.

    Args:
        info: The flat model.
        config: What is asked for.
        num_towers: Number of towers.

    Returns:
        The module, and alternatives that emit as little. There are alternatives only if a
        compression is all that the user asks for.

    Raises:
        ConfigError: The settings contradict each other, or do not fit the model.
    """
    module = module_spec(
        info.spec,
        config.tower_module,
        num_towers=num_towers,
        c=config.c,
        p=config.p,
        dim=config.dim,
        compression=config.compression,
    )
    if config.compression is None or config.c is not None or config.p is not None:
        return (module,)
    others = alternative_modules(
        info.spec, module, num_towers=num_towers, compression=config.compression
    )
    return (module, *others)


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
    spec: ModelSpec, modules: Sequence[TowerModuleSpec]
) -> Literal["coherent", "diverse"]:
    """Choose how to partition, if the user does not say.

    A tower that emits combinations of its features loses least if they say much the same to the
    pairs behind it, so features that interact are parted. All other towers keep them together.
    """
    combines = any(each.rules.combines(each) for each in modules)
    pairs = spec.interaction.rules.pairs_vectors
    return "diverse" if combines and pairs else "coherent"


def may_allot(module: TowerModuleSpec, compression: float | None) -> bool:
    """Whether towers may have output dims of their own: if bytes are all that is asked for."""
    return compression is not None or module.rules.restores
