"""How a converted model starts: exactly, in closed form, or at random."""

from dmt_convert.towers.initialisation.closed_form import Method, initialise
from dmt_convert.towers.initialisation.distill import distill
from dmt_convert.towers.initialisation.ridge import Refit, refit_linear

__all__ = ["Method", "Refit", "distill", "initialise", "refit_linear"]
