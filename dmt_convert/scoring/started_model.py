"""The converted model as it starts, and what that start is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dmt_convert.architectures import FlatModelInfo
from dmt_convert.bundle import SmallWeights, split_state
from dmt_convert.sampling import Sample
from dmt_convert.scoring.quality import compare_models
from dmt_convert.scoring.quality_table import Quality
from dmt_convert.spec import Dtype
from dmt_convert.towers import DmtModel, DmtSpec, MappedTables, open_flat_model
from dmt_convert.towers.initialisation import distill, initialise

_HELD_OUT: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedModel:
    """A converted model before any fine-tuning."""

    weights: SmallWeights
    """All its weights beside tables."""
    method: str
    """How they were found."""
    notes: tuple[str, ...]
    """What was fitted, one line each."""
    quality: Quality
    """How well it agrees with the flat model, beside its yardsticks."""


def start_model(
    info: FlatModelInfo,
    spec: DmtSpec,
    sample: Sample,
    *,
    distill_steps: int = 0,
    stored_as: Dtype | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> StartedModel:
    """Initialise a converted model, and measure it on rows that no fit has seen.

    Args:
        info: The flat checkpoint.
        spec: The converted model.
        sample: Rows; the last quarter is held out.
        distill_steps: Steps of distillation after the closed form.
        stored_as: Type in which the tables will be stored.
        seed: Seed of everything random.
        on_step: Told of distillation steps done and in all.

    Raises:
        CheckpointError: A weight is NaN or Inf.
    """
    flat = open_flat_model(info)
    fit, held = sample.split(_HELD_OUT)
    infos = {table.name: info.table_info(table.name) for table in info.spec.tables}
    tables = MappedTables(info.spec, infos, stored_as=stored_as)
    candidates: dict[str, DmtModel] = {}
    if spec.is_passthrough:
        model, notes = initialise(flat, spec, None, method="exact", tables=tables)
        method = "exact"
        candidates["passthrough"] = model
    else:
        model, notes = initialise(flat, spec, fit, method="closed-form", tables=tables)
        candidates["closed form"] = model
        method = "closed form"
        if distill_steps:
            model, note = distill(flat, model, fit, steps=distill_steps, seed=seed, on_step=on_step)
            notes, method = (*notes, note), "closed form, then distilled"
            candidates["distilled"] = model
        candidates["random initialisation"], _ = initialise(
            flat, spec, None, method="random", tables=tables, seed=seed
        )
    return StartedModel(
        weights=split_state(model),
        method=method,
        notes=notes,
        quality=compare_models(flat, candidates, held),
    )
