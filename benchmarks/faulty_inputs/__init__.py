"""Inputs with one plausible fault each, and what every command makes of them."""

from . import bundles, data, documents, files, tensors, training
from .case import FAULTS as KINDS

__all__ = ["KINDS", "bundles", "data", "documents", "files", "tensors", "training"]
