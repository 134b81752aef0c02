"""Exports for GPUs, by structure: stand-ins take the place of what needs a GPU."""

import json
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmt_convert.bundle import Bundle
from dmt_convert.config import ExportConfig
from dmt_convert.errors import ConfigError, ExportError
from dmt_convert.serving import (
    ExportedModel,
    export_bundle,
    exported_model,
    gpu,
    graphs,
    load_pt2,
    pt2,
)
from dmt_convert.serving.checks import generate_batch
from dmt_convert.serving.graphs import traced
from dmt_convert.serving.triton import place_on_gpus
from support.exports import checks_of
from support.shortcuts import skip_export_checks

Exporter = Callable[..., ExportedModel]


class StandIn:
    """A package compiled for CUDA: it refuses what lies elsewhere, as a careful one would."""

    described: dict[str, Any]

    def __init__(self, path: str, name: str, single: bool, runners: int, index: int) -> None:
        self.device = torch.device("cuda", index)

    @staticmethod
    def load_metadata_from_package(*_: str) -> dict[str, str]:
        return {"dmt": json.dumps(StandIn.described)}

    def get_constant_fqns(self) -> list[str]:
        return ["w"]

    def load_constants(self, weights: dict[str, torch.Tensor], *_: bool) -> None:
        assert all(weight.device == self.device for weight in weights.values())

    def boxed_run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        assert all(tensor.device == self.device for tensor in tensors)
        return [tensors[0] * 2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package for CUDA on a machine that seems to have two GPUs; the second is the current."""
    StandIn.described = {
        "device": "cuda",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": [9, 0],
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["B"]}],
        "ids": [],
        "files": [],
        "weights": {"w": {"values": [1.0], "dtype": "float32"}},
    }
    monkeypatch.setattr(load_pt2, "_Loader", StandIn)
    found = {"is_available": lambda: True, "current_device": lambda: 1}
    found["get_device_capability"] = lambda index: (9, index)
    monkeypatch.setattr(load_pt2, "cuda", SimpleNamespace(**found))
    return tmp_path / "tower.pt2"


@pytest.mark.parametrize(("asked", "found"), [(None, "cuda:1"), ("cuda:0", "cuda:0")])
def test_inputs_and_weights_go_to_the_device_of_the_package(
    package: Path, asked: str | None, found: str
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = load_pt2.Graph(package, device=asked)
        assert graph.device == torch.device(found)
        assert graph({"x": torch.ones(3)}).device == torch.device(found)


def test_a_device_that_does_not_fit_the_package_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="compiled for cuda, and cannot run on cpu"):
        load_pt2.Graph(package, device="cpu")
    monkeypatch.setattr(load_pt2.cuda, "get_device_capability", lambda index: (8, 9))
    with pytest.raises(RuntimeError, match=r"capability 9\.0; cuda:1 has 8\.9"):
        load_pt2.Graph(package)
    monkeypatch.setattr(load_pt2.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="finds none here"):
        exported_model.Pt2Runner(package)
    StandIn.described |= {"device": "cpu"}
    with pytest.raises(RuntimeError, match="compiled for cpu, and cannot run on cuda:1"):
        load_pt2.Graph(package, device="cuda:1")


def compile_jobs(
    bundle: Bundle, out: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], None]
) -> Any:
    """Export for a GPU up to the compiler, which `look` takes the place of."""

    def stand_in(job: Any) -> Any:
        look(job)
        return job.parts

    monkeypatch.setattr(pt2, "_compile", stand_in)
    monkeypatch.setattr(pt2, "_find_compiler", lambda: "none")
    monkeypatch.setattr(pt2, "check_gpu", lambda: None)
    skip_export_checks(monkeypatch)
    return export_bundle(bundle, out, ExportConfig(format="pt2", gpu=True))


def test_towers_for_a_gpu_are_built_without_tables_and_mix_no_devices(
    make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    # fake ids have no values to refuse
    monkeypatch.setattr(graphs, "refuse_wrong", lambda wrong: torch.stack([*wrong]).any())

    def look(job: Any) -> None:
        for part in ("tower_000", "tower_001"):
            builder = pt2.MappedGraphs(job)
            assert builder._model is builder._model  # made before values are fake
            with builder.fakes, torch.no_grad():
                graph, _ = builder.build(part)
                zeros, _ = traced(graph.inputs, job.device)
                found.append(graph(*zeros).device)
            tables = {n: p for n, p in graph.named_parameters() if "lookup." in n}
            assert tables and all(isinstance(table, FakeTensor) for table in tables.values())

    # of passthrough towers: other modules' weights are real, and need a GPU to be on
    compile_jobs(make_bundle(), tmp_path / "out", monkeypatch, look)
    assert found == [torch.device("cuda:0")] * 2


def test_tables_take_no_memory_while_compiling_and_other_weights_are_real(
    make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor writes small weights into the code: their values must be those of the file."""
    job: list[Any] = []
    compile_jobs(make_bundle("dlrm"), tmp_path / "out", monkeypatch, job.append)
    builder = pt2.MappedGraphs(replace(job[0], device="cpu", folder=str(tmp_path / "out")))
    huge = builder._fake({"dtype": "float32", "shape": [10**11, 128]})
    assert huge.nbytes > 10**13
    graph, _ = builder.build("over_arch")
    assert not any(isinstance(weight, FakeTensor) for weight in graph.parameters())
    other = builder._fake({"dtype": "float32", "shape": [10**11, 128]})
    with pt2._fakes_apart():
        from torch._inductor import graph as inductor

        is_same = inductor.is_same_tensor
        assert is_same(huge, huge) and not is_same(huge, other)
        real = torch.ones(3)
        assert is_same(real, real.view(3)) and not is_same(real, real.clone())
    with pytest.warns(UserWarning, match="FakeTensor"):  # all lie at address 0
        assert inductor.is_same_tensor(huge, other)


def test_a_whole_graph_that_does_not_fit_the_gpu_is_left_out_and_a_tower_refused(
    make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, parts = make_bundle("dlrm"), []
    sizes = {"free": gpu.SPARE_BYTES + 2**30}
    monkeypatch.setattr(gpu, "free_gpu_bytes", lambda: sizes["free"])

    def run(name: str) -> Any:
        return compile_jobs(bundle, tmp_path / name, monkeypatch, lambda job: parts.append(job))

    fits = run("fits").manifest
    assert "whole" in fits.parts and "skipped" not in fits.details and fits.gpu
    towers = [size.bytes for name, size in fits.weights.items() if "tower" in name]
    sizes["free"] = gpu.SPARE_BYTES + max(towers)
    tight = run("tight").manifest
    assert set(fits.parts) - set(tight.parts) == {"whole"} == set(tight.details["skipped"])
    assert "GiB free" in tight.details["skipped"]["whole"]
    sizes["free"] = gpu.SPARE_BYTES + max(towers) - 1
    with pytest.raises(ExportError, match="do not fit the GPU") as refused:
        run("over")
    assert "more towers" in refused.value.hint and not (tmp_path / "over").exists()


@pytest.mark.parametrize(("device", "processes"), [("cpu", 2), ("cuda", 1)])
def test_one_graph_at_a_time_is_compiled_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, processes: int
) -> None:
    code = (
        "import json, sys\nfor line in sys.stdin:\n"
        "    print(json.dumps({'part': line.strip()}), flush=True)"
    )
    started = []

    def start(job: Any, logs: Any) -> Any:
        log = logs.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        started.append(process)
        return process, log

    monkeypatch.setattr(pt2, "_start", start)
    monkeypatch.setattr(pt2.os, "sched_getaffinity", lambda pid: range(8))
    parts = {f"tower_{t:03d}": "" for t in range(4)}
    job = pt2.CompileJob(
        folder="", model={}, inputs={}, towers=(), over_arch="", parts=parts, packed=False,
        clip=False, device=device,
    )  # fmt: skip
    assert sorted(pt2._compile(job)) == sorted(parts)
    assert len(started) == processes


@pytest.mark.parametrize(("free", "most_open"), [(0, 1), (None, 1), (1 << 50, 4)])
def test_graphs_are_closed_if_the_next_one_does_not_fit_the_gpu(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Exporter,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    most_open: int,
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), gpu=True, out_of_range="clip")
    opened: list[weakref.ref[Any]] = []
    counts: list[int] = []
    original = exported_model.open_graph

    def open_graph(path: Path, **options: Any) -> Any:
        runner = original(path, **options)
        opened.append(weakref.ref(runner))
        counts.append(sum(ref() is not None for ref in opened))
        return runner

    monkeypatch.setattr(exported_model, "open_graph", open_graph)
    monkeypatch.setattr(exported_model, "free_gpu_bytes", lambda: free)
    checks = checks_of(exported, make_bundle("dlrm"))
    assert all(check.passed for check in checks)
    # the checks ask one graph after the other, so that closing costs nothing
    assert (max(counts), len(counts)) == (most_open, 4)
    assert {check.ran_on for check in checks} == {"CPUExecutionProvider"}


def test_graphs_for_a_gpu_run_on_cuda_if_onnx_runtime_can(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Exporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime as ort

    session, asked = ort.InferenceSession, []

    def stand_in(path: str, options: Any, providers: list[Any]) -> Any:
        asked.append(providers)
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", stand_in)
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    exported = export_unchecked(make_bundle("dlrm"), gpu=True, out_of_range="clip")
    exported._runner("whole")
    assert exported.runs_on == "CPUExecutionProvider"  # what ran it, not what was asked for
    export_unchecked(make_bundle("dlrm"))._runner("whole")
    assert asked == [[cuda, names[1]], [names[1]]]


@pytest.mark.parametrize("form", ["onnx", "triton"])
def test_ids_that_nothing_would_check_on_a_gpu_have_to_be_clipped(form: Any) -> None:
    with pytest.raises(ConfigError, match="--out-of-range clip"):
        ExportConfig(format=form, gpu=True)
    assert ExportConfig(format=form, gpu=True, out_of_range="clip").gpu
    assert ExportConfig(format="pt2", gpu=True).out_of_range == "refuse"
    for wrong in ({}, {"format": "onnx", "gpu": True, "out_of_range": "clip"}):
        with pytest.raises(ConfigError, match="--gpus: only for"):
            ExportConfig(**{"format": form, "gpus": 2, **wrong})


class Gather(OpRun):
    """As on CUDA: an index outside reads zeros, and nothing is refused."""

    op_domain = ""

    def _run(self, x: Any, indices: Any, axis: int | None = None) -> Any:
        size = x.shape[axis or 0]
        inside = (indices >= -size) & (indices < size)
        taken = np.take(x, np.where(inside, indices, 0), axis=axis or 0)
        shape = (1,) * (axis or 0) + inside.shape + (1,) * (taken.ndim - inside.ndim - (axis or 0))
        return (np.where(inside.reshape(shape), taken, 0).astype(x.dtype),)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jagged", "padded", "single"])
def test_nothing_relies_on_checks_that_a_gpu_lacks(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, form: str
) -> None:
    options = {"gpu": True, "out_of_range": "clip", "pooling_input": form, "copy_weights": True}
    exported = export_unchecked(make_bundle("dlrm"), **options)
    model = onnx.load(exported.path / "whole.onnx")
    on_gpu = ReferenceEvaluator(model, new_ops=[Gather])
    inputs = exported.manifest.inputs
    feeds = dict(inputs.feeds(generate_batch(exported.spec.flat, inputs, 6, seed=3)))

    def compare() -> None:
        (found,) = on_gpu.run(None, feeds)
        np.testing.assert_allclose(
            found, exported._runner("whole").run(feeds), rtol=2e-5, atol=1e-6
        )

    compare()
    ids = inputs.features[0].ids
    feeds[ids] = feeds[ids] + 1000
    compare()  # clipped on both
    if form == "jagged":
        lengths = str(inputs.features[1].lengths)
        for wrong in (feeds[lengths] + 1, -feeds[lengths], np.roll(feeds[lengths], 1) * 2):
            changed = {**feeds, lengths: wrong}
            with pytest.raises(Exception, match="reshape"):
                on_gpu.run(None, changed)
            with pytest.raises(Exception, match="refused its inputs"):
                exported._runner("whole").run(changed)


def instance_groups(exported: ExportedModel) -> dict[str, list[int]]:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    found = {}
    for path in exported.path.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), ModelConfig())
        for group in config.instance_group:
            found[config.name.rsplit("_", 2)[-1]] = list(group.gpus)
    return found


def test_towers_are_spread_over_the_gpus_of_a_server(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    options = {"format": "triton", "gpu": True, "out_of_range": "clip"}
    bundle = make_bundle("dlrm")
    exported = export_unchecked(bundle, **options, gpus=2)
    found = instance_groups(exported)
    assert sorted(found["000"] + found["001"]) == [0, 1] and found["arch"] == [0, 1]
    readme = (exported.path / "README.md").read_text()
    assert "| 1 | `dmt_" in readme and "at least 2 GPUs" in readme
    assert "NVIDIA_TF32_OVERRIDE" in readme and "does not check ids" not in readme
    alone = export_unchecked(bundle, **options)
    assert set(map(tuple, instance_groups(alone).values())) == {()}
    assert "export with `--gpus N`" in (alone.path / "README.md").read_text()
    assert alone.manifest.details["generation"] != exported.manifest.details["generation"]


def test_large_towers_go_first_and_small_ones_where_there_is_room() -> None:
    sizes, everywhere = [3, 9, 5, 1, 4], [False, False, False, True, False]
    job: Any = SimpleNamespace(
        config=SimpleNamespace(gpus=2),
        spec=SimpleNamespace(towers=[SimpleNamespace(everywhere=e) for e in everywhere]),
        weights=SimpleNamespace(towers=[SimpleNamespace(bytes=size) for size in sizes]),
    )
    assert place_on_gpus(job) == ((0,), (0,), (1,), (0, 1), (1,))


def test_what_compiling_for_a_gpu_needs_is_checked_first(
    make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refusal() -> ExportError:
        with pytest.raises(ExportError) as refused:
            export_bundle(make_bundle("dlrm"), out, ExportConfig(format="pt2", gpu=True))
        assert not out.exists()
        return refused.value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "triton" in str(refusal())
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu, "_cuda_home", lambda: None)
    assert "CUDA_HOME" in refusal().hint
    monkeypatch.setattr(gpu, "_cuda_home", lambda: tmp_path / "cuda")
    assert "has no include/cuda.h" in str(refusal())
    (tmp_path / "cuda/include").mkdir(parents=True)
    (tmp_path / "cuda/include/cuda.h").touch()
    gpu.check_gpu()
