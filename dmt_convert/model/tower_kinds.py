"""What stands between a tower's lookup and the exchange: every kind of tower module. No torch.

A kind is one class and one entry in `TOWER_MODULES`. The class answers whatever the rest of the
library would otherwise find out by comparing `kind`: what a tower emits, what that costs, which
options it takes. Its torch module is named as `package.module:Class`, and its closed form is in
`dmt_convert.conversion.initialisation`.

Letters: F features, N embedding dim, M sum of a tower's embedding dims, T towers, K vectors that a
tower emits, D output dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from dmt_convert.documents import OMITTED_IF_EMPTY, OMITTED_IF_NONE
from dmt_convert.errors import ConfigError, UsageError
from dmt_convert.interactions import NO_WORK, DenseWork, cross_work, linear_work
from dmt_convert.model.tower_code import TowerCode, comm_bytes, forward_code, gradient_dtype
from dmt_convert.spec import CommDtype, ModelSpec

if TYPE_CHECKING:
    from torch import nn

_MAX_FEATURES: Final = 128
"""Features up to which alternatives are tried: each costs one more closed form."""
_COMPRESSION: Final = 2.0
"""Compression that a converted model has by default."""
_SIZE_HINT: Final = "2 is the default; 4 and 8 trade quality for bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerModuleSpec:
    """The module of one tower."""

    kind: str
    """Name of one of `TOWER_MODULES`."""
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
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata=OMITTED_IF_EMPTY)
    """Settings of any other module: JSON-able, lists instead of tuples."""
    code: TowerCode | None = field(default=None, metadata=OMITTED_IF_NONE)
    """How what it emits travels between hosts; None: as float32."""

    def __post_init__(self) -> None:
        if not self.rules.is_sound(self):
            raise ConfigError(
                f"a {self.kind} tower module with c={self.c}, p={self.p}, D={self.dim}",
                expected="c >= 0, p >= 0, c + p >= 1, D >= 1",
                hint="the default is --c 1 --p 0 and half the embedding dim",
            )

    @property
    def rules(self) -> TowerModule:
        """The kind: answers what follows from it."""
        return find_tower_module(self.kind)

    def num_vectors(self, num_features: int) -> int:
        """K_t: vectors that a tower of that many features emits."""
        return self.rules.num_vectors(self, num_features)

    def vector_dims(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Widths of the vectors that a tower emits; `dims` are its features' embedding dims."""
        return self.rules.vector_dims(self, dims)

    def width(self, dims: Sequence[int]) -> int:
        """Elements that a tower emits per sample.

        Args:
            dims: Embedding dims of its features.
        """
        return sum(self.vector_dims(dims))

    def nbytes(self, dims: Sequence[int], comm_dtype: CommDtype | None = None) -> int:
        """Bytes that a tower sends per sample.

        Args:
            dims: Embedding dims of its features.
            comm_dtype: Precision of what has no code; None: fp32.
        """
        code, width = forward_code(self.code), self.width(dims)
        return comm_bytes(comm_dtype or "fp32", width) if code is None else code.nbytes(width)

    def gradient_bytes(self, dims: Sequence[int], comm_dtype: CommDtype | None = None) -> int:
        """Bytes per sample of the gradients that come back; None: the precision of the code."""
        return comm_bytes(gradient_dtype(self.code, comm_dtype), self.width(dims))

    def describe(self, dim: str = "") -> str:
        """Describe it for people; `dim` is shown instead of D, for towers that differ in it."""
        return self.rules.describe(self, dim or str(self.dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRequest:
    """The size that a user asks for; None: not given."""

    c: int | None = None
    """Vectors per feature."""
    p: int | None = None
    """Vectors per tower."""
    dim: int | None = None
    """Output dim D."""
    compression: float | None = None
    """Ratio of what would cross hosts to what does; instead of `dim`."""

    def check_one_size(self) -> None:
        """Refuse `dim` and `compression` together.

        Raises:
            UsageError: Both are given.
        """
        if self.dim is not None and self.compression is not None:
            raise UsageError(
                f"--dim {self.dim} and --compression {self.compression:g} together",
                expected="one of the two",
                hint="--dim sets D, --compression computes it",
            )


class TowerModule:
    """One kind of tower module; a new one is a subclass and an entry in `TOWER_MODULES`."""

    kind: ClassVar[str]
    """Name in specs, and of the option --tower-module."""
    module: ClassVar[str]
    """`package.module:Class` of the torch module, see `dmt_convert.model.tower_modules`."""
    exact: ClassVar[bool] = False
    """Whether the converted model computes exactly what the flat one does."""
    restores: ClassVar[bool] = False
    """Whether the receiver restores the embeddings by a linear map of what every tower emits."""

    @property
    def keeps_network(self) -> bool:
        """Whether all that stands behind the exchange is the flat model's, fed in its order."""
        return self.exact or self.restores

    def fits(self, flat: ModelSpec) -> bool:
        """Whether it can stand in front of a model's interaction."""
        return self.keeps_network or self.kind in flat.interaction.rules.tower_modules

    def is_sound(self, spec: TowerModuleSpec) -> bool:
        """Whether the fields of a spec are possible."""
        return spec.dim >= 1

    def num_vectors(self, spec: TowerModuleSpec, num_features: int) -> int:
        """K_t: vectors that a tower of that many features emits."""
        return num_features

    def vector_dims(self, spec: TowerModuleSpec, dims: Sequence[int]) -> tuple[int, ...]:
        """Widths of the vectors that a tower emits; `dims` are its features' embedding dims."""
        return (spec.dim,) * self.num_vectors(spec, len(dims))

    def combines(self, spec: TowerModuleSpec) -> bool:
        """Whether a tower emits combinations of features and nothing of any one feature alone."""
        return False

    def work(self, spec: TowerModuleSpec, dims: Sequence[int]) -> DenseWork | None:
        """Count FLOPs and parameters; None: count the parameters of the module that is built."""
        return None

    def describe(self, spec: TowerModuleSpec, dim: str) -> str:
        """Describe it for people; `dim` is D, or the D of all towers."""
        return f"{self.kind}, D={dim}"

    def build(self, spec: TowerModuleSpec, dims: Sequence[int]) -> nn.Module:
        """Build the torch module, with random weights."""
        package, name = self.module.split(":")
        return cast("nn.Module", getattr(import_module(package), name)(spec, tuple(dims)))

    def choose(self, flat: ModelSpec, num_towers: int, request: ModuleRequest) -> TowerModuleSpec:
        """Choose the module's size: one vector per feature, as short as the compression asks.

        Args:
            flat: The flat model.
            num_towers: T.
            request: What the user asks for.

        Raises:
            ConfigError: The request contradicts itself, or cannot be met.
        """
        if request.c not in (None, 1) or request.p not in (None, 0):
            raise ConfigError(
                f"a {self.kind} tower module with c={request.c}, p={request.p}",
                expected="one vector per feature (c = 1, p = 0)",
                hint="set its size with --dim or --compression",
            )
        return TowerModuleSpec(kind=self.kind, dim=_vector_dim(flat, num_towers, 1, 0, request))

    def spread(
        self, spec: TowerModuleSpec, dims: Sequence[Sequence[int]]
    ) -> Sequence[TowerModuleSpec]:
        """Return the module of every tower; `dims` are the towers' embedding dims."""
        return [spec] * len(dims)

    def alternatives(
        self, flat: ModelSpec, spec: TowerModuleSpec, *, num_towers: int, compression: float
    ) -> tuple[TowerModuleSpec, ...]:
        """Return other modules that emit as little, and may lose less on some models."""
        return ()


class PassthroughKind(TowerModule):
    """The identity: towers emit their embeddings as they are."""

    kind = "passthrough"
    module = "dmt_convert.model.tower_modules:Passthrough"
    exact = True

    def is_sound(self, spec: TowerModuleSpec) -> bool:
        """It has no size."""
        return True

    def vector_dims(self, spec: TowerModuleSpec, dims: Sequence[int]) -> tuple[int, ...]:
        """The embeddings."""
        return tuple(dims)

    def work(self, spec: TowerModuleSpec, dims: Sequence[int]) -> DenseWork:
        """Nothing is computed."""
        return NO_WORK

    def describe(self, spec: TowerModuleSpec, dim: str) -> str:
        """Describe it."""
        return "passthrough (identity)"

    def choose(self, flat: ModelSpec, num_towers: int, request: ModuleRequest) -> TowerModuleSpec:
        """It takes no size."""
        if request != ModuleRequest():
            raise UsageError(
                "--tower-module passthrough with --c, --p, --dim or --compression",
                expected="no compression: passthrough emits the embeddings as they are",
                hint="leave these options out, or choose --tower-module auto",
            )
        return TowerModuleSpec(kind=self.kind)


class DlrmKind(TowerModule):
    """Two linear maps: c vectors per feature, and p per tower."""

    kind = "dlrm"
    module = "dmt_convert.model.tower_modules:DlrmTowerModule"

    def is_sound(self, spec: TowerModuleSpec) -> bool:
        """It emits a vector at least."""
        return min(spec.c, spec.p) >= 0 and spec.c + spec.p >= 1 and spec.dim >= 1

    def num_vectors(self, spec: TowerModuleSpec, num_features: int) -> int:
        """K_t = c F_t + p."""
        return spec.c * num_features + spec.p

    def combines(self, spec: TowerModuleSpec) -> bool:
        """Without vectors of single features."""
        return spec.c == 0

    def work(self, spec: TowerModuleSpec, dims: Sequence[int]) -> DenseWork:
        """c: every feature has a map of its own; p: one map of the whole tower."""
        width, out = sum(dims), spec.c * spec.dim
        per_feature = DenseWork(flops=2.0 * width * out, parameters=(width + len(dims)) * out)
        return per_feature + linear_work(width, spec.p * spec.dim)

    def describe(self, spec: TowerModuleSpec, dim: str) -> str:
        """Give c, p and D."""
        return f"dlrm, c={spec.c}, p={spec.p}, D={dim}"

    def choose(self, flat: ModelSpec, num_towers: int, request: ModuleRequest) -> TowerModuleSpec:
        """By default c = 1, p = 0 and D = N / 2, at least 1."""
        c, p = request.c, request.p
        c, p = 1 if c is None else c, 0 if p is None else p
        dim = _vector_dim(flat, num_towers, c, p, request)
        return TowerModuleSpec(kind=self.kind, c=c, p=p, dim=dim)

    def alternatives(
        self, flat: ModelSpec, spec: TowerModuleSpec, *, num_towers: int, compression: float
    ) -> tuple[TowerModuleSpec, ...]:
        """Emit p combinations of a tower's features, each of nearly N elements (c = 0).

        That loses less if the embeddings need all their dims, but the towers hold features that
        say much the same. Only models that pair vectors can read them.
        """
        features, dim = len(flat.features), flat.input_dims[0]
        if not flat.interaction.rules.pairs_vectors or features > _MAX_FEATURES:
            return ()
        fewest = math.ceil(features / (num_towers * compression))
        found = []
        for p in (fewest, 2 * fewest):
            width = min(dim, int(features * dim / (p * num_towers * compression) + 1e-9))
            if p <= features // num_towers and width >= 1:
                found.append(TowerModuleSpec(kind=self.kind, c=0, p=p, dim=width))
        return tuple(found)


class DcnKind(TowerModule):
    """A low-rank cross network over the tower, then a linear map to a vector per feature."""

    kind = "dcn"
    module = "dmt_convert.model.tower_modules:DcnTowerModule"

    def work(self, spec: TowerModuleSpec, dims: Sequence[int]) -> DenseWork:
        """The cross layers and the map."""
        width = sum(dims)
        crossed = cross_work(width, min(spec.cross_rank, width), spec.cross_layers)
        return crossed + linear_work(width, len(dims) * spec.dim)

    def describe(self, spec: TowerModuleSpec, dim: str) -> str:
        """Give D and the cross layers."""
        layers = "1 cross layer" if spec.cross_layers == 1 else f"{spec.cross_layers} cross layers"
        return f"dcn, D={dim}, {layers} of rank {spec.cross_rank}"

    def choose(self, flat: ModelSpec, num_towers: int, request: ModuleRequest) -> TowerModuleSpec:
        """One cross layer of the flat model's rank."""
        chosen = super().choose(flat, num_towers, request)
        rank = min(flat.interaction.cross_rank, max(flat.feature_dims))
        return replace(chosen, cross_layers=1, cross_rank=rank)


class LinearKind(TowerModule):
    """One linear map of the whole tower, which the receiver undoes as well as it can."""

    kind = "linear"
    module = "dmt_convert.model.tower_modules:LinearTowerModule"
    restores = True

    def num_vectors(self, spec: TowerModuleSpec, num_features: int) -> int:
        """All that a tower emits is one vector."""
        return 1

    def work(self, spec: TowerModuleSpec, dims: Sequence[int]) -> DenseWork:
        """The map."""
        return linear_work(sum(dims), spec.dim, bias=False)

    def choose(self, flat: ModelSpec, num_towers: int, request: ModuleRequest) -> TowerModuleSpec:
        """Choose the elements that a tower emits on average; compression 1 is passthrough."""
        dim, compression = request.dim, request.compression
        given = (request.c, request.p) != (None, None)
        if given or (dim is not None and compression is not None):
            raise UsageError(
                "a linear tower module with --c or --p, or with both --dim and --compression",
                expected="--dim D, the elements that a tower emits, or --compression",
                hint="2 is the default compression",
            )
        if compression == 1:
            return TowerModuleSpec(kind=PassthroughKind.kind)
        held = sum(flat.feature_dims) / num_towers
        if dim is not None and dim > held:
            raise ConfigError(
                f"--dim {dim} for {num_towers} towers that hold {held:g} elements each: they "
                "would emit more than they hold",
                expected=f"at most {held:g}",
                hint="--tower-module passthrough emits the embeddings as they are",
            )
        if dim is None:
            ratio = _COMPRESSION if compression is None else compression
            dim = int(sum(flat.feature_dims) / (num_towers * ratio) + 1e-9) if ratio > 1 else 0
            dim = max(dim, 1) if compression is None else dim
        if dim < 1:
            raise ConfigError(
                f"--compression {compression or 0:g} for {num_towers} towers that hold "
                f"{sum(flat.feature_dims)} elements",
                expected=f"between 1 and {sum(flat.feature_dims) / num_towers:g}",
                hint=_SIZE_HINT,
            )
        return TowerModuleSpec(kind=self.kind, dim=dim)

    def spread(
        self, spec: TowerModuleSpec, dims: Sequence[Sequence[int]]
    ) -> Sequence[TowerModuleSpec]:
        """Let every tower emit in proportion to what it holds; D is the mean over the towers."""
        widths = [sum(own) for own in dims]
        shares = [spec.dim * len(widths) * width / sum(widths) for width in widths]
        emits = [min(width, max(1, int(x + 1e-9))) for width, x in zip(widths, shares, strict=True)]
        left = spec.dim * len(widths) - sum(emits)
        for t in sorted(range(len(widths)), key=lambda t: emits[t] - shares[t])[: max(0, left)]:
            emits[t] = min(widths[t], emits[t] + 1)
        return [replace(spec, dim=dim) for dim in emits]


TOWER_MODULES: tuple[TowerModule, ...] = (
    PassthroughKind(),
    DlrmKind(),
    DcnKind(),
    LinearKind(),
)
"""All kinds of tower modules. `auto` is the first that an interaction names, else the last one."""


def find_tower_module(kind: str) -> TowerModule:
    """Return the kind of tower module of that name.

    Raises:
        ConfigError: The kind is unknown.
    """
    for entry in TOWER_MODULES:
        if entry.kind == kind:
            return entry
    raise ConfigError(
        f"tower module {kind!r}",
        expected="one of " + ", ".join(entry.kind for entry in TOWER_MODULES),
        hint="leave --tower-module at auto",
    )


def module_spec(
    spec: ModelSpec,
    kind: str,
    *,
    num_towers: int,
    c: int | None = None,
    p: int | None = None,
    dim: int | None = None,
    compression: float | None = None,
) -> TowerModuleSpec:
    """Choose a tower module.

    `auto` is the interaction's own: dcn for DCNv2, linear for networks, dlrm for all others.

    Args:
        spec: The flat model.
        kind: Kind of module, or `auto`.
        num_towers: Number of towers.
        c: Vectors per feature.
        p: Vectors per tower.
        dim: Output dim D.
        compression: Ratio of what would cross hosts to what does; instead of `dim`.

    Raises:
        ConfigError: The options contradict each other, or do not fit the model.
    """
    kinds = ("auto", *(entry.kind for entry in TOWER_MODULES))
    if kind not in kinds:
        raise UsageError(
            f"--tower-module must be one of {', '.join(kinds)}, got {kind!r}",
            hint="leave --tower-module at auto",
        )
    own = next(iter(spec.interaction.rules.tower_modules), LinearKind.kind)
    chosen = find_tower_module(own if kind == "auto" else kind)
    if not chosen.fits(spec):
        fitting = [own, *(entry.kind for entry in reversed(TOWER_MODULES) if entry.fits(spec))]
        named = [f"--tower-module {own}", *dict.fromkeys(name for name in fitting if name != own)]
        raise ConfigError(
            f"--tower-module {chosen.kind} for a model with {spec.interaction.kind} interaction",
            expected=" or ".join(named),
            hint="leave --tower-module at auto",
        )
    request = ModuleRequest(c=c, p=p, dim=dim, compression=compression)
    return chosen.choose(spec, num_towers, request)


def _vector_dim(flat: ModelSpec, num_towers: int, c: int, p: int, request: ModuleRequest) -> int:
    """Return the largest D that compresses enough: sum N_f / ((c F + p T) D) >= compression.

    Raises:
        ConfigError: No D does.
    """
    request.check_one_size()
    widest = max(flat.feature_dims)
    if request.dim is not None and request.dim > widest:
        raise ConfigError(
            f"--dim {request.dim} for embeddings of {widest} elements: towers would emit more than "
            "they hold",
            expected=f"at most {widest}",
            hint=f"half of that, {max(1, widest // 2)}, is the default; --tower-module passthrough "
            "emits the embeddings as they are",
        )
    if request.dim is not None:
        return request.dim
    ratio = _COMPRESSION if request.compression is None else request.compression
    vectors, total = c * len(flat.features) + p * num_towers, sum(flat.feature_dims)
    if request == ModuleRequest():  # nothing is asked for: vectors of one element stay so
        ratio = min(ratio, total / len(flat.features))
    dim = int(total / (vectors * ratio) + 1e-9) if vectors > 0 and ratio > 0 else 0
    if ratio < 1 or dim < 1:
        raise ConfigError(
            f"--compression {ratio:g} with {vectors} vectors out of {num_towers} towers",
            expected=f"between 1 and {total / max(vectors, 1):g}",
            hint=f"{_SIZE_HINT}; --c and --p set the number of vectors",
        )
    return dim
