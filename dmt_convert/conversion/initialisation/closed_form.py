"""Initialise a converted model from the flat one: exactly, in closed form, or at random."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn

from dmt_convert.conversion import Sample
from dmt_convert.conversion.initialisation.dcn_conversion import start_dcn
from dmt_convert.conversion.initialisation.dot_conversion import start_dot
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace, trace_flat
from dmt_convert.conversion.initialisation.linear_conversion import start_linear
from dmt_convert.conversion.initialisation.restored_start import start_restored
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.conversion.initialisation.start import Start
from dmt_convert.model import DmtModel, DmtSpec, FlatModel, state_name, to_tensor

Method = Literal["exact", "closed-form", "random"]


def initialise(
    flat: FlatModel,
    spec: DmtSpec,
    sample: Sample | None,
    *,
    method: Method,
    tables: nn.Module | None = None,
    seed: int = 0,
    trace: FlatTrace | None = None,
) -> tuple[DmtModel, tuple[str, ...]]:
    """Build a converted model over the flat model's tables.

    Args:
        flat: The flat model.
        spec: The converted model.
        sample: Rows to fit on; needed for the closed form.
        method: exact: every weight is the flat model's (passthrough only). closed-form: DESIGN
            section 4. random: tower modules and layers whose inputs change are drawn as
            `torch.nn.Linear` draws them, all else is the flat model's: the yardstick.
        tables: Lookups that the towers share; by default the flat model's.
        seed: Seed of the random method.
        trace: What the flat model computes on the sample, where that is known already.

    Returns:
        The model in eval mode, and one line per thing that was fitted.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DmtModel(spec, [flat.tables if tables is None else tables] * len(spec.towers))
    _copy_unchanged(flat, model)
    model.eval()
    if method == "exact":
        assert spec.is_passthrough
        return model, ("every weight is the flat model's",)
    if method == "random":
        return model, ("tower modules and changed layers drawn at random",)
    assert sample is not None
    with torch.no_grad():
        trace = trace_flat(flat, sample) if trace is None else trace
        if spec.keeps_network:
            start = start_restored(flat, sample, trace, spec)
        else:
            start = _start(trace, spec)
        _load(model, start)
        notes = start.notes
        if spec.flat.interaction.kind == "dot" and not spec.keeps_network:
            notes = (*notes, _refit_over_arch(model, trace, start))
    return model, notes


def _start(trace: FlatTrace, spec: DmtSpec) -> Start:
    kind = spec.flat.interaction.kind
    if kind == "dot":
        return start_dot(trace, spec)
    if kind == "dcn":
        return start_dcn(trace, spec)
    return start_linear(trace, spec)


def _copy_unchanged(flat: FlatModel, model: DmtModel) -> None:
    """Copy every weight that the converted model has in the same shape and meaning."""
    source = flat.state_dict()
    changed = set() if model.spec.keeps_network else _changed_layers(model.spec)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in source and not name.startswith(tuple(changed)):
                value.copy_(source[name])


def _changed_layers(spec: DmtSpec) -> set[str]:
    if spec.flat.interaction.kind == "projection":
        return {"interaction.branch1.0.", "interaction.branch2.0."}
    return {"interaction.cross.", "over_arch.0."}


def _load(model: DmtModel, start: Start) -> None:
    state = {
        f"towers.{t}.tower_module.{name}": value
        for t, module in enumerate(start.modules)
        for name, value in module.items()
    }
    for name, value in start.dense.items():
        state[state_name(name)] = value
    own = model.state_dict()
    for name, value in state.items():
        own[name].copy_(to_tensor(np.ascontiguousarray(value, dtype=np.float32)))


def _refit_over_arch(model: DmtModel, trace: FlatTrace, start: Start) -> str:
    """Refit over_arch's first layer on what the converted interaction gives."""
    dense = to_tensor(trace.dense)
    inputs = model.interact(dense, model.emit(to_tensor(trace.pooled))).numpy()
    prior = np.asarray(start.dense["over_arch.0.weight"], dtype=np.float64)
    fit = refit_linear(inputs, trace.pre_activation, prior)
    layer = model.over_arch[0]
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(to_tensor(fit.weight.astype(np.float32)))
    layer.bias.copy_(to_tensor(fit.bias.astype(np.float32)))
    return f"over_arch.0 refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}"
