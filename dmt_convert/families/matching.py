"""Find the model among a checkpoint's tensors, and give its tensors canonical names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.name_map import is_index, strip_wrappers


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A model found in a checkpoint: one family, one dict, one prefix."""

    family: Architecture
    """The family."""
    container: tuple[str, ...]
    """Keys of the dict that holds the model."""
    prefix: str
    """What stands before the model's own names (wrappers already dropped)."""
    tensors: Mapping[str, TensorInfo]
    """Canonical name -> tensor, in the order of the file."""
    extra: tuple[str, ...]
    """Tensors of the same dict that the family does not know."""
    unsupported: tuple[str, ...]
    """Why some of them cannot be read: variants of the family."""
    parameter_names: tuple[str, ...]
    """Trainer's full names of all tensors of that dict, in file order."""


def find_model(
    checkpoint: FlatCheckpoint, families: tuple[Architecture, ...], config: ModelConfig
) -> Match:
    """Find the one model that the checkpoint holds.

    Raises:
        ArchitectureError: No family knows these names, or several models are there.
    """
    groups: dict[tuple[str, ...], list[TensorInfo]] = {}
    for tensor in checkpoint.tensors:
        groups.setdefault(tensor.container, []).append(tensor)
    if config.family is not None and config.family not in {family.name for family in families}:
        raise ConfigError(
            f"the model config names the family {config.family!r}",
            expected="one of " + ", ".join(family.name for family in families),
            hint="leave it out: the family shows in the names of the tensors",
        )
    candidates: list[tuple[Architecture, tuple[str, ...], str]] = []
    for container, tensors in groups.items():
        if config.container is not None and ".".join(container) != config.container:
            continue
        for family in families:
            prefixes = {
                match.group("prefix"): None
                for tensor in tensors
                if (match := re.fullmatch(family.anchor, strip_wrappers(tensor.name)))
            }
            candidates += [(family, container, prefix) for prefix in prefixes]
    if config.family is not None:
        candidates = [c for c in candidates if c[0].name == config.family]
    if config.prefix is not None:
        wanted = config.prefix.removesuffix(".")
        candidates = [c for c in candidates if c[2].removesuffix(".") == wanted]
    if not candidates:
        raise _no_model(checkpoint, families, config)
    if len(candidates) > 1:
        raise ArchitectureError(
            f"{checkpoint.source} holds {len(candidates)} models",
            expected="one model",
            hint="say which one with --model-config (keys container, prefix, family)",
            details=[
                f"family: {family.name}, container: {'.'.join(container) or '(top)'!r}, "
                f"prefix: {prefix!r}"
                for family, container, prefix in candidates
            ],
        )
    family, container, prefix = candidates[0]
    return _match(family, container, prefix, groups[container], config)


def _match(
    family: Architecture,
    container: tuple[str, ...],
    prefix: str,
    tensors: list[TensorInfo],
    config: ModelConfig,
) -> Match:
    canonical: dict[str, TensorInfo] = {}
    extra: list[str] = []
    unsupported: dict[str, None] = {}
    for tensor in tensors:
        name = strip_wrappers(tensor.name)
        known, target = False, None
        if name.startswith(prefix) and family.describe is not None:
            known, target = True, name.removeprefix(prefix)
        elif name.startswith(prefix):
            known, target = family.names.to_canonical(name.removeprefix(prefix))
        if target is not None and target.startswith("tables.") and family.positional:
            known = is_index(target.split(".")[1])
        if known and target is not None and target not in canonical:
            canonical[target] = tensor
        elif not known and not any(fnmatch(tensor.name, glob) for glob in config.ignore):
            reason = next(
                (
                    why
                    for pattern, why in family.unsupported.items()
                    if re.fullmatch(pattern, name.removeprefix(prefix))
                ),
                None,
            )
            if reason is None:
                extra.append(tensor.name)
            else:
                unsupported[reason] = None
        elif known and target is not None:
            extra.append(tensor.name)  # the same tensor twice under different wrappers
    return Match(
        family=family,
        container=container,
        prefix=prefix,
        tensors=canonical,
        extra=tuple(extra),
        unsupported=tuple(unsupported),
        parameter_names=tuple(tensor.name for tensor in tensors),
    )


def _no_model(
    checkpoint: FlatCheckpoint, families: tuple[Architecture, ...], config: ModelConfig
) -> ArchitectureError:
    chosen = [
        f"{key}={value!r}"
        for key in ("family", "container", "prefix")
        if (value := getattr(config, key)) is not None
    ]
    names = [tensor.path for tensor in checkpoint.tensors]
    details = [*names[:6], f"... and {len(names) - 6} more"] if len(names) > 6 else names
    return ArchitectureError(
        f"{checkpoint.source} ({checkpoint.format}, {len(names)} tensors) holds no model of a "
        f"known family" + (f" with {', '.join(chosen)}" if chosen else ""),
        expected="a checkpoint of " + ", or ".join(family.trainer for family in families),
        hint="if it is one of these models under other names, rename its tensors and save them "
        "again; else its trainer is not supported yet",
        details=details,
    )
