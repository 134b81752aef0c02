"""Which worker of pytest-xdist runs which tests.

pytest-xdist's own groups are a suffix of a test's name, which pytest 9.2 does not take over: with
`--dist loadgroup` alone, every test would go to any worker, and both would build what a file's
tests share.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TOGETHER: Final = {
    # they start ranks or servers, or kill what they start, and take their turns
    "processes": (
        "engine",
        "finetune",
        "recipes",
        "selftest",
        "export/triton",
        "convert/test_interruptions",
    ),
    # they share bundles
    "commands": ("cli",),
    "scored": ("scoring", "verify"),
}
"""Below tests/: what one worker runs. All else is dealt out by file."""


def group_of(test: str) -> str:
    """Return the group of a test; its name is one such as `tests/plan/test_plan.py::test_it`."""
    file = test.partition("::")[0].removeprefix("tests/")
    return next((group for group, names in TOGETHER.items() if file.startswith(names)), file)


def put_long_groups_first(items: list[pytest.Item]) -> None:
    """Sort tests so that groups with many slow ones come first, and workers end together."""
    slow = Counter(group_of(item.nodeid) for item in items if item.get_closest_marker("slow"))
    every = Counter(group_of(item.nodeid) for item in items)

    def key(item: pytest.Item) -> tuple[int, int]:
        group = group_of(item.nodeid)
        return -slow[group], -every[group]

    items.sort(key=key)


class GroupScheduling(LoadScopeScheduling):
    """Deal out whole groups, in the order of the tests."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
