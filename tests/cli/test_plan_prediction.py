"""`dmt plan --predict`: what it prints and refuses, and that the plan itself stays the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

PLAN = ["--hosts", 2, "--ranks-per-host", 4]
ROW = {
    "variant", "step_ms", "speedup", "communication_ms", "compute_ms", "overhead_ms", "lookup_ms",
    "reshuffle_ms", "tower_ms", "dense_ms", "indices_ms", "forward_ms", "backward_ms",
    "all_reduce_ms", "exposed_ms", "forward_bytes", "gradient_bytes",
}  # fmt: skip
POINT = {
    "ranks", "hosts", "towers", "compression", "flat_ms", "sptt_ms", "dmt_ms", "flat_exposed_ms",
    "sptt_exposed_ms", "dmt_exposed_ms", "sptt_speedup", "dmt_speedup",
}  # fmt: skip


def predict(call_dmt: Call, bundle: Path, *options: object) -> dict[str, Any]:
    run = call_dmt("plan", bundle, *PLAN, *options, "--json")
    assert run.code == 0, run.stderr
    value = json.loads(run.stdout)
    assert isinstance(value, dict)
    return value


def test_a_prediction_is_one_more_key(compressed: Path, call_dmt: Call) -> None:
    bare = predict(call_dmt, compressed)
    assert "prediction" not in bare
    value = predict(call_dmt, compressed, "--predict")
    found = value.pop("prediction")
    assert value == bare
    assert set(found) == {
        "modelled", "gpu", "hosts", "ranks_per_host", "batch", "comm_dtype", "ids_per_bag",
        "matmul_precision", "assumptions", "rows", "as_placed", "suggestion", "candidates",
        "towers_that_do_not_fit",
    }  # fmt: skip
    assert found["modelled"] is True
    assert (found["batch"], found["comm_dtype"], found["ids_per_bag"]) == (1024, "fp32", 1.0)
    assert [row["variant"] for row in found["rows"]] == ["flat", "flat2d", "sptt", "dmt"]
    assert found["matmul_precision"] == "high"
    assert all(set(row) - {"copies"} == ROW for row in found["rows"])
    choice = {"towers", "compression", "step_ms", "speedup"}
    assert set(found["suggestion"]) == choice | {"beats_flat"}
    assert 0 < len(found["candidates"]) <= 5
    assert all(set(candidate) == choice for candidate in found["candidates"])
    assert set(found["as_placed"]) == {"step_ms", "speedup", "busiest_rank"}


def test_options_reach_the_model(compressed: Path, call_dmt: Call) -> None:
    options = ("--gpu", "V100", "--batch", 64, "--comm-dtype", "bf16", "--ids-per-bag", 3)
    assumed = ("--assume", "launch_us=1", "--assume", "scale_loss=0.5")
    value = predict(call_dmt, compressed, "--predict", *options, *assumed, "--inter-gbps", 25)
    found = value["prediction"]
    assert found["gpu"]["name"] == "v100"
    assert (found["gpu"]["inter_gbps"], found["gpu"]["intra_gbps"]) == (25.0, 1200.0)
    assert found["gpu"]["hbm_bytes"] == value["cluster"]["hbm_bytes"] == 32 * 2**30
    assert (found["batch"], found["comm_dtype"], found["ids_per_bag"]) == (64, "bf16", 3.0)
    assert (found["assumptions"]["launch_us"], found["assumptions"]["scale_loss"]) == (1.0, 0.5)


def test_given_memory_beats_the_presets(compressed: Path, call_dmt: Call) -> None:
    value = predict(call_dmt, compressed, "--predict", "--gpu", "v100", "--hbm-gib", 16)
    assert value["cluster"]["hbm_bytes"] == 16 * 2**30


def test_scaling_alone_has_no_rows(compressed: Path, tmp_path: Path, call_dmt: Call) -> None:
    plot = tmp_path / "scaling.svg"
    found = predict(call_dmt, compressed, "--predict-scaling", "--plot", plot)["prediction"]
    assert "rows" not in found and "suggestion" not in found
    assert [point["ranks"] for point in found["scaling"]] == [2**k for k in range(4, 15)]
    assert all(set(point) == POINT for point in found["scaling"])
    assert found["files"] == [str(plot)]
    text = plot.read_text("utf-8")
    assert text.startswith("<?xml") and "Modelled, not measured" in text
    again = tmp_path / "again.svg"
    predict(call_dmt, compressed, "--predict-scaling", "--plot", again)
    assert again.read_bytes() == plot.read_bytes()


def test_a_written_plan_holds_no_prediction(
    compressed: Path, tmp_path: Path, call_dmt: Call
) -> None:
    out = tmp_path / "plan.json"
    value = predict(call_dmt, compressed, "--predict", "--out", out)
    del value["prediction"]
    assert json.loads(out.read_text("utf-8")) == value


def test_people_are_told_that_it_is_modelled(
    compressed: Path, tmp_path: Path, call_dmt: Call
) -> None:
    plot = tmp_path / "scaling.png"
    run = call_dmt("plan", compressed, *PLAN, "--predict", "--predict-scaling", "--plot", plot)
    assert run.code == 0, run.stderr
    told = ("modelled, not measured", "SPTT", "DMT (this bundle)", "DMT (this plan)", "suggestion")
    for text in (*told, "16384"):
        assert text in run.stdout
    # not another time beside it, of another batch
    assert "bandwidth only" not in run.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "found"),
    [
        (["--batch", 64], 2, "--batch without a prediction"),
        (["--gpu", "h100", "--assume", "scale_loss=0"], 2, "--gpu, --assume without a prediction"),
        (["--predict", "--plot", "x.png"], 2, "--plot x.png without sizes to draw"),
        (["--predict", "--gpu", "b400"], 3, "--gpu b400"),
        (["--predict", "--batch", 0], 2, "--batch must be"),
        (["--predict", "--comm-dtype", "fp64"], 2, "--comm-dtype must be one of"),
        (["--predict", "--ids-per-bag", 0], 2, "--ids-per-bag must be"),
        (["--predict", "--ids-per-bag", "nan"], 2, "--ids-per-bag must be a finite number"),
        (["--predict", "--assume", "speed=9"], 3, "--assume speed=9"),
        (["--predict", "--inter-gbps", -1], 2, "--inter-gbps must be"),
        (["--predict", "--hbm-gib", 1e-8], 3, "cannot hold theirs"),
        (["--predict-scaling", "--plot", "x.gif"], 3, "a plot named x.gif"),
    ],
)
def test_nonsense_is_refused(
    compressed: Path,
    tmp_path: Path,
    call_dmt: Call,
    options: list[object],
    code: int,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = call_dmt("plan", compressed, *PLAN, *options)
    assert run.code == code
    assert found in run.stderr
    assert "try:" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_clusters_beyond_the_model_are_refused(compressed: Path, call_dmt: Call) -> None:
    options = ["--hosts", 2, "--ranks-per-host", 16384, "--predict"]
    run = call_dmt("plan", compressed, *options)
    assert run.code == 3
    assert "32768 ranks to predict" in run.stderr


def test_flat_in_copies_is_named_where_it_is_faster(compressed: Path, call_dmt: Call) -> None:
    """Tables of a few KiB are averaged for next to nothing, and large batches stay in a host."""
    large = ("--predict", "--batch", 65536, "--inter-gbps", 1)
    rows = predict(call_dmt, compressed, *large)["prediction"]["rows"]
    by_name = {row["variant"]: row["speedup"] for row in rows}
    assert by_name["flat2d"] > max(by_name["flat"], by_name["sptt"], by_name["dmt"])
    shown = " ".join(call_dmt("plan", compressed, *PLAN, *large).stdout.split())
    assert "flat in 2 copies of its tables is faster still by the model" in shown
    assert "flat, 2D (2 copies)" in shown
    small = call_dmt("plan", compressed, *PLAN, "--predict")
    assert "faster still" not in " ".join(small.stdout.split())
