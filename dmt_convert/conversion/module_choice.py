"""Which module stands over every tower, how what it emits travels, and what else would fit.

The choice is made in three steps: `choose_modules` reads the options before any weight is read;
`start_model` solves the closed form of every candidate and keeps the best; bytes are allotted to
towers and their elements on the way, see `how_to_choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from dmt_convert.config import ConvertConfig
from dmt_convert.errors import ConfigError
from dmt_convert.families import FlatModelInfo
from dmt_convert.model import (
    ELEMENT_BYTES,
    Precision,
    TowerCode,
    TowerModuleSpec,
    converted_spec,
    module_spec,
)
from dmt_convert.spec import ModelSpec

if TYPE_CHECKING:
    from dmt_convert.conversion.start import Choice

COMPRESSION: Final = 4.0
"""Default: every element travels as one byte instead of four."""
_UP_TO: Final[dict[Precision, float]] = {"fp32": 1.0, "bf16": 2.0}
"""Compression up to which elements travel in that precision, and none is left out."""
_ELEMENTS_PER_BYTE: Final = 1.5
"""Elements that a byte holds, if those that matter less have 4 bits: between 1 and 2."""
_MAX_FEATURES: Final = 128
"""Features up to which the architecture's own tower modules are tried beside the best one."""


def choose_modules(
    info: FlatModelInfo, config: ConvertConfig, num_towers: int
) -> tuple[TowerModuleSpec, ...]:
    """Choose the module of all towers by what the user asks for.

    Args:
        info: The flat model.
        config: What is asked for.
        num_towers: Number of towers.

    Returns:
        The module, and alternatives that send as little. There are alternatives only if bytes are
        all that the user asks for.

    Raises:
        ConfigError: The settings contradict each other, or do not fit the model.
    """
    if config.tower_module == "auto" and not _is_sized(config):
        return _chosen_by_bytes(info.spec, config, num_towers)
    module = _coded(info.spec, config, num_towers, config.tower_module, _asked_precision(config))
    if config.compression is None or config.c is not None or config.p is not None:
        return (module,)
    return (
        module,
        *alternative_modules(
            info.spec, module, num_towers=num_towers, compression=config.compression
        ),
    )


def how_to_choose(config: ConvertConfig, modules: Sequence[TowerModuleSpec]) -> Choice:
    """Say how bytes are allotted, and which of the candidates is taken."""
    from dmt_convert.conversion.start import Choice

    sized = _is_sized(config)
    by_bytes = config.compression is not None or (config.tower_module == "auto" and not sized)
    return Choice(
        compression=(config.compression or COMPRESSION) if by_bytes else None,
        allot=by_bytes or modules[0].rules.restores,
        mix=config.precision != "int8",
        prefer=config.prefer,
    )


def default_strategy(
    spec: ModelSpec, modules: Sequence[TowerModuleSpec]
) -> Literal["loss", "coherent", "diverse"]:
    """Choose how to partition, if the user does not say.

    If towers may be linear codes of their features, which they are as long as nothing is said of
    modules, the loss of such codes decides.

    A tower that emits combinations of its features loses least if they say much the same to the
    pairs behind it, so features that interact are parted. All other towers keep them together.
    """
    if not modules or any(each.rules.restores for each in modules):
        return "loss"
    combines = any(each.rules.combines(each) for each in modules)
    pairs = spec.interaction.rules.pairs_vectors
    return "diverse" if combines and pairs else "coherent"


def _is_sized(config: ConvertConfig) -> bool:
    """Whether the user sets the size of a tower module."""
    return (config.c, config.p, config.dim) != (None, None, None)


def _asked_precision(config: ConvertConfig) -> Precision:
    """Precision of a module of which the user asks for more than bytes."""
    if config.precision == "auto":
        return "fp32"
    return "int8" if config.precision == "mixed" else config.precision


def _chosen_by_bytes(
    spec: ModelSpec, config: ConvertConfig, num_towers: int
) -> tuple[TowerModuleSpec, ...]:
    """Return linear towers in the precision that loses least, and the architecture's own.

    Fewer bits for all elements cost less than fewer elements, and nothing in computation, as long
    as they are enough: so the elements are cut only once they travel as bytes.
    """
    compression = COMPRESSION if config.compression is None else config.compression
    if config.precision != "auto":
        precision = _asked_precision(config)
    else:
        precision = next((p for p, most in _UP_TO.items() if compression <= most), "int8")
    sized = config.replace(compression=compression, max_auc_loss=None, min_r2=None)
    best = _coded(spec, sized, num_towers, "linear", precision)
    asked = config.compression is not None and len(spec.features) <= _MAX_FEATURES
    if compression <= 1 or config.precision != "auto":
        return (best,)
    if not (asked or config.prefer == "compute"):
        return (best,)
    try:
        own = module_spec(spec, "auto", num_towers=num_towers, compression=compression)
    except ConfigError:  # it cannot send so little
        return (best,)
    others = (own, *alternative_modules(spec, own, num_towers=num_towers, compression=compression))
    return (best, *(other for other in others if other.kind != best.kind))


def _coded(
    spec: ModelSpec, config: ConvertConfig, num_towers: int, kind: str, precision: Precision
) -> TowerModuleSpec:
    """Return a module that emits as many elements as its budget of bytes holds."""
    _check_budget(spec, config.compression, num_towers)
    code = None if precision == "fp32" else TowerCode(precision=precision)
    elements = config.compression
    if elements is not None:
        elements *= ELEMENT_BYTES[precision] / ELEMENT_BYTES["fp32"]
    if code is not None and elements is not None and elements <= 1:
        if kind == "linear":
            return TowerModuleSpec(kind="passthrough", code=code)
        elements = 1.0
    module = module_spec(
        spec,
        kind,
        num_towers=num_towers,
        c=config.c,
        p=config.p,
        dim=config.dim,
        compression=elements,
    )
    return replace(module, code=code)


def _check_budget(spec: ModelSpec, compression: float | None, num_towers: int) -> None:
    """Refuse a compression that no code can reach: every tower sends one byte at least.

    Raises:
        ConfigError: It cannot be reached.
    """
    held = ELEMENT_BYTES["fp32"] * sum(spec.feature_dims)
    if compression is not None and held / compression < num_towers:
        raise ConfigError(
            f"--compression {compression:g} for {num_towers} towers that hold {held:,} bytes: "
            f"they could send {held / compression:.3g} bytes in all",
            expected=f"at most {held / num_towers:g}, a byte for every tower",
            hint="choose a smaller --compression, or fewer --towers",
        )


def alternative_modules(
    spec: ModelSpec, module: TowerModuleSpec, *, num_towers: int, compression: float
) -> tuple[TowerModuleSpec, ...]:
    """Return modules that send as little, for models whose features do not compress one by one.

    Args:
        spec: The flat model.
        module: The module that was chosen.
        num_towers: T.
        compression: What has to be reached, in bytes.
    """
    code = module.code
    if code is not None:
        compression *= ELEMENT_BYTES[code.precision] / ELEMENT_BYTES["fp32"]
    others = module.rules.alternatives(spec, module, num_towers=num_towers, compression=compression)
    return tuple(replace(other, code=code) for other in others)


def planned_elements(
    spec: ModelSpec,
    modules: Sequence[TowerModuleSpec],
    num_towers: int,
    compression: float | None = None,
) -> int:
    """Return how many elements all towers are to emit together, before their features are known.

    Args:
        spec: The flat model.
        modules: Candidates for the tower module; a linear one counts most.
        num_towers: T.
        compression: What to plan for if no module tells, in bytes; 8 by default.
    """
    held = sum(spec.feature_dims)
    ranked = sorted(modules, key=lambda module: not module.rules.restores)
    if not ranked or ranked[0].rules.exact:
        sent = ELEMENT_BYTES["fp32"] * held / (compression or 2 * COMPRESSION)
        return int(min(_ELEMENTS_PER_BYTE * sent, held / 2))
    num_towers = min(num_towers, len(spec.features))
    dealt = tuple(spec.feature_names[t::num_towers] for t in range(num_towers))
    emitted = sum(converted_spec(spec, dealt, ranked[0]).tower_widths)
    code = ranked[0].code
    return emitted if code is None else int(_ELEMENTS_PER_BYTE * emitted)
