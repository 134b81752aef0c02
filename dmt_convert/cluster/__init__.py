"""The converted model over many ranks: TorchRec's towers with SPTT's exchanges."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
