"""What commands say of tables on every rank, and of tables that could be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.commands import Run

PASSTHROUGH = {"tower_module": "passthrough", "partition": "round-robin"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("replication")
    source = make_flat(folder / "ckpt.pt")
    return {
        name: convert_quickly(source, folder / name, **PASSTHROUGH, **options, report=True).path
        for name, options in {"some": {"replicate": "8"}, "none": {}}.items()
    }


def test_convert_says_what_could_be_on_every_rank(
    tmp_path: Path, call_dmt: Callable[..., Run]
) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    options = ["--towers", 2, "--tower-module", "passthrough", "--distill-steps", 0, "--out"]
    run = call_dmt("convert", source, *options, tmp_path / "plain")
    assert "note: 2 of 4 tables would be cheaper on every rank: --replicate auto" in run.stderr
    run = call_dmt("convert", source, *options, tmp_path / "auto", "--replicate", "auto", "--json")
    assert "would be cheaper" not in run.stderr
    value = json.loads(run.stdout)
    assert value["on_every_rank"] == [False, False, True] and value["compression"] == 2.0
    assert sorted(map(len, value["towers"])) == [1, 1, 2]


def test_plan_counts_their_gradients(
    bundles: dict[str, Path], call_dmt: Callable[..., Run]
) -> None:
    cluster = ["--hosts", 2, "--ranks-per-host", 2]
    run = call_dmt("plan", bundles["some"], *cluster)
    assert "2 of 4 tables, of up to 7 rows" in " ".join(run.stdout.split())
    assert "gradients per host and step" in " ".join(run.stdout.split())
    traffic = json.loads(call_dmt("plan", bundles["some"], *cluster, "--json").stdout)["traffic"]
    assert traffic["replicated_step_bytes"] == 2 * 4 * 8 * (7 + 6) * 3 / 4
    run = call_dmt("plan", bundles["none"], *cluster)
    assert "would be cheaper on every rank" in run.stderr


def test_a_prediction_can_be_asked_for(
    bundles: dict[str, Path], call_dmt: Callable[..., Run]
) -> None:
    cluster = ["--hosts", 2, "--ranks-per-host", 8, "--predict", "--json"]
    rows = {
        name: json.loads(call_dmt("plan", path, *cluster).stdout)["prediction"]["rows"][2]
        for name, path in bundles.items()
    }
    assert rows["some"]["forward_ms"] < rows["none"]["forward_ms"]
    assert rows["some"]["all_reduce_ms"] > rows["none"]["all_reduce_ms"]


def test_inspect_and_report_name_them(
    bundles: dict[str, Path], call_dmt: Callable[..., Run]
) -> None:
    assert "on every rank" in call_dmt("inspect", bundles["some"]).stdout
    page = (bundles["some"] / "report.html").read_text()
    assert "Tables on every rank" in page and "stays on every rank" in page
    assert "--replicate auto" in (bundles["none"] / "report.html").read_text()
