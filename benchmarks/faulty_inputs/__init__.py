"""Inputs with one plausible fault each, and what every command makes of them."""

from . import files, tensors
from .case import FAULTS as KINDS

__all__ = ["KINDS", "files", "tensors"]
