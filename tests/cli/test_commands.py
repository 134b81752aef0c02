"""What every command prints, and where: results on stdout, all else on stderr."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CONTROL = ("\x1b", "\r", "━", "⠋")
Call = Callable[..., Any]


@pytest.fixture
def arguments(
    tmp_path: Path, flat: Path, exact: Path, compressed: Path, click_data: Path
) -> dict[str, list[object]]:
    """A run of every command that succeeds."""
    return {
        "inspect": [flat],
        "inspect a bundle": [compressed],
        "convert": [flat, "--towers", 2, "--out", tmp_path / "out", "--distill-steps", 0],
        "convert exactly": [
            *(flat, "--towers", 2, "--out", tmp_path / "out", "--tower-module", "passthrough"),
            *("--calibration", click_data),
        ],
        "convert (dry run)": [flat, "--towers", 2, "--out", tmp_path / "out", "--dry-run"],
        "partition": [flat, "--towers", 2, "--out", tmp_path / "towers.json"],
        "plan": [compressed, "--hosts", 2, "--ranks-per-host", 4, "--out", tmp_path / "plan.json"],
        "score": [compressed, "--data", click_data, "--out", tmp_path / "scores.npz"],
        "evaluate": [flat, "--data", click_data],
        "verify": [flat, exact, "--data", click_data, "--checksums"],
        "finetune (dry run)": [compressed, "--data", click_data, "--nproc", 4, "--dry-run"],
    }


def test_names_that_a_terminal_would_obey(flat: Path, tmp_path: Path, call_dmt: Call) -> None:
    odd = tmp_path / os.fsdecode(b"m\x1b[31m\xff.pt")  # a file name need be no text
    odd.write_bytes(flat.read_bytes())
    run = call_dmt("inspect", odd)
    assert run.code == 0 and "m\\x1b[31m\\udcff.pt" in run.stdout.replace("\n", "")
    run = call_dmt("inspect", odd, "--json")
    assert run.code == 0 and json.loads(run.stdout)["files"][0]["path"] == str(odd)
    odd.write_bytes(b"")
    run = call_dmt("inspect", odd)
    assert run.code == 3 and "\x1b" not in run.stderr and "m\\x1b[31m" in run.stderr
    run = call_dmt("inspect", odd, "--json")
    assert run.code == 3 and json.loads(run.stdout)["error"] == "CheckpointError"


COMMANDS = [
    "inspect",
    "inspect a bundle",
    "convert",
    "convert exactly",
    "convert (dry run)",
    "partition",
    "plan",
    "score",
    "evaluate",
    "verify",
    "finetune (dry run)",
]
KEYS = {
    "inspect": {"format", "files", "bytes", "spec", "facts", "tensors", "ignored"},
    "inspect a bundle": {"path", "schema_version", "source", "model", "quality", "weights"},
    "convert": {"bundle", "report", "towers", "tower_module", "compression", "quality", "facts"},
    "convert exactly": {"bundle", "initialisation", "quality"},
    "convert (dry run)": {"dry_run", "out", "spec", "towers", "tower_module", "table_bytes"},
    "partition": {"towers", "strategy", "affinity", "loads", "sample", "files"},
    "plan": {"cluster"},
    "score": {"out", "rows", "rows_per_s", "truth"},
    "evaluate": {"auc", "log_loss", "ne", "rows", "rows_per_s"},
    "verify": {"same", "first_difference", "checks", "skipped", "data", "atol", "rtol"},
    "finetune (dry run)": {"dry_run", "command"},
}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_document(
    command: str, arguments: dict[str, list[object]], call_dmt: Call
) -> None:
    run = call_dmt(command.split()[0], *arguments[command], "--json")
    assert run.code == 0, run.stderr
    value = json.loads(run.stdout, parse_constant=refuse)
    assert KEYS[command] <= set(value)
    assert run.stderr == ""


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("command", COMMANDS)
def test_people_read_text_without_control_characters_in_a_pipe(
    command: str, arguments: dict[str, list[object]], call_dmt: Call
) -> None:
    run = call_dmt(command.split()[0], *arguments[command])
    assert run.code == 0, run.stderr
    assert run.stdout.strip()
    for text in (run.stdout, run.stderr):
        assert not any(mark in text for mark in CONTROL), text


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_is_silent_but_for_the_result(
    command: str, arguments: dict[str, list[object]], call_dmt: Call
) -> None:
    run = call_dmt(command.split()[0], *arguments[command], "--quiet")
    assert run.code == 0
    assert run.stdout.strip()
    assert run.stderr == ""


def test_evaluate_has_exactly_these_keys(flat: Path, click_data: Path, call_dmt: Call) -> None:
    value = json.loads(call_dmt("evaluate", flat, "--data", click_data, "--json").stdout)
    assert list(value) == ["auc", "log_loss", "ne", "rows", "rows_per_s", "inputs"]
    assert value["rows"] == 300
    assert 0.3 < value["auc"] < 0.7  # the labels are noise
    assert value["ne"] > 1


def test_scores_of_the_exact_bundle_are_the_flat_ones(
    tmp_path: Path, flat: Path, exact: Path, compressed: Path, click_data: Path, call_dmt: Call
) -> None:
    logits = {}
    for model in (flat, exact, compressed):
        out = tmp_path / f"{model.name}.npz"
        assert call_dmt("score", model, "--data", click_data, "--out", out).code == 0
        with np.load(out) as file:
            assert file.files == ["logits"]
            logits[model] = file["logits"]
        assert logits[model].shape == (300,)
    assert np.array_equal(logits[flat], logits[exact])
    assert not np.array_equal(logits[flat], logits[compressed])
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_scores_never_replace_what_is_read(
    tmp_path: Path, flat: Path, click_data: Path, call_dmt: Call
) -> None:
    for target in (flat, click_data):
        before = target.read_bytes()
        run = call_dmt("score", flat, "--data", click_data, "--out", target)
        assert run.code == 3
        assert f"--out {target} is {target}, which is read" in run.stderr
        assert target.read_bytes() == before
    for out, found in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.npz", "does not exist")):
        run = call_dmt("score", flat, "--data", click_data, "--out", out)
        assert run.code == 3
        assert found in run.stderr


def test_a_written_partition_is_read_again(tmp_path: Path, flat: Path, call_dmt: Call) -> None:
    towers, plot = tmp_path / "towers.json", tmp_path / "towers.svg"
    run = call_dmt("partition", flat, "--towers", 2, "--out", towers, "--plot", plot, "--json")
    assert json.loads(run.stdout)["files"] == [str(towers), str(plot)]
    assert plot.read_text("utf-8").startswith("<?xml")
    wanted = json.loads(towers.read_text("utf-8"))["towers"]
    again = call_dmt("partition", flat, "--partition", towers, "--json")
    assert json.loads(again.stdout)["towers"] == wanted
    dry = call_dmt("convert", flat, "--partition", towers, "--dry-run", "--json")
    assert json.loads(dry.stdout)["assignment"] == wanted


def test_a_written_plan_is_the_printed_one(
    tmp_path: Path, compressed: Path, call_dmt: Call
) -> None:
    out = tmp_path / "plan.json"
    run = call_dmt("plan", compressed, "--hosts", 2, "--ranks-per-host", 1, "--out", out, "--json")
    assert json.loads(run.stdout) == json.loads(out.read_text("utf-8"))


def test_a_dry_run_writes_nothing(tmp_path: Path, flat: Path, call_dmt: Call) -> None:
    run = call_dmt("convert", flat, "--towers", 2, "--out", tmp_path / "out", "--dry-run")
    assert run.code == 0
    assert "would write" in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_calibration_with_labels_gives_auc_before_and_after(
    tmp_path: Path, flat: Path, click_data: Path, call_dmt: Call
) -> None:
    out = tmp_path / "out"
    run = call_dmt(
        "convert",
        flat,
        "--towers",
        2,
        "--out",
        out,
        "--calibration",
        click_data,
        "--dim",
        2,
        "--json",
    )
    quality = json.loads(run.stdout)["quality"]
    assert quality["labelled"] is True
    assert quality["count"] == 75
    assert [row["name"] for row in quality["rows"]] == [
        "flat",
        "closed form",
        "random initialisation",
    ]
    for row in quality["rows"]:
        assert 0 < row["auc"] < 1
        assert row["ne"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_the_summary_says_what_was_assumed_and_how_to_get_the_exact_model(
    tmp_path: Path, flat: Path, call_dmt: Call
) -> None:
    run = call_dmt("convert", flat, "--towers", 2, "--out", tmp_path / "out")
    assert "assumed: pooling = sum" in run.stderr
    assert "--model-config" in run.stderr
    assert f"exact model: dmt convert {flat} --towers 2 --tower-module passthrough" in run.stderr
    assert f"next: dmt evaluate {tmp_path / 'out'} --data DATA\n" in run.stderr
    assert f"dmt finetune {tmp_path / 'out'}" in run.stderr
    assert f"dmt export {tmp_path / 'out'}" in run.stderr
    assert "R^2" in run.stdout
