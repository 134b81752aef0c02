"""Exports as AOTInductor packages: compiled once for all tests of this file."""

import ast
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.config import ExportConfig
from dmt_convert.errors import ExportError
from dmt_convert.model import TowerCode
from dmt_convert.serving import ExportedModel, export_bundle, exporter
from dmt_convert.serving.checks import generate_batch
from dmt_convert.serving.exported_model import Pt2Runner
from dmt_convert.serving.load_pt2 import MappedFile
from support.coded import write_coded
from support.exports import checks_of

pytestmark = pytest.mark.slow

FORMS: dict[str, Any] = {
    "pooling_input": {"cat_0": "single", "cat_1": "padded", "cat_2": "fixed", "cat_3": "jagged"},
    "weighted": ("cat_1", "cat_2"),
}
Feeds = dict[str, torch.Tensor]


@pytest.fixture(scope="session", autouse=True)
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What compiling leaves behind goes with the tests' other files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One tower sends levels of 8 and 4 bits, the other one float32."""
    code = TowerCode(precision="int8", int4=3)
    return write_coded(make_bundle("dlrm"), tmp_path_factory.mktemp("coded") / "b", code, None)


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, compiler_cache: None
) -> Path:
    out = tmp_path_factory.mktemp("pt2") / "served"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "check_graphs", lambda *_: ())
        export_bundle(bundle, out, ExportConfig(format="pt2", **FORMS))
    return out


@pytest.fixture(scope="session")
def loader(exported: Path) -> ModuleType:
    """The loader that lies in the export, imported from there."""
    spec = importlib.util.spec_from_file_location("copied_loader", exported / "load_pt2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def feeds(exported: Path, bundle: Bundle) -> Feeds:
    """Six rows."""
    inputs = ExportedModel(exported, trust_code=True).manifest.inputs
    batch = generate_batch(bundle.manifest.model.flat, inputs, 6, seed=3)
    return {name: torch.from_numpy(array) for name, array in inputs.feeds(batch).items()}


def test_graphs_answer_like_the_model_and_refuse_bad_ids(exported: Path, bundle: Bundle) -> None:
    threads = torch.get_num_threads()
    checks = checks_of(ExportedModel(exported, trust_code=True), bundle)
    assert [check.line for check in checks if not check.passed] == []
    assert {check.part for check in checks} == {"tower_000", "tower_001", "joined", "whole"}
    assert sum(check.what.startswith("refuses") for check in checks) >= 24
    assert torch.get_num_threads() == threads


def test_weights_are_mapped_and_a_changed_one_is_found(
    exported: Path, bundle: Bundle, tmp_path: Path
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    opened = ExportedModel(copy, trust_code=True)
    assert all(check.passed for check in checks_of(opened, bundle))
    with (copy / "tower_001/tower.safetensors").open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(np.full(8, 3, dtype=np.float32).tobytes())  # row 0 of the tower's first table
    failed = {check.part for check in checks_of(opened, bundle) if not check.passed}
    assert failed == {"tower_001", "joined", "whole"}  # in graphs that had been opened before


def test_the_loader_needs_torch_alone(exported: Path) -> None:
    source = (exported / "load_pt2.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}
    assert source.count("\n") < 220


def test_the_copied_loader_runs_every_part(
    exported: Path, bundle: Bundle, loader: ModuleType, feeds: Feeds
) -> None:
    whole = loader.load(exported)(feeds)
    towers = {name: loader.load(exported, name)(feeds) for name in ("tower_000", "tower_001")}
    assert [towers[name].dtype for name in towers] == [torch.uint8, torch.float32]
    assert torch.equal(loader.load(exported, "over_arch")(feeds | towers), whole)
    manifest = ExportedModel(exported, trust_code=True).manifest
    batch = generate_batch(bundle.manifest.model.flat, manifest.inputs, 6, seed=3)
    with torch.inference_mode():
        expected = open_bundle_model(bundle)(batch)
    torch.testing.assert_close(whole[:, 0], expected, rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no graph 'tower_002'; it has whole, tower_000"):
        loader.load(exported, "tower_002")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dense", lambda x: x.double(), "torch.float64"),
        ("dense", lambda x: x[:0], "the batch is empty"),
        ("cat_0", lambda x: x.int(), "torch.int32"),
        ("cat_0", lambda x: x[:5], r"\[5, 1\], not int64 \[6, 1\]"),
        ("cat_1.weights", lambda x: torch.cat([x, x], dim=1), "'cat_1.weights'"),
        ("cat_0", lambda x: x - 9, "id -.* in 'cat_0', whose table has 7 rows"),
        ("cat_1", lambda x: x - 2, "id -.* in 'cat_1', whose table has 50 rows"),
        ("cat_2", lambda x: x + 2**62, "in 'cat_2', whose table has 11 rows"),
        ("cat_3.lengths", lambda x: -x, "'cat_3.lengths' does not add up"),
        ("cat_3.lengths", lambda x: x + 1, "'cat_3.lengths' does not add up"),
        ("cat_3.lengths", lambda x: x.roll(1) - torch.eye(6, dtype=torch.int64)[0], "add up"),
        ("cat_3.lengths", lambda x: x + 2**62, "'cat_3.lengths' does not add up"),
    ],
)
def test_hostile_inputs_are_refused(
    exported: Path,
    loader: ModuleType,
    feeds: Feeds,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    graph = loader.load(exported)
    right = graph(feeds)
    with pytest.raises(ValueError, match=message):
        graph(feeds | {name: change(feeds[name])})
    assert torch.equal(graph(feeds), right)  # it goes on
    with pytest.raises(ValueError, match=f"input '{name}' is missing"):
        graph({key: value for key, value in feeds.items() if key != name})


def test_weights_of_another_shape_are_refused(exported: Path, tmp_path: Path) -> None:
    path = exported / "tower_000/tower.safetensors"
    name = next(name for name in MappedFile(path)._header if name.startswith("tables."))
    with pytest.raises(RuntimeError, match="not the float32"):
        MappedFile(path).view([name], "float32", [10**6, 8])
    copy = shutil.copytree(exported, tmp_path / "copy")
    shutil.copyfile(copy / "tower_001/tower.safetensors", copy / "tower_000/tower.safetensors")
    with pytest.raises(ExportError, match="cannot be loaded by torch"):
        Pt2Runner(copy / "whole.pt2")
    for content in (b"no package", None):
        path = copy / "tower_001/tower.pt2"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ExportError, match="cannot be loaded by torch"):
            Pt2Runner(path)


def test_commands_run_it_with_the_users_consent_and_as_it_was_exported(
    exported: Path, bundle: Bundle, loader: ModuleType, call_dmt: Callable[..., Any],
    click_data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    words = ["verify", bundle.path, exported, "--json"]  # on rows that fit every form of input
    refused = call_dmt(*words)
    assert refused.code == 3 and "machine code" in refused.stderr
    assert "--trust-code" in refused.stderr
    done = call_dmt(*words, "--trust-code", "--checksums")
    assert done.code == 0, done.stderr
    copy = shutil.copytree(exported, tmp_path / "copy")
    content = bytearray((copy / "whole.pt2").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "whole.pt2").write_bytes(content)
    words = ["score", copy, "--data", click_data, "--out", tmp_path / "s.npz"]
    damaged = call_dmt(*words, "--trust-code")
    assert damaged.code == 3 and "whole.pt2 has other bytes" in damaged.stderr
    with pytest.raises(RuntimeError, match="not the file that was exported"):
        loader.load(copy)


def test_without_a_compiler_or_a_gpu_it_is_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match="for a GPU on a machine that has none"):
            export_bundle(bundle, tmp_path / "out", ExportConfig(format="pt2", gpu=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match="no C\\+\\+ compiler") as refused:
        export_bundle(bundle, tmp_path / "out", ExportConfig(format="pt2"))
    assert "apt-get install g++" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_a_compiler_that_fails_is_quoted(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo g++ 12 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ExportError, match="cannot be compiled") as refused:
        export_bundle(bundle, tmp_path / "out", ExportConfig(format="pt2"))
    assert refused.value.details
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("module", "making", "options"),
    [
        ("passthrough", {}, {"pooling_input": "jagged", "out_of_range": "clip"}),
        (
            "passthrough",
            {},
            {"pooling_input": "padded", "out_of_range": "clip", "weighted": ("*",)},
        ),
        ("dcn", {"interaction": "dcn"}, {"pooling_input": "fixed"}),
        ("dlrm", {"interaction": "projection"}, {"pooling_input": "single", "weighted": ("*",)}),
        ("dlrm", {"convert": {"dtype": "fp16"}}, FORMS),
        ("passthrough", {"convert": {"dtype": "bf16"}}, {"pooling_input": "single"}),
        ("dlrm", {}, {"quantize": "int8", **FORMS}),
        ("dlrm", {}, {"pooling_input": "jagged"}),
        ("passthrough", {}, {"quantize": "int4", **FORMS}),
        ("passthrough", {"dim": 7}, {"quantize": "int4", "pooling_input": "single"}),
        ("dlrm", {}, {"quantize": "fp16", "pooling_input": "jagged", "weighted": ("*",)}),
        (
            "dlrm",
            {"names": "facebook", "interaction": "cat", "mean": False},
            {"pooling_input": "jagged"},
        ),
        (
            "dlrm",
            {"names": "facebook", "interaction": "self-pairs", "mean": False},
            {"pooling_input": "padded"},
        ),
    ],
)
def test_every_kind_of_model_passes_its_own_checks(
    make_bundle: Callable[..., Bundle],
    tmp_path: Path,
    module: str,
    making: dict[str, Any],
    options: dict[str, Any],
) -> None:
    bundle = make_bundle(module, **making)
    export = export_bundle(bundle, tmp_path / "out", ExportConfig(format="pt2", **options))
    assert export.checks and all(check.passed for check in export.checks)
