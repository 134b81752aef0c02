"""Tiny data sets, opened once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmt_convert.data import Dataset, criteo_readers, open_data, stored_arrays
from support.data_files import BLOCK_VARIANTS, WRITERS


@pytest.fixture(scope="module")
def datasets() -> Iterator[dict[str, Dataset]]:
    """Eleven rows in every format, in blocks of at most four where it has any."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(criteo_readers, "BLOCK_ROWS", 3)
        patch.setattr(stored_arrays, "BLOCK_ROWS", 4)
        opened = {}
        for variant in BLOCK_VARIANTS:
            parent = Path(folder) / variant
            parent.mkdir()
            opened[variant] = open_data(WRITERS[variant](parent))
        yield opened
