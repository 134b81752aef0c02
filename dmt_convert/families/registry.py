"""All families, and the way from a checkpoint to a model of one of them."""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import replace
from typing import Final

from dmt_convert.checkpoint import FlatCheckpoint, merge_dicts
from dmt_convert.documents import InputRecord
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.averages import check_averages
from dmt_convert.families.captured_model import describe_captured
from dmt_convert.families.deepctr import DEEPCTR
from dmt_convert.families.facebook import FACEBOOK_DLRM
from dmt_convert.families.family import Family
from dmt_convert.families.fuxictr import FUXICTR
from dmt_convert.families.hugectr import HUGECTR
from dmt_convert.families.leftovers import (
    DESCRIBE_IT,
    check_remapping,
    counter_of,
    list_parts,
    list_unread,
)
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_info import FlatModelInfo, ModelPlace
from dmt_convert.families.name_map import strip_wrappers
from dmt_convert.families.nvidia import NVIDIA_DLRM
from dmt_convert.families.torcheasyrec import TORCHEASYREC
from dmt_convert.families.torchrec import TORCHREC_DLRM
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.families.user_model import user_family
from dmt_convert.plugins import load_plugins
from dmt_convert.spec import ModelSpec

FAMILIES: Final[tuple[Family, ...]] = (
    TORCHREC_DLRM,
    FACEBOOK_DLRM,
    NVIDIA_DLRM,
    DEEPCTR,
    FUXICTR,
    TORCHEASYREC,
    HUGECTR,
)
"""The families of this package; see `list_families` for those of others."""
_log = logging.getLogger(__name__)
_MAX_PLACES: Final = 100
"""Places of a model up to which it is looked at which are parts of others."""


def infer_model(checkpoint: FlatCheckpoint, config: ModelConfig | None = None) -> FlatModelInfo:
    """Understand a flat checkpoint from its headers.

    Args:
        checkpoint: An opened checkpoint.
        config: What the user says about the model.

    Raises:
        ArchitectureError: The checkpoint does not hold a model of a known family, or not a whole
            one; every missing, extra and misshapen tensor is listed.
        ConfigError: What the user says does not fit the checkpoint, or a plugin is broken.
    """
    config = config or ModelConfig()
    try:
        return _infer(checkpoint, config)
    except ArchitectureError:
        if config.container is None and config.builder is None:
            for merged in merge_dicts(checkpoint):
                with contextlib.suppress(ArchitectureError):
                    return _infer(merged, config)
        raise


def _infer(checkpoint: FlatCheckpoint, config: ModelConfig) -> FlatModelInfo:
    """Understand a checkpoint whose model lies in one dict."""
    family: Family
    if config.builder is not None:
        return _name_dense(describe_captured(checkpoint, config), config.dense_features)
    if config.adapter is not None:
        user = user_family(config.adapter)
        family, place = user, user.find(checkpoint, config)
    else:
        family, place = find_model(checkpoint, list_families(), config)
    check_averages(checkpoint, place, config)
    source = TrainerTensors(
        family=family.name,
        trainer=family.trainer,
        checkpoint=checkpoint,
        place=place,
        config=config,
        anchor=family.anchor,
    )
    info = _name_dense(family.describe(source), config.dense_features)
    if info.ignored_tensors:
        names = ", ".join(tensor.name for tensor in info.ignored_tensors[:5])
        more = f" and {len(info.ignored_tensors) - 5} more" if len(info.ignored_tensors) > 5 else ""
        count = len(info.ignored_tensors)
        verb = "tensor is" if count == 1 else "tensors are"
        _log.info("%d %s passed over: %s%s", count, verb, names, more)
    return info


def _name_dense(info: FlatModelInfo, names: tuple[str, ...] | None) -> FlatModelInfo:
    """Give the dense inputs the names that the user says they have.

    Raises:
        ConfigError: There are more or fewer names than inputs, or one is named twice.
    """
    if names is None:
        return info
    if len(names) != info.spec.num_dense or len({*names}) < len(names):
        raise ConfigError(
            f"dense_features of the model config has {len({*names})} different names",
            expected=f"a name for each of the model's {info.spec.num_dense} dense inputs",
            hint="list the columns of the data in the order of training",
        )
    return replace(info, inputs=InputRecord(dense=names))


def infer_spec(checkpoint: FlatCheckpoint, config: ModelConfig | None = None) -> ModelSpec:
    """Return only the spec; see `infer_model`."""
    return infer_model(checkpoint, config).spec


def list_families() -> tuple[Family, ...]:
    """Return `FAMILIES` and those that other installed packages add.

    A package adds a family by an entry point of the group `dmt_convert.families` that points to
    an instance of `Family`.

    Raises:
        ConfigError: An entry point cannot be loaded, is not a family, or has a name that is taken.
    """
    families, owners = [*FAMILIES], dict.fromkeys([f.name for f in FAMILIES], "dmt-convert")
    for plugin in load_plugins("dmt_convert.families"):
        family = plugin.value
        if not isinstance(family, Family):
            raise plugin.refuse(
                f"points to an object of type {type(family).__name__}",
                expected="an instance of dmt_convert.families.Family, such as a DlrmFamily",
            )
        if family.name in owners:
            raise plugin.refuse(
                f"adds the family {family.name!r}, which {owners[family.name]} has already",
                expected="a name that no other family has",
            )
        families.append(family)
        owners[family.name] = plugin.distribution
    return tuple(families)


def find_model(
    checkpoint: FlatCheckpoint, families: tuple[Family, ...], config: ModelConfig
) -> tuple[Family, ModelPlace]:
    """Find the one model that the checkpoint holds: its family, and where it is.

    Args:
        checkpoint: The checkpoint.
        families: The families to try.
        config: What the user says: `family`, `container` and `prefix` restrict the search.

    Raises:
        ArchitectureError: No family knows the names of the tensors, or there are several models.
        ConfigError: The user names a family that does not exist.
    """
    names = [family.name for family in families]
    if config.family is not None and config.family not in names:
        raise ConfigError(
            f"the model config names the family {config.family!r}",
            expected="one of " + ", ".join(names),
            hint="leave it out: the family shows in the names of the tensors",
        )
    candidates = [
        (family, place)
        for family in families
        if config.family in (None, family.name)
        for place in _drop_parts(checkpoint, family.matches(checkpoint))
        if config.container in (None, ".".join(place.container))
        and (
            config.prefix is None
            or config.prefix.removesuffix(".") == place.prefix.removesuffix(".")
        )
    ]
    if not candidates:
        raise _no_model(checkpoint, families, config)
    if len(candidates) > 1:
        raise ArchitectureError(
            f"{checkpoint.source} holds {len(candidates)} models",
            expected="one model",
            hint="say which one with --model-config (keys container, prefix, family)",
            details=[
                f"family: {family.name}, container: {'.'.join(place.container) or '(top)'!r}, "
                f"prefix: {place.prefix!r}"
                for family, place in candidates
            ],
        )
    return candidates[0]


def _drop_parts(checkpoint: FlatCheckpoint, places: list[ModelPlace]) -> list[ModelPlace]:
    """Leave out the places inside another model's modules: they are its parts.

    A place that holds the same tensors as all that surrounds it stays: it is a copy, such as the
    averaged weights, and only the user knows which one is meant.
    """
    if len(places) > _MAX_PLACES:
        return places
    kept = []
    for place in places:
        around = [
            other
            for other in places
            if other.container == place.container
            and other.prefix != place.prefix
            and place.prefix.startswith(other.prefix)
        ]
        if not around or all(_is_copy(checkpoint, place, other) for other in around):
            kept.append(place)
    return kept


def _is_copy(checkpoint: FlatCheckpoint, inner: ModelPlace, outer: ModelPlace) -> bool:
    names = [
        strip_wrappers(info.name)
        for info in checkpoint.tensors
        if info.container == inner.container and counter_of(info) is None
    ]
    copied = {n.removeprefix(inner.prefix) for n in names if n.startswith(inner.prefix)}
    own = {
        n.removeprefix(outer.prefix)
        for n in names
        if n.startswith(outer.prefix) and not n.startswith(inner.prefix)
    }
    return own == copied


def _no_model(
    checkpoint: FlatCheckpoint, families: tuple[Family, ...], config: ModelConfig
) -> ArchitectureError:
    chosen = [
        f"{key}={value!r}"
        for key in ("family", "container", "prefix")
        if (value := getattr(config, key)) is not None
    ]
    check_remapping(checkpoint, checkpoint.tensors)
    for family in families:
        tables = [p for p in checkpoint.unread if re.fullmatch(family.anchor, strip_wrappers(p))]
        if tables:
            return ArchitectureError(
                f"{checkpoint.source} holds a model of {family.trainer} whose tables are of types "
                f"that are not read: {checkpoint.unread[tables[0]]}",
                expected="tables in fp32, fp16, bf16 or fp64, or TorchRec's rows of bytes",
                hint="load the model with its trainer, convert the tables to fp32, and save it "
                "again: torch.save(model.state_dict(), 'model.pt')",
                details=list_unread(checkpoint),
            )
    names = [tensor.path for tensor in checkpoint.tensors]
    details = [*names[:6], f"... and {len(names) - 6} more"] if len(names) > 6 else names
    details += list_unread(checkpoint)
    parts = list_parts(strip_wrappers(name) for name in names)
    return ArchitectureError(
        f"{checkpoint.source} ({checkpoint.format}, {len(names)} tensors) holds no model of a "
        "known family"
        + (f" with {', '.join(chosen)}" if chosen else "")
        + (f"; it has {', '.join(parts)}" if parts else ""),
        expected="a checkpoint of " + ", or ".join(family.trainer for family in families),
        hint=f"for any other model, {DESCRIBE_IT}; if it is one of these models with other "
        "names, rename its tensors and save it again",
        details=details,
    )
