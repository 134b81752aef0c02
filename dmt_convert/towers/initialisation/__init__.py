"""How a converted model starts: exactly, in closed form, or at random."""

from dmt_convert.towers.initialisation.allotment import allot_dims
from dmt_convert.towers.initialisation.closed_form import Method, initialise
from dmt_convert.towers.initialisation.distillation import default_steps, distill
from dmt_convert.towers.initialisation.flat_trace import FlatTrace, trace_flat
from dmt_convert.towers.initialisation.ridge import Refit, refit_linear

__all__ = [
    "FlatTrace",
    "Method",
    "Refit",
    "allot_dims",
    "default_steps",
    "distill",
    "initialise",
    "refit_linear",
    "trace_flat",
]
