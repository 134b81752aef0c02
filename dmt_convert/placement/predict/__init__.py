"""The modelled time of a training step on a cluster: flat, SPTT and converted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
