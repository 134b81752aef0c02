"""How a bundle was fine-tuned, and what it gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from dmt_convert.report.markup import (
    EMPTY,
    Html,
    code,
    definitions,
    details,
    escape,
    join,
    name_of,
    paragraph,
    section,
    table,
    tag,
)
from dmt_convert.report.quantities import (
    DASH,
    show_change,
    show_metric,
    show_number,
    show_percent_change,
)
from dmt_convert.report.report_data import ReportData

FINETUNED_ROW: Final = "fine-tuned"
"""How the names of quality rows of fine-tuned models begin."""
_COLUMNS: Final = ("Step", "AUC", "NE", "Log loss", "Training loss")
_MAX_ROWS: Final = 24


def show_gain(record: Mapping[str, Any]) -> str:
    """AUC and NE on the validation rows before and after, in words."""
    before, after = record["before"], record["after"]
    said = []
    if before["auc"] is not None and after["auc"] is not None:
        said.append(
            f"AUC {show_metric(before['auc'])} → {show_metric(after['auc'])} "
            f"({show_change(after['auc'] - before['auc'])}; higher is better)"
        )
    if before["ne"] is not None and after["ne"] is not None:
        said.append(
            f"NE {show_metric(before['ne'])} → {show_metric(after['ne'])} "
            f"({show_percent_change(before['ne'], after['ne'])}; lower is better)"
        )
    if not said:
        said.append(
            f"log loss {show_metric(before['log_loss'])} → {show_metric(after['log_loss'])}"
        )
    return ", ".join(said)


def show_rows(record: Mapping[str, Any]) -> str:
    """The validation rows, in words."""
    data = record["data"]
    return f"{show_number(data['valid_rows'])} validation rows ({data['valid']})"


def render_finetune(data: ReportData) -> Html:
    """The fine-tuning section; nothing where the bundle was not fine-tuned."""
    record = data.finetune
    if record is None:
        return EMPTY
    parent, rows = record["parent"], record["data"]
    settings = ", ".join(
        f"{name} {value}" for name, value in record["settings"].items() if value is not None
    )
    notes = [tag("li", name_of(note)) for note in record["notes"]]
    return section(
        "finetune",
        "Fine-tuning",
        paragraph(escape(f"On {show_rows(record)}: {show_gain(record)}.")),
        definitions(
            [
                ("From", join([name_of(parent["name"]), escape(" "), code(parent["digest"])])),
                ("Trained on", escape(f"{show_number(rows['train_rows'])} rows: {rows['train']}")),
                (
                    "Steps",
                    escape(
                        f"{show_number(record['steps'])}, the best after "
                        f"{show_number(record['best_step'])}"
                    ),
                ),
                ("Settings", escape(settings)),
            ]
        ),
        tag("ul", join(notes)) if notes else EMPTY,
        _history(record["history"]),
    )


def _history(history: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        (
            escape(show_number(entry["step"])),
            *(
                escape(DASH if entry[key] is None else show_metric(entry[key]))
                for key in ("auc", "ne", "log_loss", "train_loss")
            ),
        )
        for entry in history
    ]
    numeric = range(len(_COLUMNS))
    first = table("Evaluations on the validation rows", _COLUMNS, rows[:_MAX_ROWS], numeric=numeric)
    if len(rows) <= _MAX_ROWS:
        return first
    rest = table("Evaluations, the rest", _COLUMNS, rows[_MAX_ROWS:], numeric=numeric)
    return join([first, details(f"and {len(rows) - _MAX_ROWS} more", rest)])
