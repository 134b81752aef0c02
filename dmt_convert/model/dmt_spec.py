"""What a converted model is, as pure data: the flat spec, its towers, their modules. No torch.

Letters: F_t features of a tower, N embedding dim, D output dim, K_t vectors that a tower emits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from dmt_convert.documents import MODEL_CONFIG, from_json, to_json
from dmt_convert.errors import ConfigError
from dmt_convert.spec import InteractionSpec, MlpSpec, ModelSpec, TowerAssignment

TowerModuleKind = Literal["passthrough", "dlrm", "dcn", "linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerModuleSpec:
    """What stands between a tower's lookup and the network."""

    kind: TowerModuleKind
    """passthrough: identity; dlrm: two linear maps; dcn: a cross network, then a linear map;
    linear: one linear map, which the receiver undoes as well as it can."""
    c: int = 0
    """dlrm: vectors emitted per feature."""
    p: int = 0
    """dlrm: vectors emitted per tower beside those."""
    dim: int = 0
    """Output dim D of every emitted vector; 0 for passthrough; linear: all that the tower emits."""
    cross_layers: int = 0
    """dcn: layers of the tower's own cross network."""
    cross_rank: int = 0
    """dcn: their rank."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(TowerModuleKind):
            raise ConfigError(
                f"tower module {self.kind!r}",
                expected="one of " + ", ".join(get_args(TowerModuleKind)),
                hint="leave --tower-module at auto",
            )
        bad = self.kind == "dlrm" and (min(self.c, self.p) < 0 or self.c + self.p < 1)
        if bad or (self.kind != "passthrough" and self.dim < 1):
            raise ConfigError(
                f"a {self.kind} tower module with c={self.c}, p={self.p}, D={self.dim}",
                expected="c >= 0, p >= 0, c + p >= 1, D >= 1",
                hint="the default is --c 1 --p 0 and half the embedding dim",
            )

    def num_vectors(self, num_features: int) -> int:
        """K_t: vectors that a tower of that many features emits (not for passthrough)."""
        if self.kind == "linear":
            return 1
        return self.c * num_features + self.p if self.kind == "dlrm" else num_features

    def width(self, dims: Sequence[int]) -> int:
        """Elements that a tower emits per sample.

        Args:
            dims: Embedding dims of its features.
        """
        if self.kind == "passthrough":
            return sum(dims)
        return self.num_vectors(len(dims)) * self.dim


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSpec:
    """One tower."""

    features: tuple[str, ...]
    """Its features."""
    module: TowerModuleSpec
    """Its module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DmtSpec:
    """A converted model: the flat one, and how towers replace its global lookup."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = MODEL_CONFIG

    flat: ModelSpec
    """The model that was converted."""
    towers: tuple[TowerSpec, ...]
    """Its towers; all have the same kind of module, each its own output dim."""

    def __post_init__(self) -> None:
        self.assignment.check_covers(self.flat.feature_names)
        shapes = {(t.module.kind, t.module.c, t.module.p) for t in self.towers}
        if len(shapes) > 1:
            raise ConfigError(
                "towers with modules "
                + ", ".join(f"{kind} c={c} p={p}" for kind, c, p in sorted(shapes)),
                expected="one kind of module, one c and one p; D may differ",
                hint="give all towers the same module",
            )

    @property
    def assignment(self) -> TowerAssignment:
        """The towers as sets of features."""
        return TowerAssignment(towers=tuple(tower.features for tower in self.towers))

    @property
    def kind(self) -> TowerModuleKind:
        """Kind of all tower modules."""
        return self.towers[0].module.kind

    @property
    def is_passthrough(self) -> bool:
        """Whether the model computes exactly what the flat one does."""
        return self.kind == "passthrough"

    @property
    def keeps_network(self) -> bool:
        """Whether all that stands behind the towers is the flat model's, fed in its order."""
        return self.kind in ("passthrough", "linear")

    def tower_dims(self, tower: int) -> tuple[int, ...]:
        """Embedding dims of a tower's features."""
        return self.dims_by_tower[tower]

    @property
    def dims_by_tower(self) -> tuple[tuple[int, ...], ...]:
        """Embedding dims of every tower's features."""
        dims = dict(zip(self.flat.feature_names, self.flat.feature_dims, strict=True))
        return tuple(tuple(dims[name] for name in tower.features) for tower in self.towers)

    @property
    def tower_widths(self) -> tuple[int, ...]:
        """Elements that every tower emits per sample."""
        pairs = zip(self.towers, self.dims_by_tower, strict=True)
        return tuple(tower.module.width(dims) for tower, dims in pairs)

    @property
    def compression(self) -> float:
        """What would cross hosts uncompressed, over what does: sum N_f / sum K_t D."""
        return sum(self.flat.feature_dims) / sum(self.tower_widths)

    @property
    def dense_dim(self) -> int:
        """Width at which the dense vector takes part in the interaction."""
        dense = self.flat.input_dims[0]
        if self.keeps_network or self.flat.interaction.kind != "dot":
            return dense
        return max(tower.module.dim for tower in self.towers)

    @property
    def emitted_dims(self) -> tuple[int, ...]:
        """Widths of all vectors that the towers emit, in their order (not for passthrough)."""
        return tuple(
            tower.module.dim
            for tower in self.towers
            for _ in range(tower.module.num_vectors(len(tower.features)))
        )

    @property
    def interaction_dims(self) -> tuple[int, ...]:
        """Widths of the interaction's inputs, the dense vector first.

        Vectors that are paired by dot products have one width: narrower ones are filled up with
        zeros where they arrive, so that no zero crosses the network.
        """
        if self.keeps_network:
            return self.flat.input_dims
        if self.flat.interaction.kind == "dot":
            return (self.dense_dim,) * (1 + len(self.emitted_dims))
        return (self.dense_dim, *self.emitted_dims)

    @property
    def interaction(self) -> InteractionSpec:
        """The converted interaction."""
        flat = self.flat.interaction
        if self.keeps_network or flat.kind != "projection":
            return flat
        assert flat.branch1 is not None and flat.branch2 is not None
        width = sum(self.interaction_dims)
        branch1, branch2 = (
            MlpSpec(widths=(width, *branch.widths[1:]), final_relu=branch.final_relu)
            for branch in (flat.branch1, flat.branch2)
        )
        return InteractionSpec(kind="projection", branch1=branch1, branch2=branch2)

    @property
    def over_arch(self) -> MlpSpec:
        """The converted over_arch: only its input width may differ from the flat one's."""
        flat = self.flat
        if self.keeps_network or flat.interaction.kind == "projection":
            return flat.over_arch
        dims = self.interaction_dims
        width = self.interaction.output_width(dims) + flat.input_dims[0] - dims[0]
        return MlpSpec(
            widths=(width, *flat.over_arch.widths[1:]), final_relu=flat.over_arch.final_relu
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` reads it back."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: object) -> DmtSpec:
        """Read what `to_json` wrote.

        Raises:
            BundleError: It does not describe a model.
        """
        return from_json(cls, value)
