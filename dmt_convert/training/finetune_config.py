"""How a model is trained: settings that check themselves, from code or from a YAML file."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from dmt_convert.errors import ConfigError
from dmt_convert.spec import COMM_DTYPES, CommDtype

TableOptimizerKind = Literal["rowwise-adagrad", "adagrad", "sgd", "adam"]
DenseOptimizerKind = Literal["adam", "sgd"]
Decay = Literal["constant", "linear", "cosine"]

_EVALUATIONS: Final = 10
"""Evaluations per pass over the data, if `eval_every` is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What training is asked for."""

    epochs: int = 1
    """Passes over the training rows; `max_steps` overrides it."""
    max_steps: int | None = None
    """Steps to take, over as many passes as they need."""
    batch_size: int = 512
    """Rows per step, over all ranks."""
    eval_every: int | None = None
    """Steps between evaluations; a tenth of a pass, or of `max_steps`, by default."""
    patience: int | None = 10
    """Evaluations without improvement after which training stops; None for never."""
    dense_lr: float = 5e-4
    """Learning rate of everything but tables; 0 freezes it."""
    table_lr: float = 0.02
    """Learning rate of the tables; 0 freezes them."""
    table_optimizer: TableOptimizerKind = "rowwise-adagrad"
    """What moves the rows that a batch touches."""
    initial_accumulator: float | None = None
    """Adagrad: what squared gradients start from. By default the bundle's accumulators; if it
    has none, the table's mean over the rows that the first batch touches, as if each row had been
    touched once before."""
    warmup_steps: int = 0
    """Steps over which learning rates rise from 0."""
    lr_decay: Decay = "linear"
    """How learning rates fall from there to the end of training."""
    clip_norm: float | None = None
    """Largest norm of the gradient of everything but tables."""
    seed: int = 0
    """Seed of the order of rows."""
    dense_optimizer: DenseOptimizerKind = "adam"
    """What moves everything but tables."""
    comm_dtype: CommDtype = "fp32"
    """Over ranks: precision of what crosses hosts, forward and backward."""
    checkpoint_every: int | None = None
    """Over ranks: steps between checkpoints, beside those of the best states."""
    keep_checkpoints: int = 2
    """Over ranks: checkpoints that are kept, beside that of the best state."""
    async_checkpoints: bool = False
    """Over ranks: write checkpoints while training goes on, from copies in main memory."""
    prefetch: bool = True
    """Over ranks: send the ids of the next batch while this one is trained on."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {_show(getattr(self, name))} (must be {expected})"
            for name, (is_right, expected) in _CHECKS.items()
            if not is_right(getattr(self, name))
        ]
        if problems:
            raise ConfigError(
                "invalid training settings: " + "; ".join(problems),
                expected="values as docs/finetune.md lists them",
                hint="leave them out: every setting has a default",
            )

    def total_steps(self, num_rows: int) -> int:
        """Steps that training takes at most.

        Args:
            num_rows: Training rows.
        """
        if self.max_steps is not None:
            return self.max_steps
        return self.epochs * math.ceil(num_rows / self.batch_size)

    def steps_between_evaluations(self, num_rows: int) -> int:
        """Steps between evaluations.

        Args:
            num_rows: Training rows.
        """
        if self.eval_every is not None:
            return self.eval_every
        one_pass = math.ceil(num_rows / self.batch_size)
        return max(1, min(one_pass, self.total_steps(num_rows)) // _EVALUATIONS)

    def lr_factor(self, step: int, total: int) -> float:
        """What learning rates are multiplied by.

        Args:
            step: The step, from 1.
            total: Steps in all.
        """
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.lr_decay == "constant":
            return 1.0
        done = (step - 1 - self.warmup_steps) / max(1, total - self.warmup_steps)
        if self.lr_decay == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file: keys are fields of `FinetuneConfig`.

    Raises:
        ConfigError: It cannot be read, or holds a key or a value that is not known.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _wrong(path, f"cannot be read ({reason})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise _wrong(path, f"holds {type(content).__name__}, not keys and values")
    known = [field.name for field in fields(FinetuneConfig)]
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise _wrong(path, f"has keys that are not known: {', '.join(unknown)}")
    try:
        FinetuneConfig(**content)
    except ConfigError as error:
        raise _wrong(path, f"cannot be used: {error.found}") from None
    return content


def merge_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> FinetuneConfig:
    """Make a config of a file's settings and what overrides them.

    Args:
        base: The file's settings.
        changes: Settings that override them; None stands for not given. `epochs` and
            `max_steps` each override both.

    Raises:
        ConfigError: A value cannot be.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    kept = dict(base)
    if "epochs" in given or "max_steps" in given:
        kept.pop("epochs", None)
        kept.pop("max_steps", None)
    return FinetuneConfig(**{**kept, **given})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for every setting; what is not given is None.

    Type, choices, default and help come from the field and the text below it.
    """
    hints, docs = get_type_hints(FinetuneConfig), _attribute_docs(FinetuneConfig)
    for field in fields(FinetuneConfig):
        text = " ".join(docs[field.name].split()).replace("%", "%%")
        option = f"--{field.name.replace('_', '-')}"
        kinds = [kind for kind in get_args(hints[field.name]) or () if kind is not NoneType]
        kind = kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) else hints[field.name]
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction
            parser.add_argument(option, action=action, help=f"{text} [{field.default}]")
        elif get_origin(kind) is Literal:
            help_ = f"{text} [{field.default}]"
            parser.add_argument(option, choices=get_args(kind), help=help_)
        else:
            default = "" if field.default is None else f" [{field.default}]"
            parser.add_argument(option, type=kind, help=f"{text}{default}")


def _attribute_docs(kind: type) -> dict[str, str]:
    """Field -> the text below it."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
            docs[field.target.id] = str(text.value.value)
    return docs


def _wrong(path: Path, what: str) -> ConfigError:
    known = ", ".join(field.name for field in fields(FinetuneConfig))
    return ConfigError(
        f"the training config {path} {what}",
        expected=f"a YAML file with some of {known}",
        hint="start from a file in recipes/configs",
    )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_int(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object, *, above: float | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value >= 0 if above is None else value > above


_COUNT: Final = "a whole number from 1"
_CHECKS: Final[Mapping[str, Any]] = {
    "epochs": (lambda value: _is_int(value, 1), _COUNT),
    "max_steps": (lambda value: value is None or _is_int(value, 1), _COUNT),
    "batch_size": (lambda value: _is_int(value, 1), _COUNT),
    "eval_every": (lambda value: value is None or _is_int(value, 1), _COUNT),
    "patience": (lambda value: value is None or _is_int(value, 1), _COUNT),
    "dense_lr": (_is_number, "a finite number from 0"),
    "table_lr": (_is_number, "a finite number from 0"),
    "table_optimizer": (
        lambda value: value in get_args(TableOptimizerKind),
        "one of " + ", ".join(get_args(TableOptimizerKind)),
    ),
    "initial_accumulator": (
        lambda value: value is None or _is_number(value),
        "a finite number from 0",
    ),
    "warmup_steps": (lambda value: _is_int(value, 0), "a whole number from 0"),
    "lr_decay": (
        lambda value: value in get_args(Decay),
        "one of " + ", ".join(get_args(Decay)),
    ),
    "clip_norm": (
        lambda value: value is None or _is_number(value, above=0),
        "a finite number above 0",
    ),
    "seed": (lambda value: _is_int(value, 0), "a whole number from 0"),
    "dense_optimizer": (
        lambda value: value in get_args(DenseOptimizerKind),
        "one of " + ", ".join(get_args(DenseOptimizerKind)),
    ),
    "comm_dtype": (lambda value: value in COMM_DTYPES, "one of " + ", ".join(COMM_DTYPES)),
    "checkpoint_every": (lambda value: value is None or _is_int(value, 1), _COUNT),
    "keep_checkpoints": (lambda value: _is_int(value, 1), _COUNT),
    "async_checkpoints": (lambda value: type(value) is bool, "true or false"),
    "prefetch": (lambda value: type(value) is bool, "true or false"),
}
"""Setting -> whether a value is right, and what would be."""
