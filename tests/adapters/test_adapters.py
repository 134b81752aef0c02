"""A model of the user's own: the documented example through the commands, and what is refused."""

from __future__ import annotations

import json

import pytest

from dmt_convert.bundle import open_bundle
from dmt_convert.report.view import ReportView


def _json(run):
    return json.loads(run.stdout)


@pytest.fixture
def bundle(example, call_dmt, tmp_path, few_rows, no_report):
    """A passthrough bundle of the example."""
    out = tmp_path / "exact"
    run = call_dmt(
        "convert", example.checkpoint, "--towers", 2, "--tower-module", "passthrough",
        "--model", example.model, "--out", out, "--quiet",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    return out


def test_the_example_scores_as_its_trainer_does(example, call_dmt, tmp_path):
    run = call_dmt("inspect", example.checkpoint, "--model", example.model, "--json")
    assert run.code == 0, run.stderr
    spec = _json(run)["spec"]
    assert spec["family"] == "xlrm" and spec["interaction"]["network"]["file"] == "xlrm.py"
    assert [table["rows"] for table in spec["tables"]] == [60, 40, 9]
    run = call_dmt("inspect", example.checkpoint, "--model", example.model)
    assert "network xlrm.py" in run.stdout
    run = call_dmt(
        "score", example.checkpoint, "--model", example.model, "--data", example.probe,
        "--out", tmp_path / "scores.npz", "--json",
    )  # fmt: skip
    assert _json(run)["truth"]["max_abs_diff"] < 1e-6


def test_passthrough_towers_are_the_flat_model(example, call_dmt, bundle):
    run = call_dmt(
        "verify", example.checkpoint, bundle, "--model", example.model, "--data", example.probe,
        "--atol", 0, "--rtol", 0, "--json",
    )  # fmt: skip
    checks = {check["stage"]: check for check in _json(run)["checks"]}
    assert checks["logit"]["identical"]
    assert checks["logit of the original model (from the data), against A"]["max_abs_diff"] < 1e-6


def test_linear_towers_by_default(example, call_dmt, tmp_path, few_rows, no_report):
    run = call_dmt(
        "convert", example.checkpoint, "--towers", 2, "--model", example.model,
        "--out", tmp_path / "out", "--distill-steps", 100, "--compression", 8, "--json",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    value = _json(run)
    assert value["tower_module"]["kind"] == "linear" and value["compression"] >= 8
    quality = {row["name"]: row["r2"] for row in value["quality"]["rows"]}
    assert quality["closed form"] > quality["random initialisation"] + 0.2
    assert value["partition"]["strategy"] == "loss"


def test_the_report_names_the_file_in_its_commands(bundle):
    opened = open_bundle(bundle)
    view = ReportView(
        manifest=opened.manifest, plan=opened.plan, folder=bundle.name, figure="<svg/>"
    )
    commands = [command for _, command in view.commands]
    assert f"dmt evaluate {bundle.name} --data DATA --model xlrm.py" in commands
    assert f"dmt plan {bundle.name} --hosts 2 --ranks-per-host 8" in commands


def test_a_bundle_wants_its_file(example, call_dmt, bundle, tmp_path, monkeypatch):
    from dmt_convert import adapter
    from dmt_convert.model import count_parameters

    def score(*more):
        monkeypatch.setattr(adapter, "_loaded", {})
        out = tmp_path / "s.npz"
        return call_dmt("score", bundle, "--data", example.probe, "--out", out, "--quiet", *more)

    without = score()
    assert without.code == 3 and "add --model xlrm.py" in without.stderr
    other = tmp_path / "xlrm.py"
    other.write_text(example.model.read_text() + "\n# another\n")
    changed = score("--model", other)
    assert changed.code == 3 and "the same file, to the byte" in changed.stderr
    assert score("--model", example.model).code == 0
    for command in (["finetune", "--data", example.clicks], ["plan", "--hosts", 1]):
        monkeypatch.setattr(adapter, "_loaded", {})
        count_parameters.cache_clear()
        more = ["--ranks-per-host", 2, "--predict", "--gpu", "h100"] if command[0] == "plan" else []
        run = call_dmt(command[0], bundle, *command[1:], *more)
        assert run.code == 3 and "--model xlrm.py" in run.stderr, run.stderr


SPOILED = {
    "syntax": ("num_dense=6,", "num_dense=,", ", line {line}: it failed: SyntaxError"),
    "raises": (
        "ADAPTER = Adapter(",
        "1 / 0\nADAPTER = Adapter(",
        ", line {line}: it failed: ZeroDiv",
    ),
    "exits": (
        "ADAPTER = Adapter(",
        "raise SystemExit(0)\nADAPTER = Adapter(",
        ", line {line}: it failed: SystemExit",
    ),
    "nothing": ("ADAPTER = Adapter(", "OTHER = Adapter(", "sets no ADAPTER"),
    "type": ("num_dense=6,", 'num_dense="6",', "num_dense is '6'"),
    "build": ("width = dims[0]", "width = dims[9]", ", line {line}: network failed: IndexError"),
    "forward": (".squeeze(1)\n", ".squeeze(7)\n", ", line {line}: the network's forward() failed"),
    "shape": (".squeeze(1)\n", "\n", "returned a tensor of shape [2, 1]"),
    "names": ("self.norm ", "self.other ", "missing: other.weight"),
    "table": ('table="t_shop"', 'table="t_shops"', "uses table 't_shops', which does not exist"),
    "pooling": ('pooling="mean"', 'pooling="max"', "has pooling 'max'"),
    "module": ("DensePart(list(dims), num_dense)", "3", "returned a int"),
    "prefix": ('prefix="dense_part."', "prefix=3", "prefix is a int, not a string"),
    "features": (
        'name="xlrm",\n)',
        'name="xlrm",\n)\nfrom dataclasses import replace\n'
        'ADAPTER = replace(ADAPTER, features="t_user")',
        "features is a str, not a list",
    ),
    "rename": ('name="xlrm"', "rename=lambda n: n[99]", ": rename("),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_errors_of_the_file_are_the_users(kind, example, call_dmt, tmp_path):
    before, after, said = SPOILED[kind]
    text = example.model.read_text()
    assert before in text
    model = tmp_path / "mine.py"
    model.write_text(spoiled := text.replace(before, after))
    said = said.format(line=1 + spoiled[: spoiled.index(after)].count("\n"))
    run = call_dmt("inspect", example.checkpoint, "--model", model)
    assert run.code == 3, run.stderr
    assert said in run.stderr and "Traceback" not in run.stderr


def test_the_file_is_not_run_unless_it_is_given(example, call_dmt, bundle, tmp_path, monkeypatch):
    from dmt_convert import adapter

    monkeypatch.setattr(adapter, "_loaded", {})
    monkeypatch.setattr(adapter, "_run_file", lambda *_: pytest.fail("was run"))
    monkeypatch.chdir(example.model.parent)
    assert call_dmt("inspect", bundle).code == 0
    assert call_dmt("inspect", example.checkpoint).code == 3
