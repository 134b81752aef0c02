"""Whether tensors stand in the order in which a module lists them, or a dict was put together anew.

`Module.state_dict()` lists a module's own tensors and then the modules inside, one after the other,
each in the order in which it was made. Whatever merges the dicts of several ranks, sorts a dict by
names or by sizes, or goes through a container without an order, leaves traces:

- tensors of one module stand apart from each other
- every bias stands before its weight, which torch's layers register first
- modules that are numbered (a ModuleList) stand in another order
- all names are sorted, apart for each width of elements, as safetensors stores them
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, Keys

_MAX_DEPTH: Final = 64


def is_module_order(tensors: Iterable[Keys] | Mapping[Keys, Any]) -> bool:
    """Tell whether the tensors of every dict may stand in the order of a module.

    Dicts of optimizers do not count.

    Args:
        tensors: Keys of the tensors in the order of the file; or a mapping from them to objects
            with a `dtype` and a `shape`, from which more can be told.
    """
    dicts: dict[Keys, list[str]] = defaultdict(list)
    for keys in tensors:
        if any(key.lower().startswith("optim") for key in keys[:-1]):
            continue
        dicts[keys[:-1]].append(keys[-1] if keys else "")
    if not all(map(_may_be_module, dicts.values())):
        return False
    if not isinstance(tensors, Mapping):
        return True
    return not any(
        _is_sorted([(name, tensors[(*keys, name)]) for name in names])
        for keys, names in dicts.items()
        if keys or names != [""]
    )


def _may_be_module(names: Sequence[str]) -> bool:
    if any(name.count(".") > _MAX_DEPTH for name in names):
        return False
    parts = [tuple(name.split(".")) for name in names]
    return _stand_together(parts) and not _biases_first(parts) and _numbers_count(parts)


def _stand_together(names: Sequence[tuple[str, ...]]) -> bool:
    """Tell whether the tensors of every module follow each other."""
    left: set[tuple[str, ...]] = set()
    before: tuple[str, ...] = ()
    for name in names:
        module = name[:-1]
        shared = 0
        while shared < min(len(before), len(module)) and before[shared] == module[shared]:
            shared += 1
        left.update(before[:end] for end in range(shared + 1, len(before) + 1))
        if any(module[:end] in left for end in range(shared + 1, len(module) + 1)):
            return False
        before = module
    return True


def _biases_first(names: Sequence[tuple[str, ...]]) -> bool:
    """Tell whether every module that has a weight and a bias lists the bias first."""
    places = {name: place for place, name in enumerate(names)}
    pairs = [
        (place, places[*name[:-1], "weight"])
        for name, place in places.items()
        if name[-1] == "bias" and (*name[:-1], "weight") in places
    ]
    return bool(pairs) and all(bias < weight for bias, weight in pairs)


def _numbers_count(names: Sequence[tuple[str, ...]]) -> bool:
    """Tell whether modules numbered 0 .. n-1 stand in that order."""
    inside: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for name in names:
        for end in range(len(name)):
            inside[name[:end]].setdefault(name[end])
    for children in inside.values():
        numbers = [int(child) for child in children if child.isdecimal() and len(child) < 10]
        gapless = sorted(numbers) == list(range(len(children)))
        if gapless and numbers != sorted(numbers):
            return False
    return True


def _is_sorted(tensors: Sequence[tuple[str, Any]]) -> bool:
    """Tell whether names are sorted as strings, wide elements first.

    Only if there are vectors among them: tables alone may well have names in alphabetical order.
    """
    if len(tensors) < 3 or all(len(tensor.shape) > 1 for _, tensor in tensors):
        return False
    order = [(-ITEM_BYTES[tensor.dtype], name) for name, tensor in tensors]
    return order == sorted(order)
