"""Weights that are absurd beside all others are refused, though every logit is finite."""

from pathlib import Path

import pytest
import torch

import dmt_convert as dmt
from dmt_convert.errors import CheckpointError
from support.checkpoints.flat import TORCHREC_TABLE
from support.scored import write_model, write_rows

PLACES = {
    "over_arch.model.0._mlp.0._linear.weight": (0, 0),
    "dense_arch.model._mlp.0._linear.bias": (1,),
    TORCHREC_TABLE.format(2): (3, 1),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_flat_checkpoint_with_an_outlier_is_not_scored(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "m.pt")
    state = torch.load(path)
    state[name][PLACES[name]] = -1e17
    torch.save(state, path)
    data = write_rows(tmp_path / "rows.npz", 50)
    with pytest.raises(CheckpointError, match="-1e\\+17") as refused:
        dmt.score(path, data)
    assert name in refused.value.found and "--outliers accept" in refused.value.hint
    assert dmt.score(path, data, outliers="accept").rows == 50
