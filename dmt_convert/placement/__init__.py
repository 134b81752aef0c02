"""Placing towers on hosts and tables on ranks, and predicting steps there.

Importing this does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
