"""What is computed from stored dense inputs before a model is fed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from dmt_convert.arrays import AnyArray
from dmt_convert.data.column_names import Schema
from dmt_convert.errors import DataError

Transform = Callable[[AnyArray], AnyArray]


def log3_dense(values: AnyArray) -> AnyArray:
    """Return log(max(x, -2) + 3) in float32: TorchRec's transform of Criteo's integers."""
    with np.errstate(over="ignore"):  # what float32 does not hold is refused with its row
        shifted: AnyArray = np.maximum(values, -2).astype(np.float32) + np.float32(3)
    return np.log(shifted)


def log1p_dense(values: AnyArray) -> AnyArray:
    """Return log(max(x, 0) + 1) in float32, as the DLRM trainer computes it."""
    with np.errstate(over="ignore"):
        raw = values.astype(np.float32)
    return np.log(np.maximum(raw, np.float32(0)) + np.float32(1))


TRANSFORMS: Final[Mapping[str, Transform | None]] = {
    "none": None,
    "log3": log3_dense,
    "log1p": log1p_dense,
}
"""By the name that `schema.json` gives them."""
STORED: Final = "stored"
"""Dense inputs are fed as the file holds them, in a form that nothing tells."""
FORMS: Final[Mapping[str, str]] = {
    "none": "x",
    "log3": "log(x + 3)",
    "log1p": "log(x + 1)",
    STORED: "what the files hold",
}
"""Forms in which dense inputs are fed, for messages; x is the raw count."""


def choose_transform(schema: Schema | None, default: str) -> str:
    """Return the transform of a format that holds raw counts: what the schema says, or its own.

    Raises:
        DataError: The schema asks for one that is not known.
    """
    if schema is None or schema.dense_transform is None:
        return default
    name = schema.dense_transform
    if name not in TRANSFORMS:
        raise DataError(
            f"{schema.file}: dense_transform is {name!r}",
            expected=f"one of {', '.join(TRANSFORMS)}",
            hint="log3 is TorchRec's, log1p the DLRM trainer's, none feeds what is stored",
        )
    return name


def stored_form(schema: Schema | None) -> str:
    """Return the form of dense inputs that are fed as stored: what the schema says of them."""
    name = None if schema is None else schema.dense_transform
    return name if name is not None and name in TRANSFORMS else STORED


def states_form(schema: Schema | None) -> bool:
    """Tell whether the schema names the form of the dense inputs."""
    return schema is not None and schema.dense_transform in TRANSFORMS
