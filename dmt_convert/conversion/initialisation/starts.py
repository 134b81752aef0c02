"""The ways in which a converted model starts: exactly, in closed form, or at random."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn

from dmt_convert.conversion import Sample
from dmt_convert.conversion.initialisation.closed_form import ClosedForm, Start
from dmt_convert.conversion.initialisation.code_ranges import fit_codes
from dmt_convert.conversion.initialisation.dcn import CrossForm
from dmt_convert.conversion.initialisation.dot import DotForm
from dmt_convert.conversion.initialisation.first_layer import FirstLayerForm
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace, trace_flat
from dmt_convert.conversion.initialisation.restored import RestoredForm
from dmt_convert.model import DmtModel, DmtSpec, FlatModel, state_name, to_tensor

Method = Literal["exact", "closed-form", "random"]

CLOSED_FORMS: tuple[ClosedForm, ...] = (
    RestoredForm(),
    DotForm(),
    CrossForm(),
    FirstLayerForm(),
)
"""All closed forms; the first that fits a model is taken."""


def find_closed_form(spec: DmtSpec) -> ClosedForm | None:
    """Return the closed form of a model; None: it starts at random, and is distilled."""
    return next((form for form in CLOSED_FORMS if form.fits(spec)), None)


def allot_dims(
    trace: FlatTrace, spec: DmtSpec, budget: int | None = None, *, mix: bool = True
) -> DmtSpec:
    """Give every tower its own D, within a budget of bytes.

    Of modules that combine features only the linear one: combinations of features compete for the
    same dims in ways that no closed form weighs if the network behind changes as well.

    Args:
        trace: Intermediate results of the flat model on sampled rows.
        spec: Towers of one D each.
        budget: Bytes that all towers may send per sample; by default those of `spec`.
        mix: Whether elements of an int8 code may take 4 bits.

    Returns:
        The spec with the D that lose least; `spec` itself if one D for all loses no more.
    """
    form = find_closed_form(spec)
    towers = spec.sending_towers
    if form is None or (len(towers) == 1 and towers[0].module.code is None):
        return spec
    return form.allot(trace, spec, sum(spec.tower_bytes) if budget is None else budget, mix=mix)


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
        sample: Rows to fit on; needed for the closed form, and for the ranges of codes.
        method: exact: every weight is the flat model's (passthrough only; a code still rounds).
            closed-form: DESIGN section 4. random: tower modules and layers whose inputs change are
            drawn as `torch.nn.Linear` draws them, all else is the flat model's: the yardstick.
        tables: Lookups that the towers share; by default the flat model's.
        seed: Seed of the random method.
        trace: Intermediate results of the flat model on the sample, if they are known already.

    Returns:
        The model in eval mode, and one line per thing that was fitted.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DmtModel(spec, [flat.tables if tables is None else tables] * len(spec.towers))
    _copy_unchanged(flat, model)
    model.eval()
    assert method != "exact" or spec.rules.exact
    form = find_closed_form(spec) if method == "closed-form" else None
    if form is None:
        if sample is not None:
            fit_codes(model, sample.pooled)
        return model, (_say_unsolved(spec, method),)
    assert sample is not None
    with torch.no_grad():
        trace = trace_flat(flat, sample) if trace is None else trace
        start = form.start(trace, spec)
        _load(model, start)
        fit_codes(model, sample.pooled)
        return model, (*start.notes, *form.finish(model, trace, start))


def _say_unsolved(spec: DmtSpec, method: Method) -> str:
    if method == "exact":
        return "every weight is the flat model's"
    if method == "random":
        return "tower modules and changed layers drawn at random"
    reads = f"a {spec.kind} tower module in front of {spec.flat.interaction.kind} interaction"
    return f"{reads} has no closed form: changed layers drawn at random"


def _copy_unchanged(flat: FlatModel, model: DmtModel) -> None:
    """Copy every weight that the converted model has in the same shape and meaning."""
    source = flat.state_dict()
    layers = model.spec.flat.interaction.rules.input_layers
    changed = () if model.spec.keeps_network else tuple(f"{state_name(name)}." for name in layers)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            known = source.get(name)
            if known is not None and known.shape == value.shape and not name.startswith(changed):
                value.copy_(known)


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
