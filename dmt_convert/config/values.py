"""Kinds of values: read as options (strings) and YAML (lists, mappings) give them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from pydantic import BeforeValidator, PlainSerializer

Strategy = Literal["loss", "coherent", "diverse", "round-robin"]
AffinityKind = Literal["cosine", "weights"]
TableOptimizerKind = Literal["rowwise-adagrad", "adagrad", "sgd", "adam"]
DenseOptimizerKind = Literal["adam", "sgd"]
Decay = Literal["constant", "linear", "cosine"]
Backend = Literal["nccl", "gloo"]
DenseCommDtype = Literal["fp32", "bf16"]
NumaBinding = Literal["none", "node", "socket", "exclusive", "core-complex"]
ExportFormat = Literal["onnx", "pt2", "triton"]
TableCode = Literal["none", "fp16", "int8", "int4"]
InputForm = Literal["single", "fixed", "padded", "jagged"]
OutOfRange = Literal["refuse", "clip"]
TeacherSource = Literal["auto", "none"]
Outliers = Literal["refuse", "accept"]

STRATEGIES: Final[tuple[str, ...]] = get_args(Strategy)
AFFINITY_KINDS: Final[tuple[str, ...]] = get_args(AffinityKind)


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value else value


def _plain(value: object) -> object:
    """Write a path as text; pydantic asks for every member of a union."""
    return str(value) if isinstance(value, Path) else value


def _number(value: object) -> object:
    """Read 5e-4, which YAML takes for a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _names(value: object) -> object:
    """Split `f,g` into names; a list of names stays."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return tuple(value) if isinstance(value, list) else value


def _name_lists(value: object) -> object:
    return tuple(_names(item) for item in value) if isinstance(value, list | tuple) else value


def _flat_names(value: object) -> object:
    """Join lists of names, each of which may be written `f,g`."""
    if isinstance(value, str):
        return _names(value)
    if not isinstance(value, list | tuple):
        return value
    return tuple(name for item in value for name in (_as_tuple(_names(item))))


def _as_tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _groups(value: object) -> object:
    """Read groups: a mapping from names to features, or a list of `NAME=f,g`."""
    if isinstance(value, Mapping):
        return tuple((name, _names(features)) for name, features in value.items())
    if not isinstance(value, list | tuple):
        return value
    return tuple(_group(item) if isinstance(item, str) else _pair(item) for item in value)


def _group(text: str) -> tuple[str, object]:
    name, equals, features = text.partition("=")
    if not equals or not name or not features:
        raise ValueError(f"{text!r} is not NAME=f,g, for example user=user_id,age")
    return name, _names(features)


def _pair(item: object) -> object:
    return (item[0], _names(item[1])) if isinstance(item, list | tuple) and len(item) == 2 else item


def _texts(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _forms(value: object) -> object:
    """Read forms of inputs: a mapping, or a list of FORM and FEATURE=FORM; "" is every feature."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    pairs = (str(text).rpartition("=") for text in value)
    return {feature: form for feature, _, form in pairs}


def _strategy(value: object) -> object:
    if isinstance(value, str) and value not in STRATEGIES:
        if not Path(value).is_file():
            raise ValueError(
                f"{value!r} is neither a strategy ({', '.join(STRATEGIES)}) nor a file like "
                '{"towers": [["f0", "f3"], ["f1", "f2"]]}'
            )
        return Path(value)
    return value


def _teacher(value: object) -> object:
    return Path(value) if isinstance(value, str) and value not in ("auto", "none") else value


def _replicate(value: object) -> object:
    text = str(value)
    if text in ("none", "auto") or (text.isdecimal() and int(text) >= 1):
        return text
    raise ValueError(f"{value!r} is neither none nor auto nor a number of rows of at least 1")


PathValue = Annotated[Path, BeforeValidator(_path), PlainSerializer(_plain)]
Float = Annotated[float, BeforeValidator(_number)]
Names = Annotated[tuple[str, ...], BeforeValidator(_flat_names)]
NameLists = Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_name_lists)]
Groups = Annotated[
    tuple[tuple[str, tuple[str, ...]], ...],
    BeforeValidator(_groups),
    PlainSerializer(lambda value: {name: list(features) for name, features in value}),
]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Forms = Annotated[dict[str, InputForm], BeforeValidator(_forms)]
TeacherValue = Annotated[TeacherSource | Path, BeforeValidator(_teacher), PlainSerializer(_plain)]
Replicate = Annotated[str, BeforeValidator(_replicate)]
StrategyValue = Annotated[Strategy | Path, BeforeValidator(_strategy), PlainSerializer(_plain)]
