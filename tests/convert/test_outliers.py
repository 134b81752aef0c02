"""Conversions of checkpoints with a flipped exponent, and of models that no tower can follow."""

import pytest
import torch

from support.checkpoints.flat import TORCHREC_TABLE, make_flat
from support.refusals import check_refusal

pytestmark = pytest.mark.usefixtures("few_rows", "no_report")

OVER = "over_arch.model.0._mlp.0._linear.weight"


def spoil(name, value, place=(3, 2)):
    def edit(state):
        state[name][place] = value

    return edit


@pytest.mark.parametrize("name", [TORCHREC_TABLE.format(1), OVER])
@pytest.mark.parametrize("value", [1e37, -1e20, 1e9])
@pytest.mark.parametrize("command", ["convert", "partition"])
def test_an_absurd_weight_is_named(tmp_path, call_dmt, name, value, command):
    source = make_flat(tmp_path / "ckpt.pt", edit=spoil(name, value))
    run = call_dmt(command, source, "--towers", 2, "--json")
    check_refusal(run, "CheckpointError", "row 3, column 2")
    assert name in run.stderr and "RMS of the others" in run.stderr
    assert "Warning" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_an_accepted_one_is_converted_exactly_or_refused(tmp_path, call_dmt):
    source = make_flat(tmp_path / "ckpt.pt", edit=spoil(TORCHREC_TABLE.format(1), 1e20))
    accept = (source, "--towers", 2, "--outliers", "accept", "--json")
    run = call_dmt("convert", *accept, "--tower-module", "passthrough")
    assert run.code == 0, run
    run = call_dmt("convert", *accept, "--out", tmp_path / "towers")
    assert run.code in (0, 3) and "Warning" not in run.stderr and "bug" not in run.stderr


@pytest.mark.parametrize("interaction", ["dot", "dcn", "projection"])
def test_logits_that_are_not_finite_are_refused(tmp_path, call_dmt, interaction):
    def edit(state):
        for name in state:
            state[name] *= 1e25 if name.startswith("over_arch") else 1

    source = make_flat(tmp_path / "ckpt.pt", edit=edit, interaction=interaction)
    run = call_dmt("convert", source, "--towers", 2, "--outliers", "accept", "--json")
    check_refusal(run, "CheckpointError", "logits are NaN or Inf")
    assert "Warning" not in run.stderr


def test_a_fit_that_fails_names_tensors(monkeypatch, tmp_path, call_dmt):
    from dmt_convert.conversion.initialisation import ridge

    def fail(*args):
        raise torch.linalg.LinAlgError("linalg.cholesky: not positive-definite")

    monkeypatch.setattr(ridge, "_solve", fail)
    run = call_dmt("convert", make_flat(tmp_path / "ckpt.pt"), "--towers", 2, "--dim", 2, "--json")
    check_refusal(run, "CheckpointError", "towers cannot be fitted")
    assert "largest value" in run.stderr and "passthrough" in run.stderr


def test_an_absurd_accumulator_is_left_out_and_named(tmp_path, call_dmt):
    def edit(state):
        sums = torch.rand(50)
        sums[17] = 1e30
        model = dict(state)
        state.clear()
        state["model"] = model
        state["optimizer"] = {"state": {TORCHREC_TABLE.format(1): {"sum": sums}}}

    run = call_dmt(
        "convert", make_flat(tmp_path / "ckpt.pt", edit=edit), "--towers", 2, "--distill-steps", 0
    )
    assert run.code == 0, run
    assert "1e+30" in run.stderr and "left out" in run.stderr


def test_low_agreement_and_discarded_steps_are_said(tmp_path, call_dmt):
    source = make_flat(tmp_path / "ckpt.pt")
    run = call_dmt("convert", source, "--towers", 2, "--dim", 1, "--distill-steps", 0)
    assert run.code == 0 and "R^2 of the logits is" in run.stderr and "below 0.9" in run.stderr
    run = call_dmt(
        "convert", source, "--towers", 2, "--tower-module", "passthrough", "--distill-steps", 9,
        "--out", tmp_path / "exact",
    )  # fmt: skip
    assert run.code == 0 and "--distill-steps 9 changed nothing" in run.stderr
    assert "below 0.9" not in run.stderr


@pytest.mark.parametrize("module", ["auto", "linear"])
def test_towers_wider_than_the_model_are_refused(tmp_path, call_dmt, module):
    run = call_dmt(
        "convert", make_flat(tmp_path / "ckpt.pt"), "--towers", 2, "--dim", 100,
        "--tower-module", module, "--dry-run", "--json",
    )  # fmt: skip
    check_refusal(run, "ConfigError", "--dim 100")


def test_a_dry_run_opens_the_calibration_data(tmp_path, call_dmt):
    run = call_dmt(
        "convert", make_flat(tmp_path / "ckpt.pt"), "--towers", 2, "--dry-run", "--json",
        "--calibration", tmp_path / "nope.npz",
    )  # fmt: skip
    check_refusal(run, "DataError", "nope.npz")
