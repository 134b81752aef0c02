"""A new interaction and a new tower module: one class and one line of a registry each.

The interaction gates all inputs, `[dense, features] * gate`, before over_arch. The tower module
emits the first D elements of a tower's embeddings, each times a scale; the receiver restores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dmt_convert as dmt
from dmt_convert import interactions
from dmt_convert.bundle import open_bundle, open_bundle_model
from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.conversion import convert, sample
from dmt_convert.conversion.initialisation import initialise, starts, trace_flat
from dmt_convert.conversion.initialisation.closed_form import ClosedForm, Start
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import BundleError
from dmt_convert.families import FlatModelInfo
from dmt_convert.interactions import Interaction
from dmt_convert.model import DmtSpec, TowerModuleSpec, converted_spec, tower_kinds
from dmt_convert.model.tower_kinds import TowerModule
from dmt_convert.placement.predict.cost_model import count_work
from dmt_convert.serving import ExportedModel
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec
from dmt_convert.training import load_bundle
from support.exports import checks_of
from support.models import build_flat, build_sample, split_towers
from support.shortcuts import skip_export_checks

DIMS = (4, 2, 6)
ROWS = 30


class GateModule(nn.Module):
    def __init__(self, spec, dims):
        super().__init__()
        self.gate = nn.Parameter(torch.full((sum(dims),), float(spec.config["start"])))

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        return torch.cat((dense_BN, sparse_BM), dim=1) * self.gate


class Gate(Interaction):
    kind = "gate"
    module = f"{__name__}:GateModule"

    def output_width(self, spec, dims):
        return sum(dims)

    def build(self, spec, dims):
        return GateModule(spec, dims)  # tests cannot be imported by name


class LeadingModule(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, pooled_BM: Tensor) -> Tensor:
        return pooled_BM[:, : len(self.scale)] * self.scale


class Leading(TowerModule):
    kind = "leading"
    restores = True

    def num_vectors(self, spec, num_features):
        return 1

    def choose(self, flat, num_towers, request):
        return TowerModuleSpec(kind=self.kind, dim=request.dim, config={"scale": 2.0})

    def spread(self, spec, dims):
        return [replace(spec, dim=min(spec.dim, sum(own))) for own in dims]

    def build(self, spec, dims):
        return LeadingModule(spec.dim)


class LeadingForm(ClosedForm):
    """Regress the embeddings on what is emitted."""

    def fits(self, spec):
        return spec.kind == "leading"

    def start(self, trace, spec):
        modules, dense = [], {}
        for t, (tower, columns) in enumerate(zip(spec.towers, spec.columns_by_tower, strict=True)):
            x, scale = trace.pooled[:, list(columns)], tower.module.config["scale"]
            y = np.column_stack([x[:, : tower.module.dim] * scale, np.ones(len(x))])
            back = np.linalg.lstsq(y, x, rcond=None)[0]
            modules.append({"scale": np.full(tower.module.dim, scale)})
            dense |= {f"restore.{t}.weight": back[:-1].T, f"restore.{t}.bias": back[-1]}
        return Start(modules=modules, dense=dense, notes=("leading elements",))


@pytest.fixture
def _registered(monkeypatch):
    monkeypatch.setattr(interactions, "INTERACTIONS", (*interactions.INTERACTIONS, Gate()))
    monkeypatch.setattr(tower_kinds, "TOWER_MODULES", (*tower_kinds.TOWER_MODULES, Leading()))
    monkeypatch.setattr(starts, "CLOSED_FORMS", (*starts.CLOSED_FORMS, LeadingForm()))


def _spec() -> ModelSpec:
    width = 3 + sum(DIMS)
    return ModelSpec(
        family="test",
        tables=tuple(TableSpec(name=f"t{i}", rows=ROWS, dim=dim) for i, dim in enumerate(DIMS)),
        features=tuple(FeatureSpec(name=f"f{i}", table=f"t{i}") for i in range(len(DIMS))),
        dense_arch=MlpSpec(widths=(5, 3), final_relu=True),
        interaction=InteractionSpec(kind="gate", config={"start": 1.0}),
        over_arch=MlpSpec(widths=(width, 8, 1), final_relu=False),
    )


@pytest.fixture
def checkpoint(_registered, tmp_path: Path, monkeypatch) -> Path:
    """Canonical names in a file; no family describes a gate, so the test does."""
    torch.manual_seed(0)
    width = 3 + sum(DIMS)
    state = {f"tables.t{i}.weight": torch.randn(ROWS, dim) for i, dim in enumerate(DIMS)}
    shapes = {"dense_arch.0": (5, 3), "over_arch.0": (width, 8), "over_arch.1": (8, 1)}
    for name, shape in shapes.items():
        for kind, value in nn.Linear(*shape).state_dict().items():
            state[f"{name}.{kind}"] = value
    state["gate"] = torch.rand(width) + 0.5
    save_file(state, tmp_path / "flat.safetensors")

    def describe(opened, config):
        return FlatModelInfo(
            checkpoint=opened,
            spec=_spec(),
            tensors={tensor.name: tensor for tensor in opened.tensors},
            optimizer_state={},
            facts=(),
            ignored=(),
        )

    monkeypatch.setattr(convert, "infer_model", describe)
    monkeypatch.setattr(sample, "sample_size", lambda spec: 1024)
    return tmp_path / "flat.safetensors"


def _convert(checkpoint: Path, **options):
    out = checkpoint.parent / "bundle"
    return dmt.convert(checkpoint, out, towers=2, distill_steps=0, **options)


def _batch(rows: int = 40) -> Batch:
    rng = np.random.default_rng(0)
    offsets = np.arange(rows + 1, dtype=np.int64)
    return Batch(
        dense=rng.random((rows, 5)).astype(np.float32),
        feature_names=tuple(f"f{i}" for i in range(len(DIMS))),
        bags=tuple(Bag(values=rng.integers(0, ROWS, rows), offsets=offsets) for _ in DIMS),
    )


def _weights(checkpoint: Path) -> dict[str, np.ndarray]:
    tensors = open_checkpoint(checkpoint).tensors
    return {tensor.name: np.asarray(read_tensor(tensor), dtype=np.float64) for tensor in tensors}


def _pooled(checkpoint: Path, batch: Batch) -> np.ndarray:
    w = _weights(checkpoint)
    tables = [w[f"tables.t{i}.weight"] for i in range(len(DIMS))]
    return np.concatenate([t[bag.values] for t, bag in zip(tables, batch.bags, strict=True)], 1)


def _head(checkpoint: Path, batch: Batch, pooled: np.ndarray) -> np.ndarray:
    """What follows the embeddings, in NumPy."""
    w = _weights(checkpoint)
    dense = np.maximum(batch.dense @ w["dense_arch.0.weight"].T + w["dense_arch.0.bias"], 0)
    x = np.concatenate([dense, pooled], axis=1) * w["gate"]
    x = np.maximum(x @ w["over_arch.0.weight"].T + w["over_arch.0.bias"], 0)
    return (x @ w["over_arch.1.weight"].T + w["over_arch.1.bias"])[:, 0]


def _expected(checkpoint: Path, batch: Batch) -> np.ndarray:
    """The flat model's logits, in NumPy."""
    return _head(checkpoint, batch, _pooled(checkpoint, batch))


def _restore(spec: DmtSpec, state: dict[str, Tensor], pooled: np.ndarray) -> np.ndarray:
    """What the receiver makes of leading elements, in NumPy."""
    restored = np.empty_like(pooled)
    for t, columns in enumerate(map(list, spec.columns_by_tower)):
        scale = state[f"towers.{t}.tower_module.scale"].numpy()
        emitted = pooled[:, columns[: len(scale)]] * scale
        weight, bias = (state[f"restore.{t}.{kind}"].numpy() for kind in ("weight", "bias"))
        restored[:, columns] = emitted @ weight.T + bias
    return restored


def _logits(bundle: Path) -> np.ndarray:
    with torch.inference_mode():
        return open_bundle_model(open_bundle(bundle))(_batch()).numpy()


@pytest.mark.parametrize("module", ["passthrough", "leading"])
def test_a_converted_model_scores_like_the_flat_one(checkpoint, module):
    """Leading towers that emit all their elements lose nothing."""
    dim = {"dim": sum(DIMS)} if module == "leading" else {}
    done = _convert(checkpoint, tower_module=module, **dim)
    spec = done.manifest.model
    assert spec.kind == module and spec.flat.interaction.kind == "gate"
    np.testing.assert_allclose(
        _logits(done.path), _expected(checkpoint, _batch()), rtol=1e-4, atol=1e-5
    )


def test_leading_towers_emit_less_and_are_restored(checkpoint):
    done = _convert(checkpoint, tower_module="leading", dim=3, partition="coherent")
    spec, state = done.manifest.model, open_bundle_model(done).state_dict()
    assert spec.tower_widths == (3, 3) and spec.compression == 2
    assert spec.towers[0].module.config == {"scale": 2.0}
    assert DmtSpec.from_json(spec.to_json()) == spec
    assert torch.equal(state["towers.0.tower_module.scale"], torch.full((3,), 2.0))
    restored = _restore(spec, state, _pooled(checkpoint, _batch()))
    np.testing.assert_allclose(
        _logits(done.path), _head(checkpoint, _batch(), restored), rtol=1e-4, atol=1e-5
    )
    # a random guess of the lost elements is as far off as their spread; a regression is closer
    expected = _expected(checkpoint, _batch())
    error = np.square(_logits(done.path) - expected).mean()
    assert 0 < error < np.square(expected - expected.mean()).mean()


def test_linear_towers_are_the_default_of_an_interaction_without_its_own(checkpoint):
    done = _convert(checkpoint, compression=8)
    assert done.manifest.model.kind == "linear"
    exact = _convert(checkpoint, tower_module="passthrough", force=True)
    assert exact.manifest.partition.affinity == "cosine"  # nobody knows what a gate's weights tell


def test_it_trains(checkpoint):
    bundle = _convert(checkpoint, tower_module="leading", dim=3, partition="coherent")
    model, batch = load_bundle(bundle), _batch()
    labels = torch.from_numpy((np.arange(batch.num_rows) % 2).astype(np.float32))
    parameters = model.dense_parameters()
    assert {"interaction.gate", "towers.1.tower_module.scale"} <= set(parameters)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
    losses = []
    for value in parameters.values():
        value.requires_grad_(True)
    for _ in range(5):
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameters[name].grad is not None for name in parameters)


@pytest.mark.slow
def test_it_exports(checkpoint, monkeypatch, tmp_path):
    """The export's own checks run here, where the two kinds are registered."""
    bundle = _convert(checkpoint, tower_module="leading", dim=3, partition="coherent")
    skip_export_checks(monkeypatch)
    exported = dmt.export(bundle, "onnx", tmp_path / "export")
    checks = checks_of(ExportedModel(exported.path), bundle)
    assert not [check.line for check in checks if not check.passed]
    assert {check.part for check in checks} >= {"tower_000", "tower_001", "joined", "whole"}


@pytest.mark.usefixtures("_registered")
def test_without_formulas_parameters_are_counted():
    flat, module = _spec(), TowerModuleSpec(kind="leading", dim=3)
    towers = tuple(replace(tower, module=module) for tower in _one_feature_each(flat).towers)
    work = count_work(DmtSpec(flat=flat, towers=towers))
    assert [tower.parameters for tower in work.towers] == [3, 3, 3]
    assert work.over.parameters > flat.over_arch.work.parameters + 15  # the gate, the way back


@pytest.mark.usefixtures("_registered")
def test_a_module_without_a_closed_form_starts_at_random(monkeypatch):
    monkeypatch.setattr(starts, "CLOSED_FORMS", starts.CLOSED_FORMS[:-1])
    flat = build_flat(_spec())
    module = TowerModuleSpec(kind="leading", dim=2)
    sample = build_sample(flat, 50)
    spec = split_towers(flat.spec, 2, module)
    model, notes = initialise(
        flat, spec, sample, method="closed-form", trace=trace_flat(flat, sample)
    )
    assert "has no closed form" in notes[0]
    assert torch.equal(model.over_arch[0].weight, flat.over_arch[0].weight)


def test_a_bundle_needs_what_it_is_made_of(checkpoint, monkeypatch):
    bundle = _convert(checkpoint, tower_module="leading", dim=3, partition="coherent")
    known, modules = interactions.INTERACTIONS[:-1], tower_kinds.TOWER_MODULES[:-1]
    with monkeypatch.context() as patch:
        patch.setattr(interactions, "INTERACTIONS", known)
        with pytest.raises(BundleError, match="interaction 'gate'"):
            open_bundle(bundle.path)
    monkeypatch.setattr(tower_kinds, "TOWER_MODULES", modules)
    with pytest.raises(BundleError, match="tower module 'leading'"):
        open_bundle(bundle.path)


def _one_feature_each(flat: ModelSpec) -> DmtSpec:
    bare = TowerModuleSpec(kind="passthrough")
    return converted_spec(flat, [(name,) for name in flat.feature_names], bare)
