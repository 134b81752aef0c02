"""Bundles of tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle import Bundle
from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.convert import convert_checkpoint
from dmt_convert.convert_config import ConvertConfig
from support.checkpoints.flat import make_flat
from support.shortcuts import sample_few, skip_report


def convert_quickly(
    source: Path, out: Path, *, rows: int = 1024, report: bool = False, **options: Any
) -> Bundle:
    """Convert a checkpoint without distillation, into two towers unless `partition` says otherwise.

    Args:
        source: a checkpoint.
        out: the bundle.
        rows: as many inputs are sampled.
        report: whether to write the report, which takes longest.
        options: fields of `ConvertConfig`.
    """
    usual = {"partition": PartitionConfig(num_towers=2), "distill_steps": 0}
    config = ConvertConfig(**{**usual, **options})
    with pytest.MonkeyPatch.context() as patch:
        sample_few(patch, rows)
        if not report:
            skip_report(patch)
        return convert_checkpoint(source, out, config=config).bundle


def make_bundle(folder: Path, *, flat: dict[str, Any] | None = None, **options: Any) -> Path:
    """Convert a tiny checkpoint into `folder / "ckpt-dmt2"`: two towers, features take turns.

    `flat` has options of `make_flat`, the others are fields of `ConvertConfig`.
    """
    source = make_flat(folder / "ckpt.pt", **(flat or {}))
    options = {"partition": PartitionConfig(num_towers=2, strategy="round-robin"), **options}
    return convert_quickly(source, folder / "ckpt-dmt2", report=True, **options).path
