"""What a pickle holds, as inert objects: tensors, shards of tensors, modules, plain values.

A module (`torch.save(model)`) is read as its `state_dict()` would list it: parameters, buffers,
then the modules inside, each in order of construction. None of its code is known or run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import Keys, Scalar, TableConfig
from dmt_convert.checkpoint.inert.deepctr import DEEPCTR_MODULE, describe_deepctr_module
from dmt_convert.checkpoint.inert.objects import (
    MAX_SIZE,
    NUMPY_ARRAY,
    InertDict,
    Record,
    TensorRef,
    UnknownGlobal,
)
from dmt_convert.checkpoint.inert.sharded import ShardedRef, as_sharded
from dmt_convert.errors import CheckpointError

_MAX_DEPTH: Final = 32
_MAX_ITEMS: Final = 1_000_000
_MAX_SCALARS: Final = 100_000
_MAX_NAMES: Final = 1 << 27
"""Most characters of all names together: keys may be long, and each is part of many names."""
_MAX_UNREAD: Final = 1000
_MODULE_PARTS: Final = ("_parameters", "_buffers", "_modules")
_SCRIPTED: Final = "__torch__."


@dataclass(slots=True)
class PickledContent:
    """Everything in a pickle that is used, by the keys around it; the last key is the name."""

    tensors: dict[Keys, TensorRef | ShardedRef] = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    table_configs: list[TableConfig] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)
    """What modules say about their own construction, as dicts, lists and scalars."""
    modules: dict[Keys, tuple[str, ...]] = field(default_factory=dict)
    """Keys of a state dict or a module -> all modules in it, in the order of construction."""


@dataclass(frozen=True, slots=True)
class _Description:
    """What a module says about its own construction."""

    name: str
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Modules:
    """The names of the modules in a state dict or a module, in the order of construction."""

    names: tuple[str, ...]


def collect_content(content: object, path: Path) -> PickledContent:
    """Walk through what was unpickled.

    Args:
        content: What `read_pickle` returned.
        path: The file to name in errors.

    Raises:
        CheckpointError: It is nested too deeply or holds too many items.
    """
    found = PickledContent()
    left = _MAX_NAMES
    for keys, value in _walk(content, path):
        left -= sum(map(len, keys))
        if left < 0:
            raise _names_too_long(path)
        if isinstance(value, TensorRef | ShardedRef):
            found.tensors[keys] = value
        elif isinstance(value, TableConfig):
            found.table_configs.append(value)
        elif isinstance(value, _Description):
            # two modules that differ: it is unknown which one is meant
            same = found.documents.get(value.name, value.content) == value.content
            found.documents[value.name] = value.content if same else None
        elif isinstance(value, _Modules):
            found.modules[keys] = value.names
        elif isinstance(value, Record | UnknownGlobal):
            if len(found.unread) < _MAX_UNREAD:
                found.unread[".".join(keys)] = _describe(value)
        elif len(found.scalars) < _MAX_SCALARS:
            found.scalars[".".join(keys)] = value
    return found


_Value = (
    TensorRef | ShardedRef | Scalar | Record | UnknownGlobal | TableConfig | _Description | _Modules
)


def _walk(content: object, path: Path) -> Iterator[tuple[Keys, _Value]]:
    """Yield all that is of use, in the order of the file."""
    stack: list[tuple[Keys, object]] = [((), content)]
    seen: set[int] = set()
    count = 1
    while stack:
        keys, value = stack.pop()
        value = _unwrap(value)
        if isinstance(value, Record) and not is_module(value):
            sharded = as_sharded(value, ".".join(keys), path)
            if sharded is not None:
                yield keys, sharded
                continue
            if value.origin:
                yield keys, value
            if id(value) in seen:
                continue
            seen.add(id(value))
        if isinstance(value, InertDict) and value.modules:
            yield keys, _Modules(value.modules)
        elif isinstance(value, Record) and is_module(value):
            yield keys, _Modules(tuple(_module_names(value)))
        items = _items(keys, value)
        if items is None:
            if not (isinstance(value, int) and abs(value) >= MAX_SIZE) and isinstance(
                value,
                TensorRef | TableConfig | _Description | str | int | float | UnknownGlobal | None,
            ):
                yield keys, value
            continue
        count += len(items)
        if len(keys) > _MAX_DEPTH or count > _MAX_ITEMS:
            raise CheckpointError(
                f"{path} nests dicts more than {_MAX_DEPTH} deep or holds over {_MAX_ITEMS} items",
                expected="a state dict, or a dict that holds one",
                hint="save only the weights: torch.save(model.state_dict(), 'weights.pt')",
            )
        stack.extend(reversed(items))


def _items(keys: Keys, value: object) -> list[tuple[Keys, object]] | None:
    """Return what is inside, with its keys; None if nothing can be."""
    if isinstance(value, dict):
        return [((*keys, _key_name(key)), item) for key, item in dict.items(value)]
    if isinstance(value, list | tuple):
        return [((*keys, str(index)), item) for index, item in enumerate(value)]
    if isinstance(value, Record):
        if is_module(value):
            return list(_module_items(keys, value))
        if len(keys) >= _MAX_DEPTH:  # an object may well hold itself
            return []
        return [*(_items(keys, value.fields) or []), *(_items(keys, value.items) or [])]
    return None


def _unwrap(value: object) -> object:
    """Return the module that `torch.compile` keeps as an argument of its own; else the value."""
    if isinstance(value, Record) and value.origin.endswith(".OptimizedModule") and value.args:
        return value.args[0]
    return value


def is_module(value: Record) -> bool:
    """Tell a pickled `torch.nn.Module`, or a scripted one, by what it keeps."""
    return value.origin.startswith(_SCRIPTED) or _has_parts(value)


def _has_parts(value: Record) -> bool:
    return all(isinstance(value.fields.get(part), dict) for part in _MODULE_PARTS)


def _module_items(keys: Keys, module: Record) -> Iterator[tuple[Keys, object]]:
    """Yield a module's tensors by their names in its state dict, and its plain attributes.

    Names inside are one key, joined by dots, as a state dict has them.
    """
    stack = [("", 0, module)]
    count, left = 0, _MAX_NAMES
    while stack:
        prefix, level, current = stack.pop()
        inside = []
        for name, member in _members(current):
            value = _unwrap(member)
            count += 1
            left -= len(prefix) + len(name)
            if left < 0:
                raise _names_too_long(None)
            if level > _MAX_DEPTH or count > _MAX_ITEMS:
                raise _too_deep()
            if isinstance(value, Record) and is_module(value):
                inside.append((f"{prefix}{name}.", level + 1, value))
            else:
                yield (*keys, prefix + name), value
        stack.extend(reversed(inside))


def _module_names(module: Record) -> Iterator[str]:
    """Yield the names of all modules inside, each before those that it holds."""
    stack = [("", 0, module)]
    count = 0
    while stack:
        name, level, current = stack.pop()
        yield name
        prefix = f"{name}." if name else ""
        parts = current.fields.get("_modules") if _has_parts(current) else current.fields
        inside = [
            (prefix + _key_name(key), level + 1, part)
            for key, part in dict.items(parts if isinstance(parts, dict) else {})
            if isinstance(part, Record) and is_module(part)
        ]
        count += len(inside)
        if level > _MAX_DEPTH or count > _MAX_ITEMS:
            raise _too_deep()
        stack.extend(reversed(inside))


def _names_too_long(path: Path | None) -> CheckpointError:
    return CheckpointError(
        f"{path or 'a module'} holds names of over {_MAX_NAMES} characters in all",
        expected="the names of a model's tensors",
        hint="save only the weights: torch.save(model.state_dict(), 'weights.pt')",
    )


def _too_deep() -> CheckpointError:
    return CheckpointError(
        f"a module nests modules more than {_MAX_DEPTH} deep or holds over {_MAX_ITEMS} items",
        expected="the modules of a model",
        hint="save only the weights: torch.save(model.state_dict(), 'weights.pt')",
    )


def _members(module: Record) -> Iterator[tuple[str, object]]:
    """Yield parameters, buffers, plain attributes and modules of one module."""
    fields = module.fields
    if not _has_parts(module):  # scripted: its attributes are its parts
        for name, value in fields.items():
            if isinstance(value, TensorRef | Record):
                yield _key_name(name), value
        return
    passing = fields.get("_non_persistent_buffers_set")
    skipped = passing if isinstance(passing, list) else []
    for part in _MODULE_PARTS[:2]:
        for name, value in dict.items(fields[part]):
            if value is not None and not (part == "_buffers" and name in skipped):
                yield _key_name(name), value
    for name, value in fields.items():
        if isinstance(value, str | int | float) and not _key_name(name).startswith("_"):
            yield _key_name(name), value
    yield from _table_configs(fields.get("_embedding_bag_configs"))
    description = describe_deepctr_module(module)
    if description is not None:
        yield "description", _Description(DEEPCTR_MODULE, description)
    for name, value in dict.items(fields["_modules"]):
        if value is not None:
            yield _key_name(name), value


def _table_configs(configs: object) -> Iterator[tuple[str, TableConfig]]:
    """Yield what TorchRec's EmbeddingBagCollection keeps of its tables."""
    for config in configs if isinstance(configs, list) else ():
        fields = config.fields if isinstance(config, Record) else {}
        name, features = map(fields.get, ("name", "feature_names"))
        kind, data_type = _member(fields.get("pooling")), _member(fields.get("data_type"))
        if not isinstance(features, list) or not all(isinstance(text, str) for text in features):
            continue
        if isinstance(name, str) and kind in ("SUM", "MEAN"):
            yield (
                "table_configs",
                TableConfig(
                    name=name,
                    features=tuple(features),
                    pooling="sum" if kind == "SUM" else "mean",
                    data_type=data_type.lower() if isinstance(data_type, str) else None,
                ),
            )


def _member(value: object) -> object:
    """Return which member of an enumeration a pickle names."""
    return value.args[0] if isinstance(value, Record) and value.args else None


def _key_name(key: object) -> str:
    return str(key) if isinstance(key, str) or (type(key) is int and abs(key) < MAX_SIZE) else "?"


def _describe(value: Record | UnknownGlobal) -> str:
    if isinstance(value, UnknownGlobal):
        return f"the name {value.name[:200]}"
    origin, args = value.origin, value.args
    kind = origin.removeprefix("torch.").removeprefix("_utils.")
    if origin == NUMPY_ARRAY:
        state = args[0] if args and isinstance(args[0], tuple) and len(args[0]) > 2 else ()
        dtype = state[2] if state else None
        code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
        known = code[:20] if isinstance(code, str) else "an unknown dtype"
        return f"a numpy array{_shape(state[1] if state else None)} in {known}"
    if kind == "_rebuild_sparse_tensor":
        return "a sparse tensor"
    if kind == "_rebuild_meta_tensor_no_storage":
        return "a tensor on the device `meta`, which was saved without its values"
    if kind == "_rebuild_qtensor" and len(args) > 2:
        storage = args[0].origin if isinstance(args[0], Record) else "a quantised type"
        return f"a tensor{_shape(args[2])} in {storage.removeprefix('torch.')[:40]}"
    if kind.startswith(_OTHER_DTYPES):
        return f"a tensor{_shape(args[0] if args else None)} in {kind[:40]}"
    return f"an object made by {origin[:200]}"


_OTHER_DTYPES: Final = ("float8_", "float4_", "uint", "complex", "Complex", "UInt", "Q", "q")
"""How the names of dtypes and storages begin whose tensors are not read."""


def _shape(sizes: object) -> str:
    if isinstance(sizes, tuple) and len(sizes) <= 16 and all(type(size) is int for size in sizes):
        return f" of shape {list(sizes)}"
    return ""
