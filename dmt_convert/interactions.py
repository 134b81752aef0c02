"""How the dense vector and the embeddings meet: every interaction, and what follows from it.

An interaction is one class and one entry in `INTERACTIONS`. The class answers whatever the rest of
the library would otherwise find out by comparing `kind`. Nothing here imports torch: the module
that computes an interaction is named as `package.module:Class` and imported when it is built.

Letters: B batch, N embedding dim, M sum of the input widths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast

from dmt_convert.documents import OMITTED_IF_EMPTY, OMITTED_IF_NONE
from dmt_convert.errors import ArchitectureError

if TYPE_CHECKING:
    from torch import nn

PairOrder = Literal["tril", "triu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """A vector and all vectors that it is paired with: one row of the triangle of pairs."""

    vector: int
    """The vector."""
    others: slice
    """The vectors it meets."""
    columns: slice
    """Where these pairs stand among all pairs."""


def pair_rows(count: int, order: PairOrder, *, self_pairs: bool) -> Iterator[PairRow]:
    """Yield the pairs of `count` vectors in their order, row by row of the triangle."""
    begin = 0
    for i in range(count):
        if order == "tril":
            others = slice(0, i + self_pairs)
        else:
            others = slice(i + (not self_pairs), count)
        end = begin + others.stop - others.start
        yield PairRow(vector=i, others=others, columns=slice(begin, end))
        begin = end


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWork:
    """What a dense part costs.

    A product of an (m, n) matrix with a vector is 2 m n FLOPs; biases and ReLUs are left out.
    """

    flops: float
    """Forward pass, per sample."""
    parameters: int
    """Weights and biases."""

    def __add__(self, other: DenseWork) -> DenseWork:
        """Both parts."""
        return DenseWork(
            flops=self.flops + other.flops, parameters=self.parameters + other.parameters
        )


NO_WORK: Final = DenseWork(flops=0.0, parameters=0)


def linear_work(inputs: int, outputs: int, *, bias: bool = True) -> DenseWork:
    """Count a linear layer."""
    return DenseWork(flops=2.0 * inputs * outputs, parameters=(inputs + bias) * outputs)


def cross_work(width: int, rank: int, layers: int) -> DenseWork:
    """Count low-rank cross layers over `width` elements."""
    return DenseWork(
        flops=4.0 * width * rank * layers, parameters=(2 * width * rank + width) * layers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """A stack of linear layers with ReLU between them; without a layer, the identity."""

    widths: tuple[int, ...]
    """Input width, then the output width of each layer, in elements."""
    final_relu: bool
    """Whether the last layer is followed by a ReLU as well."""

    def __post_init__(self) -> None:
        layers = len(self.widths) > 1
        if not self.widths or min(self.widths) < (1 if layers else 0):
            raise ArchitectureError(
                f"an MLP with widths {list(self.widths)}",
                expected="an input width, and the positive widths of its layers",
                hint="check that the checkpoint was saved whole",
            )

    @property
    def num_layers(self) -> int:
        """Number of linear layers."""
        return len(self.widths) - 1

    @property
    def work(self) -> DenseWork:
        """What its layers cost."""
        return sum((linear_work(a, b) for a, b in pairwise(self.widths)), NO_WORK)

    def with_input(self, width: int) -> MlpSpec:
        """Return the same stack over another number of inputs."""
        return MlpSpec(widths=(width, *self.widths[1:]), final_relu=self.final_relu)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Any torch module over the dense inputs and the pooled embeddings, as data.

    It is built by a factory of `dmt_convert.model.networks`, or by a user's adapter file.
    """

    name: str
    """Name of the factory; `user` for an adapter's."""
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings of the factory: JSON-able, lists instead of tuples."""
    file: str = ""
    """Adapter only: the file's name."""
    sha256: str = ""
    """Adapter only: hex digest of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionSpec:
    """How the dense vector and the pooled embeddings meet.

    The inputs stand in the order [dense, feature 0, feature 1, ...].
    """

    kind: str
    """Name of one of `INTERACTIONS`."""
    self_pairs: bool = False
    """dot only: whether a vector is also paired with itself."""
    pair_order: PairOrder = "triu"
    """dot only: row-major order of the lower (tril) or upper (triu) triangle."""
    cross_layers: int = 0
    """dcn only: number of cross layers."""
    cross_rank: int = 0
    """dcn only: rank of each cross layer."""
    branch1: MlpSpec | None = None
    """projection only: the MLP whose output is split into vectors of N."""
    branch2: MlpSpec | None = None
    """projection only: the MLP whose output is split into N vectors."""
    network: NetworkSpec | None = field(default=None, metadata=OMITTED_IF_NONE)
    """network only: the module. Versions that knew no networks wrote no such key."""
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata=OMITTED_IF_EMPTY)
    """Settings of any other interaction: JSON-able, lists instead of tuples."""

    def __post_init__(self) -> None:
        self.rules.check(self)

    @property
    def rules(self) -> Interaction:
        """The kind: answers what follows from it."""
        return find_interaction(self.kind)

    def output_width(self, dims: Sequence[int]) -> int:
        """Width of the interaction's output.

        Args:
            dims: Widths of the inputs, the dense vector first.
        """
        return self.rules.output_width(self, dims)


class Interaction(ABC):
    """One kind of interaction; a new one is a subclass and an entry in `INTERACTIONS`.

    The defaults are those of an interaction about which nothing else is known: towers then emit
    linear maps of their embeddings, which are restored in front of the unchanged dense part.
    """

    kind: ClassVar[str]
    """Name in specs."""
    module: ClassVar[str]
    """`package.module:Class` of the torch module. The class takes a spec and the widths of the
    inputs; its `forward(dense_BN, sparse_BM, passed_BN)` is described in
    `dmt_convert.model.interaction_modules`."""
    tower_modules: ClassVar[tuple[str, ...]] = ()
    """Kinds of tower modules that suit it, beside those that suit every interaction. The first is
    the default."""
    one_width: ClassVar[bool] = False
    """Whether a flat model's vectors must all have one width."""
    pairs_vectors: ClassVar[bool] = False
    """Whether it reads dot products of vectors. Vectors that towers emit are then filled up to one
    width, and the dense vector is projected to it."""
    input_layers: ClassVar[tuple[str, ...]] = ()
    """Canonical names of the layers whose inputs change with what towers emit."""

    def check(self, spec: InteractionSpec) -> None:
        """Check that a spec has this interaction's fields and no other's.

        Raises:
            AssertionError: It does not: a mistake in the code that made it.
        """
        assert spec.network is None

    @abstractmethod
    def output_width(self, spec: InteractionSpec, dims: Sequence[int]) -> int:
        """Width of the output, in elements; `dims` are the input widths, the dense vector first."""

    def converted(self, spec: InteractionSpec, dims: Sequence[int]) -> InteractionSpec:
        """Return the interaction of the same model over other inputs, of widths `dims`."""
        return spec

    def work(self, spec: InteractionSpec, dims: Sequence[int]) -> DenseWork | None:
        """Count FLOPs and parameters; None: count the parameters of the module that is built."""
        return None

    def build(self, spec: InteractionSpec, dims: Sequence[int]) -> nn.Module:
        """Build the torch module, with random weights."""
        package, name = self.module.split(":")
        return cast("nn.Module", getattr(import_module(package), name)(spec, tuple(dims)))


_MODULES: Final = "dmt_convert.model.interaction_modules"


class Dot(Interaction):
    """The dense vector, and the dot products of all pairs of vectors."""

    kind = "dot"
    module = f"{_MODULES}:DotInteraction"
    tower_modules = ("dlrm",)
    one_width = pairs_vectors = True
    input_layers = ("over_arch.0",)

    def output_width(self, spec: InteractionSpec, dims: Sequence[int]) -> int:
        """The dense vector's width and the number of pairs."""
        count = len(dims)
        return dims[0] + count * (count + 1 if spec.self_pairs else count - 1) // 2

    def work(self, spec: InteractionSpec, dims: Sequence[int]) -> DenseWork:
        """All dot products, each pair twice, as one matrix product computes them."""
        return DenseWork(flops=2.0 * len(dims) ** 2 * dims[0], parameters=0)


class Cat(Interaction):
    """All inputs side by side."""

    kind = "cat"
    module = f"{_MODULES}:CatInteraction"
    tower_modules = ("dlrm",)
    input_layers = ("over_arch.0",)

    def output_width(self, spec: InteractionSpec, dims: Sequence[int]) -> int:
        """M."""
        return sum(dims)

    def work(self, spec: InteractionSpec, dims: Sequence[int]) -> DenseWork:
        """Nothing is computed."""
        return NO_WORK


class Dcn(Interaction):
    """A low-rank cross network over all inputs side by side (DCNv2)."""

    kind = "dcn"
    module = f"{_MODULES}:CrossInteraction"
    tower_modules = ("dcn",)
    input_layers = ("cross", "over_arch.0")

    def output_width(self, spec: InteractionSpec, dims: Sequence[int]) -> int:
        """M."""
        return sum(dims)

    def work(self, spec: InteractionSpec, dims: Sequence[int]) -> DenseWork:
        """The cross layers."""
        return cross_work(sum(dims), spec.cross_rank, spec.cross_layers)


class Projection(Interaction):
    """The dense vector, and the product of two matrices that MLPs make of all inputs."""

    kind = "projection"
    module = f"{_MODULES}:ProjectionInteraction"
    tower_modules = ("dlrm",)
    one_width = True
    input_layers = ("branch1.0", "branch2.0")

    def output_width(self, spec: InteractionSpec, dims: Sequence[int]) -> int:
        """The dense vector's width and the number of products."""
        left, right = _branches(spec)
        return dims[0] + (left.widths[-1] // dims[0]) * (right.widths[-1] // dims[0])

    def converted(self, spec: InteractionSpec, dims: Sequence[int]) -> InteractionSpec:
        """Both MLPs read the new inputs."""
        left, right = (branch.with_input(sum(dims)) for branch in _branches(spec))
        return InteractionSpec(kind=self.kind, branch1=left, branch2=right)

    def work(self, spec: InteractionSpec, dims: Sequence[int]) -> DenseWork:
        """Both MLPs and the product."""
        left, right = _branches(spec)
        product = left.widths[-1] * right.widths[-1] / dims[0]
        return left.work + right.work + DenseWork(flops=2.0 * product, parameters=0)


def _branches(spec: InteractionSpec) -> tuple[MlpSpec, MlpSpec]:
    assert spec.branch1 is not None and spec.branch2 is not None
    return spec.branch1, spec.branch2


class Network(Interaction):
    """A module of the model's own that takes all inputs and gives the logit."""

    kind = "network"
    module = f"{_MODULES}:NetworkInteraction"

    def check(self, spec: InteractionSpec) -> None:
        """It has a network."""
        assert spec.network is not None

    def output_width(self, spec: InteractionSpec, dims: Sequence[int]) -> int:
        """The logit."""
        return 1


INTERACTIONS: tuple[Interaction, ...] = (Dot(), Cat(), Dcn(), Projection(), Network())
"""All interactions."""


def find_interaction(kind: str) -> Interaction:
    """Return the interaction of that name.

    Raises:
        ArchitectureError: The kind is unknown.
    """
    for interaction in INTERACTIONS:
        if interaction.kind == kind:
            return interaction
    raise ArchitectureError(
        f"an interaction {kind!r}",
        expected="one of " + ", ".join(entry.kind for entry in INTERACTIONS),
        hint="use the version of dmt-convert that wrote the bundle, or a newer one",
    )
