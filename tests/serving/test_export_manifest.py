"""What `export.json` may hold, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.documents import GraphCheck, WeightsFile
from dmt_convert.errors import ExportError
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec
from dmt_convert.serving import ExportManifest, read_export_manifest
from dmt_convert.serving.export_manifest import ExportedBundle
from dmt_convert.serving.graph_inputs import FeatureInput, GraphInputs
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec

FLAT = ModelSpec(
    family="test",
    tables=(TableSpec(name="t", rows=9, dim=4),),
    features=(FeatureSpec(name="f", table="t"),),
    dense_arch=MlpSpec(widths=(2, 4), final_relu=True),
    interaction=InteractionSpec(kind="cat"),
    over_arch=MlpSpec(widths=(8, 1), final_relu=False),
)
MANIFEST = ExportManifest(
    format="onnx",
    bundle=ExportedBundle(name="ckpt-dmt1", tool_version="0.1.0", source_digest="sha256:0"),
    inputs=GraphInputs(num_dense=2, features=(FeatureInput(feature="f", form="single"),)),
    parts={"whole": "whole/model.onnx"},
    details={"opset": 20},
    quality={"code": "int8", "logits": {"r2": float("nan")}},
    checks=(
        GraphCheck(part="whole", what="rows", rows=3, max_abs_diff=0.0, limit=1e-5, passed=True),
    ),
    weights={"weights/tower_000.safetensors": WeightsFile(bytes=3, digests={"a": "sha256:1"})},
    model=DmtSpec(
        flat=FLAT,
        towers=(TowerSpec(features=("f",), module=TowerModuleSpec(kind="passthrough")),),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served")
    (found / "whole").mkdir()
    (found / "weights").mkdir()
    (found / "whole/model.onnx").write_bytes(b"")
    (found / "weights/tower_000.safetensors").write_bytes(b"abc")
    return found


def read(folder: Path, value: object) -> ExportManifest:
    (folder / "export.json").write_text(json.dumps(value), "utf-8")
    return read_export_manifest(folder)


def test_it_is_read_as_it_was_written(folder: Path) -> None:
    value = MANIFEST.to_json()
    assert list(value) == [
        "schema_version", "tool", "format", "bundle", "inputs", "out_of_range", "quantize",
        "parts", "details", "quality", "checks", "weights", "model",
    ]  # fmt: skip
    assert value["quality"]["logits"]["r2"] is None
    again = read(folder, value | {"later": 1})
    assert again.to_json() == value
    assert again.model == MANIFEST.model and again.checks == MANIFEST.checks


def test_a_newer_version_is_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(ExportError, match="schema version 2") as refused:
        read(folder, {"schema_version": 2})
    assert "upgrade dmt-convert" in refused.value.hint


def test_what_is_not_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"it has no export\.json"):
        read_export_manifest(tmp_path)
    with pytest.raises(ExportError) as refused:
        read(tmp_path, {"schema_version": 1})
    assert "format is missing" in refused.value.details


@pytest.mark.parametrize("case", ["fuzz-export-11-131", "fuzz-export-11-138", "fuzz-export-11-154"])
def test_documents_that_once_were_a_crash(shared: Path, tmp_path: Path, case: str) -> None:
    found = shared / "cases/reliability" / case / "export.json"
    if not found.is_file():
        pytest.skip("the shared cases are not here")
    shutil.copyfile(found, tmp_path / "export.json")
    with pytest.raises(ExportError) as refused:
        read_export_manifest(tmp_path)
    assert refused.value.expected and refused.value.hint and refused.value.details


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    st.data(),
)
def test_any_value_anywhere_is_no_crash(folder: Path, value: object, data: st.DataObject) -> None:
    """Whatever stands in place of one part, the export opens or is refused."""
    manifest = json.loads(json.dumps(MANIFEST.to_json()))
    place, last = manifest, data.draw(st.sampled_from(list(manifest)))
    while isinstance(place[last], dict | list) and place[last] and data.draw(st.booleans()):
        place = place[last]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        last = data.draw(st.sampled_from(keys))
    place[last] = value
    with suppress(ExportError):
        read(folder, manifest)
