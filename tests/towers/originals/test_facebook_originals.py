"""What dlrm_s_pytorch.py documents to compute: the same logits, whatever the widths."""

from __future__ import annotations

import pytest

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import ArchitectureError
from dmt_convert.families import ModelConfig, infer_model
from support.originals import assert_agrees, facebook_original, save_facebook

ROWS = (1, 7, 30, 11, 2, 16, 9, 40, 5, 12, 21)


@pytest.mark.parametrize(("interaction", "itself"), [("dot", False), ("dot", True), ("cat", False)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bottom": (), "top": ()},
        {"rows": (8,), "dim": 4, "top": (9,)},
        {"bottom": (9, 4), "top": (8, 3)},
    ],
    ids=["plain", "one layer each", "one feature", "more layers"],
)
def test_facebook_models(interaction, itself, options, tmp_path):
    original = facebook_original(interaction, itself=itself, **options)
    config = ModelConfig(self_pairs=True) if itself else None
    assert_agrees(save_facebook(original, tmp_path / "model.pt"), original, config)


@pytest.mark.parametrize(("interaction", "itself"), [("dot", False), ("cat", False), ("dot", True)])
@pytest.mark.parametrize(("tables", "dim"), [(11, 6), (7, 4), (1, 3), (2, 3)])
def test_widths_that_two_interactions_give(interaction, itself, tables, dim, tmp_path):
    original = facebook_original(interaction, itself=itself, rows=ROWS[:tables], dim=dim)
    path = save_facebook(original, tmp_path / "model.pt")
    given = ModelConfig(interaction=interaction, self_pairs=itself)  # type: ignore[arg-type]
    assert_agrees(path, original, given)
    if tables > 2 and itself:
        with pytest.raises(ArchitectureError, match=f"and one without of {tables + 1}") as caught:
            infer_model(open_checkpoint(path))
        assert "self_pairs: true" in caught.value.hint
    elif tables > 2 or itself or interaction == "cat":
        with pytest.raises(ArchitectureError, match=r"dot( with self-pairs)? and cat both give"):
            infer_model(open_checkpoint(path))


def test_facebook_models_in_every_container(save, tmp_path):
    original = facebook_original("dot")
    assert_agrees(save(original.state, tmp_path), original)
