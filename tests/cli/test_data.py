"""`dmt data` shows what feeds what; what fed a bundle once is compared ever after."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dmt_convert as dmt
from dmt_convert.bundle import open_bundle
from dmt_convert.data import data_profile
from dmt_convert.errors import BundleError, DataError
from dmt_convert.training import open_training_data
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.specs import build_spec

Call = Callable[..., Any]
TABLES = (7, 50, 11, 6)
DENSE = ("price", "age", "days", "size", "rate")


def make_rows(count: int = 40, *, dense: tuple[str, ...] = DENSE, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {f"C{i + 1}": rng.integers(0, n, count) for i, n in enumerate(TABLES)}
    columns |= {name: rng.standard_normal(count).astype(np.float32) for name in dense}
    columns["label"] = np.arange(count) % 2
    return columns


def write(folder: Path, columns: dict[str, Any], schema: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    if schema is not None:
        (folder / "schema.json").write_text(json.dumps(schema))
    return folder / "rows.parquet"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows", make_rows(), {"dense_features": DENSE})


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was made with data."""
    folder = tmp_path_factory.mktemp("calibrated")
    data = write(folder / "rows", make_rows(), {"dense_features": DENSE})
    flat = make_flat(folder / "ckpt.pt")
    return convert_quickly(
        flat, folder / "bundle", calibration=data, tower_module="passthrough"
    ).path


def test_every_column_is_shown(flat: Path, rows: Path, call_dmt: Call) -> None:
    run = call_dmt("data", flat, rows)
    assert run.code == 0, run.stderr
    for text in (*DENSE, "C1", "cat_0", "50.00% are 1", "C1..C4 -> cat_0..cat_3", "can be used"):
        assert text in run.stdout


def test_json_has_everything(flat: Path, rows: Path, call_dmt: Call) -> None:
    value = json.loads(call_dmt("data", flat, rows, "--json").stdout)
    assert value["usable"] and value["checked_rows"] == value["rows"] == 40
    assert value["inputs"]["dense"] == list(DENSE)
    assert value["inputs"]["features"]["cat_3"] == "C4"
    columns = make_rows()
    for i, feature in enumerate(value["features"]):
        ids = columns[f"C{i + 1}"]
        assert (feature["min"], feature["max"]) == (ids.min(), ids.max())
        assert (feature["empty_share"], feature["ids_per_row"]) == (0, 1)
        assert (feature["out_of_range"], feature["type"]) == (0, "int64")
    for name, dense in zip(DENSE, value["dense"], strict=True):
        assert dense["mean"] == pytest.approx(columns[name].mean(), abs=1e-6)
        wanted = np.quantile(columns[name].astype(float), data_profile.QUANTILES)
        assert dense["quantiles"] == pytest.approx(wanted, abs=1e-6)
    assert value["positive_share"] == 0.5


def test_all_faults_at_once(flat: Path, tmp_path: Path, call_dmt: Call) -> None:
    columns = make_rows()
    columns["C2"][[3, 4, 9]] = (50, 999, -1)
    columns["age"][7] = np.nan
    columns["label"][[1, 2]] = 3
    path = write(tmp_path / "rows", columns | {"note": ["x"] * 40}, {"dense_features": DENSE})
    run = call_dmt("data", flat, path, "--json")
    assert run.code == 3
    value = json.loads(run.stdout)
    feature = value["features"][1]
    assert (feature["out_of_range"], feature["first_out_of_range"]) == (3, 3)
    found = [fault["found"] for fault in value["faults"]]
    assert len(found) == 3
    assert any("'C2'): 3 ids outside" in text and "row 3 (from 0): id 50" in text for text in found)
    assert any("column 'age', row 7 (from 0): nan" in text for text in found)
    assert any("label 3" in text and "2 rows" in text for text in found)
    assert value["unused"] == {"note": "string"}
    assert run.stderr.count("\nexpected: ") == 3


def test_columns_that_do_not_fit_are_listed(flat: Path, tmp_path: Path, call_dmt: Call) -> None:
    columns = make_rows() | {"C2": ["a"] * 40}
    run = call_dmt("data", flat, write(tmp_path / "rows", columns))
    assert run.code == 3
    assert "C2" in run.stdout and "string" in run.stdout
    assert "lacks 4 of the model's 4 features" in run.stderr
    assert "schema.json" in run.stderr
    run = call_dmt("data", flat, tmp_path / "nothing")
    assert run.code == 3 and "does not exist" in run.stderr


def test_rows_are_limited_and_memory_is_bounded(
    flat: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dmt.check_data(flat, rows, rows=7).checked_rows == 7
    monkeypatch.setattr(data_profile, "_BATCH_ROWS", 3)
    monkeypatch.setattr(data_profile, "_KEPT_VALUES", 5 * 300)
    told: list[int] = []
    report = dmt.check_data(flat, rows, progress=lambda step, done, total: told.append(done))
    assert told[-1] == report.checked_rows == 40
    assert report.usable
    kept = data_profile._Thinned(most=16)
    for first in range(0, 3000, 7):
        kept.add(np.arange(first, min(first + 7, 3000), dtype=np.float32)[:, None])
    values = np.concatenate(kept.rows)[:, 0]
    assert len(values) <= 16
    assert set(np.diff(values)) == {kept.step}


def test_odd_columns_are_noted(flat: Path, tmp_path: Path) -> None:
    columns = make_rows()
    columns["C1"][:] = 2
    columns["label"][:] = 1
    columns["C3"] = pa.nulls(40, pa.int32())
    report = dmt.check_data(flat, write(tmp_path / "r", columns, {"dense_features": DENSE}))
    assert report.usable
    text = "\n".join(report.notes)
    assert "without a single id: cat_2" in text
    assert "one value only: cat_0" in text
    assert "all labels are 1" in text
    assert report.features[2].empty_share == 1


def logits(model: Path, data: Path) -> Any:
    return dmt.score(model, data).logits


def test_a_bundle_knows_the_columns_that_it_was_made_with(
    calibrated: Path, tmp_path: Path, rows: Path
) -> None:
    inputs = open_bundle(calibrated).manifest.inputs
    assert inputs is not None
    assert inputs.dense == DENSE
    assert inputs.features == {f"cat_{i}": f"C{i + 1}" for i in range(4)}
    expected = logits(calibrated, rows)
    columns = make_rows()
    shuffled = {name: columns[name] for name in sorted(columns, reverse=True)}
    other = write(tmp_path / "other", shuffled | {"rating": np.ones(40), "id": np.arange(40)})
    np.testing.assert_array_equal(logits(calibrated, other), expected)
    with pytest.raises(DataError, match=r"schema\.json beside the data"):
        dmt.score(calibrated.parent / "ckpt.pt", other)


@pytest.mark.parametrize("command", ["score", "evaluate", "verify", "data", "finetune"])
def test_other_columns_are_refused_ever_after(
    calibrated: Path, tmp_path: Path, command: str
) -> None:
    data = write(tmp_path / "r", make_rows(), {"dense_features": (*DENSE[1:], DENSE[0])})
    found = "the model was fed price, age, days, size, rate so far"
    if command == "data":
        (fault,) = dmt.check_data(calibrated, data).faults
        assert found in fault.found
        return
    flat = calibrated.parent / "ckpt.pt"
    calls: dict[str, Callable[[], object]] = {
        "verify": lambda: dmt.verify(flat, calibrated, data=data),
        "finetune": lambda: open_training_data(data, None, open_bundle(calibrated).manifest),
        "score": lambda: dmt.score(calibrated, data),
        "evaluate": lambda: dmt.evaluate(calibrated, data),
    }
    with pytest.raises(DataError) as caught:
        calls[command]()
    assert found in caught.value.found


def test_validation_rows_are_fed_as_the_training_rows(calibrated: Path, tmp_path: Path) -> None:
    manifest = replace(open_bundle(calibrated).manifest, inputs=None)
    train = write(tmp_path / "t", make_rows(), {"dense_features": DENSE})
    valid = write(tmp_path / "v", make_rows(dense=DENSE[::-1]))
    data = open_training_data(train, valid, manifest)
    assert data.valid.inputs is not None and data.valid.inputs.dense == DENSE
    write(tmp_path / "v", make_rows(dense=("I1", "I2", "I3", "I4", "I5")))
    with pytest.raises(DataError, match="fed price, age, days, size, rate so far"):
        open_training_data(train, valid, manifest)


def test_a_record_of_another_model_is_refused(calibrated: Path, tmp_path: Path) -> None:
    manifest = open_bundle(calibrated).manifest
    assert manifest.inputs is not None
    for inputs in (
        replace(manifest.inputs, dense=DENSE[:2]),
        replace(manifest.inputs, features={"nothing": "C1"}),
        replace(manifest.inputs, dense_form="sqrt"),
    ):
        with pytest.raises(BundleError, match="not of this model"):
            replace(manifest, inputs=inputs)


def test_names_of_dense_inputs_in_the_model_config(
    flat: Path, tmp_path: Path, call_dmt: Call
) -> None:
    columns = make_rows()
    other = write(tmp_path / "r", {name: columns[name] for name in sorted(columns)})
    named = write(tmp_path / "n", columns, {"dense_features": DENSE})
    (tmp_path / "m.yaml").write_text(f"dense_features: [{', '.join(DENSE)}]")
    config = tmp_path / "m.yaml"
    scores = dmt.score(flat, other, model_config=config)
    np.testing.assert_array_equal(scores.logits, logits(flat, named))
    (tmp_path / "m.yaml").write_text("dense_features: [price]")
    run = call_dmt("score", flat, "--data", other, "--model-config", config)
    assert run.code == 3 and "each of the model's 5 dense inputs" in run.stderr


def test_one_class_is_said(flat: Path, tmp_path: Path, call_dmt: Call) -> None:
    columns = make_rows() | {"label": np.zeros(40)}
    data = write(tmp_path / "r", columns, {"dense_features": DENSE})
    run = call_dmt("evaluate", flat, "--data", data)
    assert run.code == 0
    assert "all 40 rows have the label 0: AUC and NE do not exist" in run.stderr


def test_evaluate_names_the_columns_of_rows_without_labels(
    flat: Path, tmp_path: Path, call_dmt: Call
) -> None:
    columns = {name.replace("C", "cat_"): ids for name, ids in make_rows().items()}
    for i in range(4):
        columns[f"cat_{i}"] = columns.pop(f"cat_{i + 1}")
    columns["click"] = columns.pop("label")
    data = write(tmp_path / "r", columns, {"dense_features": DENSE})
    run = call_dmt("evaluate", flat, "--data", data)
    assert run.code == 3
    assert "price, age, days, size, rate, cat_0, cat_1, cat_2, cat_3, click" in run.stderr
    assert "rename the column of labels" in run.stderr


def test_bags_that_are_too_long_are_a_fault(tmp_path: Path) -> None:
    spec = build_spec(["f0"], dense=(1,), rows=9)
    spec = replace(spec, features=(replace(spec.features[0], max_ids=1),))
    path = write(tmp_path / "r", {"f0": [[1], [2, 3]]})
    (fault,) = data_profile.profile_data(path, spec).faults
    assert "feature 'f0' has bags of up to 2 ids" in fault.found


def test_inspect_says_what_feeds_a_bundle(calibrated: Path, call_dmt: Call) -> None:
    run = call_dmt("inspect", calibrated)
    assert "C1..C4 -> cat_0..cat_3; dense inputs price, age, days, size, rate" in run.stdout
