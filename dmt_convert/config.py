"""Every setting of every command, written once.

One frozen pydantic model per command says what can be set: the type, the default, the bounds and
the help text. The options of the command line, the keys of `--config` files, the checks, the
tables in docs/settings.md and what a bundle records of its conversion are made from these models;
the functions of `dmt_convert` take the same names as keyword arguments.

A setting whose default is None is decided when the command runs; `auto` says how.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from dmt_convert.errors import ConfigError, UsageError
from dmt_convert.spec import CommDtype, Dtype

Strategy = Literal["coherent", "diverse", "round-robin"]
AffinityKind = Literal["cosine", "weights"]
TableOptimizerKind = Literal["rowwise-adagrad", "adagrad", "sgd", "adam"]
DenseOptimizerKind = Literal["adam", "sgd"]
Decay = Literal["constant", "linear", "cosine"]
Backend = Literal["nccl", "gloo"]
ExportFormat = Literal["onnx", "pt2", "triton"]
TableCode = Literal["none", "fp16", "int8", "int4"]
InputForm = Literal["single", "fixed", "padded", "jagged"]
OutOfRange = Literal["refuse", "clip"]

STRATEGIES: Final[tuple[str, ...]] = get_args(Strategy)
AFFINITY_KINDS: Final[tuple[str, ...]] = get_args(AffinityKind)
Kind = TypeVar("Kind", bound="Config")
_TOWERS: Final = "Which features share a tower"
_MODULES: Final = "What a tower emits"
_CLUSTER: Final = "Cluster"
_MODEL: Final = "Facts about the model"
_TRAINING: Final = "Training"
_RANKS: Final = "Over ranks"
_PREDICTION: Final = "Prediction (modelled)"
_INPUTS: Final = "Inputs of the graphs"
_REQUESTS: Final = "User side once per request"
_EVALUATIONS: Final = 10
"""Evaluations per pass over the data, unless `eval_every` says otherwise."""


# Values as they come from options (strings) and from YAML (lists, mappings).


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
StrategyValue = Annotated[Strategy | Path, BeforeValidator(_strategy), PlainSerializer(_plain)]


def setting(default: Any, help_: str, **more: Any) -> Any:
    """Declare a setting.

    Args:
        default: Its default; `...` if it must be given.
        help_: What it does, in one or two sentences.
        **more: `auto` (what None comes to), `metavar`, `panel` (heading in `--help`), `record`
            (False: how to run, not what to make, so no bundle records it), and bounds and `alias`
            as pydantic's `Field` takes them.
    """
    extra: dict[str, Any] = {
        key: more.pop(key) for key in ("auto", "metavar", "panel", "record") if key in more
    }
    return Field(default, description=help_, json_schema_extra=extra, **more)


class Config(BaseModel):
    """Settings that check themselves when they are made."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        validate_default=False,
        defer_build=True,  # help is shown without building validators
    )
    command: ClassVar[str] = ""
    """The command that takes these settings."""
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Settings of which one is given; an option replaces all of them in a file."""

    def __init__(self, **values: Any) -> None:
        """Check the settings.

        Raises:
            ConfigError: Some are wrong; every one of them is named.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), error) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other settings, checked again.

        Raises:
            ConfigError: Some are wrong.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(given | changes))

    def record(self) -> dict[str, Any]:
        """Return the settings that a bundle records, as JSON-able values by YAML key."""
        skipped = {n for n, f in type(self).model_fields.items() if not extra_of(f)["record"]}
        return self.model_dump(mode="json", exclude=skipped, exclude_none=True)


def extra_of(field: Any) -> dict[str, Any]:
    """Return what `setting` was told beside pydantic's own: auto, metavar, panel, record."""
    said = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return {"auto": "", "metavar": None, "panel": None, "record": True, **said}


def option_name(key: str) -> str:
    """Return the option of a setting: `table_lr` is `--table-lr`."""
    return "--" + key.replace("_", "-")


def key_of(name: str, field: Any) -> str:
    """Return what a setting is called outside Python: in YAML, and as an option."""
    return field.alias or name


class SettingsError(ConfigError):
    """Settings of a command are wrong.

    Args:
        problems: Setting ("" for several together) and what is wrong with it.
    """

    def __init__(self, problems: Sequence[tuple[str, str]], *, hint: str = "") -> None:
        said = [f"{name} {text}" if name else text for name, text in problems]
        one = len(said) == 1
        super().__init__(
            said[0] if one else f"{len(said)} settings are wrong",
            hint=hint,
            details=() if one else said,
        )
        self.problems = tuple(problems)


def _refusal(kind: type[Config], error: ValidationError) -> SettingsError:
    problems: dict[tuple[str, str], None] = {}
    for found in error.errors():
        name = str(found["loc"][0]) if found["loc"] else ""
        problems[name, _problem(kind, name, found)] = None
    merged: dict[str, str] = {}
    for name, text in problems:  # a union reports every member: one line is enough
        if name not in merged or not name:
            merged[name] = text if name not in merged else f"{merged[name]}; {text}"
    return SettingsError([*merged.items()])


_KINDS: Final = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "path_type": "must be a path",
    "is_instance_of": "must be a path",
}


def _problem(kind: type[Config], name: str, found: Any) -> str:
    """Say what is wrong with one setting, what it must be and what it is."""
    code, context = found["type"], found.get("ctx", {})
    got = "" if isinstance(found["input"], dict | BaseModel) else f", got {_show(found['input'])}"
    if code == "missing":
        return "is missing"
    if code == "extra_forbidden":
        known = [key_of(n, f) for n, f in kind.model_fields.items()]
        near = difflib.get_close_matches(name, known, n=1)
        return "is not a setting" + (f"; did you mean {near[0]}?" if near else "")
    if code == "value_error":
        return str(context["error"])
    if code == "literal_error":
        return f"must be one of {', '.join(literals(_annotation(kind, name)))}{got}"
    for bound, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if bound in context:
            noun = "an integer" if base_type(_annotation(kind, name)) is int else "a number"
            return f"must be {noun} {sign} {context[bound]:g}{got}"
    return _KINDS.get(code, str(found["msg"])) + got


def _show(value: object) -> str:
    return reprlib.repr(str(value) if isinstance(value, Path) else value)


def _annotation(kind: type[Config], name: str) -> Any:
    fields = {key_of(key, field): field for key, field in kind.model_fields.items()}
    return fields[name].annotation


def literals(annotation: Any) -> tuple[str, ...]:
    """Return the strings that an annotation allows, from all its Literals."""
    found: list[str] = []
    for part in get_args(annotation):
        found += [part] if isinstance(part, str) else literals(part)
    return tuple(dict.fromkeys(found))


def read_settings(path: Path, kind: type[Config]) -> dict[str, Any]:
    """Read a `--config` file: YAML whose keys are settings, or the `dmt.json` of a bundle.

    Args:
        path: The file.
        kind: The settings of the command.

    Returns:
        The settings that it gives, by key.

    Raises:
        ConfigError: The file cannot be read, or holds a key or a value that is not allowed.
    """
    content = _read_document(path)
    if "schema_version" in content:
        content = _recorded(path, content, kind)
    try:
        kind(**content)
    except SettingsError as error:
        # what is missing, or does not go together, may still come from options
        wrong = [f"{n} {text}" for n, text in error.problems if n and text != "is missing"]
        if wrong:
            raise ConfigError(
                f"{path} has settings that cannot be used",
                expected=f"settings of dmt {kind.command}, as docs/settings.md lists them",
                details=wrong,
            ) from None
    return content


def _read_document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read ({reason})",
            expected="a YAML file whose keys are settings, or the dmt.json of a bundle",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{path} holds {type(content).__name__}, not settings by name",
            expected="a YAML file whose keys are settings, for example `towers: 16`",
        )
    return content


def _recorded(path: Path, document: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    recorded = document.get("config")
    if not isinstance(recorded, dict) or recorded.get("command") != kind.command:
        what = recorded.get("command") if isinstance(recorded, dict) else None
        raise ConfigError(
            f"{path} records {f'a run of dmt {what}' if what else 'no settings'}",
            expected=f"the dmt.json of a bundle that dmt {kind.command} wrote",
            hint="bundles of version 0.1.0 and older record no settings" if not what else "",
        )
    return {key: value for key, value in recorded.items() if key != "command"}


# What commands share.


class ModelOptions(Config):
    """What the user says of a model that its checkpoint does not."""

    model_facts: PathValue | dict[str, Any] | None = setting(
        None,
        "YAML file with facts that the checkpoint does not store (feature order, pooling, ...).",
        alias="model_config",
        metavar="FILE.yaml",
        panel=_MODEL,
    )
    model: PathValue | None = setting(
        None,
        "Python file that describes a model of your own (docs/adapters.md). The file is run.",
        metavar="FILE.py",
        panel=_MODEL,
    )


class BundleOptions(Config):
    """What a command on a bundle needs to know of its model."""

    model: PathValue | None = setting(
        None,
        "Python file that defines the bundle's own model, if it has one. The file is run.",
        metavar="FILE.py",
    )


class ClusterOptions(Config):
    """The cluster that towers are placed on."""

    hosts: int | None = setting(
        None, "Hosts of the cluster.", ge=1, auto="one per tower", panel=_CLUSTER
    )
    ranks_per_host: int | None = setting(
        None, "Ranks (GPUs) per host.", ge=1, auto="8", panel=_CLUSTER
    )
    hbm_gib: Float | None = setting(
        None, "Memory per rank in GiB.", gt=0, auto="80", panel=_CLUSTER
    )


class InspectConfig(ModelOptions):
    """Settings of `dmt inspect`."""

    command: ClassVar[str] = "inspect"


class PartitionOptions(Config):
    """How features become towers, as `dmt partition` and `dmt convert` take it."""

    towers: int | None = setting(
        None, "Number of towers, often the number of hosts.", ge=1, auto="as the file says"
    )
    partition: StrategyValue | None = setting(
        None,
        "coherent puts features that interact into one tower, diverse keeps them apart, "
        "round-robin deals them out; or a JSON file with the towers.",
        metavar="coherent|diverse|round-robin|FILE",
        auto="coherent; diverse if a tower may emit combinations of its features (c = 0, or a "
        "compression, with a dot interaction)",
        panel=_TOWERS,
    )
    affinity: AffinityKind = setting(
        "weights",
        "How close two features are. weights: how much the model uses the pair; cosine: how "
        "aligned their embeddings are.",
        panel=_TOWERS,
    )
    size_ratio: Float = setting(
        1.0,
        "Largest tower, as a multiple of the mean number of features. 1 keeps towers within one "
        "feature of each other.",
        ge=1,
        panel=_TOWERS,
    )
    load_ratio: Float | None = setting(
        None,
        "Largest load of a tower (table bytes, lookups, emitted values), as a multiple of the "
        "mean.",
        ge=1,
        auto="unlimited",
        panel=_TOWERS,
    )
    together: NameLists = setting(
        (), "Features that share a tower. Repeatable.", metavar="f,g", panel=_TOWERS
    )
    apart: NameLists = setting(
        (), "Features in different towers. Repeatable.", metavar="f,g", panel=_TOWERS
    )
    group: Groups = setting(
        (),
        "Features of different groups never share a tower. Repeatable.",
        metavar="NAME=f,g",
        panel=_TOWERS,
    )
    calibration: PathValue | None = setting(
        None,
        "Sample data for fitting and measuring the towers. Labels are optional.",
        auto="rows drawn from the tables",
        metavar="DATA",
    )
    seed: int = setting(0, "Seed of all random choices.", ge=0)

    @property
    def strategy(self) -> Strategy | Path:
        """How towers are found, if nothing else is asked for."""
        return self.partition or "coherent"

    @model_validator(mode="after")
    def _check_constraints(self) -> Self:
        problems = list(_constraint_problems(self.together, self.apart, self.group))
        if self.towers is None and not isinstance(self.partition, Path):
            problems.append("towers is missing: give a number, or a file with `partition`")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _constraint_problems(together: NameLists, apart: NameLists, groups: Groups) -> Iterable[str]:
    for option, tuples in (("together", together), ("apart", apart)):
        for names in tuples:
            if len(names) < 2 or _repeated(names):
                yield f"{option} {','.join(names)}: needs two or more different features"
    for name in _repeated([name for name, _ in groups]):
        yield f"group {name} is given twice"
    for name, features in groups:
        if not features or _repeated(features):
            yield f"group {name}={','.join(features)}: needs different features"
    members = [feature for _, features in groups for feature in set(features)]
    for feature in _repeated(members):
        yield f"feature {feature} is in several groups"


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


class PartitionConfig(ModelOptions, PartitionOptions):
    """Settings of `dmt partition`."""

    command: ClassVar[str] = "partition"

    out: PathValue | None = setting(
        None, "Write the towers to this JSON file.", record=False, metavar="FILE"
    )
    plot: PathValue | None = setting(
        None, "Draw affinity and towers.", record=False, metavar="FILE.svg|png"
    )


class ConvertConfig(ModelOptions, ClusterOptions, PartitionOptions):
    """What a flat checkpoint is converted into: settings of `dmt convert`."""

    command: ClassVar[str] = "convert"

    tower_module: str = setting(
        "auto",
        "Kind of tower module. auto takes the architecture's own; passthrough computes exactly "
        "what the flat model computes.",
        metavar="auto|passthrough|dlrm|dcn|linear",
        panel=_MODULES,
    )
    c: int | None = setting(None, "Vectors emitted per feature.", ge=0, auto="1", panel=_MODULES)
    p: int | None = setting(None, "Vectors emitted per tower.", ge=0, auto="0", panel=_MODULES)
    dim: int | None = setting(
        None,
        "Output dim D of an emitted vector.",
        ge=1,
        auto="half the embedding dim",
        panel=_MODULES,
    )
    compression: Float | None = setting(
        None,
        "Compression to reach, instead of --dim: bytes that would cross hosts uncompressed, over "
        "bytes that do.",
        gt=0,
        auto="2",
        panel=_MODULES,
    )
    distill_steps: int | None = setting(
        None,
        "Distillation steps after the closed-form fit; 0 for none.",
        ge=0,
        auto="up to 500, fewer for large models",
        panel=_MODULES,
    )
    dtype: Dtype | None = setting(None, "Store tables in this type.", auto="as they are")
    optimizer_state: Literal["keep", "drop"] = setting(
        "keep", "Whether the bundle keeps the tables' Adagrad accumulators for fine-tuning."
    )
    out: PathValue | None = setting(
        None, "Folder of the bundle.", record=False, auto="CKPT-dmtT beside SOURCE", metavar="DIR"
    )
    force: bool = setting(False, "Replace an existing bundle.", record=False)


class PlanConfig(BundleOptions):
    """A cluster to place towers on, and what to predict for it: settings of `dmt plan`."""

    command: ClassVar[str] = "plan"

    hosts: int = setting(..., "Hosts of the cluster.", ge=1)
    ranks_per_host: int = setting(..., "Ranks (GPUs) per host.", ge=1)
    hbm_gib: Float | None = setting(
        None, "Memory per rank in GiB.", gt=0, auto="80, or the memory of --gpu"
    )
    intra_gbps: Float | None = setting(
        None,
        "Link speed of a rank inside its host, in Gbit/s.",
        gt=0,
        auto="3600, or the link of --gpu",
    )
    inter_gbps: Float | None = setting(
        None,
        "Link speed of a rank to other hosts, in Gbit/s.",
        gt=0,
        auto="200, or the link of --gpu",
    )
    out: PathValue | None = setting(
        None, "Write the plan to this JSON file.", record=False, metavar="FILE"
    )
    predict: bool = setting(
        False,
        "Predict the time of a step (flat, SPTT and this bundle), and suggest towers and "
        "compression.",
        panel=_PREDICTION,
    )
    predict_scaling: bool = setting(
        False, "Predict the same for 16 to 16,384 GPUs.", panel=_PREDICTION
    )
    plot: PathValue | None = setting(
        None, "Draw --predict-scaling.", panel=_PREDICTION, metavar="FILE.svg|png"
    )
    gpu: str | None = setting(
        None,
        "GPU whose memory, links and speed to assume: v100, a100 or h100.",
        panel=_PREDICTION,
        auto="h100 for predictions",
    )
    batch: int | None = setting(
        None, "Samples per rank and step.", ge=1, panel=_PREDICTION, auto="1024"
    )
    comm_dtype: CommDtype | None = setting(
        None,
        "Precision of embeddings and their gradients between ranks.",
        panel=_PREDICTION,
        auto="fp32",
    )
    ids_per_bag: Float | None = setting(
        None, "Mean ids per sample and feature.", gt=0, panel=_PREDICTION, auto="1"
    )
    assume: Texts = setting(
        (),
        "Replace a constant of the cost model, for example scale_loss=0.05. Repeatable.",
        panel=_PREDICTION,
        metavar="NAME=VALUE",
    )

    @model_validator(mode="after")
    def _check_prediction(self) -> Self:
        asked = ("gpu", "batch", "comm_dtype", "ids_per_bag", "assume")
        idle = [option_name(name) for name in asked if getattr(self, name)]
        if idle and not (self.predict or self.predict_scaling):
            raise ValueError(f"{', '.join(idle)} without a prediction: add --predict")
        if self.plot is not None and not self.predict_scaling:
            raise ValueError(
                f"--plot {self.plot.name} without sizes to draw: add --predict-scaling"
            )
        return self


class ScoreConfig(ModelOptions):
    """Settings of `dmt score`."""

    command: ClassVar[str] = "score"

    data: PathValue = setting(..., "Data set, or a probe npz.")
    out: PathValue | None = setting(
        None,
        "npz to write, with the array `logits`.",
        auto="nothing is written",
        metavar="FILE.npz",
        record=False,
    )


class EvaluateConfig(ModelOptions):
    """Settings of `dmt evaluate`."""

    command: ClassVar[str] = "evaluate"

    data: PathValue = setting(..., "Data set with labels.")


class VerifyConfig(ModelOptions):
    """Settings of `dmt verify`."""

    command: ClassVar[str] = "verify"

    data: PathValue | None = setting(None, "Rows to run both models on.", auto="generated rows")
    atol: Float = setting(1e-6, "Absolute tolerance.", ge=0)
    rtol: Float = setting(1e-5, "Tolerance relative to the largest value of a stage.", ge=0)
    checksums: bool = setting(
        False, "Also read every byte of a bundle or export and check its digests."
    )


class ExportConfig(BundleOptions):
    """Settings of `dmt export`."""

    command: ClassVar[str] = "export"

    format: ExportFormat = setting(..., "What to write.")
    out: PathValue | None = setting(
        None, "Folder to write; it must not exist.", auto="required", metavar="DIR"
    )
    quantize: TableCode = setting(
        "none", "Storage type of the tables. Prints the cost in accuracy before writing."
    )
    max_auc_loss: Float | None = setting(
        None,
        "Refuse to quantise if more AUC than this is lost on --data.",
        ge=0,
        auto="unlimited",
    )
    data: PathValue | None = setting(
        None, "Rows to check the graphs on.", auto="generated rows only"
    )
    pooling_input: Forms = setting(
        {},
        "Shape of the ids: single (B, 1), fixed (B, L), padded (B, L) with -1, jagged (values and "
        "lengths); for all features, or for one as FEATURE=FORM. Repeatable.",
        metavar="[FEATURE=]single|fixed|padded|jagged",
        panel=_INPUTS,
        auto="jagged; padded for triton",
    )
    weighted: Names = setting(
        (),
        "Features whose ids come with weights; * for all. Repeatable.",
        metavar="f,g",
        panel=_INPUTS,
    )
    out_of_range: OutOfRange = setting(
        "refuse",
        "What happens to an id outside its table: the request fails, or the nearest row is used.",
        panel=_INPUTS,
    )
    request_batching: bool = setting(
        False,
        "Run the towers of one group once per request, for all candidates together.",
        panel=_REQUESTS,
    )
    request_group: str = setting(
        "user", "That group, as `dmt convert --group` named it.", panel=_REQUESTS
    )
    per_request: Names = setting(
        (),
        "Features that come once per request. Repeatable.",
        metavar="f,g",
        panel=_REQUESTS,
        auto="those of --request-group",
    )
    dense_per_request: bool = setting(
        False, "Dense inputs also come once per request.", panel=_REQUESTS
    )
    model_name: str = setting(
        "dmt", "triton: name of the ensemble, and prefix of its parts.", metavar="NAME"
    )
    gpu: bool = setting(False, "triton, pt2: serve on a GPU.")
    checksums: bool | None = setting(
        None, "Compare all tables with their digests.", auto="if they have up to 4 GiB in total"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        batching = self.request_batching or bool(self.per_request)
        if self.dense_per_request and not batching:
            raise ValueError("--dense-per-request needs --request-batching")
        if self.max_auc_loss is not None and self.quantize == "none":
            raise ValueError("--max-auc-loss without quantisation: add --quantize int8")
        if batching and self.format != "onnx":
            raise ValueError(
                f"--request-batching for {self.format}: only --format onnx can do it (Triton's "
                "batcher cannot take batches of two sizes in one request)"
            )
        return self


class UnshardConfig(Config):
    """Settings of `dmt unshard`."""

    command: ClassVar[str] = "unshard"

    out: PathValue = setting(..., "The .safetensors file to write.", metavar="FILE")
    only: Texts = setting(
        (),
        "Write only tensors whose name or path matches; * and ? as in a shell. Repeatable.",
        metavar="PATTERN",
    )
    force: bool = setting(False, "Replace an existing file.")


class TrainingConfig(Config):
    """How a model is trained."""

    command: ClassVar[str] = "finetune"
    alternatives: ClassVar[tuple[str, ...]] = ("epochs", "max_steps")

    epochs: int = setting(1, "Passes over the training rows.", ge=1, panel=_TRAINING)
    max_steps: int | None = setting(
        None, "Steps to take, instead of passes.", ge=1, panel=_TRAINING, auto="as --epochs says"
    )
    batch_size: int = setting(512, "Rows per step, over all ranks.", ge=1, panel=_TRAINING)
    eval_every: int | None = setting(
        None, "Steps between evaluations.", ge=1, panel=_TRAINING, auto="a tenth of a pass"
    )
    patience: int | None = setting(
        10, "Evaluations without improvement before training stops.", ge=1, panel=_TRAINING
    )
    dense_lr: Float = setting(
        5e-4, "Learning rate of everything but tables; 0 freezes it.", ge=0, panel=_TRAINING
    )
    dense_optimizer: DenseOptimizerKind = setting(
        "adam", "Optimizer of everything but tables.", panel=_TRAINING
    )
    table_lr: Float = setting(
        0.02, "Learning rate of the embedding tables; 0 freezes them.", ge=0, panel=_TRAINING
    )
    table_optimizer: TableOptimizerKind = setting(
        "rowwise-adagrad", "Optimizer of the embedding tables.", panel=_TRAINING
    )
    initial_accumulator: Float | None = setting(
        None,
        "Adagrad: start value of the squared gradients.",
        ge=0,
        panel=_TRAINING,
        auto="the bundle's accumulators, else measured on the first batch",
    )
    warmup_steps: int = setting(
        0, "Steps over which learning rates rise from 0.", ge=0, panel=_TRAINING
    )
    lr_decay: Decay = setting(
        "linear", "How learning rates fall after the warm-up.", panel=_TRAINING
    )
    clip_norm: Float | None = setting(
        None,
        "Largest gradient norm of everything but tables.",
        gt=0,
        panel=_TRAINING,
        auto="unlimited",
    )
    seed: int = setting(0, "Seed of the order of rows.", ge=0, panel=_TRAINING)
    comm_dtype: CommDtype = setting(
        "fp32", "Precision of what crosses hosts, forward and backward.", panel=_RANKS
    )
    checkpoint_every: int | None = setting(
        None,
        "Steps between training checkpoints.",
        ge=1,
        panel=_RANKS,
        auto="only the best states are kept",
    )
    keep_checkpoints: int = setting(
        2, "Checkpoints to keep beside the best one.", ge=1, panel=_RANKS
    )
    async_checkpoints: bool = setting(
        False, "Write checkpoints while training goes on.", panel=_RANKS
    )
    prefetch: bool = setting(True, "Send the ids of the next batch ahead of time.", panel=_RANKS)

    def total_steps(self, num_rows: int) -> int:
        """Return the largest number of steps that training takes.

        Args:
            num_rows: Training rows.
        """
        if self.max_steps is not None:
            return self.max_steps
        return self.epochs * math.ceil(num_rows / self.batch_size)

    def steps_between_evaluations(self, num_rows: int) -> int:
        """Return the steps between evaluations.

        Args:
            num_rows: Training rows.
        """
        if self.eval_every is not None:
            return self.eval_every
        one_pass = math.ceil(num_rows / self.batch_size)
        return max(1, min(one_pass, self.total_steps(num_rows)) // _EVALUATIONS)

    def lr_factor(self, step: int, total: int) -> float:
        """Return the factor of the learning rates at a step.

        Args:
            step: The step, from 1.
            total: Steps in total.
        """
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.lr_decay == "constant":
            return 1.0
        done = (step - 1 - self.warmup_steps) / max(1, total - self.warmup_steps)
        if self.lr_decay == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class RunConfig(BundleOptions, TrainingConfig):
    """A training run: what the recipe `finetune_dmt.py` is given beside the bundle."""

    data: PathValue = setting(..., "Labelled rows, or a folder with train.npz.")
    valid: PathValue | None = setting(
        None, "Validation rows.", auto="the last tenth of DATA", metavar="DATA"
    )
    out: PathValue | None = setting(
        None, "Bundle to write.", auto="BUNDLE-tuned", metavar="DIR", record=False
    )
    log: PathValue | None = setting(
        None,
        "Folder for metrics.jsonl and TensorBoard.",
        panel=_TRAINING,
        auto="CHECKPOINTS/log",
        metavar="DIR",
    )
    plan: PathValue | None = setting(
        None,
        "plan.json to place towers by.",
        panel=_RANKS,
        auto="the bundle's if it fits the ranks, else a new one",
        metavar="FILE",
    )
    backend: Backend | None = setting(
        None, "Backend of torch.distributed.", panel=_RANKS, auto="nccl if there are GPUs"
    )
    checkpoints: PathValue | None = setting(
        None,
        "Folder of training checkpoints.",
        panel=_RANKS,
        auto="OUT.checkpoints",
        metavar="DIR",
    )
    resume: bool = setting(
        False, "Continue from the newest checkpoint, if there is one.", panel=_RANKS
    )
    timeout: Float = setting(600.0, "Seconds that ranks wait for each other.", gt=0, panel=_RANKS)
    force: bool = setting(
        False, "Replace an existing bundle and existing checkpoints.", record=False
    )


class LaunchConfig(Config):
    """How ranks are started on this host, by torchrun."""

    nproc: int = setting(1, "Ranks (GPUs) on this host.", ge=1, record=False)
    nnodes: int = setting(1, "Hosts; run the command on each of them.", ge=1, record=False)
    node_rank: int = setting(0, "Index of this host, from 0.", ge=0, record=False)
    rdzv_endpoint: str | None = setting(
        None,
        "Address at which hosts meet: host 0 and any free port.",
        metavar="HOST:PORT",
        record=False,
    )
    local_addr: str | None = setting(
        None, "Address of this host for the others.", auto="its host name", record=False
    )
    rdzv_timeout: int = setting(300, "Seconds that hosts wait for each other.", ge=1, record=False)
    max_restarts: int = setting(
        0, "How often to continue after a rank is lost.", ge=0, record=False
    )
    shutdown_timeout: int = setting(
        30, "Seconds that ranks have to end before they are killed.", ge=1, record=False
    )

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        if self.node_rank >= self.nnodes:
            raise ValueError(
                f"node_rank must be 0 to {self.nnodes - 1}, as --nnodes is {self.nnodes}"
            )
        if self.rdzv_endpoint is None and self.nnodes > 1:
            raise ValueError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint: HOST:PORT of host 0, the same on "
                "every host, for example host0.cluster:29400"
            )
        if self.rdzv_endpoint is not None and not _is_endpoint(self.rdzv_endpoint):
            raise ValueError(f"rdzv_endpoint must be HOST:PORT, got {self.rdzv_endpoint!r}")
        return self


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16


class FinetuneConfig(LaunchConfig, RunConfig):
    """Settings of `dmt finetune`."""


COMMANDS: Final[tuple[type[Config], ...]] = (
    InspectConfig,
    ConvertConfig,
    PartitionConfig,
    PlanConfig,
    ScoreConfig,
    EvaluateConfig,
    VerifyConfig,
    FinetuneConfig,
    ExportConfig,
    UnshardConfig,
)
"""The settings of every command, in the order of the documentation."""


def describe_settings(kind: type[Config]) -> list[tuple[str, str, str, str]]:
    """Return key, values, default and help of every setting of a command, for tables."""
    rows = []
    for name, field in kind.model_fields.items():
        extra = extra_of(field)
        choices = " | ".join(literals(field.annotation)) if not extra["metavar"] else ""
        values = extra["metavar"] or choices or _noun(field.annotation)
        rows.append((key_of(name, field), values, default_text(field), str(field.description)))
    return rows


def base_type(annotation: Any) -> type:
    """Return the plain type of a setting: bool, int, float, Path, str; list for several values."""
    members = set(_members(annotation))
    if members & {tuple, dict} and Path not in members:  # a file may also be given as its content
        return list
    kinds: tuple[type, ...] = (bool, int, float, Path)
    return next((kind for kind in kinds if kind in members), str)


def _members(annotation: Any) -> Iterable[Any]:
    yield get_origin(annotation) or annotation
    if get_origin(annotation) not in (tuple, dict, Literal):
        for part in get_args(annotation):
            yield from _members(part)


def _noun(annotation: Any) -> str:
    nouns = {int: "integer", float: "number", bool: "true | false", Path: "path", list: "list"}
    return nouns.get(base_type(annotation), "text")


def default_text(field: Any) -> str:
    """Return the default of a setting as people read it."""
    if field.is_required():
        return "required"
    auto = extra_of(field)["auto"]
    if auto:
        return str(auto)
    value = field.default
    if value is None or (isinstance(value, dict | tuple) and not value):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_arguments(parser: argparse.ArgumentParser, kind: type[Config]) -> None:
    """Give a script of one's own the options of a command, for `argparse`.

    Args:
        parser: The script's parser; `--config FILE` is added too.
        kind: The settings.
    """
    groups: dict[str, Any] = {}
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    for name, field in kind.model_fields.items():
        panel = extra_of(field)["panel"]
        if panel and panel not in groups:
            groups[panel] = parser.add_argument_group(panel)
        add = groups[panel].add_argument if panel else parser.add_argument
        option, plain = option_name(key_of(name, field)), base_type(field.annotation)
        help_ = f"{field.description} [{default_text(field)}]".replace("%", "%%")
        if plain is bool:
            on = argparse.BooleanOptionalAction if field.default else "store_true"
            add(option, dest=name, action=on, default=None, help=help_)
        else:
            type_ = plain if plain in (int, float) else str
            many = {"action": "append"} if plain is list else {"type": type_}
            choices = literals(field.annotation) if not extra_of(field)["metavar"] else ()
            metavar = None if choices else (extra_of(field)["metavar"] or plain.__name__.upper())
            add(option, dest=name, choices=choices or None, metavar=metavar, help=help_, **many)


def parse_arguments(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Make settings from what a parser of `add_arguments` returned: defaults, file, options.

    Args:
        kind: The settings.
        values: `vars()` of the parsed arguments.

    Raises:
        ConfigError: The file, or an option, is wrong.
    """
    keys = {name: key_of(name, field) for name, field in kind.model_fields.items()}
    given = {key: values[name] for name, key in keys.items() if values.get(name) not in (None, [])}
    file = values.get("config")
    return make_config(kind, given, file)


def make_config(kind: type[Kind], options: Mapping[str, Any], file: Path | None) -> Kind:
    """Make the settings of a command: defaults, then the file, then options.

    Args:
        kind: The settings.
        options: Settings by key.
        file: YAML file with settings, or the `dmt.json` of a bundle.

    Raises:
        ConfigError: The file is wrong.
        UsageError: An option is wrong.
    """
    settings = {} if file is None else read_settings(file, kind)
    rivals = [name for name in kind.alternatives if name in options]
    if len(rivals) > 1:
        raise UsageError(
            f"{' and '.join(map(option_name, rivals))} together", expected="one of the two"
        )
    if rivals:
        settings = {k: value for k, value in settings.items() if k not in kind.alternatives}
    try:
        return kind(**(settings | dict(options)))
    except SettingsError as error:
        said = [f"{option_name(name)} {text}" if name else text for name, text in error.problems]
        raise UsageError(
            said[0] if len(said) == 1 else f"{len(said)} options are wrong",
            hint=f"dmt {kind.command} --help",
            details=said if len(said) > 1 else (),
        ) from None


def to_arguments(config: Config, kind: type[Config]) -> list[str]:
    """Write settings as the options that give them; those that were not set are left out.

    Args:
        config: The settings.
        kind: Which of them to write.
    """
    arguments: list[str] = []
    for name, field in kind.model_fields.items():
        value = getattr(config, name)
        if name not in config.model_fields_set or value is None:
            continue
        option = option_name(key_of(name, field))
        if isinstance(value, bool):
            arguments += [option] if value else ["--no-" + option[2:]] * bool(field.default)
        else:
            arguments += [option, str(value)]
    return arguments
