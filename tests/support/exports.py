"""Exports, checked in this process."""

from __future__ import annotations

import os

import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.documents import GraphCheck
from dmt_convert.serving import ExportedModel
from dmt_convert.serving.checks import run_checks


def checks_of(exported: ExportedModel, bundle: Bundle) -> list[GraphCheck]:
    """Run, in this process, what an export is checked by."""
    with torch.inference_mode():
        return list(run_checks(exported, open_bundle_model(bundle), None))


def umask() -> int:
    """What this process's new files may not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
