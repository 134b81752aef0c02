"""Exports whose files changed: named before anything is done with them, and no code is run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmt_convert.bundle import Bundle
from dmt_convert.errors import DataError, ExportError
from dmt_convert.scoring import verify
from dmt_convert.serving import ExportedModel, exported_model
from dmt_convert.serving.checks import generate_batch
from dmt_convert.serving.export_manifest import read_export_manifest

Exporter = Callable[..., ExportedModel]
Dmt = Callable[..., Any]
GROUPS = {"user": ["cat_0", "cat_2"], "item": ["cat_1", "cat_3"]}


@pytest.fixture
def served(make_bundle: Callable[..., Bundle], export_unchecked: Exporter) -> Path:
    """An ONNX export whose weights are its own."""
    return own_files(export_unchecked(make_bundle("dlrm")).path)


def own_files(folder: Path) -> Path:
    """Give an export files that may be spoiled: weights are shared with its bundle."""
    for path in folder.rglob("*.safetensors"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    return folder


def score(served: Path, **options: Any) -> np.ndarray:
    exported = ExportedModel(served, **options)
    return exported.score(generate_batch(exported.spec.flat, exported.manifest.inputs, 4, seed=1))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, *, sealed: bool = True, **changes: Any) -> None:
    """Write another export.json, as a version that knows no other would have."""
    manifest = replace(read_export_manifest(folder), **changes)
    manifest = manifest.sealed() if sealed else replace(manifest, digest="")
    (folder / "export.json").write_text(json.dumps(manifest.to_json()), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "triton"])
def test_every_file_of_an_export_has_a_digest(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, form: str
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), format=form)
    manifest = exported.manifest
    found = {
        path.relative_to(exported.path).as_posix()
        for path in exported.path.rglob("*")
        if path.is_file()
    }
    assert {*manifest.files, *manifest.weights, "export.json"} == found
    assert all(len(entry.sha256) == 64 for entry in manifest.files.values())
    assert manifest.digest and manifest.sealed().digest == manifest.digest
    exported.check_files()


@pytest.mark.parametrize("where", ["begin", "middle", "end"])
def test_a_flipped_bit_of_a_graph_is_named_before_it_is_loaded(
    served: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    size = (served / "whole.onnx").stat().st_size
    flip(served / "whole.onnx", {"begin": 0, "middle": size // 2, "end": size - 1}[where])
    monkeypatch.setattr(exported_model, "open_graph", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(
        ExportError, match=r"changed on disk: whole\.onnx has other bytes"
    ) as refused:
        score(served)
    assert "export the bundle again" in refused.value.hint


def test_a_flipped_bit_of_any_weight_is_named(served: Path) -> None:
    """In a table and outside, in towers and over_arch: before the first answer."""
    score(served)
    for name in read_export_manifest(served).weights:
        size = (served / name).stat().st_size
        header = 8 + int.from_bytes((served / name).read_bytes()[:8], "little")
        for at in (header, (header + size) // 2, size - 1):
            flip(served / name, at)
            with pytest.raises(ExportError, match=f"changed on disk: {name}: .* has other bytes"):
                score(served)
            flip(served / name, at)
    score(served)


def test_damage_that_no_answer_uses_is_found_by_checksums(
    served: Path, make_bundle: Callable[..., Bundle], click_data: Path, call_dmt: Dmt
) -> None:
    bundle = make_bundle("dlrm").path
    flip(served / "tower_001/tower.onnx", 100)
    score(served)  # the whole graph is whole
    options = ("verify", bundle, served, "--data", click_data)
    done = call_dmt(*options, "--checksums", "--json")
    assert done.code == 3 and "tower_001/tower.onnx has other bytes" in done.stderr


@pytest.mark.parametrize("command", ["score", "evaluate", "verify"])
def test_commands_refuse_a_damaged_export(
    served: Path, command: str, click_data: Path, call_dmt: Dmt, tmp_path: Path
) -> None:
    flip(served / "tower_000/tower.safetensors", -1)
    models = [served, served] if command == "verify" else [served]
    more = ["--out", tmp_path / "s.npz"] if command == "score" else []
    done = call_dmt(command, *models, "--data", click_data, *more, "--json")
    assert done.code == 3, done.stderr
    assert json.loads(done.stdout)["error"] == "ExportError"
    assert "tower_000/tower.safetensors: " in done.stderr and "try: copy" in done.stderr
    assert not (tmp_path / "s.npz").exists()


def test_an_edited_export_json_is_refused(served: Path) -> None:
    path = served / "export.json"
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(value), "utf-8")  # laid out in another way
    score(served)
    for change in ({"out_of_range": "clip"}, {"quantize": "int8"}, {"later": 1}):
        path.write_text(json.dumps(value | change), "utf-8")
        with pytest.raises(ExportError, match="does not fit its own digest"):
            score(served)
    huge = json.dumps(value)[:-1] + ', "later": ' + "9" * 5000 + "}"
    path.write_text(huge, "utf-8")
    with pytest.raises(ExportError, match=r"its own digest|cannot be read"):
        score(served)


def test_an_export_of_an_early_version_opens_with_a_remark(
    served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(served, sealed=False, files={})
    with caplog.at_level("INFO", "dmt_convert"):
        score(served)
    assert "recorded no digests of graphs" in caplog.text


def test_a_graph_without_a_digest_among_others_is_refused(served: Path) -> None:
    files = dict(read_export_manifest(served).files)
    del files["whole.onnx"]
    rewrite(served, files=files)
    with pytest.raises(ExportError, match="not among the files"):
        score(served)


@pytest.mark.parametrize("name", ["../whole.onnx", "/etc/passwd", "a/../../b", "", "."])
def test_names_stay_in_the_folder(served: Path, name: str) -> None:
    parts = {**read_export_manifest(served).parts, "whole": name}
    rewrite(served, parts=parts)
    with pytest.raises(ExportError, match="is damaged") as refused:
        score(served)
    assert repr(name) in "\n".join(refused.value.details)


def test_what_is_no_file_is_not_opened(served: Path) -> None:
    (served / "whole.onnx").unlink()
    os.mkfifo(served / "whole.onnx")
    with pytest.raises(ExportError, match="is no file"):
        score(served)


@pytest.mark.parametrize("form", ["onnx", "triton"])
def test_an_export_of_symbolic_links_opens(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, tmp_path: Path, form: str
) -> None:
    """As caches of model hubs keep files: every name a link to a blob elsewhere."""
    exported = export_unchecked(make_bundle("dlrm"), format=form)
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/1a2b"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(p for p in exported.path.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(exported.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{i:08x}")
        link.symlink_to(os.path.relpath(blobs / f"{i:08x}", link.parent))
    assert np.array_equal(score(snapshot), score(exported.path))
    ExportedModel(snapshot).check_files()
    flip(blobs / next(p.name for p in blobs.iterdir() if p.stat().st_size > 5000), -1)
    with pytest.raises(ExportError, match=r"changed on disk|does not fit|cannot be read"):
        ExportedModel(snapshot).check_files()


def test_links_that_onnx_runtime_does_not_follow_are_named(served: Path, tmp_path: Path) -> None:
    weights = served / "tower_000/tower.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="cannot be loaded by ONNX Runtime") as refused:
        score(served)
    assert "symbolic links" in refused.value.hint and "cp -rL" in refused.value.hint


@pytest.fixture
def native(served: Path) -> Path:
    """What is described as machine code, without a compiler: the graph's file is no package."""
    (served / "whole.onnx").rename(served / "whole.pt2")
    value = json.loads((served / "export.json").read_text("utf-8"))
    value["format"], value["parts"]["whole"] = "pt2", "whole.pt2"
    value["files"]["whole.pt2"] = value["files"].pop("whole.onnx")
    del value["digest"]
    (served / "export.json").write_text(json.dumps(value), "utf-8")
    return served


@pytest.mark.parametrize("command", ["score", "evaluate", "verify"])
def test_machine_code_runs_only_when_the_user_says_so(
    native: Path, command: str, click_data: Path, call_dmt: Dmt, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded: list[Path] = []

    def load(path: Path) -> None:
        loaded.append(path)
        raise RuntimeError("no package")

    monkeypatch.setattr(exported_model, "Graph", load)
    models = [native, native] if command == "verify" else [native]
    more = ["--out", tmp_path / "s.npz"] if command == "score" else []
    words = [command, *models, "--data", click_data, *more]
    done = call_dmt(*words, "--json")
    assert done.code == 3 and loaded == []
    refused = json.loads(done.stdout)
    assert refused["error"] == "ExportError"
    if command != "verify":  # which asks the towers first; they are graphs of ONNX here
        assert "machine code" in refused["found"] and "--trust-code" in refused["hint"]
    done = call_dmt(*words, "--trust-code", "--json")
    assert done.code == 3 and "cannot be loaded by torch" in done.stderr
    assert {path.name for path in loaded} == {"whole.pt2"}
    loaded.clear()
    flip(native / "whole.pt2", 50)
    done = call_dmt(*words, "--trust-code", "--json")
    assert done.code == 3 and "whole.pt2 has other bytes" in done.stderr
    assert loaded == []


def test_machine_code_without_a_digest_is_called_so(native: Path) -> None:
    rewrite(native, sealed=False, files={})
    with pytest.raises(ExportError, match="no digest of it was recorded") as refused:
        score(native)
    assert "--trust-code" in refused.value.hint


def test_inspecting_loads_no_graph(
    native: Path, call_dmt: Dmt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_model, "open_graph", lambda *_: pytest.fail("it was loaded"))
    assert call_dmt("inspect", native).code == 0


@pytest.mark.parametrize(("form", "value"), [("padded", 50), ("jagged", -1), ("single", 2**40)])
def test_a_refused_id_is_named(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, form: str, value: int
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), pooling_input=form)
    batch = generate_batch(exported.spec.flat, exported.manifest.inputs, 3, seed=1)
    bags = list(batch.bags)
    values = bags[1].values.copy()
    values[0] = value
    bags[1] = replace(bags[1], values=values)
    with pytest.raises(DataError, match=f"id {value} of feature 'cat_1' .* 50 rows") as refused:
        exported.score(replace(batch, bags=tuple(bags)))
    assert "clip" in refused.value.hint


def test_a_graph_of_another_export_is_refused(
    served: Path, make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    other = export_unchecked(make_bundle("dlrm"), pooling_input="single").path
    rewrite(served, sealed=False, files={})  # with digests, these are what would be noticed
    shutil.copyfile(other / "whole.onnx", served / "whole.onnx")
    with pytest.raises(ExportError, match="does not describe: 'cat_0'"):
        score(served)


def test_a_config_may_be_tuned(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, caplog: pytest.LogCaptureFixture
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), format="triton")
    config = next(exported.path.glob("*over_arch/config.pbtxt"))
    config.write_text(config.read_text().replace("count: 1", "count: 3"))
    with caplog.at_level("INFO", "dmt_convert"):
        ExportedModel(exported.path).check_files()
    assert "config.pbtxt has other bytes" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"pooling_input": "single"},
        {"pooling_input": {"cat_0": "single", "cat_1": "fixed", "cat_2": "padded"}},
        {"pooling_input": "fixed", "weighted": ("*",)},
        {"per_request": ("cat_0", "cat_2"), "dense_per_request": True},
    ],
)
def test_every_form_is_verified_on_generated_rows(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Exporter,
    call_dmt: Dmt,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "GENERATED_ROWS", 50)
    bundle = make_bundle("dlrm", convert={"group": GROUPS})
    exported = export_unchecked(bundle, **options)
    for models in ((bundle.path, exported.path), (exported.path, bundle.path)):
        done = call_dmt("verify", *models, "--json")
        assert done.code == 0, done.stderr or done.stdout
