"""`dmt export`, and the commands that take what it writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import run_dmt

Dmt = Callable[..., Any]


@pytest.fixture(scope="session")
def served(compressed: Path) -> Path:
    """An ONNX export of the compressed bundle."""
    out = compressed.parent / "served"
    done = run_dmt("export", compressed, "--format", "onnx", "--out", out)
    assert done.code == 0, done.stderr
    assert "Checked against the bundle" in done.stdout and "FAILED" not in done.stdout
    return out


@pytest.mark.slow
def test_an_export_scores_like_its_bundle(
    served: Path, compressed: Path, call_dmt: Dmt, click_data: Path
) -> None:
    both = [
        json.loads(call_dmt("evaluate", model, "--data", click_data, "--json").stdout)
        for model in (served, compressed)
    ]
    assert both[0]["auc"] == pytest.approx(both[1]["auc"], abs=1e-4)
    same = call_dmt("verify", compressed, served, "--data", click_data, "--checksums", "--json")
    report = json.loads(same.stdout)
    assert same.code == 0 and report["same"]
    assert {check["stage"] for check in report["checks"]} == {
        "output of tower 0",
        "output of tower 1",
        "logit",
    }
    scores = served.parent / "served.npz"
    assert call_dmt("score", served, "--data", click_data, "--out", scores).code == 0


@pytest.mark.slow
def test_a_compressed_export_differs_from_the_flat_model(
    served: Path, flat: Path, call_dmt: Dmt
) -> None:
    done = call_dmt("verify", flat, served)
    assert done.code == 4
    assert "fewer bytes" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_inspect_says_what_the_graphs_take(served: Path, call_dmt: Dmt) -> None:
    done = call_dmt("inspect", served)
    assert done.code == 0
    assert "cat_0.values, cat_0.lengths" in done.stdout and "whole.onnx" in done.stdout
    assert json.loads(call_dmt("inspect", served, "--json").stdout)["format"] == "onnx"


@pytest.mark.slow
def test_weights_are_shared_and_described(served: Path, compressed: Path) -> None:
    manifest = json.loads((served / "export.json").read_text())
    for name, entry in manifest["weights"].items():
        assert (served / name).stat().st_size == entry["bytes"]
    tower = served / "tower_000" / "tower.safetensors"
    assert tower.samefile(compressed / "weights" / "tower_000.safetensors")
    assert len(manifest["checks"]) > 20 and all(check["passed"] for check in manifest["checks"])


@pytest.mark.slow
def test_a_graph_that_differs_is_not_left_in_place(
    compressed: Path, call_dmt: Dmt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmt_convert.serving.onnx_dense import DenseNodes

    right = DenseNodes.add_head
    monkeypatch.setattr(
        DenseNodes,
        "add_head",
        lambda self, graph, dense, emitted, output: right(
            self, graph, dense, emitted[::-1], output
        ),
    )
    done = call_dmt("export", compressed, "--format", "onnx", "--out", tmp_path / "out")
    assert done.code == 4
    assert "the graphs differ from the model" in done.stderr and "joined" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "found", "hint"),
    [
        (["--format", "tflite"], 2, "--format must be one of", "onnx, pt2, triton"),
        (["--format", "onnx", "--pooling-input", "ragged"], 2, "--pooling-input must", "jagged"),
        (["--format", "onnx", "--pooling-input", "who=single"], 3, "who", "cat_0"),
        (["--format", "onnx", "--quantize", "int2"], 2, "--quantize must be one of", "int4"),
        (["--format", "onnx", "--request-batching"], 3, "no group 'user'", "--group user"),
        (["--format", "onnx", "--dense-per-request"], 2, "--dense-per-request", "needs --request"),
        (["--format", "onnx", "--max-auc-loss", "0.1"], 2, "--max-auc-loss", "--quantize"),
    ],
)
def test_requests_that_cannot_be(
    compressed: Path,
    call_dmt: Dmt,
    tmp_path: Path,
    options: list[str],
    code: int,
    found: str,
    hint: str,
) -> None:
    done = call_dmt("export", compressed, *options, "--out", tmp_path / "out", "--json")
    assert done.code == code, done.stderr
    value = json.loads(done.stdout)
    assert found in value["found"]
    assert hint in value["found"] + value["expected"] + value["hint"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_there_is_never_touched(served: Path, compressed: Path, call_dmt: Dmt) -> None:
    before = sorted(path.stat().st_mtime_ns for path in served.rglob("*"))
    done = call_dmt("export", compressed, "--format", "onnx", "--out", served)
    assert done.code == 3 and "exists" in done.stderr
    assert sorted(path.stat().st_mtime_ns for path in served.rglob("*")) == before


@pytest.mark.slow
def test_a_damaged_export_is_refused(served: Path, call_dmt: Dmt, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(served, copy)
    weights = copy / "tower_001" / "tower.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = call_dmt("verify", served, copy, "--checksums")
    assert done.code == 3 and "changed on disk" in done.stderr
    weights.write_bytes(data[:-4])
    done = call_dmt("inspect", copy)
    assert done.code == 3 and "tower_001/tower.safetensors has" in done.stderr
    weights.unlink()
    assert "is missing" in call_dmt("inspect", copy).stderr


@pytest.mark.slow
def test_quantised_tables_are_announced(
    compressed: Path, call_dmt: Dmt, click_data: Path, tmp_path: Path
) -> None:
    options = ["--format", "onnx", "--quantize", "int8", "--data", click_data]
    done = call_dmt("export", compressed, *options, "--out", tmp_path / "out", "--pooling-input")
    assert done.code == 2
    options += ["--pooling-input", "single"]
    done = call_dmt("export", compressed, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "tables as int8" in done.stderr and "AUC" in done.stderr
