"""A user's network is fine-tuned in one process: it learns, but for its running statistics."""

from __future__ import annotations

import pytest
import torch

import dmt_convert as dmt
from dmt_convert.adapter import load_adapter
from dmt_convert.bundle import open_bundle, open_bundle_model
from dmt_convert.recipes.finetune_dmt import main
from dmt_convert.training import finetuned

CHANGED = "self.norm = nn.LayerNorm(width)"
NORM = """self.norm = nn.LayerNorm(width)
        self.scale = nn.BatchNorm1d(num_dense)"""


@pytest.fixture
def normed(example, tmp_path):
    """The example with batch norm before its dense inputs: an adapter and a checkpoint."""
    text = example.model.read_text()
    assert CHANGED in text and "self.bottom(dense)" in text
    text = text.replace(CHANGED, NORM).replace("bottom(dense)", "bottom(self.scale(dense))")
    (tmp_path / "normed.py").write_text(text)
    torch.manual_seed(0)
    network = load_adapter(tmp_path / "normed.py").adapter.network([16] * 4, 6)
    network.scale.running_var.fill_(0.3)
    network.scale.num_batches_tracked.fill_(77)
    state = torch.load(example.checkpoint)["model"]
    state |= {f"dense_part.{name}": value for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "ckpt.pt")
    return tmp_path / "normed.py", tmp_path / "ckpt.pt"


def test_a_network_is_tuned_but_for_its_statistics(
    normed, example, tmp_path, few_rows, no_report, monkeypatch
):
    model, checkpoint = normed
    before = dmt.convert(
        checkpoint, tmp_path / "bundle", towers=2, compression=8, model=model, distill_steps=0
    )
    monkeypatch.setattr(finetuned, "render_documents", lambda *_, **__: {})
    options = {
        "--bundle": before.path, "--data": example.clicks, "--out": tmp_path / "tuned",
        "--model": model, "--max-steps": 20, "--dense-lr": 0.01,
    }  # fmt: skip
    main([str(part) for pair in options.items() for part in pair] + ["--quiet"])
    start = open_bundle_model(before).state_dict()
    tuned = open_bundle_model(open_bundle(tmp_path / "tuned")).state_dict()
    kept = {name for name, value in start.items() if torch.equal(value, tuned[name])}
    stats = ("running_mean", "running_var", "num_batches_tracked")
    ranges = {name for name in kept if ".code." in name}
    assert kept - ranges == {f"interaction.network.scale.{name}" for name in stats}
    assert tuned["interaction.network.scale.num_batches_tracked"] == 77
    assert any(name.startswith("restore.") for name in start)
