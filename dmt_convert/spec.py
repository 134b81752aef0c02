"""What a flat recommendation model is, as pure data and without weights.

Letters: B batch, F features, N embedding dim, D tower output dim, T towers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast, get_args

from dmt_convert.documents import MODEL_CONFIG, OMITTED_IF_NONE, from_json, to_json
from dmt_convert.errors import ArchitectureError, DataError, PartitionError
from dmt_convert.interactions import InteractionSpec as InteractionSpec
from dmt_convert.interactions import MlpSpec as MlpSpec
from dmt_convert.interactions import NetworkSpec as NetworkSpec
from dmt_convert.interactions import PairOrder as PairOrder

if TYPE_CHECKING:
    from dmt_convert.arrays import IntArray

Dtype = Literal["fp32", "fp16", "bf16"]
CommDtype = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
MatmulPrecision = Literal["highest", "high", "medium"]
"""Of float32 matrix products on GPUs, as torch names it: float32, TF32, bf16."""
COMM_DTYPES: Final[tuple[str, ...]] = get_args(CommDtype)
"""Precisions in which embeddings and tower outputs may cross hosts."""
Pooling = Literal["sum", "mean"]
InteractionKind = Literal["dot", "cat", "dcn", "projection", "network"]
"""Interactions that trainers' checkpoints are known to have; see `interactions` for all."""

DTYPE_BYTES: Final[Mapping[str, int]] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """One embedding table."""

    name: str
    """Table name, as the trainer calls it."""
    rows: int
    """Number of rows (ids run from 0 to rows - 1)."""
    dim: int
    """Embedding dim N, in elements."""
    dtype: Dtype = "fp32"
    """Element type as stored."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise ArchitectureError(
                f"table {self.name!r} has shape ({self.rows}, {self.dim})",
                expected="at least one row and one column",
                hint="check that the checkpoint was saved whole",
            )

    @property
    def nbytes(self) -> int:
        """Size of the table as stored, in bytes."""
        return self.rows * self.dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """One categorical feature: a bag of ids looked up in one table."""

    name: str
    """Feature name, as the data calls it."""
    table: str
    """Name of the table that it is looked up in (a table may serve several features)."""
    pooling: Pooling = "sum"
    """How the rows of one bag become one vector; an empty bag gives zeros."""
    max_ids: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Most ids that a bag may hold: with more, the original model would give another vector. None:
    as many as there are."""
    padding_id: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Id that stands for no id in the original model, which leaves it out: bags may not hold it."""

    def check_bags(self, values: IntArray, offsets: IntArray) -> None:
        """Refuse bags that are longer than allowed, or hold the id that stands for none.

        Args:
            values: All ids.
            offsets: Where every row's ids begin, then the number of all ids, shape (B + 1,).

        Raises:
            DataError: There is such a bag.
        """
        if self.padding_id is not None and (padded := values == self.padding_id).any():
            row = int(offsets.searchsorted(int(padded.argmax()), side="right")) - 1
            raise DataError(
                f"feature {self.name!r}: row {row} of a batch holds the id {self.padding_id}",
                expected="the ids of the row alone: that one is its padding in the original model, "
                "which leaves it out of the bag",
                hint="leave it out of the data; a row without ids has an empty bag",
            )
        if self.max_ids is None or len(offsets) < 2:
            return
        lengths = offsets[1:] - offsets[:-1]
        row = int(lengths.argmax())
        if lengths[row] > self.max_ids:
            raise DataError(
                f"feature {self.name!r}: row {row} of a batch has a bag of {int(lengths[row])} ids",
                expected=f"at most {self.max_ids}: with more, the original model would not pool "
                "rows (it looks up one id, or multiplies rows of a quotient-remainder table)",
                hint="give one id per row; a model that was trained with longer bags cannot be "
                "converted",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A flat model: sparse_arch (tables, features), dense_arch, interaction, over_arch.

    A network takes the place of the last three. It is the interaction then; dense_arch and
    over_arch have no layers, and let the dense inputs and the logit through (see `network_model`).
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = MODEL_CONFIG

    family: str
    """Name of the trainer's family, such as `torchrec-dlrm`."""
    tables: tuple[TableSpec, ...]
    """All tables."""
    features: tuple[FeatureSpec, ...]
    """All features, in the order in which they enter the interaction."""
    dense_arch: MlpSpec
    """MLP over the dense inputs."""
    interaction: InteractionSpec
    """How dense and sparse meet."""
    over_arch: MlpSpec
    """MLP from the interaction to one logit."""
    final_sigmoid: bool = False
    """Whether the original model ends in a sigmoid (we always give the logit before it)."""

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ArchitectureError(
                f"the parts of this {self.family} model do not fit together",
                expected="widths that agree from the tables to the logit",
                hint="check that the checkpoint was saved whole, or describe the model with "
                "--model-config",
                details=problems,
            )

    def _problems(self) -> list[str]:
        problems = []
        tables = {table.name for table in self.tables}
        counts = Counter(feature.name for feature in self.features)
        problems += [f"feature {n!r} appears twice" for n, count in counts.items() if count > 1]
        problems += [
            f"feature {f.name!r} uses table {f.table!r}, which does not exist"
            for f in self.features
            if f.table not in tables
        ]
        used = {feature.table for feature in self.features}
        problems += [f"table {t!r} is used by no feature" for t in sorted(tables - used)]
        if problems:
            return problems
        dims = self.input_dims
        if self.interaction.rules.one_width and len(set(dims)) > 1:
            problems.append(
                f"{self.interaction.kind} interaction of vectors of different widths "
                f"{sorted(set(dims))}"
            )
        elif self.over_arch.widths[0] != self.interaction.output_width(dims):
            problems.append(
                f"over_arch takes {self.over_arch.widths[0]} inputs, the {self.interaction.kind} "
                f"interaction of {len(dims)} vectors gives {self.interaction.output_width(dims)}"
            )
        if self.over_arch.widths[-1] != 1:
            problems.append(f"over_arch gives {self.over_arch.widths[-1]} outputs, not one logit")
        return problems

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Feature names in interaction order."""
        return tuple(feature.name for feature in self.features)

    @property
    def num_dense(self) -> int:
        """Number of dense inputs."""
        return self.dense_arch.widths[0]

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Widths of the interaction's inputs: the dense vector, then every feature."""
        return (self.dense_arch.widths[-1], *self.feature_dims)

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """Embedding dim N_f of every feature, in interaction order."""
        dims = {table.name: table.dim for table in self.tables}
        return tuple(dims[feature.table] for feature in self.features)

    @property
    def feature_columns(self) -> dict[str, range]:
        """Columns of every feature among all pooled embeddings side by side."""
        columns, begin = {}, 0
        for name, dim in zip(self.feature_names, self.feature_dims, strict=True):
            columns[name] = range(begin, begin + dim)
            begin += dim
        return columns

    @property
    def tables_by_feature(self) -> dict[str, TableSpec]:
        """Feature -> the table that it is looked up in."""
        tables = {table.name: table for table in self.tables}
        return {feature.name: tables[feature.table] for feature in self.features}

    def table(self, name: str) -> TableSpec:
        """Return the table of that name."""
        return next(table for table in self.tables if table.name == name)

    def table_of(self, feature: str) -> TableSpec:
        """Return the table that a feature is looked up in."""
        return self.table(next(f.table for f in self.features if f.name == feature))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` reads it back."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: object) -> ModelSpec:
        """Read what `to_json` wrote.

        Raises:
            BundleError: It does not describe a model.
        """
        return from_json(cls, value)


def network_model(
    *,
    family: str,
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    num_dense: int,
    network: NetworkSpec,
    final_sigmoid: bool = False,
) -> ModelSpec:
    """Describe a model whose dense part is a network.

    Args:
        family: Name of the family.
        tables: All tables.
        features: All features, in the order in which the network takes them.
        num_dense: Number of dense inputs; may be 0.
        network: The dense part.
        final_sigmoid: Whether the original model ends in a sigmoid.

    Raises:
        ArchitectureError: Tables and features do not fit together.
    """
    return ModelSpec(
        family=family,
        tables=tuple(tables),
        features=tuple(features),
        dense_arch=MlpSpec(widths=(num_dense,), final_relu=False),
        interaction=InteractionSpec(kind="network", network=network),
        over_arch=MlpSpec(widths=(1,), final_relu=False),
        final_sigmoid=final_sigmoid,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerAssignment:
    """Which features form which tower: disjoint, exhaustive, no tower empty."""

    towers: tuple[tuple[str, ...], ...]
    """Feature names of every tower."""

    def __post_init__(self) -> None:
        names = [name for tower in self.towers for name in tower]
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        empty = [str(t) for t, tower in enumerate(self.towers) if not tower]
        if repeated or empty or not self.towers:
            raise PartitionError(
                f"{len(self.towers)} towers"
                + (f", empty: {', '.join(empty)}" if empty else "")
                + (f", in two towers: {', '.join(repeated)}" if repeated else ""),
                expected="at least one tower, none empty, every feature in exactly one",
                hint="lower --towers, or correct the partition file",
            )

    def check_covers(self, features: Sequence[str]) -> None:
        """Refuse unless the towers hold exactly these features.

        Raises:
            PartitionError: A feature is forgotten or unknown.
        """
        mine = {name for tower in self.towers for name in tower}
        details = [f"forgotten: {name}" for name in features if name not in mine]
        details += [f"unknown: {name}" for name in sorted(mine - set(features))]
        if details:
            raise PartitionError(
                f"the towers do not hold the model's {len(features)} features",
                expected="every feature of the model in exactly one tower",
                hint="list the features with `dmt inspect` and correct the partition file",
                details=details,
            )

    @property
    def tower_of(self) -> dict[str, int]:
        """Tower index of every feature."""
        return {name: t for t, tower in enumerate(self.towers) for name in tower}


def check_dtype(value: str) -> Dtype:
    """Return a dtype name, typed."""
    assert value in get_args(Dtype), value
    return cast(Dtype, value)
