"""A user's network in graphs: without dense inputs, with constants that are no buffers."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch.export.graph_signature import InputKind

from dmt_convert.config import ExportConfig
from dmt_convert.errors import ExportError
from dmt_convert.serving import ExportedModel, export_bundle, exporter, pt2
from support.exports import checks_of

FEATURES = ("t0", "t1", "t2", "t3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"per_request": ("t0", "t1")}, {"format": "triton", "pooling_input": "padded"}],
    ids=["onnx", "requests", "triton"],
)
def test_without_dense_inputs_graphs_take_none(
    make_network_bundle: Any, export_unchecked: Any, options: dict[str, Any]
) -> None:
    bundle = make_network_bundle(num_dense=0)
    exported: ExportedModel = export_unchecked(bundle, **options)
    assert "dense" not in exported.manifest.inputs.names
    for part, name in exported.manifest.parts.items():
        graph = onnx.load(exported.path / name, load_external_data=False).graph
        taken = {value.name.split(".")[0] for value in graph.input}
        assert taken <= ({"tower_000", "tower_001"} if part == "over_arch" else {*FEATURES}), part
    checks = checks_of(exported, bundle)
    assert checks and [check.line for check in checks if not check.passed] == []
    if options.get("format") == "triton":
        assert "dense" not in (exported.path / "README.md").read_text()
        assert "dense" not in (exported.path / "dmt/config.pbtxt").read_text()


def test_dense_inputs_that_there_are_not_cannot_come_once(
    make_network_bundle: Any, tmp_path: Any
) -> None:
    config = ExportConfig(format="onnx", per_request=("t0", "t1"), dense_per_request=True)
    with pytest.raises(ExportError, match="without dense inputs"):
        export_bundle(make_network_bundle(num_dense=0), tmp_path / "out", config)
    every = ExportConfig(format="onnx", per_request=FEATURES)
    with pytest.raises(ExportError, match="every input comes once per request"):
        export_bundle(make_network_bundle(num_dense=0), tmp_path / "out", every)


@pytest.mark.slow
@pytest.mark.parametrize("num_dense", [pytest.param(0, marks=pytest.mark.exhaustive), 3])
def test_constants_of_the_code_are_weights_of_pt2_graphs(
    make_network_bundle: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, num_dense: int
) -> None:
    """All but the compiler, which would call literals by names of its own."""
    found = {}

    def trace(job: Any) -> Any:
        builder = pt2.MappedGraphs(job)
        graph, weights = builder.build("whole")
        found["program"] = program = pt2.trace_graph(graph, "cpu", builder.fakes)
        weights |= pt2.name_constants(program)
        assert {*program.state_dict, *program.constants} <= weights.keys()
        found["weights"] = weights
        found["inputs"] = [entry.name for entry in graph.inputs]
        return job.parts

    monkeypatch.setattr(pt2, "_compile", trace)
    monkeypatch.setattr(pt2, "_find_compiler", lambda: "none")
    monkeypatch.setattr(exporter, "check_graphs", lambda *_: ())
    config = ExportConfig(format="pt2", pooling_input="single")
    export_bundle(make_network_bundle(num_dense=num_dense), tmp_path / "out", config)
    kinds = {spec.kind for spec in found["program"].graph_signature.input_specs}
    assert kinds == {InputKind.PARAMETER, InputKind.BUFFER, InputKind.USER_INPUT}
    values = [w["values"] for w in found["weights"].values() if "values" in w]
    assert [float(i) for i in range(12)] in values
    assert torch.linspace(1, 2, num_dense + 32).tolist() in values
    assert found["inputs"] == ["dense", *FEATURES][not num_dense :]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("num_dense", "options"), [(0, {"quantize": "int8"}), (3, {"pooling_input": "padded"})]
)
def test_a_compiled_network_passes_its_checks(
    make_network_bundle: Any, tmp_path: Any, num_dense: int, options: dict[str, Any]
) -> None:
    config = ExportConfig(format="pt2", **options)
    done = export_bundle(make_network_bundle(num_dense=num_dense), tmp_path / "out", config)
    assert done.checks and all(check.passed for check in done.checks)
