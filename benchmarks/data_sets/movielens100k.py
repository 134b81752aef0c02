"""MovieLens-100k: whether a user liked a film, and when the user said so."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from .prepared import DataSet, Examples, RawFile

LIKED: Final = 4
"""The lowest rating that counts as liked."""
_GENRES: Final = 3
_PROJECT: Final = "Jiahui-Ruan/HDP"


def _read(files: Mapping[str, bytes]) -> Examples:
    users = {row[0]: _describe_user(row) for row in _rows(files["u.user"], "|")}
    films = {row[0]: _describe_film(row) for row in _rows(files["u.item"], "|")}
    columns: dict[str, list[str]] = {}
    labels = []
    for user, film, rating, seconds in _rows(files["u.data"], "\t"):
        when = datetime.fromtimestamp(int(seconds), UTC)
        row = {"user": user, **users[user], "film": film, **films[film]}
        row |= {"hour": str(when.hour), "weekday": str(when.weekday())}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        labels.append(int(int(rating) >= LIKED))
    return Examples(columns=columns, labels=labels)


def _rows(content: bytes, separator: str) -> list[list[str]]:
    return [line.split(separator) for line in content.decode("latin-1").splitlines() if line]


def _describe_user(row: list[str]) -> dict[str, str]:
    _, age, gender, occupation, zip_code = row
    decade = str(int(age) // 10)
    return {
        "decade": decade,
        "gender": gender,
        "occupation": occupation,
        "zip": zip_code,
        "zip_region": zip_code[:2],
    }


def _describe_film(row: list[str]) -> dict[str, str]:
    """Year and the first three genres, in the order of the file's columns."""
    genres = [str(number) for number, flag in enumerate(row[5:]) if flag == "1"]
    genres = (genres + ["none"] * _GENRES)[:_GENRES]
    return {"year": row[2][-4:]} | {f"genre{n + 1}": genre for n, genre in enumerate(genres)}


MOVIELENS_100K: Final = DataSet(
    name="movielens100k",
    about="100,000 ratings of 1,682 films by 943 users, 4 and 5 as liked (GroupLens 1998); "
    "13 features",
    licence="research only, no redistribution without permission (README of the set)",
    files=(
        RawFile(
            name="u.data",
            project=_PROJECT,
            path="ml-100k/u.data",
            size=1979173,
            sha256="06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
        ),
        RawFile(
            name="u.item",
            project=_PROJECT,
            path="ml-100k/u.item",
            size=236344,
            sha256="553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
        ),
        RawFile(
            name="u.user",
            project=_PROJECT,
            path="ml-100k/u.user",
            size=22628,
            sha256="f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
        ),
    ),
    read=_read,
)
