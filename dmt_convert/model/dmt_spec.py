"""What a converted model is, as pure data: the flat spec, its towers, their modules. No torch.

Letters: F_t features of a tower, N embedding dim, D output dim, K_t vectors that a tower emits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dmt_convert.documents import MODEL_CONFIG, OMITTED_IF_EMPTY, from_json, to_json
from dmt_convert.errors import ConfigError
from dmt_convert.model.tower_code import ELEMENT_BYTES
from dmt_convert.model.tower_kinds import TowerModule, TowerModuleSpec
from dmt_convert.spec import CommDtype, InteractionSpec, MlpSpec, ModelSpec, TowerAssignment


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSpec:
    """One tower."""

    features: tuple[str, ...]
    """Its features."""
    module: TowerModuleSpec
    """Its module."""
    everywhere: bool = field(default=False, metadata=OMITTED_IF_EMPTY)
    """Whether every rank has its tables, so that nothing of it crosses hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DmtSpec:
    """A converted model: the flat one, and how towers replace its global lookup."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = MODEL_CONFIG

    flat: ModelSpec
    """The model that was converted."""
    towers: tuple[TowerSpec, ...]
    """Its towers; all that send have the same kind of module, each its own output dim and code."""

    def __post_init__(self) -> None:
        self.assignment.check_covers(self.flat.feature_names)
        shapes = {(t.module.kind, t.module.c, t.module.p) for t in self.sending_towers}
        if len(shapes) > 1:
            raise ConfigError(
                "towers with modules "
                + ", ".join(f"{kind} c={c} p={p}" for kind, c, p in sorted(shapes)),
                expected="one kind of module, one c and one p; D may differ",
                hint="give all towers the same module",
            )
        for tower, dims in zip(self.towers, self.dims_by_tower, strict=True):
            code = tower.module.code
            if code is not None and code.int4 and code.int4 >= tower.module.width(dims):
                raise ConfigError(
                    f"{code.int4} elements of 4 bits in a tower that emits no more",
                    expected="one element of 8 bits at least, which shows what is not finite",
                    hint="leave the precision to `dmt convert`",
                )
        local = [t.module for t in self.towers if t.everywhere]
        if not shapes or any(not each.rules.exact or each.code is not None for each in local):
            raise ConfigError(
                f"{len(local)} of {len(self.towers)} towers are on every rank, with modules "
                + ", ".join(sorted({each.kind for each in local})),
                expected="a tower that is placed on hosts; passthrough modules over the others",
                hint="what does not cross hosts needs no compression",
            )
        if local and not self.keeps_network:
            raise ConfigError(
                f"towers on every rank beside {self.kind} tower modules",
                expected="linear or passthrough tower modules, which keep the flat model's network",
                hint="choose --tower-module linear, or --replicate none",
            )

    @property
    def assignment(self) -> TowerAssignment:
        """The towers as sets of features."""
        return TowerAssignment(towers=tuple(tower.features for tower in self.towers))

    @property
    def sending_towers(self) -> tuple[TowerSpec, ...]:
        """The towers that send what they emit to other hosts."""
        return tuple(tower for tower in self.towers if not tower.everywhere)

    @property
    def kind(self) -> str:
        """Kind of the modules of all towers that send."""
        return self.sending_towers[0].module.kind

    @property
    def rules(self) -> TowerModule:
        """The kind of these modules: answers what follows from it."""
        return self.sending_towers[0].module.rules

    @property
    def is_passthrough(self) -> bool:
        """Whether the model computes exactly what the flat one does."""
        return self.rules.exact and all(tower.module.code is None for tower in self.towers)

    @property
    def keeps_network(self) -> bool:
        """Whether all that stands behind the towers is the flat model's, fed in its order."""
        return self.rules.keeps_network

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
    def tower_bytes(self) -> tuple[int, ...]:
        """Bytes that every tower sends per sample to a host; 0 for towers on every rank."""
        return self.bytes_sent()

    def bytes_sent(self, comm_dtype: CommDtype | None = None) -> tuple[int, ...]:
        """Return `tower_bytes` if what has no code travels in a precision; None: as fp32."""
        pairs = zip(self.towers, self.dims_by_tower, strict=True)
        return tuple(0 if t.everywhere else t.module.nbytes(dims, comm_dtype) for t, dims in pairs)

    def gradient_bytes(self, comm_dtype: CommDtype | None = None) -> tuple[int, ...]:
        """Bytes per sample of the gradients that come back to every tower.

        Args:
            comm_dtype: Their precision; None: that of the tower's code, fp32 without one.
        """
        pairs = zip(self.towers, self.dims_by_tower, strict=True)
        return tuple(
            0 if t.everywhere else t.module.gradient_bytes(dims, comm_dtype) for t, dims in pairs
        )

    @property
    def compression(self) -> float:
        """Bytes that would cross hosts as float32, over bytes that do."""
        return ELEMENT_BYTES["fp32"] * sum(self.flat.feature_dims) / sum(self.tower_bytes)

    @property
    def columns_by_tower(self) -> tuple[tuple[int, ...], ...]:
        """Columns of all pooled embeddings in flat order that every tower holds, in its order."""
        columns = self.flat.feature_columns
        return tuple(
            tuple(column for name in tower.features for column in columns[name])
            for tower in self.towers
        )

    @property
    def dense_dim(self) -> int:
        """Width at which the dense vector takes part in the interaction."""
        if self.keeps_network or not self.flat.interaction.rules.pairs_vectors:
            return self.flat.input_dims[0]
        return max(self.emitted_dims)

    @property
    def emitted_dims(self) -> tuple[int, ...]:
        """Widths of all vectors that the towers emit, in their order."""
        return tuple(
            width
            for tower, dims in zip(self.towers, self.dims_by_tower, strict=True)
            for width in tower.module.vector_dims(dims)
        )

    @property
    def interaction_dims(self) -> tuple[int, ...]:
        """Widths of the interaction's inputs, the dense vector first.

        Vectors that are paired by dot products have one width: narrower ones are filled up with
        zeros where they arrive, so that no zero crosses the network.
        """
        if self.keeps_network:
            return self.flat.input_dims
        if self.flat.interaction.rules.pairs_vectors:
            return (self.dense_dim,) * (1 + len(self.emitted_dims))
        return (self.dense_dim, *self.emitted_dims)

    @property
    def interaction(self) -> InteractionSpec:
        """The converted interaction."""
        flat = self.flat.interaction
        return flat if self.keeps_network else flat.rules.converted(flat, self.interaction_dims)

    @property
    def over_arch(self) -> MlpSpec:
        """The converted over_arch: only its input width may differ from the flat one's."""
        if self.keeps_network:
            return self.flat.over_arch
        dims = self.interaction_dims
        # the dense vector that is passed on beside the interaction keeps its width
        passed = self.flat.input_dims[0] - dims[0]
        return self.flat.over_arch.with_input(self.interaction.output_width(dims) + passed)

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


def converted_spec(
    flat: ModelSpec,
    towers: Sequence[tuple[str, ...]],
    module: TowerModuleSpec,
    *,
    everywhere: Sequence[tuple[str, ...]] = (),
) -> DmtSpec:
    """Put a module over every tower.

    Args:
        flat: The flat model.
        towers: Features of every tower that sends.
        module: What `module_spec` chose; the D of a linear one is the mean over the towers.
        everywhere: Features of every tower whose tables all ranks hold; these towers are the last.
    """
    width = dict(zip(flat.feature_names, flat.feature_dims, strict=True))
    modules = module.rules.spread(module, [[width[name] for name in names] for names in towers])
    sending = [
        TowerSpec(features=names, module=own) for names, own in zip(towers, modules, strict=True)
    ]
    exact = TowerModuleSpec(kind="passthrough")
    local = [TowerSpec(features=names, module=exact, everywhere=True) for names in everywhere]
    return DmtSpec(flat=flat, towers=(*sending, *local))


def one_tower(flat: ModelSpec) -> DmtSpec:
    """Describe a flat model as one passthrough tower."""
    return converted_spec(flat, [flat.feature_names], TowerModuleSpec(kind="passthrough"))


def describe_modules(spec: DmtSpec) -> str:
    """Describe the modules of all towers that send, and how their output travels."""
    towers, widths = spec.sending_towers, spec.tower_widths
    dims = list(dict.fromkeys(str(tower.module.dim) for tower in towers))
    shown = [str(tower.module.dim) for tower in towers] if len(dims) > 1 else dims
    text = towers[0].module.describe("/".join(shown))
    if towers[0].module.code is None:
        return text
    code = replace(
        towers[0].module.code,
        int4=sum(tower.module.code.int4 for tower in towers if tower.module.code is not None),
    )
    sent = [w for tower, w in zip(spec.towers, widths, strict=True) if not tower.everywhere]
    return f"{text}; {code.describe(sum(sent))}"
