"""Pickles as inert data: what they describe is recorded, and nothing that they name is run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
