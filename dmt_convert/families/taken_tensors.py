"""The tensors of one model under its trainer's names, and what is noted while they are taken.

Tensors are taken by the names that their trainer gives them and put under canonical names. What is
missing or misshapen is collected; nothing is refused before all of it is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo, derived
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.layer_stacks import ACTIVATIONS, Layer, LayerNames
from dmt_convert.families.leftovers import DESCRIBE_IT, describe_parts
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_info import Fact, IgnoredTensor, ModelPlace, Source
from dmt_convert.families.name_map import NameMap, is_index, strip_wrappers
from dmt_convert.spec import DTYPE_BYTES, InteractionKind, TableSpec, check_dtype

FLOATS: Final = ("fp32", "fp16", "bf16", "fp64")
_MAX_WIDTH: Final = 1_000_000


@dataclass(slots=True, kw_only=True)
class TakenTensors:
    """The tensors of a model under its trainer's names, and what is known about the model."""

    family: str
    """Name of the family."""
    trainer: str
    """Who writes such checkpoints, for messages."""
    checkpoint: FlatCheckpoint
    """The checkpoint."""
    place: ModelPlace
    """Where the model is in the checkpoint."""
    config: ModelConfig
    """What the user says about the model."""
    anchor: str = ""
    """Regular expression of a table's name, with a group `table`; see `Family`."""
    own_prefix: str = ""
    """What precedes the names of the model's own modules, below the place's prefix."""
    names: NameMap = field(default_factory=lambda: NameMap({}))
    """From the trainer's names to canonical ones, for messages."""
    tensors: dict[str, TensorInfo] = field(init=False, default_factory=dict)
    """Trainer's name, without wrappers and prefix -> tensor, in file order."""
    others: list[TensorInfo] = field(init=False, default_factory=list)
    """Other tensors of the model's dict: outside the prefix, or a name that occurs twice."""
    held: tuple[TensorInfo, ...] = field(init=False)
    """All tensors of the model's dict, in file order."""
    canonical: dict[str, TensorInfo] = field(init=False, default_factory=dict)
    """Canonical name -> tensor, as far as they are known; see `name_map`."""
    tables: list[TableSpec] = field(init=False, default_factory=list)
    """All tables that have been described."""
    facts: list[Fact] = field(init=False, default_factory=list)
    """What is known so far, and why."""
    missing: list[str] = field(init=False, default_factory=list)
    """Tensors that should be there."""
    wrong: list[str] = field(init=False, default_factory=list)
    """Tensors that have another shape or dtype than they should, and why."""
    extra: list[TensorInfo] = field(init=False, default_factory=list)
    """Tensors that the model has no use for, beside those in `tensors` that are never taken."""
    ignored: dict[str, IgnoredTensor] = field(init=False, default_factory=dict)
    """Tensors that are passed over, by path."""
    single_id_tables: set[str] = field(init=False, default_factory=set)
    """Tables that stand for the trainer's only for bags of up to one id."""
    ordered: bool = field(init=False)
    """Whether the tables in the file are in the order in which the model was built."""
    order: Fact | None = field(init=False, default=None)
    """Why the order of the tables is that of the features, whatever their names suggest."""
    dense_names: tuple[str, ...] = field(init=False, default=())
    """Names of the dense inputs in their order, as the data calls them, if something says."""
    interaction: InteractionKind | None = field(init=False, default=None)
    """The interaction, if the checkpoint states it."""
    _used: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.held = tuple(t for t in self.checkpoint.tensors if t.container == self.place.container)
        self.ordered = self.checkpoint.ordered
        for tensor in self.held:
            name = strip_wrappers(tensor.name)
            own = name.removeprefix(self.place.prefix)
            if name.startswith(self.place.prefix) and own not in self.tensors:
                self.tensors[own] = tensor
            else:
                self.others.append(tensor)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of all tensors of the model's dict, in file order."""
        return tuple(tensor.name for tensor in self.held)

    def is_inside(self, tensor: TensorInfo) -> bool:
        """Tell whether a tensor stands within the model's own modules."""
        return strip_wrappers(tensor.name).startswith(self.place.prefix + self.own_prefix)

    @property
    def modules(self) -> frozenset[str]:
        """Names of all modules, as the trainer calls them; empty if the file does not keep them."""
        names = map(strip_wrappers, self.checkpoint.modules.get(self.place.container, ()))
        prefix = self.place.prefix
        return frozenset(n.removeprefix(prefix) for n in names if n.startswith(prefix))

    def tables_by_module(self) -> list[str]:
        """Return the tables in the order in which their modules were built.

        `state_dict()` keeps the names of the modules beside the tensors, and no sorting of the
        tensors changes that. Empty if the file has no such names.
        """
        found: dict[str, None] = {}
        for module in self.checkpoint.modules.get(self.place.container, ()):
            match = re.fullmatch(self.anchor, strip_wrappers(f"{module}.weight"))
            if match is not None and match.groupdict().get("prefix", "") == self.place.prefix:
                found[match["table"]] = None
        return list(found)

    def keys_of(self, pattern: str) -> list[str]:
        """Return what `{}` stands for in the names of a pattern, in file order."""
        expression = re.compile(re.escape(pattern).replace(r"\{\}", r"([^.]+)"))
        found = (expression.fullmatch(name) for name in self.tensors)
        return [match[1] for match in found if match]

    def indices_of(self, pattern: str) -> list[int]:
        """Return the layer indices of a pattern, gaps filled: 0 .. the largest one present."""
        numbers = [int(key) for key in self.keys_of(pattern) if re.fullmatch(r"\d{1,4}", key)]
        return list(range(max(numbers) + 1)) if numbers else []

    # ---- taking tensors by their trainer's names

    def take(self, name: str, *shape: int | None) -> TensorInfo:
        """Take a tensor. If it is missing or wrong, note that and return one of zeros.

        Args:
            name: Trainer's name, without the prefix.
            shape: Expected shape; None stands for any size.
        """
        self._used.add(name)
        info = self.tensors.get(name)
        if info is None:
            self.missing.append(self.place.prefix + name)
        elif info.dtype not in FLOATS:
            self.wrong.append(f"{info.path} has dtype {info.dtype}, not a float")
        elif 0 in info.shape:
            self.wrong.append(f"{info.path} {describe_empty(info)}")
        elif not _fits(info.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            self.wrong.append(f"{info.path} has shape {list(info.shape)}, expected [{wanted}]")
        else:
            return info
        return derived.fill(name, tuple(1 if size is None else size for size in shape))

    def skip(self, *names: str, reason: str = "of no use to the model") -> None:
        """Pass over tensors on purpose.

        Args:
            names: The trainer's names, without the prefix.
            reason: Why they have no part in the logits; it is recorded.
        """
        for name in names:
            if name in self.tensors:
                self._used.add(name)
                self.ignore(self.tensors[name], reason)

    def mark_used(self, name: str) -> None:
        """Note that the model needs a tensor in another way than `take`."""
        self._used.add(name)

    def ignore(self, info: TensorInfo, reason: str) -> None:
        """Record that a tensor is passed over."""
        self.ignored[info.path] = IgnoredTensor(
            name=info.path, dtype=info.dtype, shape=info.shape, reason=reason
        )

    def put(self, name: str, info: TensorInfo) -> None:
        """Give the network a tensor, by its name in the network's state dict."""
        self.canonical[f"network.{name}"] = info

    def as_table(self, info: TensorInfo) -> TensorInfo:
        """Return a table in a dtype that tables may have: one in fp64 is read as fp32."""
        if info.dtype != "fp64":
            return info
        if "table types" not in {fact.subject for fact in self.facts}:
            self.fact("table types", "fp64, read as fp32", "read", "lookups are computed in fp32")
        return derived.cast_rows(info)

    def table(self, name: str, info: TensorInfo) -> TableSpec:
        """Describe a table, and note a dtype that tables cannot have."""
        info = self.as_table(info)
        if info.dtype not in DTYPE_BYTES:
            self.wrong.append(f"{info.path} is a table in {info.dtype}, not fp32, fp16 or bf16")
        self.canonical[f"tables.{name}.weight"] = info
        dtype = check_dtype(info.dtype if info.dtype in DTYPE_BYTES else "fp32")
        table = TableSpec(name=name, rows=info.shape[0], dim=info.shape[1], dtype=dtype)
        self.tables.append(table)
        return table

    def take_stack(
        self, names: Sequence[LayerNames], activations: Sequence[str], width: int | None
    ) -> list[Layer]:
        """Take the tensors of a stack of layers.

        Args:
            names: Trainer's names, one per layer.
            activations: One per layer.
            width: Input width; None if the first layer tells it.

        Raises:
            ArchitectureError: An activation is not known.
        """
        unknown = sorted({name for name in activations if name not in ACTIVATIONS})
        if unknown:
            raise self.refuse(
                f"the activation {unknown[0]!r}",
                expected="one of " + ", ".join(ACTIVATIONS),
                hint="a model with another activation cannot be converted yet",
            )
        layers = []
        for own, activation in zip(names, activations, strict=True):
            layers.append(self._take_layer(own, activation, width))
            width = layers[-1].fan_out
        return layers

    def _take_layer(self, names: LayerNames, activation: str, width: int | None) -> Layer:
        """Take one layer; see `take_stack`."""
        weight = self.take(f"{names.linear}.weight", None, width)
        fan_out, fan_in = weight.shape
        tensors = {"linear.weight": weight}
        # trainers leave out the bias only if a norm follows, which has one of its own
        if f"{names.linear}.bias" in self or not names.norm:
            tensors["linear.bias"] = self.take(f"{names.linear}.bias", fan_out)
        per_output = False
        if names.slope:
            per_output = names.slope in self and self.tensors[names.slope].shape != (1,)
            tensors["slope"] = self.take(names.slope, fan_out if per_output else 1)
        norm: Literal["batch", "layer"] | None = None
        if names.norm:
            norm = "batch" if f"{names.norm}.running_mean" in self else "layer"
            parts = {"weight": "weight", "bias": "bias"}
            if norm == "batch":
                parts |= {"running_mean": "mean", "running_var": "var"}
            for theirs, ours in parts.items():
                tensors[f"norm.{ours}"] = self.take(f"{names.norm}.{theirs}", fan_out)
        return Layer(
            fan_in=fan_in,
            fan_out=fan_out,
            tensors=tensors,
            activation="prelu" if names.slope else activation,
            norm=norm,
            slopes=fan_out if per_output else 0,
        )

    def put_stack(self, stem: str, layers: Sequence[Layer]) -> list[dict[str, Any]] | None:
        """Give the network a stack of layers.

        Args:
            stem: Name of the stack in the network.
            layers: The layers.

        Returns:
            The stack's config; None without layers.
        """
        for i, layer in enumerate(layers):
            for name, info in layer.tensors.items():
                self.put(f"{stem}.{i}.{name}", info)
        return [layer.config for layer in layers] or None

    # ---- tensors under canonical names

    def note_missing(self, canonical: str) -> None:
        """Note that the tensor of a canonical name is missing."""
        self.missing.append(self.source_name(canonical))

    def source_name(self, canonical: str) -> str:
        """Return the trainer's name of a canonical one."""
        if canonical in self.canonical:
            return self.canonical[canonical].path
        name = self.names.to_source(canonical)
        return self.place.prefix + (canonical if name is None else name)

    def give_canonical_names(self, names: NameMap, *, numbered: bool) -> None:
        """Give every tensor its canonical name.

        Args:
            names: The trainer's names; others are left over.
            numbered: Whether tables have numbers for names.
        """
        self.names = names
        for name, info in self.tensors.items():
            known, target = names.to_canonical(name)
            if target is not None and target.startswith("tables.") and numbered:
                known = is_index(target.split(".")[1])
            if known and target is not None and target in self.canonical:
                known = False
            elif known and target is not None:
                self.canonical[target] = info
            if known:
                self._used.add(name)
            if known and target is None:
                self.ignore(info, "a constant of the trainer's module")

    def table_parts(self) -> dict[str, dict[str, TensorInfo]]:
        """Return table -> part -> tensor, in file order; a plain table has one part, `weight`."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.canonical.items():
            if name.startswith("tables."):
                table, part = name.removeprefix("tables.").rsplit(".", maxsplit=1)
                found.setdefault(table, {})[part] = info
        return found

    def set_tables(self, tables: Mapping[str, TensorInfo]) -> None:
        """Replace all tables and their parts by plain tables."""
        rest = {n: info for n, info in self.canonical.items() if not n.startswith("tables.")}
        self.canonical = {f"tables.{n}.weight": info for n, info in tables.items()} | rest

    @property
    def dense_width(self) -> int | None:
        """Output width of dense_arch; None if its last layer has no matrix."""
        layers = self.layer_indices("dense_arch")
        info = self.canonical.get(f"dense_arch.{layers[-1]}.weight") if layers else None
        return info.shape[0] if info is not None and len(info.shape) == 2 else None

    def layer_indices(self, stem: str) -> list[int]:
        """Return the layer indices of a canonical stem, gaps filled: 0 .. the largest present."""
        parts = [name.split(".") for name in self.canonical]
        found = [int(part[1]) for part in parts if part[0] == stem and part[1].isdecimal()]
        return list(range(max(found) + 1)) if found else []

    # ---- facts

    def fact(self, subject: str, value: str, source: Source, reason: str) -> None:
        """Note something that is known."""
        self.facts.append(Fact(subject=subject, value=value, source=source, reason=reason))

    def activation(self, default: str = "relu") -> str:
        """Return the activation of hidden layers: what the user says, or the trainer's default."""
        if self.config.activation is not None:
            self.fact("activation", self.config.activation, "given", "--model-config")
            return self.config.activation
        self.fact("activation", default, "assumed", "the trainer's default; not stored")
        return default

    def final_sigmoid(
        self, *, default: bool, reason: str, stored: bool | None = None, stored_in: str = ""
    ) -> bool:
        """Decide whether the model ends in a sigmoid: user, else checkpoint, else trainer.

        Args:
            default: What the trainer does by default.
            reason: Why that is assumed.
            stored: What the checkpoint says; None if it does not say.
            stored_in: What part of the checkpoint says so.
        """
        value, source = default, "assumed"
        if self.config.final_sigmoid is not None:
            value, source, reason = self.config.final_sigmoid, "given", "--model-config"
        elif stored is not None:
            value, source, reason = stored, "read", stored_in
        self.fact("final sigmoid", str(value).lower(), source, reason)  # type: ignore[arg-type]
        return value

    # ---- refusals

    def refuse_model(self, known: str) -> ArchitectureError:
        """Return the error for a model of the trainer that is none of the known ones.

        Args:
            known: The known ones, such as `neither DLRM nor DCNv2`.
        """
        matches = {n: re.fullmatch(self.anchor, self.place.prefix + n) for n in self.tensors}
        names = [n for n, m in matches.items() if m is None or m["prefix"] != self.place.prefix]
        parts = describe_parts(names) or "nothing but tables"
        return self.refuse(
            f"a model of {self.trainer.split(' (')[0]} that is {known}: it has {parts}",
            expected=f"a model of {self.trainer}",
            hint=f"this one is not supported by itself; {DESCRIBE_IT}",
        )

    def refuse(self, found: str, *, expected: str, hint: str) -> ArchitectureError:
        """Return an error that says which model is meant."""
        return ArchitectureError(
            f"{self.checkpoint.source} ({self.family}): {found}", expected=expected, hint=hint
        )

    def check_width(self, width: int) -> int:
        """Return the width of a network's input.

        Raises:
            ArchitectureError: No model has such a width: the header is damaged.
        """
        if width > _MAX_WIDTH:
            raise self.refuse(
                f"a network that takes {width} inputs",
                expected=f"at most {_MAX_WIDTH}",
                hint="the file is damaged; copy it again",
            )
        return width


def describe_empty(info: TensorInfo) -> str:
    """Say that a tensor has no elements."""
    part = "rows" if info.shape[0] == 0 else "columns"
    return f"has no {part} (shape {list(info.shape)})"


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        have > 0 and want in (None, have) for have, want in zip(shape, expected, strict=True)
    )
