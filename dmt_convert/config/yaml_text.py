"""YAML as people write it: `1e-4` is a number, and nothing in a file is silently overruled."""

from __future__ import annotations

import re
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


def load_yaml(text: str) -> Any:
    """Return what a YAML document holds.

    Raises:
        ValueError: It is not YAML, names a key twice, or has aliases (`*name`), of which a short
            text can make a huge document.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias (*name), which is not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for i, key in enumerate(keys) if key in keys[:i]]
            if twice:
                raise yaml.YAMLError(f"the key {twice[0]!r} stands there twice")
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
