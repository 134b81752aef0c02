"""What a pickled model of DeepCTR-Torch says of itself, where tensors leave several answers.

Which features it has, in which order, how they are pooled and which share a table; whether there
is a factorisation machine; the activation; the order of the dense inputs of its linear part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from dmt_convert.checkpoint import DEEPCTR_MODULE
from dmt_convert.families.model_config import FeatureConfig
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import Pooling

READ: Final = "the pickled module"
_MODELS: Final = ("DCN", "DCNMix", "DeepFM", "WDL")
_ACTIVATIONS: Final[Mapping[str, str]] = {
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "SiLU": "silu",
    "Identity": "linear",
    "Linear": "linear",
    "PReLU": "prelu",
}
"""Classes that have no settings of their own -> what networks call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleColumns:
    """What a pickled module says."""

    features: tuple[FeatureConfig, ...]
    """Features in the model's order, those of the linear part alone behind the others."""
    deep: frozenset[str]
    """Names of features that the deep part takes."""
    deep_dense: tuple[tuple[str, int], ...]
    """Dense inputs of the deep part: name and column."""
    wide_dense: tuple[tuple[str, int], ...]
    """Dense inputs of the linear part: name and column."""
    fm: bool | None
    """Whether there is a factorisation machine; None where nothing says."""
    final_sigmoid: bool | None
    """Whether a sigmoid ends the model; None where nothing says."""
    activation: str | None
    """Activation of hidden layers; None where nothing says."""


def read_module(
    source: TrainerTensors, deep_tables: Sequence[str], wide_tables: Sequence[str]
) -> ModuleColumns | None:
    """Return what the pickled module says; None where there is none, or not of these tables.

    Args:
        source: The tensors.
        deep_tables: Names of the tables of embeddings.
        wide_tables: Names of the tables of linear terms.

    Raises:
        ArchitectureError: It is another model of the trainer, or has columns that cannot be
            converted.
    """
    said = source.checkpoint.documents.get(DEEPCTR_MODULE)
    if not isinstance(said, dict):
        return None
    package, _, name = str(said["class"]).rpartition(".")
    if package.startswith("deepctr_torch.") and name not in _MODELS:
        raise source.refuse(
            f"a pickled {name}",
            expected="one of " + ", ".join(_MODELS),
            hint="other models of the trainer cannot be converted yet",
        )
    deep, wide = said["deep"], said["linear"]
    if deep is None or wide is None:
        return None
    if {row[1] for row in deep["sparse"]} != set(deep_tables) or {
        row[1] for row in wide["sparse"]
    } != set(wide_tables):
        return None
    rows = _join(source, deep["sparse"], wide["sparse"])
    use_fm = said["use_fm"]
    return ModuleColumns(
        features=tuple(
            FeatureConfig(name=name, table=table, pooling=_pooling(source, name, kind))
            for name, table, kind in rows
        ),
        deep=frozenset(row[0] for row in deep["sparse"]),
        deep_dense=_dense(deep["dense"]),
        wide_dense=_dense(wide["dense"]),
        fm=False if use_fm is None and name == "WDL" else use_fm,
        final_sigmoid=None if said["task"] is None else said["task"] == "binary",
        activation=_activation(source, said["activations"]),
    )


def _join(source: TrainerTensors, deep: list[list[Any]], wide: list[list[Any]]) -> list[list[Any]]:
    """List the features of both parts; of a shared table, all have to be in the same parts."""
    rows = {row[0]: row for row in (*wide, *deep)}
    parts = {
        name: (name in [row[0] for row in deep], name in [row[0] for row in wide]) for name in rows
    }
    by_table: dict[str, set[tuple[bool, bool]]] = {}
    for name, row in rows.items():
        by_table.setdefault(row[1], set()).add(parts[name])
    odd = [table for table, kinds in by_table.items() if len(kinds) > 1]
    odd += [row[0] for row in (*wide, *deep) if rows[row[0]] != row]
    if odd or len(rows) != len({*map(tuple, (*deep, *wide))}):
        raise source.refuse(
            f"the features of {', '.join(odd[:5])} differ between linear and deep columns",
            expected="features of one table in the same parts of the model, pooled the same way",
            hint="such a model cannot be converted yet",
        )
    deep_names = [row[0] for row in deep]
    return [rows[name] for name in dict.fromkeys([*deep_names, *(row[0] for row in wide)])]


def _pooling(source: TrainerTensors, name: str, kind: str | None) -> Pooling:
    config = source.config
    if isinstance(config.pooling, Mapping):
        kind = config.pooling.get(name, kind)
    elif config.pooling is not None:
        kind = config.pooling
    if kind not in (None, "sum", "mean"):
        raise source.refuse(
            f"the feature {name} is pooled by {kind!r}",
            expected="sum or mean",
            hint="a model with another pooling cannot be converted",
        )
    return cast(Pooling, kind or "mean")


def _dense(rows: list[list[Any]]) -> tuple[tuple[str, int], ...]:
    columns: list[tuple[str, int]] = []
    for name, width in rows:
        # a damaged width is found when the sum is compared with the network's
        columns += [(name, i) for i in range(min(width, 100_000 - len(columns)))]
    return tuple(columns)


def _activation(source: TrainerTensors, classes: list[str]) -> str | None:
    names = {name.rpartition(".")[2] for name in classes}
    if not names or source.config.activation is not None:
        return None
    known = {_ACTIVATIONS.get(name) for name in names}
    if len(known) > 1 or None in known:
        raise source.refuse(
            f"the activation {', '.join(sorted(names))}",
            expected="one of " + ", ".join(_ACTIVATIONS),
            hint="say `activation` in --model-config if it does the same as one that is known",
        )
    return known.pop()
