"""Dense parts that are neither DLRM's nor DCN's: modules over dense inputs and embeddings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
