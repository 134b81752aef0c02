"""What is computed: lookup, tower module, head; flat and converted models as plain torch modules.

Specs are plain data; everything that needs torch is imported when it is first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
