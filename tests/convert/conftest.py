"""A folder with a good checkpoint, to be spoiled."""

from pathlib import Path

import pytest

from support.refusals import Scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)
