"""Fine-tuning: train a converted model further, and write it as a new bundle."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
