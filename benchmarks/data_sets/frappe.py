"""Frappe: which app a phone's user opened, and in which context."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import numpy as np

from .prepared import SEED, DataSet, Examples, RawFile

NEGATIVES: Final = 2
"""Apps drawn for each that was opened, as papers on this set do."""
_CONTEXT: Final = (
    *("user", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country"),
    "city",
)
_OF_APP: Final = ("category", "downloads", "developer", "language", "price", "rating")
_FOLDER: Final = "Mobile_Frappe/frappe/"


def _read(files: Mapping[str, bytes]) -> Examples:
    """Every log entry, and for each the same context with apps that its user never opened.

    Apps are drawn uniformly. A drawn row belongs to the split of its entry.
    """
    archive = zipfile.ZipFile(io.BytesIO(files["Mobile_Frappe.zip"]))
    logs, apps = (_rows(archive, name) for name in ("frappe.csv", "meta.csv"))
    about = {row["item"]: _describe_app(row) for row in apps}
    opened: dict[str, set[str]] = defaultdict(set)
    for row in logs:
        opened[row["user"]].add(row["item"])
    items = sorted({row["item"] for row in logs}, key=int)
    random = np.random.default_rng(SEED)
    columns: dict[str, list[str]] = {name: [] for name in ("item", *_CONTEXT, *_OF_APP)}
    labels, groups = [], []
    for number, row in enumerate(logs):
        chosen = [row["item"]]
        while len(chosen) <= NEGATIVES:
            other = items[random.integers(len(items))]
            if other not in opened[row["user"]] and other not in chosen:
                chosen.append(other)
        for item in chosen:
            described = {"item": item, **about.get(item, {})}
            for name, values in columns.items():
                values.append(row[name] if name in _CONTEXT else described.get(name, "unknown"))
            labels.append(int(item == row["item"]))
            groups.append(number)
    return Examples(columns=columns, labels=labels, groups=np.array(groups))


def _rows(archive: zipfile.ZipFile, name: str) -> list[dict[str, str]]:
    text = archive.read(_FOLDER + name).decode()
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


def _describe_app(row: Mapping[str, str | None]) -> dict[str, str]:
    """What is known about an app: price as free or not, rating to a half star."""
    found = {name: (row.get(name) or "unknown").strip() for name in _OF_APP}
    found["price"] = "free" if found["price"].lower() in ("free", "0", "0.0") else "other"
    try:
        found["rating"] = f"{round(2 * float(found['rating'])) / 2:g}"
    except ValueError:
        found["rating"] = "unknown"
    return found


FRAPPE: Final = DataSet(
    name="frappe",
    about=(
        "96,203 app starts by 957 users of 4,082 apps in their context (Baltrunas et al. 2015), "
        "two apps drawn for each that the user never opened; 16 features"
    ),
    licence="research only, no redistribution, to be cited (README.txt in the archive)",
    files=(
        RawFile(
            name="Mobile_Frappe.zip",
            project="irecsys/CARSKit",
            path="context-aware_data_sets/Mobile_Frappe.zip",
            size=3372404,
            sha256="4adc616de57170f282397f6e6e30215f97fa7ad1b7f40bd12ef5dceaaf3e9b4e",
        ),
    ),
    read=_read,
)
