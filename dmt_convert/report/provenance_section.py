"""What the report rests on: facts, initialisation, files, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from dmt_convert.families import Fact
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
from dmt_convert.report.quantities import DASH, plural, show_bytes
from dmt_convert.report.report_data import ReportData

_SOURCES: Final = {
    "assumed": "the trainer's documented default; not stored in the checkpoint",
    "given": "by you",
    "inferred": "only this fits the tensors",
    "read": "from the checkpoint",
}
"""Kinds of facts, those to check first."""

_MAX_ROWS: Final = 60
"""Longer lists are cut, with the rest on demand."""

_PURPOSES: Final = {
    "verify": "Compare the logits of both models, stage by stage",
    "evaluate": "AUC, log loss and NE on data with labels",
    "convert": "Convert again, exactly",
    "finetune": "Train the bundle further",
    "plan": "Plan for another cluster",
    "score": "Logits of a data set",
}


def render_facts(data: ReportData) -> Html:
    """What is known of the flat model, and why."""
    order = list(_SOURCES)
    facts = sorted(data.facts, key=lambda fact: order.index(fact.source))
    counts = [
        f"{sum(fact.source == source for fact in facts)} {source} ({meaning})"
        for source, meaning in _SOURCES.items()
        if any(fact.source == source for fact in facts)
    ]
    advice = (
        "Check what was assumed; correct it with --model-config."
        if any(fact.source == "assumed" for fact in facts)
        else ""
    )
    if not facts:
        return section("facts", "What is known of the flat model", paragraph(escape("Nothing.")))
    return section(
        "facts",
        "What is known of the flat model",
        paragraph(escape(f"{'; '.join(counts)}. {advice}".strip())),
        _cut(
            "How each part of the model was come by",
            ("Part", "Value", "Source", "Reason"),
            [_fact(fact) for fact in facts],
        ),
    )


def _fact(fact: Fact) -> Sequence[Html]:
    badge = tag("span", escape(fact.source), class_=f"badge {fact.source}")
    return (name_of(fact.subject), name_of(fact.value), badge, name_of(fact.reason))


def _cut(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Html]],
    *,
    numeric: Sequence[int] = (),
) -> Html:
    first = table(caption, columns, rows[:_MAX_ROWS], numeric=numeric)
    if len(rows) <= _MAX_ROWS:
        return first
    rest = table(f"{caption}, the rest", columns, rows[_MAX_ROWS:], numeric=numeric)
    return join([first, details(f"and {len(rows) - _MAX_ROWS} more", rest)])


def render_initialisation(data: ReportData) -> Html:
    """How each part was initialised."""
    notes = [tag("li", name_of(note)) for note in data.initialisation_notes]
    listed = EMPTY
    if notes:
        listed = tag("ul", join(notes[:_MAX_ROWS]))
    if len(notes) > _MAX_ROWS:
        rest = tag("ul", join(notes[_MAX_ROWS:]))
        listed = join([listed, details(f"and {len(notes) - _MAX_ROWS} more", rest)])
    return section(
        "initialisation",
        "Initialisation",
        definitions(
            [
                ("Method", escape(data.initialisation_method)),
                ("Sample", escape(data.sample_description)),
                ("Agreement measured on", escape(data.quality_data or DASH)),
            ]
        ),
        listed,
    )


def render_files(data: ReportData) -> Html:
    """Where the bundle comes from, and what it holds."""
    source = data.source
    nbytes = source.get("nbytes", source.get("bytes"))
    facts = definitions(
        [
            ("Format", escape(str(source.get("format", DASH)))),
            ("Size", escape(DASH if nbytes is None else show_bytes(nbytes))),
            ("Digest of the tensors", _digest(source)),
            ("Written by", escape(f"dmt-convert {data.tool_version}")),
        ]
    )
    sources = [
        (name_of(str(file["name"])), escape(show_bytes(file["bytes"])))
        for file in source.get("files", ())
    ]
    weights = [(name_of(name), escape(show_bytes(size))) for name, size in data.weight_files]
    total = sum(size for _, size in data.weight_files)
    columns = ("File", "Size")
    parts = [facts]
    if sources:
        parts.append(_cut("Source files", columns, sources, numeric=(1,)))
    if weights:
        caption = f"Weights of the bundle, {show_bytes(total)} in {plural(len(weights), 'file')}"
        parts.append(_cut(caption, columns, weights, numeric=(1,)))
    return section("files", "Files", *parts)


def _digest(source: Mapping[str, Any]) -> Html:
    digest = source.get("digest")
    return escape(DASH) if digest is None else code(str(digest))


def render_commands(data: ReportData) -> Html:
    """What to do next, to be copied."""
    if not data.commands:
        return EMPTY
    steps = join(_command(command) for command in data.commands)
    return section("next", "Next commands", tag("ol", steps, class_="commands"))


def _command(command: str) -> Html:
    words = command.split()
    purpose = _PURPOSES.get(words[1], "") if len(words) > 1 and words[0] == "dmt" else ""
    return tag(
        "li",
        paragraph(escape(purpose)) if purpose else EMPTY,
        tag("pre", code(command)),
    )
