"""A user's network in ONNX graphs."""

from __future__ import annotations

import pytest
import torch

import dmt_convert as dmt
from dmt_convert.bundle import open_bundle_model
from dmt_convert.config import ExportConfig
from dmt_convert.errors import ConfigError, ExportError
from dmt_convert.serving import ExportedModel, export_bundle
from support.exports import checks_of
from support.shortcuts import skip_export_checks

GROUPS = (("user", ("user", "shop")), ("item", ("item", "last_items")))


@pytest.fixture
def bundle(example, tmp_path, few_rows, no_report):
    settings = {"tower_module": "linear", "model": example.model, "distill_steps": 0}
    return dmt.convert(example.checkpoint, tmp_path / "bundle", towers=2, group=GROUPS, **settings)


@pytest.fixture
def failed_checks(bundle, tmp_path, monkeypatch):
    """Export, run the graphs, and return what differs from the model."""
    skip_export_checks(monkeypatch)

    def export(name, **options):
        out = tmp_path / name
        export_bundle(bundle, out, ExportConfig(format="onnx", **options))
        checks = checks_of(ExportedModel(out), bundle)
        assert checks
        return {check.part for check in checks if not check.passed}

    return export


@pytest.mark.slow
def test_graphs_answer_like_the_model(failed_checks, tmp_path, monkeypatch):
    from dmt_convert.serving.onnx_dense import DenseNodes

    assert failed_checks("plain") == set()
    graph = (tmp_path / "plain/over_arch/over_arch.onnx").read_bytes()
    assert b"over_arch.safetensors:network.query_key_value.weight" in graph
    assert len(graph) < 16_000, "weights stay in their file"
    assert b"xlrm.py" not in graph, "nothing of where the user's file is"
    assert failed_checks("requests", per_request=("user", "shop")) == set()
    plain = DenseNodes.add_head
    monkeypatch.setattr(
        DenseNodes,
        "add_head",
        lambda self, graph, dense, emitted, output: plain(
            self, graph, dense, emitted[::-1], output
        ),
    )
    assert failed_checks("sabotaged") == {"joined", "whole"}


@pytest.mark.slow
def test_graphs_for_pt2_are_traced_whole(bundle, tmp_path, monkeypatch):
    """All but the compiler: traced graphs, of another batch size, with the weights named."""
    from dmt_convert.serving import pt2

    programs = {}

    def trace(job):
        builder = pt2.MappedGraphs(job)
        graph, weights = builder.build("over_arch")
        programs["over_arch"] = program = pt2.trace_graph(graph, "cpu", builder.fakes)
        assert {*program.state_dict, *program.constants} <= weights.keys()
        return job.parts

    monkeypatch.setattr(pt2, "_compile", trace)
    monkeypatch.setattr(pt2, "_find_compiler", lambda: "none")
    skip_export_checks(monkeypatch)
    export_bundle(bundle, tmp_path / "pt2", ExportConfig(format="pt2"))
    model = open_bundle_model(bundle)
    emitted = [torch.randn(9, width) for width in model.spec.tower_widths]
    dense = torch.rand(9, 6)
    with torch.no_grad():
        expected = model.forward_emitted(dense, torch.cat(emitted, dim=1))
        found = programs["over_arch"].module()(dense, *emitted)[:, 0]
        swapped = programs["over_arch"].module()(dense.flip(0), *emitted)[:, 0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    assert not torch.allclose(swapped, expected, rtol=2e-5, atol=1e-6)


def test_a_network_that_branches_on_values_is_refused(example, bundle, tmp_path, monkeypatch):
    from dmt_convert import adapter
    from dmt_convert.serving import onnx_dense

    loaded = adapter.load_adapter(example.model)
    kind = type(loaded.adapter.network([16] * 4, 6))
    plain = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, d, p: plain(self, d, p) if d.sum() > 0 else d[:, 0]
    )
    onnx_dense.trace_parts.cache_clear()
    config = ExportConfig(format="onnx")
    with pytest.raises(ExportError, match=r"torch cannot write the network xlrm\.py as a graph"):
        export_bundle(bundle, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(adapter, "_loaded", {})
    with pytest.raises(ConfigError, match="defined by a file"):
        export_bundle(bundle, tmp_path / "out", config)
