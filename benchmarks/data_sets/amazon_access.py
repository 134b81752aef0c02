"""Amazon employee access: whether an employee was granted access to a resource."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Final

from .prepared import DataSet, Examples, RawFile

_LABEL: Final = "ACTION"


def _read(files: Mapping[str, bytes]) -> Examples:
    rows = list(csv.DictReader(io.StringIO(files["train.csv"].decode())))
    names = [name for name in rows[0] if name != _LABEL]
    return Examples(
        columns={name.lower(): [row[name] for row in rows] for name in names},
        labels=[int(row[_LABEL]) for row in rows],
    )


AMAZON_ACCESS: Final = DataSet(
    name="amazon_access",
    about=(
        "32,769 requests for access to 7,518 resources, granted or not, with the manager, role "
        "and department of the employee (Kaggle, Amazon.com Employee Access Challenge 2013); "
        "9 features"
    ),
    licence="rules of the competition: no redistribution",
    files=(
        RawFile(
            name="train.csv",
            project="theusual/kaggle-amazon-employee-access",
            path="Data/train.csv",
            size=2037893,
            sha256="c50b119438fb8c8e84b2ddb9c0a28c76cb01afa3dc78b920cfea36eb506843a7",
        ),
    ),
    read=_read,
)
