"""A checkpoint and its bundles, converted once."""

from pathlib import Path

import pytest

import dmt_convert as dmt
from support.checkpoints.flat import make_flat
from support.shortcuts import sample_few


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flat(tmp_path_factory.mktemp("cli") / "ckpt.pt")


@pytest.fixture(scope="session")
def exact(flat: Path) -> Path:
    """The passthrough bundle."""
    with pytest.MonkeyPatch.context() as patch:
        sample_few(patch)
        return dmt.convert(flat, flat.parent / "exact", towers=2, tower_module="passthrough").path


@pytest.fixture(scope="session")
def compressed(flat: Path) -> Path:
    """The bundle that `dmt convert` writes by default, but for the size of its sample."""
    with pytest.MonkeyPatch.context() as patch:
        sample_few(patch)
        return dmt.convert(flat, towers=2).path
