"""Parts of ONNX graphs that no tiny bundle has: quantised tables, towers of different widths."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dmt_convert.bundle import Bundle
from dmt_convert.bundle.bundle_model import split_state
from dmt_convert.checkpoint import read_safetensors
from dmt_convert.config import ExportConfig
from dmt_convert.errors import DataError, ExportError
from dmt_convert.model import DmtModel, DmtSpec
from dmt_convert.model.table_lookup import pool_bag
from dmt_convert.serving import open_graph, plan_inputs
from dmt_convert.serving.checks import generate_batch
from dmt_convert.serving.exporter import ExportJob
from dmt_convert.serving.onnx_writer import OnnxGraphs
from dmt_convert.serving.placed_weights import PlacedFile, PlacedWeights
from dmt_convert.spec import ModelSpec


def place(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> PlacedFile:
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / name)
    tensors = read_safetensors(folder / name).tensors
    return PlacedFile(path=name, tensors={t.name: t for t in tensors}, bytes=0, digests={})


def narrow(spec: DmtSpec, dim: int) -> DmtSpec:
    """Give all tables of a model another width."""
    flat = spec.flat
    widths = flat.over_arch.widths
    count = 1 + len(flat.features)
    changed: ModelSpec = replace(
        flat,
        tables=tuple(replace(table, dim=dim) for table in flat.tables),
        dense_arch=replace(flat.dense_arch, widths=(*flat.dense_arch.widths[:-1], dim)),
        over_arch=replace(flat.over_arch, widths=(dim + count * (count - 1) // 2, *widths[1:])),
    )
    return replace(spec, flat=changed)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [7, 8])
@pytest.mark.parametrize("code", ["int8", "int4"])
@pytest.mark.parametrize("form", ["single", "fixed", "padded", "jagged"])
@pytest.mark.parametrize("weighted", [(), ("*",)], ids=["plain", "weighted"])
def test_quantised_tables(
    make_bundle: Callable[..., Bundle],
    tmp_path: Path,
    dim: int,
    code: Any,
    form: Any,
    weighted: tuple[str, ...],
) -> None:
    spec = narrow(make_bundle("passthrough").manifest.model, dim)
    config = ExportConfig(format="onnx", pooling_input=form, quantize=code, weighted=weighted)
    inputs = plan_inputs(spec, config)
    rng = np.random.default_rng(dim)
    features = spec.towers[0].features
    half, arrays, truth = -(-dim // 2), {}, {}
    for name in features:
        table = spec.flat.table_of(name)
        codes = rng.integers(0, 16 if code == "int4" else 256, (table.rows, 2 * half))
        zero = rng.integers(0, codes.max() + 1, table.rows)
        scale = rng.random(table.rows, dtype=np.float32) / 50
        stored = codes[:, :dim]
        if code == "int4":
            stored = codes[:, :half] + 16 * codes[:, half:]
        arrays[f"tables.{table.name}.quantized"] = stored.astype(np.uint8)
        arrays[f"tables.{table.name}.scale"] = scale
        arrays[f"tables.{table.name}.zero_point"] = zero.astype(np.uint8)
        truth[name] = ((codes[:, :dim] - zero[:, None]) * scale[:, None]).astype(np.float32)
    file = place(tmp_path, "tower.safetensors", arrays)
    weights = SimpleNamespace(towers=(file,))
    job = ExportJob(
        folder=tmp_path,
        spec=spec,
        inputs=inputs,
        weights=weights,
        config=config,  # type: ignore[arg-type]
    )
    OnnxGraphs(job).write_tower(0, tmp_path / "tower.onnx")
    batch = generate_batch(spec.flat, inputs, 33, seed=1)
    bags = dict(zip(batch.feature_names, batch.bags, strict=True))
    known = {feature.name: feature for feature in spec.flat.features}
    expected = np.concatenate(
        [pool_bag(torch.from_numpy(truth[n]), bags[n], known[n]).numpy() for n in features], axis=1
    )
    runner = open_graph(tmp_path / "tower.onnx", threads=1)
    feeds = inputs.feeds(batch, features)
    np.testing.assert_allclose(
        runner.run(feeds), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )
    ids = inputs.feature(features[0]).ids
    wrong = feeds[ids].copy()
    wrong.reshape(-1)[-1] = spec.flat.table_of(features[0]).rows
    with pytest.raises(DataError, match="indices element out of data bounds"):
        runner.run(feeds | {ids: wrong})


def wide_and_narrow(spec: DmtSpec, dims: tuple[int, int]) -> DmtSpec:
    towers = tuple(
        replace(tower, module=replace(tower.module, dim=dim))
        for tower, dim in zip(spec.towers, dims, strict=True)
    )
    return replace(spec, towers=towers)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(3, 6), (8, 4), (5, 5)])
def test_towers_of_different_widths_meet_in_dot_products(
    make_bundle: Callable[..., Bundle], tmp_path: Path, dims: tuple[int, int]
) -> None:
    bundle = make_bundle("dlrm", convert={"c": 1, "p": 2, "dim": 4})
    spec = wide_and_narrow(bundle.manifest.model, dims)
    torch.manual_seed(0)
    model = DmtModel(spec).eval()
    config = ExportConfig(format="onnx", pooling_input="single")
    file = place(tmp_path, "over_arch.safetensors", split_state(model).dense)
    job = ExportJob(
        folder=tmp_path,
        spec=spec,
        inputs=plan_inputs(spec, config),
        weights=PlacedWeights(towers=(), over_arch=file),
        config=config,
    )
    OnnxGraphs(job).write_over_arch(tmp_path / "over_arch.onnx")
    dense = torch.randn(9, spec.flat.num_dense)
    emitted = [torch.randn(9, width) for width in spec.tower_widths]
    with torch.inference_mode():
        expected = model.forward_emitted(dense, torch.cat(emitted, 1)).numpy()
    feeds = {job.inputs.dense: dense.numpy()}
    feeds |= {f"tower_{t:03d}": value.numpy() for t, value in enumerate(emitted)}
    found = open_graph(tmp_path / "over_arch.onnx", threads=1).run(feeds)
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=2e-5)


def test_a_feature_called_like_an_output(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    spec = make_bundle("passthrough").manifest.model
    name = spec.towers[0].features[0]
    flat = replace(
        spec.flat,
        features=tuple(
            replace(f, name="tower_000") if f.name == name else f for f in spec.flat.features
        ),
    )
    first = replace(
        spec.towers[0],
        features=tuple("tower_000" if f == name else f for f in spec.towers[0].features),
    )
    renamed = DmtSpec(flat=flat, towers=(first, *spec.towers[1:]))
    config = ExportConfig(format="onnx", pooling_input="single")
    weights = SimpleNamespace(towers=())
    job = ExportJob(
        folder=tmp_path,
        spec=renamed,
        inputs=plan_inputs(renamed, config),
        weights=weights,  # type: ignore[arg-type]
        config=config,
    )
    with pytest.raises(ExportError, match="tower_000"):
        OnnxGraphs(job).write_tower(0, tmp_path / "tower.onnx")
