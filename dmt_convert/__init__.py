"""Turn flat recommendation checkpoints into Disaggregated Multi-Tower models.

    import dmt_convert as dmt

    bundle = dmt.convert("ckpt.pt", towers=16)
    model = bundle.model()

The functions here are all that a program needs; `dmt_convert.api` describes them. Nothing heavy is
imported until a function needs it.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
