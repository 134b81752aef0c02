"""A captured model's bundle is whole: everything works from it alone, and what was edited does not.

The model is the documented example, converted by its checkpoint and file; then the file is gone.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import dmt_convert as dmt
from dmt_convert import adapter
from dmt_convert.bundle import open_bundle, open_bundle_model
from dmt_convert.config import ExportConfig
from dmt_convert.documents import digest_document
from dmt_convert.errors import BundleError, DataError, UsageError
from dmt_convert.recipes.finetune_dmt import main
from dmt_convert.serving import ExportedModel, export_bundle
from dmt_convert.training import finetuned
from support import captured_models as models
from support.exports import checks_of
from support.rows import write_schema
from support.shortcuts import sample_few, skip_export_checks, skip_report

pytestmark = pytest.mark.slow


def convert(out, source, **settings):
    """Convert quickly."""
    with pytest.MonkeyPatch.context() as patch:
        sample_few(patch)
        skip_report(patch)
        return dmt.convert(source, out, towers=2, distill_steps=0, **settings)


@pytest.fixture(scope="module")
def bundle(example, tmp_path_factory):
    """The example in exact towers."""
    out = tmp_path_factory.mktemp("captured") / "exact"
    made = convert(out, example.checkpoint, model=example.model, tower_module="passthrough")
    adapter._loaded.clear()
    return made


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks")
    rng = np.random.default_rng(0)
    user, item, last = (rng.integers(1, n, 600) for n in (60, 40, 40))
    dense = rng.random((600, 2), dtype=np.float32)
    label = (dense[:, 0] + user % 2 > 1).astype(np.uint8)
    sparse = np.stack([user, item, last], 1).astype(np.int32)
    np.savez(folder / "train.npz", dense=dense, sparse=sparse, label=label)
    write_schema(folder, ["user", "item", "last_items"])
    return folder / "train.npz"


def test_the_example_scores_as_its_trainer_does(example, bundle, call_dmt, tmp_path):
    run = call_dmt(
        "verify", example.checkpoint, bundle.path, "--model", example.model,
        "--data", example.probe, "--atol", 0, "--rtol", 0, "--json",
    )  # fmt: skip
    checks = {check["stage"]: check for check in json.loads(run.stdout)["checks"]}
    assert checks["logit"]["identical"]
    # the trainer's model is run in float64, to undo its sigmoid
    assert checks["logit of the original model (from the data), against A"]["max_abs_diff"] < 1e-5
    adapter._loaded.clear()
    scores = dmt.score(bundle.path, example.probe)
    assert scores.agreement is not None and scores.agreement.max_abs_diff < 1e-5
    flat = bundle.manifest.model.flat
    assert flat.family == "Ctr" and flat.final_sigmoid
    assert {t.name: t.dim for t in flat.tables} == {"user": 9, "item": 9, "last_items": 8}


def test_labelled_rows_are_evaluated_and_padding_is_refused(bundle, clicks, tmp_path):
    assert 0.3 < dmt.evaluate(bundle.path, clicks).auc < 0.7
    shutil.copy(clicks.parent / "schema.json", tmp_path)
    arrays = dict(np.load(clicks))
    arrays["sparse"][7, 2] = 0
    np.savez(tmp_path / "padded.npz", **arrays)
    with pytest.raises(DataError, match="feature 'last_items': row 7 of a batch holds the id 0"):
        dmt.score(bundle.path, tmp_path / "padded.npz")
    report = dmt.check_data(bundle.path, tmp_path / "padded.npz")
    assert not report.usable and "holds the id 0 1 times" in str(report.faults[0])


def test_a_live_module_is_converted_and_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    module = models.DeepFm()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UsageError, match="a DeepFm without an example"):
        dmt.convert(module, towers=2)
    made = convert(tmp_path / "b", module, example=(models.matrix(),), tower_module="passthrough")
    assert module.training and all(
        torch.equal(value, before[name]) for name, value in module.state_dict().items()
    )
    x = models.matrix(50, seed=3)
    with torch.no_grad():
        found = made.model()(x[:, 3:], {f"x_{i}": x[:, i].long() for i in range(3)})
        expected = module.eval()(x)[:, 0]
    torch.testing.assert_close(torch.sigmoid(found), expected, rtol=0, atol=1e-6)


def test_the_network_is_tuned_but_for_its_statistics(bundle, clicks, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuned, "render_documents", lambda *_, **__: {})
    options = {
        "--bundle": bundle.path, "--data": clicks, "--out": tmp_path / "tuned",
        "--max-steps": 20, "--dense-lr": 0.01,
    }  # fmt: skip
    main([str(part) for pair in options.items() for part in pair] + ["--quiet"])
    start = open_bundle_model(bundle).state_dict()
    tuned = open_bundle_model(open_bundle(tmp_path / "tuned")).state_dict()
    kept = {name for name, value in start.items() if torch.equal(value, tuned[name])}
    assert kept == {f"interaction.network.top.1.running_{name}" for name in ("mean", "var")}


def test_graphs_answer_like_the_model(example, bundle, tmp_path, monkeypatch):
    skip_export_checks(monkeypatch)
    export_bundle(bundle, tmp_path / "onnx", ExportConfig(format="onnx"))
    checks = checks_of(ExportedModel(tmp_path / "onnx"), bundle)
    assert checks and all(check.passed for check in checks)
    model = open_bundle_model(bundle)
    with torch.no_grad():
        model.interaction.network.top._modules["0"].weight += 0.1
    monkeypatch.setattr("support.exports.open_bundle_model", lambda _: model)
    changed = checks_of(ExportedModel(tmp_path / "onnx"), bundle)
    assert {check.part for check in changed if not check.passed} >= {"whole"}


def test_graphs_for_pt2_are_traced_whole(bundle, tmp_path, monkeypatch):
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
    dense = torch.rand(9, 2)
    with torch.no_grad():
        expected = model.forward_emitted(dense, torch.cat(emitted, dim=1))
        found = programs["over_arch"].module()(dense, *emitted)[:, 0]
        swapped = programs["over_arch"].module()(dense.flip(0), *emitted)[:, 0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    assert not torch.allclose(swapped, expected, rtol=2e-5, atol=1e-6)


EDITS = {
    "operator": (lambda c: c["nodes"][0].__setitem__(1, "aten.bernoulli.default"), "unknown op"),
    "shape": (lambda c: c["weights"]["top.3.bias"].__setitem__("shape", [2]), "stored is [1]"),
    "cycle": (lambda c: c["nodes"].append(c["nodes"].pop(0)), "has not been computed"),
    "huge": (lambda c: c["weights"]["top.3.bias"].__setitem__("shape", [1 << 40]), "has shape"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_graph_is_refused_when_the_bundle_is_opened(kind, bundle, tmp_path):
    edit, said = EDITS[kind]
    shutil.copytree(bundle.path, tmp_path / "b")
    path = tmp_path / "b/dmt.json"
    manifest = json.loads(path.read_text())
    edit(manifest["model"]["flat"]["interaction"]["network"]["config"])
    for key in ("digest", "model_digest"):
        if key in manifest:
            part = manifest if key == "digest" else manifest["model"]
            manifest[key] = digest_document(part)
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="may not be run") as error:
        open_bundle(tmp_path / "b")
    assert said in "\n".join(error.value.details)


def test_a_file_must_build_what_was_saved(example, call_dmt, tmp_path):
    text = example.model.read_text()
    spoiled = {
        "raises": (text.replace("return Ctr()", "raise KeyError('gone')"), "build() failed: Key"),
        "other": (text.replace("return Ctr()", "return Ctr(dim=4)"), "wrong shape: model.user.we"),
        "missing": (
            text.replace("return Ctr()", "return nn.Embedding(3, 2)"),
            "holds 8 models with",
        ),
        "nothing": (text.replace("return Ctr()", "return 3"), "build() of"),
        "no example": (text.replace("def example", "def sample"), "no function example()"),
        "range": (text.replace("[3, 59, 7, 0]", "[3, 60, 7, 0]"), "cannot be run on the example"),
    }
    for name, (content, said) in spoiled.items():
        path = tmp_path / f"{name}.py"
        path.write_text(content)
        run = call_dmt("inspect", example.checkpoint, "--model", path)
        assert run.code == 3 and said in run.stderr, (name, run.stderr)
        assert "Traceback" not in run.stderr


def test_the_file_is_not_run_unless_it_is_given(example, bundle, call_dmt, monkeypatch):
    adapter._loaded.clear()
    monkeypatch.setattr(adapter, "_run_file", lambda *_: pytest.fail("was run"))
    monkeypatch.chdir(example.model.parent)
    assert call_dmt("inspect", bundle.path).code == 0
    assert call_dmt("inspect", example.checkpoint).code == 3
