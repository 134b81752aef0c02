"""Learning rates that suit how close a bundle is to its flat model.

Measured by benchmarks/finetune_settings.py; see docs/benchmarks/fine-tuning.md.
"""

from __future__ import annotations

from typing import Final, TypeVar

from dmt_convert.bundle import Bundle
from dmt_convert.config import TrainingConfig
from dmt_convert.documents import FAIR_R2

CLOSE: Final = {"dense_lr": 0.0, "table_lr": 0.002}
"""Rates for a bundle that agrees with the flat model: a converged model is not disturbed."""

Config = TypeVar("Config", bound=TrainingConfig)


def choose_rates(config: Config, bundle: Bundle) -> tuple[Config, str]:
    """Choose learning rates by how well a bundle agrees with the flat model, unless one is given.

    Args:
        config: Settings.
        bundle: What is trained.

    Returns:
        Settings with the rates that training takes, and a line that says why.
    """
    if config.model_fields_set & CLOSE.keys():
        why = "as given"
    else:
        r2 = _agreement(bundle)
        if r2 is not None and r2 >= FAIR_R2:
            config = config.replace(**CLOSE)
        found = "is unknown" if r2 is None else f"is {r2:.4f}"
        side = "at least" if config.table_lr == CLOSE["table_lr"] else "not at least"
        why = f"as R^2 with the flat model {found}, {side} {FAIR_R2}"
    return config, (
        f"learning rates: {config.table_lr:g} of tables, {config.dense_lr:g} of the rest, {why}"
    )


def _agreement(bundle: Bundle) -> float | None:
    """R^2 of the conversion's logits with the flat model's; None if it was not measured."""
    rows = bundle.manifest.quality.rows[1:]
    found = [row.r2 for row in rows if row.r2 is not None and row.name != "random initialisation"]
    return found[-1] if found else None
