"""All variants of the serving benchmark, as data, and how each is built and opened."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serving_case import (
    DIM,
    FEATURES,
    FIXED_LENGTH,
    FORMS,
    NUM_DENSE,
    TOWERS,
    Case,
    Inputs,
    flat_spec,
    graph_inputs,
)

import dmt_convert

OURS: Final = ("flat-onnx", "flat-pt2", "dmt-onnx", "dmt-pt2")
"""Variants that compute the flat model's logits in our formulations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to serve a model."""

    name: str
    group: str
    """ours, or the letter of the rivals: a eager torch, b torch.onnx.export, c TorchRec and
    fbgemm, d the flat model in our own formulation."""
    runtime: str
    """torch, onnx or pt2."""
    lookup: str = ""
    """torch and the common way: how embeddings are looked up."""
    exporter: str = ""
    """The common way: dynamo or script."""
    function: str = "flat"
    """What it computes: flat, c2 or c4."""
    towers: int = TOWERS
    forms: tuple[str, ...] = FORMS
    """Forms of input that it can take."""
    parts: tuple[str, ...] = ("model",)
    """model, lookup, or both."""
    int8: bool = False
    """Whether its tables are quantised: then it is compared with rivals of its kind only."""
    measured: bool = True
    """Unless asked for by name; one that is not measured is only compared with."""


_BOTH: Final = ("model", "lookup")
_RECTANGLES: Final = ("single", "fixed")

VARIANTS: Final = (
    Variant(name="eager", group="a", runtime="torch", lookup="bag", parts=_BOTH),
    Variant(
        name="eager-embedding",
        group="a",
        runtime="torch",
        lookup="embedding",
        forms=_RECTANGLES,
        parts=_BOTH,
    ),
    Variant(name="export-dynamo", group="b", runtime="onnx", lookup="bag", exporter="dynamo"),
    Variant(name="export-script", group="b", runtime="onnx", lookup="bag", exporter="script"),
    Variant(
        name="export-dynamo-embedding",
        group="b",
        runtime="onnx",
        lookup="embedding",
        exporter="dynamo",
        forms=_RECTANGLES,
        parts=_BOTH,
    ),
    Variant(
        name="export-script-embedding",
        group="b",
        runtime="onnx",
        lookup="embedding",
        exporter="script",
        forms=_RECTANGLES,
    ),
    Variant(name="tbe", group="c", runtime="torch", lookup="tbe", parts=_BOTH),
    Variant(name="tbe-int8", group="c", runtime="torch", lookup="tbe-int8", parts=_BOTH, int8=True),
    Variant(
        name="torchrec-int8",
        group="c",
        runtime="torch",
        lookup="torchrec-int8",
        parts=_BOTH,
        int8=True,
    ),
    Variant(name="flat-onnx", group="d", runtime="onnx", towers=1, parts=_BOTH),
    Variant(name="flat-pt2", group="d", runtime="pt2", towers=1, parts=_BOTH),
    Variant(name="dmt-onnx", group="ours", runtime="onnx"),
    Variant(name="dmt-pt2", group="ours", runtime="pt2"),
    Variant(name="dmt-c2-onnx", group="ours", runtime="onnx", function="c2"),
    Variant(name="dmt-c2-pt2", group="ours", runtime="pt2", function="c2"),
    Variant(name="dmt-c4-onnx", group="ours", runtime="onnx", function="c4"),
    Variant(name="dmt-c4-pt2", group="ours", runtime="pt2", function="c4"),
    Variant(
        name="eager-c2", group="a", runtime="torch", lookup="bag", function="c2", measured=False
    ),
    Variant(
        name="eager-c4", group="a", runtime="torch", lookup="bag", function="c4", measured=False
    ),
)
REFERENCES: Final = {"flat": "eager", "c2": "eager-c2", "c4": "eager-c4"}
"""What a model computes -> the variant whose logits all others must give."""


def find_variant(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


def graph_folder(folder: Path, variant: Variant, case: Case) -> Path:
    """Folder of a variant's graph; another one when the code that writes it changes."""
    here = Path(__file__).parent
    if variant.exporter:
        code = [here / "serving_common_way.py"]
    else:
        library = Path(dmt_convert.__file__).parent
        code = [f for d in ("export", "serving", "towers") for f in (library / d).rglob("*.py")]
        code += [here / "serving_ours.py", here / "serving_pt2.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()[:8]
    return folder / "graphs" / f"{case.model}-{case.form}-{case.part}-{variant.name}-{digest}"


def build_graph(folder: Path, variant: Variant, case: Case, rival_python: str) -> None:
    """Write the graph of a variant, unless it is there or needs none."""
    from serving_weights import WEIGHTS

    out = graph_folder(folder, variant, case)
    if variant.runtime == "torch" or out.is_dir():
        return
    unfinished = out.with_name(out.name + ".part")
    unfinished.mkdir(parents=True)
    if variant.exporter:
        (unfinished / WEIGHTS).hardlink_to(folder / WEIGHTS)
        _export_common_way(unfinished, variant, case, rival_python)
    else:
        from serving_ours import build_job, write_onnx, write_pt2

        job = build_job(
            unfinished,
            case,
            folder / WEIGHTS,
            export_format="onnx" if variant.runtime == "onnx" else "pt2",
            function=variant.function,
            towers=variant.towers,
        )
        (write_onnx if variant.runtime == "onnx" else write_pt2)(job, case.part)
    unfinished.rename(out)


def _export_common_way(out: Path, variant: Variant, case: Case, python: str) -> None:
    from serving_weights import WEIGHTS, table_name

    from dmt_convert.checkpoint import read_safetensors

    infos = {info.name: info for info in read_safetensors(out / WEIGHTS).tensors}
    pieces = [infos[table_name(i)].pieces[0] for i in range(FEATURES)]
    spec = flat_spec(case.model, case.rows)
    job = {
        "out": str(out / f"{case.part}.onnx"),
        "weights": str(out / WEIGHTS),
        "tables": [(piece.offset, piece.length) for piece in pieces],
        "model": case.model,
        "form": case.form,
        "part": case.part,
        "rows": case.rows,
        "lookup": variant.lookup,
        "exporter": variant.exporter,
        "features": FEATURES,
        "dim": DIM,
        "num_dense": NUM_DENSE,
        "length": FIXED_LENGTH if case.form == "fixed" else 1,
        "dense_arch": spec.dense_arch.widths,
        "over_arch": spec.over_arch.widths,
        "cross_rank": spec.interaction.cross_rank,
        "cross_layers": spec.interaction.cross_layers,
    }
    path = out / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("serving_common_way.py")
    done = subprocess.run(
        [python or sys.executable, str(script), str(path)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    if done.returncode:
        raise RuntimeError(f"{variant.name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


Opened = tuple[Callable[[Inputs], Any], Callable[[Any], Any]]


def open_variant(folder: Path, variant: Variant, case: Case, threads: int) -> Opened:
    """Open a variant: what prepares its inputs (not timed), and what runs it (timed)."""
    if variant.runtime == "torch":
        import torch
        from serving_torch import open_torch

        torch.set_num_threads(threads)
        return open_torch(variant.lookup, variant.function, case, folder)
    graph = graph_folder(folder, variant, case) / f"{case.part}.{variant.runtime}"
    if variant.runtime == "pt2":
        from serving_ours import open_pt2

        return open_pt2(graph, case, threads)
    return _open_onnx(graph, case, threads)


def _open_onnx(graph: Path, case: Case, threads: int) -> Opened:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_inputs()]
    ours = graph_inputs(case.form)

    def prepare(inputs: Inputs) -> dict[str, Any]:
        feeds = inputs.feeds(ours)
        for feature, lengths in zip(ours.features, inputs.lengths, strict=True):
            feeds[f"{feature.feature}.offsets"] = lengths.cumsum() - lengths
        return {name: feeds[name] for name in wanted}

    return prepare, lambda feeds: session.run(None, feeds)[0]
