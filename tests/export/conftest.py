"""Tiny bundles and their exports, made once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.adapter import load_adapter
from dmt_convert.bundle import Bundle, open_bundle, open_bundle_model
from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.convert import convert_checkpoint
from dmt_convert.convert_config import ConvertConfig
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.serving import ExportConfig, ExportedModel, GraphCheck, export_bundle
from dmt_convert.serving.checks import run_checks

BundleMaker = Callable[..., Bundle]
Exporter = Callable[..., ExportedModel]


@pytest.fixture(scope="session")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_flat: Callable[..., Path]
) -> BundleMaker:
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
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 512)
                patch.setattr("dmt_convert.report.documents.describe_conversion", lambda *_: {})
                asked: dict[str, Any] = {
                    "partition": PartitionConfig(num_towers=2),
                    "tower_module": module,
                    "model_config": ModelConfig(pooling=pooling) if pooling else None,
                    "distill_steps": 0,
                }
                config = ConvertConfig(**{**asked, **(convert or {})})
                done = convert_checkpoint(source, folder / "bundle", config=config)
            made[key] = open_bundle(done.bundle.path)
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
        groups = (("user", ("t0", "t1")), ("item", ("t2", "t3")))
        config = ConvertConfig(
            partition=PartitionConfig(num_towers=2, groups=groups, affinity="cosine"),
            model_config=ModelConfig(adapter=loaded),
            distill_steps=0,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 512)
            patch.setattr("dmt_convert.report.documents.describe_conversion", lambda *_: {})
            return convert_checkpoint(folder / "ckpt.pt", folder / "bundle", config=config).bundle

    return make


@pytest.fixture
def export_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """Export a bundle without the process that checks it, which takes longest."""
    monkeypatch.setattr("dmt_convert.serving.exporter.check_graphs", lambda *_: ())
    count = 0

    def export(bundle: Bundle, **options: Any) -> ExportedModel:
        nonlocal count
        count += 1
        out = tmp_path / f"out-{count}"
        export_bundle(bundle, out, ExportConfig(**{"format": "onnx", **options}))
        return ExportedModel(out)

    return export


@pytest.fixture
def checks_of() -> Callable[[ExportedModel, Bundle], list[GraphCheck]]:
    """Run, in this process, what an export is checked by."""

    def check(exported: ExportedModel, bundle: Bundle) -> list[GraphCheck]:
        with torch.inference_mode():
            return list(run_checks(exported, open_bundle_model(bundle), None))

    return check
