"""The changelog, the version and the metadata agree."""

import importlib.metadata
import re

import dmt_convert
from support.paths import REPOSITORY


def headings(changelog: str) -> list[str]:
    return re.findall(r"^## (.+)$", changelog, re.MULTILINE)


def test_unreleased_comes_first() -> None:
    found = headings((REPOSITORY / "CHANGELOG.md").read_text("utf-8"))
    assert found[0] == "[Unreleased]"


def test_releases_have_dates_and_the_newest_is_the_version() -> None:
    released = headings((REPOSITORY / "CHANGELOG.md").read_text("utf-8"))[1:]
    matches = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}", line) for line in released]
    assert all(matches), released
    versions = [match[1] for match in matches if match]
    # Before the first release the version in the tree is the one to come.
    assert versions[:1] in ([], [dmt_convert.__version__])


def test_installed_metadata_has_the_version() -> None:
    assert importlib.metadata.version("dmt-convert") == dmt_convert.__version__
