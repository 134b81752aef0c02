"""The page that a person decides by. Importing this imports neither torch nor matplotlib."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
