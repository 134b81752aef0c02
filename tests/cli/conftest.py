"""A checkpoint and its bundles, converted once."""

from pathlib import Path

import pytest

from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.convert import convert_checkpoint
from dmt_convert.convert_config import ConvertConfig
from support.checkpoints.flat import make_flat


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flat(tmp_path_factory.mktemp("cli") / "ckpt.pt")


@pytest.fixture(scope="session")
def exact(flat: Path) -> Path:
    """The passthrough bundle."""
    config = ConvertConfig(partition=PartitionConfig(num_towers=2), tower_module="passthrough")
    return convert_checkpoint(flat, flat.parent / "exact", config=config).bundle.path


@pytest.fixture(scope="session")
def compressed(flat: Path) -> Path:
    """The bundle that `dmt convert` writes by default."""
    config = ConvertConfig(partition=PartitionConfig(num_towers=2))
    return convert_checkpoint(flat, flat.parent / "ckpt-dmt2", config=config).bundle.path
