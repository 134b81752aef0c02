"""Every setting of every command, written once.

One frozen pydantic model per command says what can be set: the type, the default, the bounds and
the help text. The options of the command line, the keys of `--config` files, the checks, the
tables in docs/settings.md and what a bundle records of its conversion are made from these models;
the functions of `dmt_convert` take the same names as keyword arguments.

A setting whose default is None is decided when the command runs; `auto` says how.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
