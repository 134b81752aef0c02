"""The tensors of one model under its trainer's names, taken one by one.

A family that describes its model itself takes every tensor that the model must have. What is
missing, misshapen or left over is known in the end, and refused all at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Final

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo, derived
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.facts import Fact, Source
from dmt_convert.families.incomplete import incomplete_model
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.spec import (
    DTYPE_BYTES,
    FeatureSpec,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a family makes of a model's tensors."""

    spec: ModelSpec
    """What kind of model it is."""
    tensors: Mapping[str, TensorInfo]
    """Canonical name -> tensor."""
    facts: Sequence[Fact]
    """How each part of the spec was come by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """What a trainer calls the parts of a layer."""

    linear: str
    """Stem of the linear layer's weight and bias."""
    norm: str = ""
    """Stem of the batch norm's or layer norm's tensors; empty where there is none."""
    slope: str = ""
    """Name of a PReLU's weight; empty where there is none."""


@dataclass(slots=True, kw_only=True)
class TrainerTensors:
    """Takes tensors by their names and collects what is wrong."""

    family: str
    """Name of the family."""
    trainer: str
    """Who writes such checkpoints, for messages."""
    prefix: str
    """What stands before the names in the checkpoint."""
    checkpoint: FlatCheckpoint
    """The checkpoint."""
    config: ModelConfig
    """What the user says of the model."""
    tensors: Mapping[str, TensorInfo]
    """Trainer's name, without the prefix -> tensor, in file order."""
    canonical: dict[str, TensorInfo] = field(default_factory=dict)
    """Canonical name -> tensor, as far as they were taken."""
    missing: list[str] = field(default_factory=list)
    """Tensors that should be there."""
    wrong: list[str] = field(default_factory=list)
    """Tensors that have another shape or dtype than they should."""
    facts: list[Fact] = field(default_factory=list)
    """What is known so far, and why."""
    _used: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def keys_of(self, pattern: str) -> list[str]:
        """What `{}` stands for in the names of a pattern, in file order."""
        expression = re.compile(re.escape(pattern).replace(r"\{\}", r"([^.]+)"))
        found = (expression.fullmatch(name) for name in self.tensors)
        return [match[1] for match in found if match]

    def indices_of(self, pattern: str) -> list[int]:
        """Layer indices of a pattern, gaps filled: 0 .. the largest one present."""
        numbers = [int(key) for key in self.keys_of(pattern) if re.fullmatch(r"\d{1,4}", key)]
        return list(range(max(numbers) + 1)) if numbers else []

    def take(self, name: str, *shape: int | None) -> TensorInfo:
        """Take a tensor; where it is missing or wrong, note that and return one of zeros.

        Args:
            name: Trainer's name, without the prefix.
            shape: Its expected shape, None for a size that may be any.
        """
        self._used.add(name)
        info = self.tensors.get(name)
        if info is None:
            self.missing.append(self.prefix + name)
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
        return TableSpec(name=name, rows=info.shape[0], dim=info.shape[1], dtype=dtype)

    def stack(
        self, stem: str, layers: Sequence[LayerNames], activations: Sequence[str], width: int | None
    ) -> list[dict[str, Any]]:
        """Take a stack of layers and give it to the network.

        Args:
            stem: Name of the stack in the network.
            layers: Trainer's names.
            activations: One per layer.
            width: Input width, None where the first layer tells it.

        Returns:
            The stack's config; see `towers.networks.layers`.

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
        config = []
        for i, (names, activation) in enumerate(zip(layers, activations, strict=True)):
            weight = self.take(f"{names.linear}.weight", None, width)
            fan_out, fan_in = weight.shape
            self.put(f"{stem}.{i}.linear.weight", weight)
            has_bias = f"{names.linear}.bias" in self or not names.norm
            if has_bias:
                bias = self.take(f"{names.linear}.bias", fan_out)
                self.put(f"{stem}.{i}.linear.bias", bias)
            slopes = {}
            if names.slope:
                # one for all outputs, or one for each
                own = names.slope in self and self.tensors[names.slope].shape != (1,)
                slopes = {"slopes": fan_out} if own else {}
                slope = self.take(names.slope, fan_out if own else 1)
                self.put(f"{stem}.{i}.slope", slope)
                activation = "prelu"
            layer = {"in": fan_in, "out": fan_out, "bias": has_bias, "activation": activation}
            layer |= slopes
            config.append({**layer, "norm": self._norm(f"{stem}.{i}.norm", names.norm, fan_out)})
            width = fan_out
        return config

    def _norm(self, target: str, name: str, width: int) -> str | None:
        if not name:
            return None
        for kind in ("weight", "bias"):
            self.put(f"{target}.{kind}", self.take(f"{name}.{kind}", width))
        if f"{name}.running_mean" not in self:
            return "layer"
        self.put(f"{target}.mean", self.take(f"{name}.running_mean", width))
        self.put(f"{target}.var", self.take(f"{name}.running_var", width))
        self.skip(f"{name}.num_batches_tracked")
        return "batch"

    def fact(self, subject: str, value: str, source: Source, reason: str) -> None:
        """Note something that is known."""
        self.facts.append(Fact(subject=subject, value=value, source=source, reason=reason))

    def activation(self, default: str = "relu") -> str:
        """Return the activation of hidden layers: as the user says, else the trainer's default."""
        if self.config.activation is not None:
            self.fact("activation", self.config.activation, "given", "--model-config")
            return self.config.activation
        self.fact("activation", default, "assumed", "the trainer's default; not stored")
        return default

    def believed_width(self, width: int) -> int:
        """Return the width of a network's input.

        Raises:
            ArchitectureError: It is beyond what any model has: a damaged header.
        """
        if width > _MAX_WIDTH:
            raise self.refuse(
                f"a network that takes {width} inputs",
                expected=f"at most {_MAX_WIDTH}",
                hint="the file is damaged; copy it again",
            )
        return width

    def check(self) -> None:
        """Refuse what is missing, misshapen, or left over.

        Raises:
            ArchitectureError: Something is.
        """
        extra = [
            info.path
            for name, info in self.tensors.items()
            if name not in self._used and not any(fnmatch(info.name, g) for g in self.config.ignore)
        ]
        if self.missing or self.wrong or extra:
            raise incomplete_model(
                self.checkpoint.source,
                family=self.family,
                trainer=self.trainer,
                missing=self.missing,
                wrong=self.wrong,
                extra=extra,
            )

    def refuse(self, found: str, *, expected: str, hint: str) -> ArchitectureError:
        """Return an error that says which model is meant."""
        return ArchitectureError(
            f"{self.checkpoint.source} ({self.family}): {found}", expected=expected, hint=hint
        )

    def describe_network(
        self,
        *,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec],
        num_dense: int,
        name: str,
        config: Mapping[str, Any],
        final_sigmoid: bool,
    ) -> Described:
        """Describe a model whose dense part is a network, all of whose tensors have been taken.

        Args:
            tables: All tables.
            features: All features.
            num_dense: Number of dense inputs.
            name: Name of the network's factory.
            config: What the factory is told.
            final_sigmoid: Whether the original model ends in a sigmoid.
        """
        spec = network_model(
            family=self.family,
            tables=tables,
            features=features,
            num_dense=num_dense,
            network=NetworkSpec(name=name, config=config),
            final_sigmoid=final_sigmoid,
        )
        return Described(spec=spec, tensors=self.canonical, facts=self.facts)


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        have > 0 and want in (None, have) for have, want in zip(shape, expected, strict=True)
    )
