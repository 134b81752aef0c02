"""What a pickled model of DeepCTR-Torch records about its own construction, as plain data.

`torch.save(model)` is how its documentation saves models. The feature columns are named tuples,
which an inert record holds as arguments. Source: `deepctr_torch/{inputs,models/basemodel}.py`.
"""

from __future__ import annotations

from typing import Any, Final

from dmt_convert.checkpoint.inert.objects import MAX_SIZE, Record

DEEPCTR_MODULE: Final = "DeepCTR-Torch's module"
"""Name of the description among a checkpoint's documents."""
_MAX_COLUMNS: Final = 100_000


def describe_deepctr_module(module: Record) -> dict[str, Any] | None:
    """Describe a module of DeepCTR-Torch; None if it is another module.

    Returns:
        `class`, its dotted name; `use_fm`; `task`; `activations`, the classes of the layers of
        its DNN; `deep` and `linear`, the columns of its two parts, each a dict of `sparse`
        (name, table, pooling; None for a single id) and `dense` (name, columns). A column
        that is not understood makes its part None.
    """
    columns = module.fields.get("dnn_feature_columns")
    if not isinstance(columns, list):
        return None
    linear_fields = _inside(module, "linear_model")
    linear = [
        column
        for kind in ("sparse", "varlen_sparse", "dense")
        for column in _listed(linear_fields.get(f"{kind}_feature_columns"))
    ]
    layers = _inside(module, "dnn").get("_modules")
    stack = layers.get("activation_layers") if isinstance(layers, dict) else None
    classes = stack.fields.get("_modules") if isinstance(stack, Record) else None
    return {
        "class": module.origin,
        "use_fm": _plain(module.fields.get("use_fm"), bool),
        "task": _plain(_inside(module, "out").get("task"), str),
        "activations": [_class_of(value) for value in dict.values(classes)]
        if isinstance(classes, dict)
        else [],
        "deep": _read_columns(columns),
        "linear": _read_columns(linear),
    }


def _inside(module: Record, name: str) -> dict[str, Any]:
    """Fields of a module inside; empty if it does not exist."""
    modules = module.fields.get("_modules")
    inner = modules.get(name) if isinstance(modules, dict) else None
    return inner.fields if isinstance(inner, Record) and isinstance(inner.fields, dict) else {}


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _plain(value: object, kind: type) -> Any:
    return value if isinstance(value, kind) else None


def _class_of(value: object) -> str:
    return value.origin if isinstance(value, Record) else ""


def _read_columns(columns: list[object]) -> dict[str, list[list[Any]]] | None:
    """Sort columns as the trainer does: ids, then sequences, then dense inputs."""
    single, several, dense = [], [], []
    for column in columns[:_MAX_COLUMNS]:
        kind = column.origin.rpartition(".")[2] if isinstance(column, Record) else ""
        args = column.args if isinstance(column, Record) else ()
        if kind == "VarLenSparseFeat" and len(args) > 2 and isinstance(args[0], Record):
            several.append([*_named(args[0].args), args[2]])
        elif kind == "SparseFeat":
            single.append([*_named(args), None])
        elif kind == "DenseFeat" and len(args) > 1 and _is_size(args[1]):
            dense.append([args[0], args[1]])
        else:
            return None
    sparse = [*single, *several]
    texts = [text for row in sparse for text in row if text is not None]
    if not all(isinstance(text, str) for text in (*texts, *(row[0] for row in dense))):
        return None
    if len(columns) > _MAX_COLUMNS or any(None in row[:2] for row in sparse):
        return None
    return {"sparse": sparse, "dense": dense}


def _named(args: tuple[object, ...]) -> list[object]:
    """Return the name and the table of a SparseFeat; None for what it lacks."""
    return [args[0] if args else None, args[5] if len(args) > 5 else None]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < MAX_SIZE
