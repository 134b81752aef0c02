"""How a converted model starts: exactly, in closed form, or at random."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
