"""The error for tensors that are not exactly those of a model, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.averages import is_averaged
from dmt_convert.families.leftovers import DESCRIBE_IT, describe_parts, is_measure, list_unread
from dmt_convert.families.name_map import strip_wrappers
from dmt_convert.families.taken_tensors import TakenTensors

_MAX_LISTED: Final = 100
"""Faults of a kind that an error lists."""


def incomplete_model(source: TakenTensors, extra: Sequence[TensorInfo]) -> ArchitectureError:
    """Return the error that lists every missing, misshapen and extra tensor.

    Args:
        source: The tensors that have been taken, with what is missing or wrong.
        extra: Tensors that are left over.
    """
    details, counts = [], []
    for items, label, prefix in (
        (source.missing, "missing", "missing"),
        (source.wrong, "misshapen", "wrong"),
        ([info.path for info in extra], "extra", "extra"),
    ):
        found = [*dict.fromkeys(items)]
        details += [f"{prefix}: {text}" for text in found[:_MAX_LISTED]]
        if len(found) > _MAX_LISTED:
            details.append(f"{prefix}: ... and {len(found) - _MAX_LISTED} more")
        counts += [f"{len(found)} {label}"] if found else []
    details += list_unread(source.checkpoint)
    found_text = (
        f"{source.checkpoint.source} is not a whole {source.family} model: "
        f"{', '.join(counts) or 'no'} tensors"
    )
    parts = [info for info in extra if not is_measure(info)]
    if parts:
        prefix = source.place.prefix
        names = (strip_wrappers(info.name).removeprefix(prefix) for info in parts)
        found_text += f"; not known: {describe_parts(names)}"
    return ArchitectureError(
        found_text,
        expected=f"exactly the tensors of {source.trainer}, with shapes that fit together",
        hint=_advise(source, extra, parts),
        details=details,
    )


def _advise(source: TakenTensors, extra: Sequence[TensorInfo], parts: Sequence[TensorInfo]) -> str:
    """Say what to do about an incomplete model: `ignore` is only for what takes no part."""
    measures = [info for info in extra if is_measure(info)]
    hints = []
    if source.missing or source.wrong:
        unread = ", with the tensors that were not read in fp32" * bool(source.checkpoint.unread)
        hints.append(f"save the whole model again{unread}")
    averaged = [info for info in parts if is_averaged(info.name) and not source.is_inside(info)]
    if averaged:
        head = averaged[0].name.split(".")[0]
        hints.append(
            f"if the trained weights are meant, and not the averaged ones, say `ignore: "
            f'["{head}.*"]` in --model-config'
        )
    elif parts:
        hints.append(
            "a model with other parts than these trainers' is not supported by itself; "
            f"{DESCRIBE_IT}"
        )
    if measures:
        names = ", ".join(f'"{info.name}"' for info in measures[:3])
        more = ", ..." if len(measures) > 3 else ""
        hints.append(
            f"metrics and counters may be passed over with `ignore: [{names}{more}]` in "
            "--model-config"
        )
    return "; ".join(hints)
