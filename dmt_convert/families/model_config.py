"""What a user says of a model that its checkpoint does not: a small YAML file."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, cast, get_args

from dmt_convert.adapter import LoadedAdapter
from dmt_convert.checkpoint import Combination
from dmt_convert.errors import ConfigError
from dmt_convert.spec import InteractionKind, PairOrder, Pooling

EXAMPLE: Final = """\
# every key is optional
family: torchrec-dlrm          # as `dmt inspect` calls it
container: model               # key of the dict that holds the weights, nested by dots
prefix: model.                 # what stands before sparse_arch. or emb_l.
interaction: dot               # dot | cat | dcn | projection
self_pairs: false
pair_order: triu               # triu | tril
pooling: sum                   # or a map from feature name to sum | mean
final_sigmoid: false
qr_operation: mult             # of quotient-remainder tables: mult | add | concat
activation: relu               # of hidden layers, where the checkpoint does not say
fm: true                       # DeepCTR: false for WDL, whose tensors are DeepFM's
features:                      # order of the features in the interaction; new names; shared tables
  - {name: user_id, table: t_user, pooling: sum}
  - last_item
ignore: ["train_auroc.*"]      # tensors beside the model's own that may be passed over
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureConfig:
    """One entry of `features`."""

    name: str
    """Feature name, or a table's name where `table` is not given."""
    table: str | None = None
    """Table that it is looked up in."""
    pooling: Pooling | None = None
    """Pooling of this feature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The content of a `--model-config` file; None means: not said."""

    family: str | None = None
    """Name of the architecture family."""
    container: str | None = None
    """Dotted keys of the dict that holds the weights."""
    prefix: str | None = None
    """What stands before the model's own names."""
    interaction: InteractionKind | None = None
    """Kind of interaction."""
    self_pairs: bool | None = None
    """dot: whether a vector is paired with itself."""
    pair_order: PairOrder | None = None
    """dot: order of the pairs."""
    pooling: Pooling | Mapping[str, Pooling] | None = None
    """Pooling of all features, or of each by name."""
    final_sigmoid: bool | None = None
    """Whether the original model ends in a sigmoid."""
    qr_operation: Combination | None = None
    """facebook: what is made of a quotient's and a remainder's row."""
    activation: str | None = None
    """Activation of hidden layers."""
    fm: bool | None = None
    """Whether a factorisation machine pairs the features."""
    features: tuple[FeatureConfig, ...] | None = None
    """The features in interaction order."""
    ignore: tuple[str, ...] = ()
    """Glob patterns of tensors that do not belong to the model."""
    adapter: LoadedAdapter | None = None
    """A user's own description of the model (`--model`); no key of the YAML file."""


def read_model_config(path: Path) -> ModelConfig:
    """Read a `--model-config` file.

    Raises:
        ConfigError: It is missing, is not YAML, or holds a key or value that is not known.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the model config {path} cannot be read ({reason})",
            expected="a YAML file",
            hint=f"an example:\n{EXAMPLE}",
        ) from None
    if not isinstance(content, dict):
        raise _wrong(path, [f"it holds {type(content).__name__}, not keys and values"])
    return parse_model_config(f"the model config {path}", content)


def _keys() -> list[str]:
    return [field.name for field in fields(ModelConfig) if field.name != "adapter"]


def parse_model_config(path: Path | str, content: dict[Any, Any]) -> ModelConfig:
    """Check what a user says of a model.

    Args:
        path: Where it comes from, for errors.
        content: Keys and values.

    Raises:
        ConfigError: A key or a value is not allowed; all of them are named.
    """
    known = _keys()
    problems = [f"unknown key {_show(key)}" for key in content if key not in known]
    checks = {
        # a network is known by its family or its adapter, never by this word alone
        "interaction": tuple(k for k in get_args(InteractionKind) if k != "network"),
        "pair_order": get_args(PairOrder),
        "qr_operation": get_args(Combination),
    }
    problems += [
        f"{key}: {_show(content[key])} is not one of {', '.join(allowed)}"
        for key, allowed in checks.items()
        if content.get(key) is not None and content[key] not in allowed
    ]
    problems += [
        f"{key}: {_show(content[key])} is neither true nor false"
        for key in ("self_pairs", "final_sigmoid", "fm")
        if not isinstance(content.get(key), bool | None)
    ]
    problems += [
        f"{key}: {_show(content[key])} is not a string"
        for key in ("family", "container", "prefix", "activation")
        if content.get(key) is not None and not isinstance(content[key], str)
    ]
    pooling = content.get("pooling")
    poolings = pooling.values() if isinstance(pooling, dict) else [pooling]
    problems += [
        f"pooling: {_show(p)} is neither sum nor mean"
        for p in poolings
        if not _is_pooling(p) or (p is None and isinstance(pooling, dict))
    ]
    if isinstance(pooling, dict):
        problems += [f"pooling: {_show(k)} is no name" for k in pooling if not isinstance(k, str)]
    features = _parse_features(content.get("features"), problems)
    ignore = content.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(item, str) for item in ignore):
        problems.append("ignore: not a list of patterns")
    if problems:
        raise _wrong(path, problems)
    values = {key: value for key, value in content.items() if key not in ("features", "ignore")}
    return ModelConfig(**values, features=features, ignore=tuple(ignore))


def _parse_features(value: object, problems: list[str]) -> tuple[FeatureConfig, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        problems.append("features: not a list")
        return None
    features = []
    for item in value:
        entry = item if isinstance(item, dict) else {"name": item}
        unknown = set(entry) - {"name", "table", "pooling"}
        table = entry.get("table")
        named = _is_name(entry.get("name")) and (table is None or _is_name(table))
        if unknown or not named:
            problems.append(f"features: {_show(item)} is neither a name nor name, table, pooling")
        elif not _is_pooling(entry.get("pooling")):
            problems.append(f"features: {_show(item)} has a pooling that is neither sum nor mean")
        else:
            features.append(
                FeatureConfig(
                    name=str(entry["name"]),
                    table=None if table is None else str(table),
                    pooling=cast("Pooling | None", entry.get("pooling")),
                )
            )
    return tuple(features)


def _is_name(value: object) -> bool:
    # YAML reads a bare 7 as a number and a bare no as false
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _show(value: object) -> str:
    return reprlib.repr(value)


def _is_pooling(value: object) -> bool:
    return value is None or value in get_args(Pooling)


def _wrong(path: Path, problems: list[str]) -> ConfigError:
    return ConfigError(
        f"the model config {path} is wrong",
        expected="the keys " + ", ".join(_keys()),
        hint=f"an example:\n{EXAMPLE}",
        details=problems,
    )
