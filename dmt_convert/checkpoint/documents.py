"""The small documents in which trainers describe a model beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.protobuf_text import parse_protobuf_text
from dmt_convert.errors import CheckpointError

_MAX_BYTES: Final = 16 << 20


def read_document(path: Path) -> Any:
    """Read a description: JSON, or protobuf's text format where the name ends in `.config`.

    Returns:
        Dicts, lists and scalars.

    Raises:
        CheckpointError: It is damaged, or too large for what it should be.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes",
            expected=f"a description of a model, at most {_MAX_BYTES} bytes",
            hint="check that it is the trainer's own file",
        )
    protobuf = path.suffix == ".config"
    try:
        text = path.read_text(encoding="utf-8")
        if protobuf:
            return parse_protobuf_text(text)
        value = json.loads(text, parse_constant=_refuse_constant)
        # a lone surrogate is no text that could be written to a file or a terminal
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason[:200]})",
            expected="protobuf's text format" if protobuf else "JSON",
            hint="the file is damaged; copy it again",
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
