"""The converted model: towers, their modules, and how they start from the flat model's weights.

Specs are plain data; everything that needs torch is imported when it is first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
