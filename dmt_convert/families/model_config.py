"""What a user says about a model that its checkpoint does not store: a small YAML file."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    StrictBool,
    Tag,
    ValidationError,
)
from pydantic_core import ErrorDetails

from dmt_convert.adapter import LoadedAdapter, LoadedBuilder
from dmt_convert.checkpoint import Combination
from dmt_convert.config import load_yaml
from dmt_convert.documents import MAX_YAML_BYTES, read_whole
from dmt_convert.errors import ConfigError
from dmt_convert.spec import PairOrder, Pooling

if TYPE_CHECKING:
    from torch import nn

EXAMPLE: Final = """\
# every key is optional
family: torchrec-dlrm          # as `dmt inspect` calls it
container: model               # key of the dict that holds the weights; dots for nested keys
prefix: model.                 # what precedes sparse_arch. or emb_l. in the names
interaction: dot               # dot | cat | dcn | projection
self_pairs: false
pair_order: triu               # triu | tril
table_type: int8               # of tables of bytes, or a map from table name to a type
pooling: sum                   # or a map from feature name to sum | mean
final_sigmoid: false
qr_operation: mult             # for quotient-remainder tables: mult | add | concat
activation: relu               # of hidden layers, if the checkpoint does not store it
fm: true                       # DeepCTR: false for WDL, whose tensors look like DeepFM's
features:                      # in interaction order; may rename features and share tables
  - {name: user_id, table: t_user, pooling: sum}
  - last_item
dense_features: [age, price]   # columns of the data, in the order of the dense inputs
ignore: ["train_auroc.*"]      # metrics, counters, what stands outside the model's modules
"""
_MAX_BYTES: Final = 16 << 20
_NOT_KEYS: Final = ("adapter", "builder")


def _read_name(value: object) -> object:
    """Accept the numbers that YAML makes of bare names such as 7; `no` stays a boolean."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_feature(value: object) -> object:
    """Accept a bare name for an entry that has nothing but its name."""
    return value if isinstance(value, dict | FeatureConfig) else {"name": value}


def _read_list(value: object) -> object:
    """Refuse what is not a list: pydantic also makes tuples of sets, whose order is random."""
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError("should be a list")
    return value


def _is_map(value: object) -> Literal["each", "all"]:
    return "each" if isinstance(value, Mapping) else "all"


Name = Annotated[str, BeforeValidator(_read_name), Field(min_length=1)]
Poolings = Annotated[
    Annotated[Pooling, Tag("all")] | Annotated[Mapping[str, Pooling], Tag("each")],
    Discriminator(_is_map),
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FeatureConfig(_Settings):
    """One entry of `features`."""

    name: Name
    """Feature name, or a table's name if `table` is not given."""
    table: Name | None = None
    """Table in which the feature is looked up."""
    pooling: Pooling | None = None
    """Pooling of this feature."""


TableType = Literal[
    "fp32",
    "fp16",
    "int8",
    "int4",
    "int2",
    "byte_prepack",
    "8bit_prepack",
    "4bit_prepack",
    "2bit_prepack",
]
"""Types of tables that are stored as rows of bytes; see `quantised_rows`."""
TableTypes = Annotated[
    Annotated[TableType, Tag("all")]
    | Annotated[Mapping[Annotated[str, BeforeValidator(_read_name)], TableType], Tag("each")],
    Discriminator(_is_map),
]
Features = Annotated[
    tuple[Annotated[FeatureConfig, BeforeValidator(_read_feature)], ...],
    Field(min_length=1),
    BeforeValidator(_read_list),
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LiveModel:
    """A module in memory, with its weights."""

    module: nn.Module
    """The module."""
    example: object
    """What it is called with, for a few rows."""


class ModelConfig(_Settings):
    """The content of a `--model-config` file. None means that the user does not say."""

    family: str | None = None
    """Name of the model's family."""
    container: str | None = None
    """Keys of the dict that holds the weights, joined by dots."""
    prefix: str | None = None
    """What precedes the model's own tensor names."""
    interaction: Literal["dot", "cat", "dcn", "projection"] | None = None
    """Kind of interaction. (A network shows in the family or the adapter, never here.)"""
    self_pairs: StrictBool | None = None
    """dot: whether a vector is also paired with itself."""
    pair_order: PairOrder | None = None
    """dot: order of the pairs."""
    pooling: Poolings | None = None
    """Pooling of all features, or of each feature by name."""
    table_type: TableTypes | None = None
    """Type of the tables that are stored as bytes, all of them or each by name."""
    final_sigmoid: StrictBool | None = None
    """Whether the original model ends in a sigmoid."""
    qr_operation: Combination | None = None
    """facebook-dlrm: how a quotient's row and a remainder's row are combined."""
    activation: str | None = None
    """Activation of hidden layers."""
    fm: StrictBool | None = None
    """deepctr: whether a factorisation machine pairs the features."""
    features: Features | None = None
    """The features in interaction order."""
    dense_features: Annotated[tuple[Name, ...] | None, BeforeValidator(_read_list)] = None
    """Names of the dense inputs in their order, as the data calls them."""
    ignore: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: _read_list(() if value is None else value))
    ] = ()
    """Glob patterns of tensors that do not belong to the model."""
    adapter: InstanceOf[LoadedAdapter] | None = Field(default=None, exclude=True)
    """The user's own description of the model (`--model`); not a key of the YAML file."""
    builder: InstanceOf[LoadedBuilder | LiveModel] | None = Field(default=None, exclude=True)
    """What makes the model itself, to be captured; not a key of the YAML file either."""


def read_model_config(path: Path) -> ModelConfig:
    """Read a `--model-config` file.

    Raises:
        ConfigError: The file is missing or is not YAML, or a key or value in it is not known. All
            faults are listed.
    """
    if path.exists() and (not path.is_file() or path.stat().st_size > _MAX_BYTES):
        what = f"has {path.stat().st_size} bytes" if path.is_file() else "is not a file"
        raise ConfigError(
            f"the model config {path} {what}",
            expected=f"a YAML file of at most {_MAX_BYTES} bytes",
            hint=f"an example:\n{EXAMPLE}",
        )
    try:
        content = load_yaml(read_whole(path, MAX_YAML_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the model config {path} cannot be read ({reason})",
            expected="a YAML file",
            hint=f"an example:\n{EXAMPLE}",
        ) from None
    return parse_model_config(f"the model config {path}", content)


def parse_model_config(name: str, content: object) -> ModelConfig:
    """Check what a user says of a model.

    Args:
        name: Where it comes from, for errors.
        content: Keys and values, as YAML gives them.

    Raises:
        ConfigError: A key or a value is not known. All faults are listed.
    """
    if not isinstance(content, dict):
        raise _wrong(name, [f"it holds {type(content).__name__}, not keys and values"])
    faults = [f"unknown key {key!r}" for key in _NOT_KEYS if key in content]
    try:
        config = ModelConfig.model_validate(
            {k: v for k, v in content.items() if k not in _NOT_KEYS}
        )
    except ValidationError as error:
        faults += [_show_fault(fault) for fault in error.errors(include_url=False)]
    if faults:
        raise _wrong(name, faults)
    return config


def _show(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"a {type(value).__name__} too long to show"


def _show_fault(fault: ErrorDetails) -> str:
    """Say in one line which key is wrong, why, and what stands there."""
    value = _show(fault["input"])
    key, *rest = fault["loc"]
    if fault["type"] in ("extra_forbidden", "invalid_key") and not rest:
        return f"unknown key {_show(key)}"
    # the tags of `Poolings` are ours, not the user's
    place = [str(part) for part in rest if part not in ("all", "each", "[key]")]
    reason = {
        "bool_type": "should be true or false",
        "extra_forbidden": "is not a key of a feature (name, table, pooling)",
        "missing": "is missing",
        "string_too_short": "should not be empty",
        "too_short": "should not be empty",
        "value_error": "should be a list",
    }.get(fault["type"], fault["msg"].removeprefix("Input ").removeprefix("Value error, "))
    reason = reason[:1].lower() + reason[1:]
    return f"{'.'.join([str(key), *place])}: {reason}, got {value}"


def _wrong(name: str, faults: list[str]) -> ConfigError:
    keys = [key for key in ModelConfig.model_fields if key not in _NOT_KEYS]
    return ConfigError(
        f"{name} is wrong",
        expected="the keys " + ", ".join(keys),
        hint=f"an example:\n{EXAMPLE}",
        details=faults,
    )
