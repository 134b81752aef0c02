"""What a manifest may lack, hold besides, or get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle.manifest import Manifest, read_manifest
from dmt_convert.documents import (
    EvaluationRecord,
    FinetuneRecord,
    Initialisation,
    OptimizerState,
    ParentRecord,
    PartitionRecord,
    Quality,
    QualityRow,
    TrainingDataRecord,
)
from dmt_convert.errors import BundleError


@pytest.fixture
def manifest(bundle_path: Path) -> Manifest:
    return read_manifest(bundle_path)


def read(folder: Path, value: object) -> Manifest:
    (folder / "dmt.json").write_text(json.dumps(value), "utf-8")
    return read_manifest(folder)


def test_parts_that_older_versions_did_not_write_have_defaults(
    manifest: Manifest, tmp_path: Path
) -> None:
    value = manifest.to_json()
    old = {key: value[key] for key in ("schema_version", "source", "model", "weights")}
    found = read(tmp_path, old)
    assert (found.model, found.weights) == (manifest.model, manifest.weights)
    assert found.config is None
    assert found.partition == PartitionRecord()
    assert found.initialisation == Initialisation()
    assert found.optimizer_state == OptimizerState()
    assert found.quality == Quality()
    empty = {key: {} for key in ("source", "partition", "initialisation", "optimizer_state")}
    assert read(tmp_path, value | empty | {"quality": {}}).quality.rows == ()


def test_unknown_keys_are_ignored_but_in_the_model(manifest: Manifest, tmp_path: Path) -> None:
    value = manifest.to_json()
    value["later"] = 1
    value["tool"]["later"] = 1
    value["initialisation"]["later"] = {}
    assert read(tmp_path, value) == manifest
    for part in (value["model"], value["model"]["flat"], value["model"]["flat"]["tables"][0]):
        part["later"] = 1
        with pytest.raises(BundleError, match=r"later is not known"):
            read(tmp_path, value)
        del part["later"]


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_newer_version_is_refused_with_the_way_out(
    manifest: Manifest, tmp_path: Path, version: int
) -> None:
    """Whatever else it holds: its parts are not looked at."""
    for value in (manifest.to_json() | {"schema_version": version}, {"schema_version": version}):
        with pytest.raises(BundleError, match=f"schema version {version}") as refused:
            read(tmp_path, value)
        assert "1 or older" in refused.value.expected
        assert "upgrade dmt-convert" in refused.value.hint


def test_settings_that_made_the_bundle_are_kept(manifest: Manifest, tmp_path: Path) -> None:
    assert "config" not in manifest.to_json()
    config = {"command": "convert", "towers": 4, "groups": {"user": ["a"]}, "compression": None}
    again = read(tmp_path, replace(manifest, config=config).to_json())
    assert again.config == config
    assert read(tmp_path, replace(again, quality=Quality()).to_json()).config == config


def test_a_fine_tuned_manifest_round_trips(manifest: Manifest, tmp_path: Path) -> None:
    start = EvaluationRecord(step=0, auc=0.5, ne=1.0, log_loss=float("nan"))
    record = FinetuneRecord(
        parent=ParentRecord(name="ckpt-dmt2", digest="sha256:0"),
        data=TrainingDataRecord(train="a", train_rows=9, valid="b", valid_rows=1),
        settings={"table_lr": 0.02, "patience": None},
        steps=3,
        best_step=2,
        before=start,
        after=start,
        history=(start, start),
        notes=("a note",),
    )
    record = replace(record, previous=replace(record, previous=record))
    quality = Quality(rows=(QualityRow(name="flat", r2=float("-inf")),), data="rows", count=1)
    written = replace(manifest, initialisation=Initialisation(finetune=record), quality=quality)
    text = json.dumps(written.to_json(), allow_nan=False)
    again = Manifest.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.initialisation.finetune is not None
    assert again.initialisation.finetune.previous is not None
    assert again.initialisation.finetune.history[0].log_loss is None
    assert again.quality.rows == (QualityRow(name="flat"),)


def first_width(value: dict[str, Any], width: int) -> None:
    """Make a projection of vectors without elements."""
    flat = value["model"]["flat"]
    branch = {"widths": [8, 8], "final_relu": False}
    flat["interaction"] |= {"kind": "projection", "branch1": branch, "branch2": branch}
    flat["dense_arch"]["widths"] = [width]
    for table in flat["tables"]:
        table["dim"] = 1


WRONG = {
    "tool is a number": lambda v: v.update(tool=1),
    "a width is a fraction": lambda v: v["model"]["flat"]["over_arch"].update(widths=[8.5, 1]),
    "a kind that nobody knows": lambda v: v["model"]["flat"]["interaction"].update(kind="magic"),
    "a network without a network": lambda v: v["model"]["flat"]["interaction"].update(
        kind="network"
    ),
    "a projection without branches": lambda v: v["model"]["flat"]["interaction"].update(
        kind="projection"
    ),
    "no elements": lambda v: first_width(v, 0),
    "a source that nobody knows": lambda v: v["facts"][0].update(source="guessed"),
    "nested without end": lambda v: v.update(config=json.loads('{"a":' * 900 + "1" + "}" * 900)),
    "rows are text": lambda v: v["quality"].update(rows="flat"),
    "a version of before the first": lambda v: v.update(schema_version=0),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_values_are_refused_in_words(manifest: Manifest, tmp_path: Path, kind: str) -> None:
    value = json.loads(json.dumps(manifest.to_json()))
    WRONG[kind](value)
    with pytest.raises(BundleError, match=r"dmt\.json cannot be read") as refused:
        read(tmp_path, value)
    assert refused.value.details and refused.value.expected and refused.value.hint


def test_all_that_is_wrong_is_named_with_its_place(manifest: Manifest, tmp_path: Path) -> None:
    value = manifest.to_json()
    value["weights"]["weights/dense.safetensors"]["bytes"] = "many"
    value["model"]["flat"]["tables"][1]["rows"] = None
    del value["source"]
    with pytest.raises(BundleError) as refused:
        read(tmp_path, value)
    assert refused.value.details == (
        "source is missing",
        "model.flat.tables[1].rows is null, not a valid integer",
        "weights['weights/dense.safetensors'].bytes is \"many\", not a valid integer",
    )
