"""How near a converted model is to the flat one, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from dmt_convert.documents import FAIR_R2, Frontier
from dmt_convert.report.quantities import show_agreement, show_small

EXACT_TOLERANCE: Final = 1e-3
"""Largest difference of logits that the order of float32 sums explains."""
CLOSE_R2: Final = 0.99
"""A model with at least this R² is called close."""
Level = Literal["exact", "close", "fair", "far", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The one line that a decision starts from."""

    level: Level
    """How near the converted model is to the flat one."""
    headline: str
    """In a few words."""
    text: str
    """Why."""


def judge_exact(difference: float | None) -> Verdict:
    """Judge passthrough towers by the largest difference of a logit, if it is known."""
    if difference is None:
        return Verdict(
            level="exact",
            headline="Exact by construction",
            text="Passthrough towers pass the embeddings on unchanged. The logits were not "
            "compared: run dmt verify.",
        )
    if difference <= EXACT_TOLERANCE:
        return Verdict(
            level="exact",
            headline="Exact",
            text="Passthrough towers pass the embeddings on unchanged. Largest difference of a "
            f"logit from the flat model's: {show_small(difference)}.",
        )
    return Verdict(
        level="far",
        headline="Not exact, though it should be",
        text=f"A logit differs from the flat model's by {show_small(difference)}, more than the "
        "order of float32 sums explains. Tables stored in fewer bits (--dtype) can cause that; "
        "otherwise run dmt verify before you use this model.",
    )


def judge_close(
    r2: float | None, *, drawn: bool = False, frontier: Frontier | None = None
) -> Verdict:
    """Judge towers that compress by R² with the logits of the flat model.

    Args:
        r2: R², if it is known.
        frontier: What other compressions cost, if that is known.
        drawn: Whether it was measured on inputs that were drawn, not on rows of data.
    """
    if r2 is None or not math.isfinite(r2):
        return Verdict(
            level="unknown",
            headline="Not exact; agreement not known",
            text="The towers compress, so the logits differ from the flat model's. By how much "
            "was not measured: run dmt verify.",
        )
    rows = "drawn inputs; --calibration DATA measures it on yours" if drawn else "held-out rows"
    text = f"R² = {show_agreement(r2)} with the flat model's logits on {rows}."
    if r2 >= CLOSE_R2:
        return Verdict(level="close", headline="Close, not exact", text=text)
    if r2 >= FAIR_R2:
        return Verdict(
            level="fair",
            headline="An approximation",
            text=f"{text} Distil or fine-tune before you serve it.",
        )
    better = None if frontier is None else frontier.fewest_fair
    less = "compress less" if better is None else f"compress less: {better.advice}"
    return Verdict(
        level="far",
        headline="A poor start, far from the flat model",
        text=f"{text} Do not serve it as it is: distil, fine-tune, or {less}.",
    )
