"""DLRM and DCN: families that are data, and how such a model is read off tensor shapes.

A `DlrmFamily` lists the names that a trainer gives to the tensors of dense_arch, the interaction
and over_arch. The rest shows in the shapes: widths by majority, the interaction by its own tensors
or by the width of over_arch, and what is to blame if something does not fit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.family import Family
from dmt_convert.families.feature_order import FeatureNaming, features_of_module, infer_features
from dmt_convert.families.incomplete_model import incomplete_model
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_info import FlatModelInfo
from dmt_convert.families.name_map import NameMap
from dmt_convert.families.taken_tensors import FLOATS, describe_empty
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import (
    DTYPE_BYTES,
    FeatureSpec,
    InteractionKind,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    PairOrder,
    TableSpec,
    check_dtype,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DlrmFamily(Family):
    """One trainer's DLRMs and DCNs, as data."""

    names: NameMap
    """All names that a model of this family may have, without the prefix."""
    interactions: tuple[InteractionKind, ...] = ("dot",)
    """Interactions without parameters of their own that the trainer knows, its default first."""
    pair_order: PairOrder = "triu"
    """Order of the pairs of a dot interaction."""
    allows_self_pairs: bool = False
    """Whether a dot interaction may include self-pairs."""
    final_sigmoid: bool = False
    """Whether the trainer's model ends in a sigmoid."""
    positional: bool = False
    """Whether features have numbers instead of names."""
    feature_prefix: str = ""
    """Prefix that the trainer puts before a feature's name to name its table."""
    separate_last: bool = False
    """Whether the last layer of over_arch has a name of its own; it is `over_arch.last` then."""
    rewrite: Callable[[TrainerTensors], None] | None = field(default=None, repr=False)
    """Replaces canonical tensors that the trainer stores in another form by plain ones."""

    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a DLRM or DCN by its shapes."""
        source.give_canonical_names(self.names, numbered=self.positional)
        stored = dict(source.canonical)
        if self.rewrite is not None:
            self.rewrite(source)
        reader = _ShapeReader(self, source)
        reader.check_dtypes()
        reader.read_tables()
        spec, lost = None, None
        if source.tables:
            try:
                features, facts = infer_features(
                    source,
                    [table.name for table in source.tables],
                    FeatureNaming(numbered=self.positional, prefix=self.feature_prefix),
                    stored=features_of_module(source.checkpoint, source.tables),
                )
            except ArchitectureError as error:  # if there are faults, the order is not the question
                lost, facts = error, []
                features = tuple(FeatureSpec(name=t.name, table=t.name) for t in source.tables)
            source.facts = [*facts, *source.facts]
            features = tuple(
                replace(f, max_ids=1) if f.table in source.single_id_tables else f for f in features
            )
            spec = reader.read_model(features)
        if spec is not None:
            source.extra += [
                info for name, info in source.canonical.items() if not _belongs(name, spec)
            ]
        source.check()
        if lost is not None:
            raise lost
        if spec is None:
            raise incomplete_model(source, [])
        # a last layer with a name of its own gets its number
        last = f"over_arch.{spec.over_arch.num_layers - 1}."
        for tensors in (source.canonical, stored):
            renamed = {n.replace("over_arch.last.", last): info for n, info in tensors.items()}
            tensors.clear()
            tensors.update(renamed)
        return source.finish(spec, stored)


def _belongs(name: str, spec: ModelSpec) -> bool:
    """Tell whether the model has a part for a tensor (a DCN has none for a projection's)."""
    part = name.split(".", maxsplit=1)[0]
    if part == "cross":
        return spec.interaction.kind == "dcn"
    return not part.startswith("branch") or spec.interaction.kind == "projection"


@dataclass(frozen=True, slots=True)
class _ShapeReader:
    """Reads a model off the shapes of canonical tensors; `source` collects every fault."""

    family: DlrmFamily
    source: TrainerTensors

    def check_dtypes(self) -> None:
        """Note tensors that are not floats; tables in fp64 are read as fp32."""
        source = self.source
        for name, info in source.canonical.items():
            if info.dtype not in FLOATS:
                source.wrong.append(f"{info.path} has dtype {info.dtype}, not a float")
            elif name.startswith("tables.") and len(info.shape) == 2:
                source.canonical[name] = source.as_table(info)

    def read_tables(self) -> None:
        """Describe all tables; if they have numbers, note those that are skipped."""
        source = self.source
        tables = {
            name: name.removeprefix("tables.").removesuffix(".weight")
            for name in source.canonical
            if name.startswith("tables.")
        }
        if self.family.positional:
            present = set(tables.values())
            last = max((int(table) for table in present), default=-1)
            if last < 100_000:
                for i in range(last + 1):
                    if str(i) not in present:
                        source.note_missing(f"tables.{i}.weight")
        for name, table in tables.items():
            shape, dtype = self.shape(name, 2), source.canonical[name].dtype
            if shape is not None:
                # another dtype has been noted already; the widths still count
                known = check_dtype(dtype if dtype in DTYPE_BYTES else "fp32")
                source.tables.append(
                    TableSpec(name=table, rows=shape[0], dim=shape[1], dtype=known)
                )

    def read_model(self, features: tuple[FeatureSpec, ...]) -> ModelSpec | None:
        """Read the dense part; None, noted as a fault, if it does not fit the tables."""
        source, tables = self.source, self.source.tables
        # If tables are missing no width fits. Report the tables, not what follows from them.
        stored = sum(name.startswith("tables.") for name in source.canonical)
        whole = not source.missing and len(tables) == stored
        by_name = {table.name: table for table in tables}
        dims = [by_name[feature.table].dim for feature in features]
        kind = self.parametric_kind()
        _check_given_kind(kind, source.config)
        same_dim = kind in (None, "projection") and len(set(dims)) == 1
        dense_arch = self.mlp("dense_arch", output=dims[0] if same_dim else None, final_relu=True)
        last = "over_arch.last" if self.family.separate_last else None
        over_arch = self.mlp("over_arch", last=last, final_relu=False)
        if dense_arch is None or over_arch is None or not whole:
            return None
        dense, over = dense_arch.widths[-1], over_arch.widths[0]
        if source.config.features is None and self.blame_tables(kind, dense, over):
            return None
        interaction = self.interaction(kind, [dense, *dims], over)
        if interaction is None or source.missing or source.wrong:
            return None
        source.fact(
            "activation",
            "ReLU behind every layer but the last of over_arch",
            "assumed",
            "the trainer's only choice; not stored",
        )
        return ModelSpec(
            family=self.family.name,
            tables=tuple(tables),
            features=features,
            dense_arch=dense_arch,
            interaction=interaction,
            over_arch=over_arch,
            final_sigmoid=source.final_sigmoid(
                default=self.family.final_sigmoid,
                reason="the trainer's default; logits are given before it",
            ),
        )

    # ---- widths

    def shape(self, name: str, ndim: int) -> tuple[int, ...] | None:
        """Return a tensor's shape; None, noted as a fault, if it is missing or has another rank."""
        info = self.source.canonical.get(name)
        if info is None:
            self.source.note_missing(name)
            return None
        if len(info.shape) != ndim:
            self.source.wrong.append(f"{info.path} has shape {list(info.shape)}, not {ndim} dims")
            return None
        if 0 in info.shape:
            self.source.wrong.append(f"{info.path} {describe_empty(info)}")
            return None
        return info.shape

    def mlp(
        self, stem: str, *, last: str | None = None, output: int | None = None, final_relu: bool
    ) -> MlpSpec | None:
        """Read a stack of linear layers.

        Args:
            stem: Canonical stem, such as `dense_arch`.
            last: Canonical stem of a last layer with a name of its own.
            output: Output width, if it is known from elsewhere.
            final_relu: Whether a ReLU follows the last layer.

        Returns:
            The widths that most tensors agree on; None if a layer is missing.
        """
        layers = [f"{stem}.{i}" for i in self.source.layer_indices(stem)] + [last] * bool(last)
        if not layers:
            self.source.note_missing(f"{stem}.0.weight")
            return None
        weights = [self.shape(f"{layer}.weight", 2) for layer in layers]
        biases = [self.shape(f"{layer}.bias", 1) for layer in layers]
        # each width has up to three witnesses: a weight's rows, its bias, the next weight's columns
        votes: list[Counter[int]] = [Counter() for _ in range(len(layers) + 1)]
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if weight is not None:
                votes[i + 1][weight[0]] += 1
            if bias is not None:
                votes[i + 1][bias[0]] += 1
        for i, weight in enumerate(weights):
            if weight is not None:
                votes[i][weight[1]] += 1
        if output is not None:
            votes[-1][output] += 1
        widths = [counted.most_common(1)[0][0] if counted else None for counted in votes]
        for i, layer in enumerate(layers):
            self._expect(f"{layer}.weight", weights[i], (widths[i + 1], widths[i]))
            self._expect(f"{layer}.bias", biases[i], (widths[i + 1],))
        known = [width for width in widths if width is not None]
        if len(known) < len(widths):
            return None
        return MlpSpec(widths=tuple(known), final_relu=final_relu)

    def cross(self, width: int) -> tuple[int, int] | None:
        """Read the low-rank cross layers over `width` inputs: (layers, rank)."""
        layers = self.source.layer_indices("cross")
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

    def input_width(self, stem: str) -> int | None:
        """Return the width that most tensors of `cross`, or the first of a branch, take."""
        axis = {"w": 0, "v": 1, "bias": 0} if stem == "cross" else {"0.weight": 1}
        votes = Counter(
            info.shape[axis[kind]]
            for name, info in self.source.canonical.items()
            for kind in axis
            if name.startswith(f"{stem}.")
            and name.endswith(f".{kind}")
            and len(info.shape) > axis[kind]
        )
        return votes.most_common(1)[0][0] if votes else None

    def _expect(
        self, name: str, shape: tuple[int, ...] | None, expected: tuple[int | None, ...]
    ) -> None:
        if shape is None or None in expected or shape == expected:
            return
        self.source.wrong.append(
            f"{self.source.source_name(name)} has shape {list(shape)}, expected {list(expected)}"
        )

    # ---- the interaction

    def parametric_kind(self) -> InteractionKind | None:
        """Return the interaction that has tensors of its own; None for dot and cat."""
        if self.source.layer_indices("cross"):
            return "dcn"
        if self.source.layer_indices("branch1") or self.source.layer_indices("branch2"):
            return "projection"
        return None

    def interaction(
        self, kind: InteractionKind | None, dims: list[int], over: int
    ) -> InteractionSpec | None:
        """Describe the interaction; None, noted as a fault, if nothing fits.

        Args:
            kind: What `parametric_kind` returns.
            dims: Widths of the interaction's inputs, the dense vector first.
            over: Input width of over_arch.

        Raises:
            ArchitectureError: Two interactions fit, and the user does not say which one it is.
        """
        if kind is None:
            return self._dot_or_cat(dims, over)
        found = self._cross(dims) if kind == "dcn" else self._projection(dims)
        if found is None:
            return None
        if over != found.output_width(dims):
            self.source.wrong.append(
                f"{self._over_name} takes {over} inputs, the {found.kind} interaction of "
                f"{len(dims) - 1} features gives {found.output_width(dims)}"
            )
            return None
        return found

    def _cross(self, dims: list[int]) -> InteractionSpec | None:
        cross = self.cross(sum(dims))
        if cross is None:
            return None
        layers, rank = cross
        self._shape_fact(f"dcn, {layers} layers of rank {rank}")
        return InteractionSpec(kind="dcn", cross_layers=layers, cross_rank=rank)

    def _projection(self, dims: list[int]) -> InteractionSpec | None:
        branch1 = self.mlp("branch1", final_relu=True)
        branch2 = self.mlp("branch2", final_relu=True)
        if branch1 is None or branch2 is None:
            return None
        self._shape_fact("projection")
        for name, branch in (("branch1", branch1), ("branch2", branch2)):
            if branch.widths[0] != sum(dims) or branch.widths[-1] % dims[0]:
                self.source.wrong.append(
                    f"{self.source.source_name(f'{name}.0.weight')} and its successors map "
                    f"{branch.widths[0]} to {branch.widths[-1]}, expected {sum(dims)} to a "
                    f"multiple of {dims[0]}"
                )
        return InteractionSpec(kind="projection", branch1=branch1, branch2=branch2)

    def _dot_or_cat(self, dims: list[int], width: int) -> InteractionSpec | None:
        """Tell dot, dot with self-pairs and cat apart by the input width of over_arch."""
        config, stated = self.source.config, self.source.interaction
        options = self._options(dims)
        fitting = [option for option in options if option.output_width(dims) == width]
        if not fitting:
            self.source.wrong.append(self._width_fault(dims, width, options))
            return None
        chosen, others = fitting[0], " and ".join(map(_label, fitting[1:]))
        label = _label(chosen)
        if stated is None and config.self_pairs is None and self._is_one_ranks_share(label):
            raise self._one_ranks_share(width, label)
        if others:
            dot = "`interaction: dot`" + (", `self_pairs: true`" if chosen.self_pairs else "")
            raise ArchitectureError(
                f"{self._over_name} takes {width} inputs, which {label} and {others} both give",
                expected="a width that only one interaction gives",
                hint=f"say which one with --model-config: {dot}, or `interaction: cat`",
            )
        if chosen.self_pairs and config.self_pairs is None and stated is None:
            # n vectors have as many pairs with self-pairs as n + 1 vectors have without
            raise ArchitectureError(
                f"{self._over_name} takes {width} inputs, which a dot with self-pairs of "
                f"{len(dims) - 1} features gives, and one without of {len(dims)}",
                expected="a width that only one interaction gives",
                hint="say with --model-config `self_pairs: true` if these are all features; if a "
                "table is missing, save the whole model; if one serves two features, say "
                "`self_pairs: false` and list the `features`",
            )
        if config.interaction is not None:
            self.source.fact("interaction", label, "given", "--model-config")
        elif stated is not None:
            self.source.fact("interaction", label, "read", "the model's settings")
        else:
            self._shape_fact(label, f"only this gives over_arch its {width} inputs")
        if chosen.kind == "dot" and config.pair_order is None:
            self.source.fact("order of pairs", chosen.pair_order, "assumed", "the trainer's order")
        elif chosen.kind == "dot":
            self.source.fact("order of pairs", chosen.pair_order, "given", "--model-config")
        return chosen

    def _options(self, dims: list[int]) -> list[InteractionSpec]:
        """Return the interactions without parameters that the trainer and the user allow."""
        config, family = self.source.config, self.family
        known = config.interaction or self.source.interaction
        kinds = family.interactions if known is None else (known,)
        pairs = (False, True) if family.allows_self_pairs else (False,)
        if config.self_pairs is not None:
            pairs = (config.self_pairs,)
        options = [
            InteractionSpec(
                kind="dot", self_pairs=own, pair_order=config.pair_order or family.pair_order
            )
            for own in pairs
            if "dot" in kinds and len(set(dims)) == 1
        ]
        return options + ([InteractionSpec(kind="cat")] if "cat" in kinds else [])

    def _is_one_ranks_share(self, label: str) -> bool:
        """Recognise a file of dlrm_s_pytorch.py run on several ranks: only its MLPs are in DDP.

        Each rank has a share of the tables, numbered from 0, and saves no others.
        """
        alone = label != "dot" and self.family.allows_self_pairs
        return (
            alone
            and self.source.config.interaction is None
            and any(
                ".bot_l.module." in f".{name}" or ".top_l.module." in f".{name}"
                for name in self.source.parameter_names
            )
        )

    def _one_ranks_share(self, width: int, label: str) -> ArchitectureError:
        count = len(self.source.tables)
        key = "interaction: cat" if label == "cat" else "self_pairs: true"
        return ArchitectureError(
            f"{self._over_name} takes {width} inputs, which for the {count} tables that are there "
            f"only a {label} gives. DistributedDataParallel around bot_l and top_l shows a run on "
            "several ranks, of which each saves only its own tables",
            expected="all tables of the model",
            hint=f"save it from a run on one rank; if all tables are there, say `{key}` in "
            "--model-config",
        )

    def _width_fault(self, dims: list[int], width: int, options: list[InteractionSpec]) -> str:
        """Say what width the features give, and how many features would give the right one."""
        gives = ", ".join(f"{_label(option)} {option.output_width(dims)}" for option in options)
        if not options:
            gives = f"vectors of widths {sorted(set(dims))}, which dot cannot pair"
        text = (
            f"{self._over_name} takes {width} inputs; {len(dims) - 1} features and the dense "
            f"vector give {gives}"
        )
        implied = {
            f"a {_label(option)} of {count - 1} features"
            for option in options
            for count in (_implied_count(option, dims[0], width),)
            if len(set(dims)) == 1 and count > len(dims)
        }
        if implied:
            text += (
                f". {' or '.join(sorted(implied))} would fit: tables are missing (a multi-rank "
                "run of dlrm_s_pytorch.py saves only its own), or a table serves several features "
                "(list them with --model-config)"
            )
        return text

    @property
    def _over_name(self) -> str:
        return self.source.source_name("over_arch.0.weight")

    def _shape_fact(self, value: str, reason: str = "tensor names and shapes") -> None:
        self.source.fact("interaction", value, "inferred", reason)

    # ---- tables that do not fit

    def blame_tables(self, kind: InteractionKind | None, dense: int, over: int) -> bool:
        """Note tables of a wrong dim and tables that are missing, if they explain the widths.

        A table of another dim, or one that is missing, shows in the widths of the network behind
        it. The fault is noted where it is, not at every layer that follows from it.

        Args:
            kind: Interaction that has parameters of its own, None for dot or cat.
            dense: Output width of dense_arch.
            over: Input width of over_arch.

        Returns:
            Whether any table was noted.
        """
        source, tables = self.source, self.source.tables
        if self._fits_side_by_side(kind, dense, over):
            return False
        dim, votes = Counter(table.dim for table in tables).most_common(1)[0]
        odd = [table for table in tables if table.dim != dim]
        fits = self._width_test(kind, dim, dense, over)
        gaps: list[str] = []
        if not fits(len(tables)):
            skipped = _skipped_names([table.name for table in tables])
            gaps = next((names for names in skipped if fits(len(tables) + len(names))), [])
            if not gaps:
                return False
        elif 2 * votes <= len(tables):
            return False
        for name in gaps:
            source.note_missing(f"tables.{name}.weight")
        source.wrong += [
            f"{source.source_name(f'tables.{table.name}.weight')} has shape "
            f"{[table.rows, table.dim]}, expected {[table.rows, dim]}"
            for table in odd
        ]
        return bool(gaps or odd)

    def _fits_side_by_side(self, kind: InteractionKind | None, dense: int, over: int) -> bool:
        """Tell whether the tables as they are fit side by side, whatever their dims."""
        width = self.input_width("cross") if kind == "dcn" else over
        side_by_side = kind == "dcn" or (kind is None and "cat" in self.family.interactions)
        return side_by_side and dense + sum(table.dim for table in self.source.tables) == width

    def _width_test(
        self, kind: InteractionKind | None, dim: int, dense: int, over: int
    ) -> Callable[[int], bool]:
        """Return a test of whether n features of `dim` make the network's widths."""
        if kind is not None:
            width = self.input_width("cross" if kind == "dcn" else "branch1")
            return lambda count: dense + count * dim == width
        kinds = [InteractionSpec(kind="cat")] if "cat" in self.family.interactions else []
        if "dot" in self.family.interactions and dense == dim:
            own = (False, True) if self.family.allows_self_pairs else (False,)
            kinds += [InteractionSpec(kind="dot", self_pairs=pairs) for pairs in own]
        return lambda count: any(k.output_width([dense, *[dim] * count]) == over for k in kinds)


def _check_given_kind(kind: InteractionKind | None, config: ModelConfig) -> None:
    """Refuse an interaction in the model config that the tensors contradict."""
    given = config.interaction
    if given is None or given == kind or (kind is None and given in ("dot", "cat")):
        return
    raise ConfigError(
        f"the model config says interaction {given}, the checkpoint "
        + (f"holds the tensors of {kind}" if kind else f"holds no tensor of {given}"),
        expected=kind or "dot or cat",
        hint="leave `interaction` out; `dmt inspect` shows what the tensors tell",
    )


def _label(option: InteractionSpec) -> str:
    return option.kind + (" with self-pairs" if option.self_pairs else "")


def _implied_count(option: InteractionSpec, dim: int, width: int) -> int:
    """Return how many vectors of `dim` make an interaction of this width; 0 if no number does."""
    guess = width // dim
    if option.kind == "dot":
        root = math.isqrt(max(0, 1 + 8 * (width - dim)))
        guess = (root - 1 if option.self_pairs else root + 1) // 2
    return guess if guess and option.output_width([dim] * guess) == width else 0


def _skipped_names(names: Sequence[str]) -> list[list[str]]:
    """Return the names that a numbered sequence of tables skips: inside it, then from 0 on."""
    found = [re.fullmatch(r"(\D*)(\d{1,9})(\D*)", name) for name in names]
    parts = {(match[1], match[3]) for match in found if match is not None}
    if None in found or len(parts) != 1:
        return []
    before, after = parts.pop()
    numbers = {int(match[2]) for match in found if match is not None}
    if max(numbers) > 4 * len(numbers) + 4:
        return []
    skipped = [
        [f"{before}{n}{after}" for n in range(first, max(numbers)) if n not in numbers]
        for first in (min(numbers), 0)
    ]
    return [names for names in skipped if names]
