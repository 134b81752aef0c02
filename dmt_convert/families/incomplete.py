"""What to say of a model whose tensors do not all fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dmt_convert.errors import ArchitectureError

_MAX_LISTED: Final = 100
"""Tensors of a kind that an error lists."""


def incomplete_model(
    source: Path,
    *,
    family: str,
    trainer: str,
    missing: Sequence[str],
    wrong: Sequence[str],
    extra: Sequence[str],
) -> ArchitectureError:
    """Return the error that lists every missing, misshapen and extra tensor.

    Args:
        source: The checkpoint.
        family: Name of the family.
        trainer: Who writes such checkpoints.
        missing: Names of tensors that should be there.
        wrong: A line for every tensor that does not fit.
        extra: Names of tensors that the family does not know.
    """
    details, counts = [], []
    for items, label, prefix in (
        (missing, "missing", "missing"),
        (wrong, "misshapen", "wrong shape"),
        (extra, "extra", "extra"),
    ):
        found = [*dict.fromkeys(items)]
        details += [f"{prefix}: {text}" for text in found[:_MAX_LISTED]]
        if len(found) > _MAX_LISTED:
            details.append(f"{prefix}: ... and {len(found) - _MAX_LISTED} more")
        counts += [f"{len(found)} {label}"] if found else []
    return ArchitectureError(
        f"{source} is not a whole {family} model: {', '.join(counts) or 'no'} tensors",
        expected=f"exactly the tensors of {trainer}, with shapes that fit together",
        hint="save the whole model again; pass over tensors that do not belong to it with "
        "`ignore: [pattern]` in --model-config",
        details=details,
    )
