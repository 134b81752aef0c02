"""What a server is given: exported graphs, how they are asked, and what runs them here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
