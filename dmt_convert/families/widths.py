"""Read layer widths off tensor shapes, and say of every tensor what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.families.architecture import Architecture
from dmt_convert.spec import MlpSpec

FLOATS = ("fp32", "fp16", "bf16", "fp64")


class ShapeReader:
    """Reads shapes of canonical tensors and collects every problem.

    Args:
        tensors: Canonical name -> tensor.
        family: The family, to name tensors as its trainer does.
        prefix: What stands before the trainer's names.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], family: Architecture, prefix: str
    ) -> None:
        self._tensors, self._family, self._prefix = tensors, family, prefix
        self.missing: list[str] = []
        self.wrong: list[str] = []
        for name, info in tensors.items():
            if info.dtype not in FLOATS:
                self.wrong.append(f"{info.path} has dtype {info.dtype}, not a float")
            elif name.startswith("tables.") and info.dtype == "fp64":
                self.wrong.append(f"{info.path} is a table in fp64, not fp32, fp16 or bf16")

    def source_name(self, canonical: str) -> str:
        """Name a tensor as the trainer does."""
        if canonical in self._tensors:
            return self._tensors[canonical].path
        name = self._family.names.to_source(canonical)
        return self._prefix + (canonical if name is None else name)

    def indices(self, stem: str) -> list[int]:
        """Layer indices of a stem, gaps filled: 0 .. the largest one present."""
        found = [
            int(name.split(".")[1])
            for name in self._tensors
            if name.split(".", maxsplit=1)[0] == stem and name.split(".")[1].isdecimal()
        ]
        return list(range(max(found) + 1)) if found else []

    def shape(self, name: str, ndim: int) -> tuple[int, ...] | None:
        """Shape of a tensor, None (and a problem) where it is missing or has another rank."""
        info = self._tensors.get(name)
        if info is None:
            self.missing.append(self.source_name(name))
            return None
        if len(info.shape) != ndim or 0 in info.shape:
            self.wrong.append(f"{info.path} has shape {list(info.shape)}, not {ndim} dims")
            return None
        return info.shape

    def mlp(
        self, stem: str, *, last: str | None = None, output: int | None = None, final_relu: bool
    ) -> MlpSpec | None:
        """Read a stack of linear layers.

        Args:
            stem: Canonical stem, such as `dense_arch`.
            last: Canonical stem of a last layer that stands apart, such as `over_arch.last`.
            output: Output width where it is known from elsewhere.
            final_relu: Whether a ReLU follows the last layer.

        Returns:
            The widths that most tensors agree on; None where a layer is missing.
        """
        layers = [f"{stem}.{i}" for i in self.indices(stem)] + ([last] if last else [])
        if not layers:
            self.missing.append(self.source_name(f"{stem}.0.weight"))
            return None
        weights = [self.shape(f"{layer}.weight", 2) for layer in layers]
        biases = [self.shape(f"{layer}.bias", 1) for layer in layers]
        widths: list[int | None] = []
        for i in range(len(layers) + 1):
            votes = [
                weights[i - 1][0] if i and weights[i - 1] else None,  # type: ignore[index]
                biases[i - 1][0] if i and biases[i - 1] else None,  # type: ignore[index]
                weights[i][1] if i < len(layers) and weights[i] else None,  # type: ignore[index]
                output if i == len(layers) else None,
            ]
            counted = Counter(vote for vote in votes if vote is not None)
            widths.append(counted.most_common(1)[0][0] if counted else None)
        for i, layer in enumerate(layers):
            self._expect(f"{layer}.weight", weights[i], (widths[i + 1], widths[i]))
            self._expect(f"{layer}.bias", biases[i], (widths[i + 1],))
        known = [width for width in widths if width is not None]
        if len(known) < len(widths):
            return None
        return MlpSpec(widths=tuple(known), final_relu=final_relu)

    def input_width(self, stem: str) -> int | None:
        """Width that most tensors of `cross`, or the first layer of a branch, take."""
        axis = {"w": 0, "v": 1, "bias": 0} if stem == "cross" else {"0.weight": 1}
        votes = Counter(
            info.shape[axis[kind]]
            for name, info in self._tensors.items()
            for kind in axis
            if name.startswith(f"{stem}.")
            and name.endswith(f".{kind}")
            and len(info.shape) > axis[kind]
        )
        return votes.most_common(1)[0][0] if votes else None

    def cross(self, width: int) -> tuple[int, int] | None:
        """Read the low-rank cross layers over `width` inputs: (layers, rank)."""
        layers = self.indices("cross")
        shapes = {
            (i, kind): self.shape(f"cross.{i}.{kind}", 1 if kind == "bias" else 2)
            for i in layers
            for kind in ("w", "v", "bias")
        }
        ranks = Counter(
            shape[1 if kind == "w" else 0]
            for (_, kind), shape in shapes.items()
            if shape is not None and kind != "bias"
        )
        if not ranks:
            return None
        rank = ranks.most_common(1)[0][0]
        expected = {"w": (width, rank), "v": (rank, width), "bias": (width,)}
        for (i, kind), shape in shapes.items():
            self._expect(f"cross.{i}.{kind}", shape, expected[kind])
        return len(layers), rank

    def _expect(
        self, name: str, shape: tuple[int, ...] | None, expected: tuple[int | None, ...]
    ) -> None:
        if shape is None or None in expected or shape == expected:
            return
        self.wrong.append(
            f"{self.source_name(name)} has shape {list(shape)}, expected {list(expected)}"
        )
