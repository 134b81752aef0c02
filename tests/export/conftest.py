"""Tiny bundles and their exports, made once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.adapter import load_adapter
from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.config import ExportConfig
from dmt_convert.serving import ExportedModel, export_bundle
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.shortcuts import skip_export_checks

BundleMaker = Callable[..., Bundle]
Exporter = Callable[..., ExportedModel]


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """Convert a tiny checkpoint: `make_bundle(module, interaction=, names=, convert=, edit=)`.

    Two towers of four features. The second and the fourth feature take the mean of their bags.
    """
    made: dict[str, Bundle] = {}

    def make(
        module: str = "passthrough",
        *,
        convert: dict[str, Any] | None = None,
        edit: Callable[[dict[str, Any]], object] | None = None,
        mean: bool = True,
        **options: Any,
    ) -> Bundle:
        key = repr((module, convert, edit and edit.__name__, mean, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("export")
            source = make_flat(folder / "flat.pt", edit=edit, **options)
            prefix = "cat_" if options.get("names", "torchrec") == "torchrec" else ""
            pooling: dict[str, Any] = {f"{prefix}{i}": "mean" for i in (1, 3)} if mean else {}
            facts: dict[str, Any] = {"pooling": pooling} if pooling else {}
            if options.get("interaction") == "self-pairs":
                facts["self_pairs"] = True
            asked: dict[str, Any] = {
                "tower_module": module,
                "model_config": facts or None,
                "distill_steps": 0,
            }
            converted = convert_quickly(
                source, folder / "bundle", rows=512, **{**asked, **(convert or {})}
            )
            made[key] = open_bundle(converted.path)
        return made[key]

    return make


NETWORK = """
import torch
from torch import nn
from dmt_convert.adapter import Adapter

class Net(nn.Module):
    def __init__(self, dims, num_dense):
        super().__init__()
        width = num_dense + sum(dims)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("order", torch.arange(width).flip(0), persistent=False)
        self.factors = torch.linspace(1, 2, width)  # no buffer: a constant of the code
        self.top = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense, pooled):
        x = self.norm(torch.cat([dense, *pooled], dim=1))[:, self.order] * self.factors
        first = torch.tensor([float(i) for i in range(12)])
        return self.top(x).squeeze(1) + (x[:, :12] * first).sum(1)

ADAPTER = Adapter(network=Net, num_dense=NUM_DENSE, prefix="net.")
"""


@pytest.fixture(scope="session")
def make_network_bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """A user's network over four tables, in linear towers: `make_network_bundle(num_dense=0)`."""

    @cache
    def make(num_dense: int) -> Bundle:
        folder = tmp_path_factory.mktemp("network")
        model = folder / "net.py"
        model.write_text(NETWORK.replace("NUM_DENSE", str(num_dense)))
        loaded = load_adapter(model)
        torch.manual_seed(0)
        network = loaded.adapter.network([8] * 4, num_dense)
        state = {f"net.{name}": value for name, value in network.state_dict().items()}
        for i, rows in enumerate((20, 50, 7, 9)):
            state[f"ebc.embedding_bags.t{i}.weight"] = torch.randn(rows, 8)
        torch.save(state, folder / "ckpt.pt")
        groups = {"user": ["t0", "t1"], "item": ["t2", "t3"]}
        return convert_quickly(
            folder / "ckpt.pt",
            folder / "bundle",
            rows=512,
            group=groups,
            affinity="cosine",
            model=model,
            distill_steps=0,
        )

    return make


@pytest.fixture
def export_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """Export a bundle without the process that checks it, which takes longest."""
    skip_export_checks(monkeypatch)
    count = 0

    def export(bundle: Bundle, **options: Any) -> ExportedModel:
        nonlocal count
        count += 1
        out = tmp_path / f"out-{count}"
        export_bundle(bundle, out, ExportConfig(**{"format": "onnx", **options}))
        return ExportedModel(out, trust_code=True)

    return export
