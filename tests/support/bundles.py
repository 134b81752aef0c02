"""Bundles of tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dmt_convert as dmt
from dmt_convert.bundle import Bundle
from support.checkpoints.flat import make_flat
from support.shortcuts import sample_few, skip_report


def convert_quickly(
    source: Path, out: Path, *, rows: int = 1024, report: bool = False, **options: Any
) -> Bundle:
    """Convert a checkpoint without distillation, into two towers unless `towers` says otherwise.

    Args:
        source: a checkpoint.
        out: the bundle.
        rows: as many inputs are sampled.
        report: whether to write the report, which takes longest.
        options: fields of `ConvertConfig`.
    """
    with pytest.MonkeyPatch.context() as patch:
        sample_few(patch, rows)
        if not report:
            skip_report(patch)
        return dmt.convert(source, out, **{"towers": 2, "distill_steps": 0, **options})


def make_bundle(folder: Path, *, flat: dict[str, Any] | None = None, **options: Any) -> Path:
    """Convert a tiny checkpoint into `folder / "ckpt-dmt2"`: two towers, features take turns.

    `flat` has options of `make_flat`, the others are fields of `ConvertConfig`.
    """
    source = make_flat(folder / "ckpt.pt", **(flat or {}))
    options = {"partition": "round-robin", **options}
    return convert_quickly(source, folder / "ckpt-dmt2", report=True, **options).path
