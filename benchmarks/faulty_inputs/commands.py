"""The commands, run in this process, with what makes an answer of them wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, Logits, difference
from .models import Model

TOLERANCE = 1e-4
"""Of logits, relative to the largest; sums may be taken in another order."""


def be_quick() -> None:
    """Sample few rows when converting, draw no report, check no graphs: we compare logits."""
    from dmt_convert import report
    from dmt_convert.conversion import sample
    from dmt_convert.serving import exporter

    sample.sample_size = lambda spec: 256  # type: ignore[assignment]
    exporter.check_graphs = lambda *_: ()  # type: ignore[assignment]
    report.render_documents = lambda *_, **__: {}  # type: ignore[assignment]


def score(path: Path, data: Path, **settings: Any) -> Logits:
    """Score a model on rows."""
    import dmt_convert as dmt

    return dmt.score(path, data, **settings).logits


def try_checkpoint(
    case: Case,
    path: Path,
    model: Model,
    *,
    tolerance: float = TOLERANCE,
    named: str = "",
    unshard: bool = True,
    **settings: Any,
) -> None:
    """Run all commands that take a checkpoint.

    Args:
        case: Notes the verdicts.
        path: The faulty checkpoint.
        model: The model without the fault: rows, labels and true logits.
        tolerance: Of the logits.
        named: Enough if a warning names this.
        unshard: Whether `unshard` writes something that can be scored alone.
        settings: What the user says of the model.
    """
    import dmt_convert as dmt

    rows, truth = model.rows, model.logits

    def same(scored: Path, **options: Any) -> str | None:
        return difference(score(scored, rows, **options), truth, tolerance)

    def inspect() -> str | None:
        dmt.inspect(path, **settings)
        return None

    def convert() -> str | None:
        bundle = dmt.convert(
            path,
            case.folder / "bundle",
            towers=2,
            tower_module="passthrough",
            distill_steps=0,
            force=True,
            **settings,
        )
        return same(bundle.path)

    def unshard_it() -> str | None:
        out = case.folder / "plain.safetensors"
        dmt.unshard(path, out, force=True)
        told = {"features": list(model.features)} | _facts(settings)
        return same(out, model_config=told)

    def evaluate() -> str | None:
        got = dmt.evaluate(path, model.labelled, **settings)
        return _wrong_accuracy(got, truth, model, tolerance)

    def verify() -> str | None:
        report = dmt.verify(model.clean_bundle(), path, data=rows, rtol=tolerance, **settings)
        differs = difference(score(path, rows, **settings), truth, tolerance)
        return f"`same`, but {differs}" if report.same and differs else None

    case.run("inspect", inspect)
    case.run("score", lambda: same(path, **settings), named=named)
    case.run("convert", convert, named=named)
    case.run("evaluate", evaluate, named=named)
    case.run("verify", verify)
    if unshard:
        case.run("unshard", unshard_it, named=named)


def _facts(settings: dict[str, Any]) -> dict[str, Any]:
    facts = settings.get("model_config")
    return dict(facts) if isinstance(facts, dict) else {}


def _wrong_accuracy(got: Any, truth: Logits, model: Model, tolerance: float) -> str | None:
    from dmt_convert.metrics import measure_accuracy

    want = measure_accuracy(truth, model.labels)
    off = abs(got.log_loss - want.log_loss)
    if not np.isfinite(got.log_loss) or off > 10 * tolerance:
        return f"log loss {got.log_loss:.5f}, not {want.log_loss:.5f}"
    return None
