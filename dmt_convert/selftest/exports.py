"""Exports: every graph is run against the model before it is put in place."""

from __future__ import annotations

import os
import shutil
from typing import Any, Final

import dmt_convert as dmt
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.report import Outcome
from dmt_convert.selftest.training import BUNDLE

_FORMATS: Final = ("onnx", "pt2")


def check_exports(context: Context) -> Outcome:
    """Export in every format that this machine can write and run."""
    on_gpu = context.device == "cuda"
    done: dict[str, Any] = {}
    for name in _FORMATS:
        if name == "pt2" and shutil.which(os.environ.get("CXX", "g++")) is None:
            done[name] = {"skipped": "no C++ compiler"}
            continue
        for gpu in (False, True) if on_gpu else (False,):
            clip = "clip" if gpu and name != "pt2" else "refuse"
            out = context.folder / f"served-{name}{'-gpu' * gpu}"
            export = dmt.export(context.folder / BUNDLE, name, out, gpu=gpu, out_of_range=clip)
            ran_on = sorted({check.ran_on for check in export.checks})
            done[f"{name}{' --gpu' * gpu}"] = {"checks": len(export.checks), "ran_on": ran_on}
    line = "; ".join(
        f"{name}: skipped ({found['skipped']})"
        if "skipped" in found
        else f"{name}: {found['checks']} checks on {', '.join(found['ran_on'])}"
        for name, found in done.items()
    )
    return Outcome(status="ok", line=line, details=done)
