"""YAML as people write it: `1e-4` is a number, and nothing in a file is silently overruled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

_FLOAT: Final = re.compile(
    r"""(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
"""Numbers of YAML 1.2, as JSON and Python write them; YAML 1.1 wants a dot and a sign."""


_MAX_DEPTH: Final = 64


def load_yaml(text: str) -> Any:
    """Return what a YAML document holds.

    Raises:
        ValueError: It is not YAML, names a key twice, is nested deeper than settings are, or has
            aliases (`*name`), of which a short text can make a huge document.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag.endswith(":merge"):
                    raise yaml.YAMLError("the key <<, which is not read")
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.YAMLError(f"the key {key!r} stands there twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
        for first, resolvers in base.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        _check_events(yaml.parse(text, Loader=base))
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _check_events(events: Iterable[Any]) -> None:
    """Refuse aliases and deep nesting before anything is made of them."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if kind == "AliasEvent":
            raise ValueError("an alias (*name), which is not read")
