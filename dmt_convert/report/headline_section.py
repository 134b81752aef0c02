"""The top of the report: what was made of what, and whether it is still the same model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from dmt_convert.report.finetune_section import show_gain, show_rows
from dmt_convert.report.markup import EMPTY, Html, bar, escape, join, name_of, paragraph, tag
from dmt_convert.report.quantities import (
    DASH,
    plural,
    show_agreement,
    show_bytes,
    show_bytes_change,
    show_factor,
    show_metric,
    show_number,
    show_small,
)
from dmt_convert.report.report_data import ReportData

EXACT_TOLERANCE: Final = 1e-3
"""Largest difference of logits that the order of float32 sums explains."""
CLOSE_R2: Final = 0.99
"""From here on a model is called close."""
FAIR_R2: Final = 0.9
"""From here on it is called an approximation, below it is called far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The one line that a decision starts from."""

    level: Literal["exact", "close", "fair", "far", "unknown"]
    """How near the converted model is to the flat one."""
    headline: str
    """In a few words."""
    text: str
    """Why."""


def judge(data: ReportData) -> Verdict:
    """Say how near the converted model is to the flat one, or what fine-tuning gained."""
    if data.finetune is not None:
        return Verdict(
            level="unknown",
            headline="Fine-tuned, so its logits are no longer the flat model's",
            text=f"On {show_rows(data.finetune)}: {show_gain(data.finetune)}.",
        )
    row = data.converted
    if data.spec.is_passthrough:
        return _judge_exact(None if row is None else row.max_abs_diff)
    r2 = None if row is None else row.r2
    if r2 is None or not math.isfinite(r2):
        return Verdict(
            level="unknown",
            headline="Not exact; agreement not known",
            text="The towers compress, so the logits differ from the flat model's. By how much "
            "was not measured: run dmt verify.",
        )
    agreement = f"R² = {show_agreement(r2)} with the flat model's logits on held-out rows."
    if r2 >= CLOSE_R2:
        headline = "Close, not exact"
    elif r2 >= FAIR_R2:
        headline = "An approximation"
        agreement += " Distil or fine-tune before you serve it."
    else:
        headline = "Far from the flat model"
        agreement += " Do not serve it as it is: distil, fine-tune, or compress less."
    level: Literal["close", "fair", "far"] = (
        "close" if r2 >= CLOSE_R2 else "fair" if r2 >= FAIR_R2 else "far"
    )
    return Verdict(level=level, headline=headline, text=agreement)


def _judge_exact(difference: float | None) -> Verdict:
    if difference is None:
        return Verdict(
            level="exact",
            headline="Exact by construction",
            text="Passthrough towers hand the embeddings on unchanged. The logits were not "
            "compared: run dmt verify.",
        )
    if difference <= EXACT_TOLERANCE:
        return Verdict(
            level="exact",
            headline="Exact",
            text="Passthrough towers hand the embeddings on unchanged. Largest difference of a "
            f"logit from the flat model's: {show_small(difference)}.",
        )
    return Verdict(
        level="far",
        headline="Not exact, though it should be",
        text=f"A logit differs from the flat model's by {show_small(difference)}, more than the "
        "order of float32 sums explains. Tables stored in fewer bits (--dtype) do that; "
        "otherwise run dmt verify before you use this model.",
    )


def render_headline(data: ReportData) -> Html:
    """The header of the page."""
    spec = data.spec
    features, towers = len(spec.flat.features), len(spec.towers)
    verdict = judge(data)
    banner = tag(
        "p",
        tag("strong", escape(verdict.headline)),
        escape(" " + verdict.text),
        class_=f"verdict {verdict.level}",
    )
    return tag(
        "header",
        paragraph(escape("dmt-convert conversion report"), class_="kicker"),
        tag("h1", name_of(data.title), escape(f" as {plural(towers, 'tower')}")),
        paragraph(
            escape(
                f"{spec.flat.family}, {spec.flat.interaction.kind} interaction, "
                f"{plural(features, 'feature')} in {plural(len(spec.flat.tables), 'table')} of "
                f"{show_bytes(sum(table.nbytes for table in spec.flat.tables))}"
            ),
            class_="muted",
        ),
        banner,
        _tiles(data),
        _crossing_bars(data),
    )


def _tiles(data: ReportData) -> Html:
    spec, traffic = data.spec, data.plan.traffic
    one_host = data.plan.cluster.hosts == 1
    crossing = (
        "nothing"
        if one_host
        else show_bytes_change(traffic.flat_cross_bytes, traffic.dmt_cross_bytes)
    )
    tiles = (
        (
            "Features → towers",
            f"{show_number(len(spec.flat.features))} → {show_number(len(spec.towers))}",
            f"{data.partition.strategy} partition",
        ),
        (
            "Compression",
            show_factor(spec.compression),
            f"{show_number(sum(spec.flat.feature_dims))} → "
            f"{show_number(sum(spec.tower_widths))} elements per sample",
        ),
        (
            "Cross hosts per sample",
            crossing,
            "the plan has one host" if one_host else "embeddings, one direction; flat → towers",
        ),
        _quality_tile(data),
    )
    return tag(
        "dl",
        join(
            tag(
                "div",
                tag("dt", escape(label)),
                tag("dd", tag("strong", escape(value)), tag("small", escape(note))),
            )
            for label, value, note in tiles
        ),
        class_="tiles",
    )


def _quality_tile(data: ReportData) -> tuple[str, str, str]:
    row = data.converted
    if data.finetune is not None:
        before, after = data.finetune["before"]["auc"], data.finetune["after"]["auc"]
        return "Validation AUC", show_metric(after), f"{show_metric(before)} before fine-tuning"
    return (
        "Agreement, R²",
        DASH if row is None else show_agreement(row.r2),
        "not measured" if row is None else row.name,
    )


def _crossing_bars(data: ReportData) -> Html:
    traffic = data.plan.traffic
    flat, dmt = traffic.flat_cross_bytes, traffic.dmt_cross_bytes
    if max(flat, dmt) <= 0:
        return EMPTY
    rows = (("flat", flat, "flat"), ("towers", dmt, "dmt"))
    return tag(
        "figure",
        tag(
            "figcaption",
            escape(
                f"Embedding bytes that enter a host per sample, on "
                f"{plural(data.plan.cluster.hosts, 'host')}"
            ),
        ),
        join(
            tag(
                "div",
                tag("span", escape(label)),
                bar(value / max(flat, dmt), kind=kind),
                tag("span", escape(show_bytes(value)), class_="number"),
                class_="bar-row",
            )
            for label, value, kind in rows
        ),
        class_="bars",
    )
