"""Exports of bundles whose towers send in a code, or are on every host."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc.model_config_pb2 import TYPE_FP32, TYPE_UINT8, ModelConfig

from dmt_convert.bundle import Bundle
from dmt_convert.config import ExportConfig
from dmt_convert.model import TowerCode
from dmt_convert.serving import ExportedModel, export_bundle
from dmt_convert.serving.checks import generate_batch
from support.coded import BF16, INT8, write_coded
from support.exports import checks_of
from support.shortcuts import skip_export_checks

Exporter = Callable[..., ExportedModel]
MIXED = TowerCode(precision="int8", int4=3)
CODED = {
    "linear mixed, one everywhere": ("linear", MIXED, (1,)),
    "linear bf16, one everywhere": ("linear", BF16, (1,)),
    "linear fp32, one everywhere": ("linear", None, (0,)),
    "passthrough int8, one everywhere": ("passthrough", INT8, (0,)),
    "passthrough bf16": ("passthrough", BF16, ()),
    "dlrm mixed": ("dlrm", TowerCode(precision="int8", int4=4), ()),
}


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Models are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_coded(
    make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """Make a bundle of `CODED`."""
    made: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in made:
            kind, code, everywhere = CODED[name]
            out = tmp_path_factory.mktemp("coded") / "bundle"
            made[name] = write_coded(make_bundle(kind), out, code, everywhere=everywhere)
        return made[name]

    return make


def failed_parts(exported: ExportedModel, bundle: Bundle) -> set[str]:
    return {check.part for check in checks_of(exported, bundle) if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if "mixed, one" in name else pytest.mark.exhaustive)
        for name in CODED
    ],
)
def test_graphs_compute_what_the_bundle_computes(
    make_coded: Callable[[str], Bundle], export_unchecked: Exporter, name: str
) -> None:
    bundle, (_, code, everywhere) = make_coded(name), CODED[name]
    exported = export_unchecked(bundle, pooling_input="padded", weighted=("*",))
    checks = checks_of(exported, bundle)
    assert not [check.line for check in checks if not check.passed]
    assert {check.part for check in checks} == {"tower_000", "tower_001", "joined", "whole"}
    spec, packs = exported.spec, code is not None and code.precision == "int8"
    for t, sent in enumerate(exported.manifest.towers):
        assert sent.everywhere == (t in everywhere)
        assert sent.dtype == ("uint8" if packs and t not in everywhere else "float32")
        if sent.dtype == "uint8":
            assert sent.nbytes == spec.tower_bytes[t]
    batch = generate_batch(spec.flat, exported.manifest.inputs, 33, seed=0)
    for t, sent in enumerate(exported.manifest.towers):
        raw = exported._send(t, batch)
        assert (raw.dtype, raw.shape) == (np.dtype(sent.dtype), (33, sent.columns))


@pytest.fixture(scope="session")
def mixed(
    make_coded: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> ExportedModel:
    """An export for Triton of a linear tower that sends 8 and 4 bits, and one everywhere."""
    out = tmp_path_factory.mktemp("mixed") / "served"
    with pytest.MonkeyPatch.context() as patch:
        skip_export_checks(patch)
        config = ExportConfig(format="triton", copy_weights=True)
        export_bundle(make_coded("linear mixed, one everywhere"), out, config)
    return ExportedModel(out)


def model_folder(exported: ExportedModel, part: str) -> str:
    return f"dmt_{exported.manifest.details['generation']}_{part}"


@pytest.mark.slow
def test_triton_is_told_what_travels(mixed: ExportedModel) -> None:
    configs = {}
    for part in ("tower_000", "tower_001", "over_arch"):
        path = mixed.path / model_folder(mixed, part) / "config.pbtxt"
        configs[part] = text_format.Parse(path.read_text(), ModelConfig())
    width = mixed.spec.tower_bytes[0]
    (sent,), (local,) = configs["tower_000"].output, configs["tower_001"].output
    taken = {entry.name: entry for entry in configs["over_arch"].input}
    for entry in (sent, taken["tower_000"]):
        assert (entry.data_type, list(entry.dims)) == (TYPE_UINT8, [width])
    for entry in (local, taken["tower_001"]):
        assert (entry.data_type, list(entry.dims)) == (TYPE_FP32, [mixed.spec.tower_widths[1]])
    readme = (mixed.path / "README.md").read_text()
    assert f"UINT8 (B, {width})" in readme
    assert "on every host" in readme


def scale_steps(exported: ExportedModel) -> None:
    """Let the over_arch decode with steps that are a little larger."""
    path = exported.path / model_folder(exported, "over_arch") / "1/model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (steps,) = (t for t in model.graph.initializer if t.name.endswith("codes.0.step"))
    values = numpy_helper.to_array(steps) * np.float32(1.01)
    steps.CopyFrom(numpy_helper.from_array(values, steps.name))
    path.write_bytes(model.SerializeToString())


def shift_levels(exported: ExportedModel) -> None:
    """Let the tower send the level below."""
    path = exported.path / model_folder(exported, "tower_000") / "1/model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (rounding,) = (node for node in model.graph.node if node.op_type == "Round")
    rounding.op_type = "Floor"
    path.write_bytes(model.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "failing"),
    [(scale_steps, {"joined"}), (shift_levels, {"tower_000", "joined"})],
    ids=["steps", "levels"],
)
def test_checks_notice_a_code_that_is_not_the_bundles(
    make_coded: Callable[[str], Bundle],
    mixed: ExportedModel,
    tmp_path: Path,
    break_it: Callable[[ExportedModel], None],
    failing: set[str],
) -> None:
    shutil.copytree(mixed.path, tmp_path / "copy")
    broken = ExportedModel(tmp_path / "copy", checked=False)  # its digests would notice as well
    break_it(broken)
    assert failed_parts(broken, make_coded("linear mixed, one everywhere")) == failing
