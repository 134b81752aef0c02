"""What the conversion cost in quality, and how to have it exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from dmt_convert.documents import QualityRow
from dmt_convert.report.finetune_section import FINETUNED_ROW, show_gain, show_rows
from dmt_convert.report.markup import (
    EMPTY,
    Html,
    bar,
    code,
    escape,
    join,
    name_of,
    paragraph,
    section,
    table,
    tag,
)
from dmt_convert.report.quantities import (
    show_agreement,
    show_change,
    show_metric,
    show_percent_change,
    show_share,
    show_small,
)
from dmt_convert.report.report_data import FLAT_ROW, YARDSTICK_ROWS, ReportData

_COLUMNS: Final = ("Model", "R²", "Rank correlation", "Largest difference")
_LABELLED: Final = ("AUC", "Log loss", "NE")


def render_quality(data: ReportData) -> Html:
    """The quality section."""
    return section(
        "quality",
        "Quality",
        paragraph(_meaning(data)),
        _table(data) if data.quality else EMPTY,
        *((_labels(data), _exact(data)) if data.finetune is None else ()),
    )


def _meaning(data: ReportData) -> Html:
    if data.finetune is not None:
        return escape(
            f"The model of this bundle was fine-tuned. Its row is measured on "
            f"{show_rows(data.finetune)}, with the change from before: "
            f"{show_gain(data.finetune)}. The other rows are of the conversion, measured on "
            f"{data.quality_data or 'other rows'}; compare models by dmt evaluate on one data set."
        )
    row = data.converted
    if row is None or row.r2 is None:
        return escape("The agreement of the converted model with the flat one was not measured.")
    measured = f"Measured on {data.quality_data}: "
    if data.spec.is_passthrough:
        return escape(
            f"{measured}the logits differ from the flat model's by at most "
            f"{show_small(row.max_abs_diff)} (nothing is compressed)."
        )
    explained = (
        f"explain {show_share(row.r2, 1)} of the variance of the flat model's logits"
        if 0 < row.r2 < 0.995
        else f"agree with the flat model's to R² = {show_agreement(row.r2)}"
        if math.isfinite(row.r2)
        else "cannot be compared by R², since the flat model's do not vary"
    )
    return escape(
        f"{measured}the logits of the converted model ({row.name}) {explained}; the largest "
        f"difference of a single logit is {show_small(row.max_abs_diff)}. R² = 1 would be the "
        "flat model itself; rank correlation tells how well the order of items is kept."
    )


def _table(data: ReportData) -> Html:
    columns = (*_COLUMNS, *_LABELLED)
    rows = [_row(data, row) for row in data.quality]
    return table(
        "Agreement with the flat model, and accuracy with the change from it"
        if data.finetune is None
        else "Agreement with the flat model, and accuracy with its change",
        columns,
        rows,
        numeric=range(1, len(columns)),
        class_="quality",
    )


def _row(data: ReportData, row: QualityRow) -> Sequence[Html]:
    name = name_of(row.name)
    if row is data.converted:
        name = join([name, tag("span", escape("this bundle"), class_="badge own")])
    elif row.name in YARDSTICK_ROWS:
        name = join([name, tag("span", escape("yardstick"), class_="badge")])
    before = _reference(data, row)
    share = row.r2 if row.r2 is not None and math.isfinite(row.r2) else 0.0
    r2 = join([bar(share, kind="dmt"), escape(show_agreement(row.r2))])
    return (
        name,
        r2,
        escape(show_agreement(row.rank_correlation)),
        escape(show_small(row.max_abs_diff)),
        _metric(row.auc, before.get("auc"), better=1),
        _metric(row.log_loss, before.get("log_loss"), better=-1),
        _metric(row.ne, before.get("ne"), better=-1),
    )


def _reference(data: ReportData, row: QualityRow) -> Mapping[str, float | None]:
    """The metrics on the same rows that a row's are compared with; none where there are none."""
    if row.name.startswith(FINETUNED_ROW):
        is_last = data.finetune is not None and row is data.converted
        return data.finetune["before"] if data.finetune is not None and is_last else {}
    if data.flat is None or row is data.flat:
        return {}
    return {"auc": data.flat.auc, "log_loss": data.flat.log_loss, "ne": data.flat.ne}


def _metric(value: float | None, flat: float | None, *, better: int) -> Html:
    """A metric with its change; `better` is the sign of a change for the better."""
    shown = escape(show_metric(value))
    if value is None or flat is None:
        return shown
    change = show_change(value - flat)
    gain = (value - flat) * better
    kind = "same" if change == "±0" or gain == 0 else "better" if gain > 0 else "worse"
    return join([shown, tag("small", escape(change), class_=f"change {kind}")])


def _labels(data: ReportData) -> Html:
    flat, row = data.flat, data.converted
    if data.labelled_data is None:
        return paragraph(
            escape("No labels were given, so AUC, log loss and NE are not known. "),
            code("dmt evaluate MODEL --data DATA"),
            escape(" measures them, for the flat model and for this bundle."),
        )
    text = f"AUC, log loss and NE are measured on {data.labelled_data}."
    if flat is not None and row is not None:
        text += _changes(flat, row)
    return paragraph(escape(text))


def _changes(flat: QualityRow, row: QualityRow) -> str:
    said = []
    if flat.auc is not None and row.auc is not None:
        said.append(
            f"AUC {show_metric(flat.auc)} → {show_metric(row.auc)} "
            f"({show_change(row.auc - flat.auc)}; higher is better)"
        )
    if flat.ne is not None and row.ne is not None:
        said.append(
            f"NE {show_metric(flat.ne)} → {show_metric(row.ne)} "
            f"({show_percent_change(flat.ne, row.ne)}; lower is better)"
        )
    return f" From {FLAT_ROW} to converted: {', '.join(said)}." if said else ""


def _exact(data: ReportData) -> Html:
    if data.spec.is_passthrough:
        return paragraph(
            escape("This is the exact model. To send fewer bytes between hosts, convert with "),
            code("--tower-module auto"),
            escape(" and compare the tables."),
            class_="advice",
        )
    return paragraph(
        escape("For exactly the flat model's logits, at compression 1, convert with "),
        code("--tower-module passthrough"),
        escape(". To come closer at this compression, add "),
        code("--calibration DATA"),
        escape(" and "),
        code("--distill-steps K"),
        escape(", or fine-tune the bundle."),
        class_="advice",
    )
