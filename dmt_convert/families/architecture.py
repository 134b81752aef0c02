"""A family of trainers: which names its tensors bear, and what it leaves unsaid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dmt_convert.families.model_tensors import ModelTensors
from dmt_convert.families.name_map import NameMap
from dmt_convert.families.trainer_tensors import Described, TrainerTensors
from dmt_convert.spec import InteractionKind, PairOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family, as data; `inference` does the work for all of them."""

    name: str
    """Family name, as `--model-config` and `dmt inspect` spell it."""
    trainer: str
    """Who writes such checkpoints, for messages."""
    anchor: str
    """Regular expression of a table's name; group `prefix` is what stands before the model's
    own names, group `table` the table's name."""
    names: NameMap = field(default_factory=lambda: NameMap({}))
    """All names that a model of this family may have, without the prefix."""
    interactions: tuple[InteractionKind, ...] = ()
    """Interactions that the family knows without parameters of their own, default first."""
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
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions of names that belong to variants that cannot be read, and why."""
    over_arch_last: str = ""
    """Trainer's stem of the last over_arch layer where it stands apart, for messages."""
    rewrite: Callable[[ModelTensors], None] | None = None
    """Puts plain tensors in the place of those that the trainer stores in another form."""
    describe: Callable[[TrainerTensors], Described] | None = None
    """Describes a model that the fields above cannot; they may be left empty then, but for the
    name, the trainer and the anchor."""
