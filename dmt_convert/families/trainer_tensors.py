"""The tensors of one model, and everything that is found out about them.

Every family works with one `TrainerTensors`. It takes tensors by the names that their trainer
gives them, puts them under canonical names, and notes facts. What is missing, misshapen or left
over is collected and refused all at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Final, Literal

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo, derived
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_info import (
    Fact,
    FlatModelInfo,
    ModelPlace,
    Source,
    find_optimizer_state,
)
from dmt_convert.families.name_map import NameMap, is_index, strip_wrappers
from dmt_convert.spec import (
    DTYPE_BYTES,
    FeatureSpec,
    InteractionKind,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    NetworkSpec,
    TableSpec,
    check_dtype,
    network_model,
)

FLOATS: Final = ("fp32", "fp16", "bf16", "fp64")
ACTIVATIONS: Final = (
    "linear",
    "relu",
    "sigmoid",
    "tanh",
    "gelu",
    "silu",
    "elu",
    "leakyrelu",
    "softplus",
    "prelu",
)
"""Activations that networks know."""
_MAX_WIDTH: Final = 1_000_000
_MAX_LISTED: Final = 100
"""Faults of a kind that an error lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """What a trainer calls the parts of a layer."""

    linear: str
    """Stem of the linear layer's weight and bias."""
    norm: str = ""
    """Stem of the batch norm's or layer norm's tensors; empty without a norm."""
    slope: str = ""
    """Name of a PReLU's weight; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a stack: linear, then perhaps a norm, then an activation."""

    fan_in: int
    """Input width."""
    fan_out: int
    """Output width."""
    tensors: Mapping[str, TensorInfo]
    """Name within the layer (`linear.weight`, `norm.mean`, `slope`, ...) -> tensor."""
    activation: str = "linear"
    """One of `ACTIVATIONS`."""
    norm: Literal["batch", "layer"] | None = None
    """Kind of the norm."""
    slopes: int = 0
    """PReLU only: number of slopes if there is one per output; 0 if all outputs share one."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a layer of an `MlpSpec`: linear with a bias, then ReLU."""
        return self.activation == "relu" and self.norm is None and "linear.bias" in self.tensors

    @property
    def config(self) -> dict[str, Any]:
        """The layer as a network's factory wants it; see `dmt_convert.model.networks.layers`."""
        return {
            "in": self.fan_in,
            "out": self.fan_out,
            "bias": "linear.bias" in self.tensors,
            "activation": self.activation,
            **({"slopes": self.slopes} if self.slopes else {}),
            "norm": self.norm,
        }


@dataclass(slots=True, kw_only=True)
class TrainerTensors:
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
    names: NameMap = field(default_factory=lambda: NameMap({}))
    """From the trainer's names to canonical ones, for messages."""
    tensors: dict[str, TensorInfo] = field(init=False, default_factory=dict)
    """Trainer's name, without wrappers and prefix -> tensor, in file order."""
    others: list[str] = field(init=False, default_factory=list)
    """Other tensors of the model's dict: outside the prefix, or a name that occurs twice."""
    parameter_names: tuple[str, ...] = field(init=False)
    """Names of all tensors of the model's dict, in file order."""
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
    extra: list[str] = field(init=False, default_factory=list)
    """Tensors that the model has no use for, beside those in `tensors` that are never taken."""
    ordered: bool = field(init=False)
    """Whether the tables in the file are in the order in which the model was built."""
    order: Fact | None = field(init=False, default=None)
    """Why the order of the tables is that of the features, whatever their names suggest."""
    interaction: InteractionKind | None = field(init=False, default=None)
    """The interaction, if the checkpoint states it."""
    _used: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        held = [t for t in self.checkpoint.tensors if t.container == self.place.container]
        self.parameter_names = tuple(tensor.name for tensor in held)
        self.ordered = self.checkpoint.ordered
        for tensor in held:
            name = strip_wrappers(tensor.name)
            own = name.removeprefix(self.place.prefix)
            if name.startswith(self.place.prefix) and own not in self.tensors:
                self.tensors[own] = tensor
            elif not self.is_ignored(tensor):
                self.others.append(tensor.path)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def is_ignored(self, tensor: TensorInfo) -> bool:
        """Tell whether the user says that a tensor does not belong to the model."""
        return any(fnmatch(tensor.name, pattern) for pattern in self.config.ignore)

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
        elif not _fits(info.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            self.wrong.append(f"{info.path} has shape {list(info.shape)}, expected [{wanted}]")
        else:
            return info
        return derived.fill(name, tuple(1 if size is None else size for size in shape))

    def skip(self, *patterns: str) -> None:
        """Pass over tensors on purpose; `{}` stands for one component of a name."""
        for pattern in patterns:
            expression = re.escape(pattern).replace(r"\{\}", r"[^.]+")
            self._used.update(name for name in self.tensors if re.fullmatch(expression, name))

    def put(self, name: str, info: TensorInfo) -> None:
        """Give the network a tensor, by its name in the network's state dict."""
        self.canonical[f"network.{name}"] = info

    def table(self, name: str, info: TensorInfo) -> TableSpec:
        """Describe a table, and note a dtype that tables cannot have."""
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
                self.skip(f"{names.norm}.num_batches_tracked")
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

    def check(self) -> None:
        """Refuse tensors that are missing, misshapen or left over.

        Raises:
            ArchitectureError: There are such tensors; all of them are listed.
        """
        unused = [
            info.path
            for name, info in self.tensors.items()
            if name not in self._used and not self.is_ignored(info)
        ]
        if self.missing or self.wrong or self.extra or unused:
            raise self.incomplete([*self.extra, *unused])

    def incomplete(self, extra: Sequence[str]) -> ArchitectureError:
        """Return the error that lists every missing, misshapen and extra tensor."""
        details, counts = [], []
        for items, label, prefix in (
            (self.missing, "missing", "missing"),
            (self.wrong, "misshapen", "wrong shape"),
            (extra, "extra", "extra"),
        ):
            found = [*dict.fromkeys(items)]
            details += [f"{prefix}: {text}" for text in found[:_MAX_LISTED]]
            if len(found) > _MAX_LISTED:
                details.append(f"{prefix}: ... and {len(found) - _MAX_LISTED} more")
            counts += [f"{len(found)} {label}"] if found else []
        return ArchitectureError(
            f"{self.checkpoint.source} is not a whole {self.family} model: "
            f"{', '.join(counts) or 'no'} tensors",
            expected=f"exactly the tensors of {self.trainer}, with shapes that fit together",
            hint="save the whole model again; if tensors do not belong to it, list them under "
            "`ignore: [pattern]` in --model-config",
            details=details,
        )

    # ---- the result

    def finish(
        self, spec: ModelSpec, stored: Mapping[str, TensorInfo] | None = None
    ) -> FlatModelInfo:
        """Return what is known about the model; `canonical` holds all its tensors.

        Args:
            spec: What kind of model it is.
            stored: Canonical name -> tensor as the file holds it, to look for the optimizer's
                state. Default: all tensors that are not derived, since only these have one.
        """
        if stored is None:
            stored = {n: info for n, info in self.canonical.items() if info.derivation is None}
        state = find_optimizer_state(self.checkpoint, self.place, stored, self.parameter_names)
        facts = self.facts
        if not any(fact.subject == "family" for fact in facts):
            facts = [self._family_fact(), *facts]
        return FlatModelInfo(
            checkpoint=self.checkpoint,
            spec=spec,
            tensors=self.canonical,
            optimizer_state=self._fitting_state(state, stored),
            facts=tuple(facts),
            ignored=self._list_ignored(),
        )

    def describe_network(
        self,
        *,
        features: Sequence[FeatureSpec],
        num_dense: int,
        name: str,
        config: Mapping[str, Any],
        final_sigmoid: bool,
    ) -> FlatModelInfo:
        """Describe a model whose dense part is a network; all its tensors have been taken.

        Args:
            features: All features.
            num_dense: Number of dense inputs.
            name: Name of the network's factory.
            config: Arguments of the factory.
            final_sigmoid: Whether the original model ends in a sigmoid.
        """
        spec = network_model(
            family=self.family,
            tables=self.tables,
            features=features,
            num_dense=num_dense,
            network=NetworkSpec(name=name, config=config),
            final_sigmoid=final_sigmoid,
        )
        return self.finish(spec)

    def describe_dlrm(
        self,
        features: Sequence[FeatureSpec],
        stacks: tuple[Sequence[Layer], Sequence[Layer]],
        *,
        interaction: Literal["dot", "cat"],
        dense_at: int,
        final_sigmoid: bool,
    ) -> FlatModelInfo:
        """Describe a DLRM with plain layers, whose top layer has its columns in another order.

        Ours are [dense, pairs], in which the pairs are the upper triangle with the dense vector
        as row 0, or [dense, features] for cat. Theirs are [pairs, dense], or the vectors in the
        order in which their model has them.

        Args:
            features: All features.
            stacks: The layers over the dense inputs, and those that give the logit.
            interaction: How vectors meet.
            dense_at: Place of the dense vector among the vectors of their model.
            final_sigmoid: Whether the original model ends in a sigmoid.
        """
        bottom, top = stacks
        dims = {table.name: table.dim for table in self.tables}
        widths = [bottom[-1].fan_out, *(dims[feature.table] for feature in features)]
        # our vector i is their vector theirs[i]
        theirs = [dense_at, *(i for i in range(len(widths)) if i != dense_at)]
        columns = (_dot_columns if interaction == "dot" else _cat_columns)(widths, theirs)
        for stem, layers in (("dense_arch", bottom), ("over_arch", top)):
            for i, layer in enumerate(layers):
                for kind in ("weight", "bias"):
                    self.canonical[f"{stem}.{i}.{kind}"] = layer.tensors[f"linear.{kind}"]
        first = self.canonical["over_arch.0.weight"]
        self.canonical["over_arch.0.weight"] = derived.select_columns(first, columns)
        spec = ModelSpec(
            family=self.family,
            tables=tuple(self.tables),
            features=tuple(features),
            dense_arch=_mlp(bottom, final_relu=True),
            interaction=InteractionSpec(kind=interaction),
            over_arch=_mlp(top, final_relu=False),
            final_sigmoid=final_sigmoid,
        )
        return self.finish(spec)

    def _family_fact(self) -> Fact:
        where = ".".join((*self.place.container, self.place.prefix.removesuffix("."))).strip(".")
        reason = "tensor names" + (f" below {where!r}" if where else "")
        return Fact(subject="family", value=self.family, source="inferred", reason=reason)

    def _fitting_state(
        self, state: Mapping[str, TensorInfo], stored: Mapping[str, TensorInfo]
    ) -> dict[str, TensorInfo]:
        """Keep accumulators of tensors that are as they were, and of tables with the same rows."""
        fitting = {}
        for name, info in state.items():
            # a mixed-dimension table has the rows of its narrow one
            target = re.sub(r"^(tables\..+)\.embs$", r"\1.weight", name)
            now = self.canonical.get(target)
            same_rows = now is not None and now.shape[:1] == info.shape[:1]
            if now is stored[name] or (same_rows and target.startswith("tables.")):
                fitting[target] = info
        return fitting

    def _list_ignored(self) -> tuple[str, ...]:
        """Count what the checkpoint holds beside the model, one line per dict."""
        counts: dict[str, int] = {}
        for tensor in self.checkpoint.tensors:
            if tensor.container != self.place.container:
                head = tensor.container[0] if tensor.container else "(top level)"
                counts[head] = counts.get(head, 0) + 1
        return tuple(f"{head}: {count} tensors" for head, count in counts.items())


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        have > 0 and want in (None, have) for have, want in zip(shape, expected, strict=True)
    )


def _mlp(layers: Sequence[Layer], *, final_relu: bool) -> MlpSpec:
    widths = (layers[0].fan_in, *(layer.fan_out for layer in layers))
    return MlpSpec(widths=widths, final_relu=final_relu)


def _cat_columns(widths: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Return their column of each of our columns [dense, features]."""
    starts, begin = {}, 0
    for place, i in sorted((place, i) for i, place in enumerate(theirs)):
        starts[place] = begin
        begin += widths[i]
    return [
        starts[place] + column
        for width, place in zip(widths, theirs, strict=True)
        for column in range(width)
    ]


def _dot_columns(widths: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Return their column [pairs, dense] of each of our columns [dense, pairs]."""
    pairs = [(i, j) for i in range(len(theirs)) for j in range(i + 1, len(theirs))]
    number = {pair: k for k, pair in enumerate(pairs)}
    columns = [len(pairs) + i for i in range(widths[0])]
    for i, j in pairs:
        columns.append(number[min(theirs[i], theirs[j]), max(theirs[i], theirs[j])])
    return columns
