"""Quantised exports: what is written is what was measured, and what was measured decides."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dmt_convert.bundle import Bundle, open_bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, read_safetensors, stream_tensor
from dmt_convert.config import ExportConfig
from dmt_convert.data import Bag
from dmt_convert.errors import BundleError, ConfigError, ExportError, GraphsDifferError
from dmt_convert.files.digest import TreeDigest
from dmt_convert.files.safetensors_writer import safetensors_header
from dmt_convert.model.table_codes import CodedRows, RowCode, decode_rows
from dmt_convert.serving import ExportedModel, export_bundle, exporter, plan_inputs, quantisation
from dmt_convert.serving.placed_weights import PlacedWeights, place_weights
from dmt_convert.serving.quantisation import coded_bytes, measure_quantisation, write_coded
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.exports import umask

Quality = Mapping[str, Any]
CODES: tuple[RowCode, ...] = ("fp16", "int8", "int4")
DIM = 11
"""Odd, and rows that chunks of a stream cut in two."""
ROWS = (7, 200_000, 50, 6)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a table of two chunks, stored as fp32."""
    folder = tmp_path_factory.mktemp("large")
    return convert(make_flat(folder / "ckpt.safetensors", rows=ROWS, dim=DIM), folder / "bundle")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that fits the data of `click_data`, stored as bf16."""
    folder = tmp_path_factory.mktemp("small")
    return convert(make_flat(folder / "ckpt.pt"), folder / "bundle", dtype="bf16")


def convert(flat: Path, out: Path, **options: Any) -> Bundle:
    return convert_quickly(flat, out, tower_module="passthrough", **options)


def stored_rows(path: Path, table: str, code: RowCode) -> np.ndarray:
    tensors = load_file(path)
    if code == "fp16":
        return tensors[f"tables.{table}.weight"].astype(np.float32)
    kinds = {
        kind: tensors[f"tables.{table}.{kind}"] for kind in ("quantized", "scale", "zero_point")
    }
    dim = DIM if "large" in str(path) else 8
    return decode_rows(CodedRows(**kinds), dim, code)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("which", ["large", "small"])
def test_files_hold_what_the_model_looks_up(
    request: pytest.FixtureRequest, tmp_path: Path, which: str, code: RowCode
) -> None:
    """Bit by bit: so what a quantised model scores is known before its tables are written."""
    bundle: Bundle = request.getfixturevalue(which)
    out = tmp_path / which
    told: list[tuple[str, int, int]] = []
    weights = place_weights(
        bundle, out, lambda part: part, quantize=code, progress=lambda *step: told.append(step)
    )
    spec = bundle.manifest.model
    model = open_bundle_model(bundle, code=code)
    rng = np.random.default_rng(0)
    for t, tower in enumerate(model.tower_list):
        for feature in tower.features:
            table = spec.flat.table_of(feature)
            rows = stored_rows(out / weights.towers[t].path, table.name, code)
            ids = rng.permutation(table.rows)[:3000]
            ids[0], ids[-1] = 0, table.rows - 1
            bag = Bag(values=ids, offsets=np.arange(len(ids) + 1))
            with torch.inference_mode():
                found = tower.tables(feature, bag).numpy()
            np.testing.assert_array_equal(found, rows[ids])
    check_layout(bundle, weights, out, code)
    assert {step for step, _, _ in told} == {"quantising"}


def check_layout(bundle: Bundle, weights: PlacedWeights, out: Path, code: RowCode) -> None:
    kinds = ("weight",) if code == "fp16" else ("quantized", "scale", "zero_point")
    size = 0
    for file, tensors in zip(weights.towers, bundle.towers, strict=True):
        tables = [name.removesuffix(".weight") for name in tensors if name.startswith("tables.")]
        rest = [name for name in tensors if not name.startswith("tables.")]
        expected = [f"{table}.{kind}" for kind in kinds for table in tables] + rest
        assert sorted(file.tensors, key=file.offset) == list(file.tensors) == expected
        assert (out / file.path).stat().st_mode & 0o777 == 0o666 & ~umask()
        assert file.bytes == (out / file.path).stat().st_size
        for name, info in file.tensors.items():
            digest = TreeDigest()
            for chunk in stream_tensor(info):
                digest.update(chunk)
            assert digest.finish() == file.digests[name]
            size += info.nbytes if name.startswith("tables.") else 0
            if name in rest:
                assert file.digests[name] == bundle_digests(bundle)[name]
    assert size == sum(coded_bytes(table, code) for table in bundle.manifest.model.flat.tables)
    assert (out / weights.over_arch.path).stat().st_nlink > 1


def bundle_digests(bundle: Bundle) -> dict[str, str]:
    entries = bundle.manifest.weights.values()
    return {name: digest for entry in entries for name, digest in entry.digests.items()}


def test_tables_already_stored_so_are_shared(tmp_path: Path) -> None:
    bundle = convert(make_flat(tmp_path / "ckpt.pt"), tmp_path / "bundle", dtype="fp16")
    weights = place_weights(bundle, tmp_path / "out", lambda part: part, quantize="fp16")
    assert all((tmp_path / "out" / file.path).stat().st_nlink == 2 for file in weights.towers)


def test_holes_stay_holes(tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    table = TensorInfo(name="tables.t.weight", dtype="fp32", shape=(1 << 18, 24), pieces=())
    header = safetensors_header([table], {})
    path.write_bytes(header)
    os.truncate(path, len(header) + table.nbytes)
    (stored,) = read_safetensors(path).tensors
    write_coded(tmp_path / "coded", {stored.name: stored}, "int8")
    stat = (tmp_path / "coded").stat()
    assert stat.st_size > 29 << 18
    assert stat.st_blocks * 512 < 1 << 16


def test_altered_tables_are_found(tmp_path: Path, small: Bundle) -> None:
    bundle = open_bundle(shutil.copytree(small.path, tmp_path / "bundle"))
    name, info = next(iter(bundle.towers[1].items()))
    with info.pieces[0].path.open("r+b") as file:
        file.seek(info.pieces[0].offset)
        file.write(b"\x01\x02")
    for code in CODES:
        with pytest.raises(BundleError, match="changed on disk") as raised:
            place_weights(
                open_bundle(bundle.path), tmp_path / code, lambda part: part, quantize=code
            )
        assert f"{name} (rows" in raised.value.found


def test_tables_that_fp16_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(state: dict[str, Any]) -> None:
        state[next(name for name in state if "t_cat_1" in name)][199_990, 3] = -7e4

    flat = make_flat(tmp_path / "ckpt.safetensors", rows=ROWS, dim=DIM, edit=edit)
    bundle = convert(flat, tmp_path / "bundle")
    for looked_at in (1 << 20, 0):  # and where the row is met only when it is to be written
        monkeypatch.setattr(quantisation, "_SAMPLED_ROWS", looked_at)
        with pytest.raises(ExportError, match="too large for fp16") as raised:
            export_bundle(bundle, tmp_path / "out", ExportConfig(format="onnx", quantize="fp16"))
        assert raised.value.found.startswith("row 199990 of table 't_cat_1'")
        assert "int8" in raised.value.hint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "ckpt.safetensors"]


def measure(bundle: Bundle, code: RowCode, data: Path | None = None) -> Quality:
    inputs = plan_inputs(bundle.manifest.model, ExportConfig(format="onnx"))
    return measure_quantisation(bundle, inputs, code, data)


@pytest.mark.parametrize(
    ("code", "low", "high"), [("fp16", 1e-4, 3e-4), ("int8", 2e-3, 6e-3), ("int4", 0.03, 0.07)]
)
def test_cost_of_tables(large: Bundle, code: RowCode, low: float, high: float) -> None:
    quality = measure(large, code)
    assert json.loads(json.dumps(quality)) == quality
    assert quality["code"] == code
    for name, table in quality["tables"].items():
        rows = ROWS[int(name[-1])]
        assert table["rows"] == rows
        assert 100_000 < table["rows_measured"] < rows if rows == max(ROWS) else True
        assert table["rows_measured"] == rows or rows == max(ROWS)
        assert low / 3 < table["relative_rms"] < high * 2
        assert 0 < table["max_abs_error"] < 30 * high
    assert low < quality["relative_rms"] < high
    assert quality["bytes_before"] == sum(ROWS) * DIM * 4
    assert quality["bytes_after"] < quality["bytes_before"] * 0.52
    assert quality["logits"]["data"] == "generated rows"
    assert 0.9 < quality["logits"]["r2"] < 1
    assert not {"auc", "ne", "log_loss"} & quality.keys()


def test_cost_on_labelled_data(small: Bundle, click_data: Path, tmp_path: Path) -> None:
    quality = measure(small, "int4", click_data)
    assert quality["logits"]["rows"] == 300
    for key in ("auc", "log_loss", "ne"):
        before, after, lost = (quality[key][part] for part in ("before", "after", "lost"))
        assert before != after
        assert lost == (before - after if key == "auc" else after - before)
    data = dict(np.load(click_data))
    data["label"][:] = 0
    np.savez(tmp_path / "test.npz", **data)
    (tmp_path / "schema.json").write_bytes((click_data.parent / "schema.json").read_bytes())
    one_class = measure(small, "int4", tmp_path / "test.npz")
    assert "auc" not in one_class
    assert one_class["log_loss"]["lost"] != 0


def refuse(bundle: Bundle, folder: Path, found: str, **options: Any) -> list[Quality]:
    told: list[Quality] = []
    config = ExportConfig(format="onnx", **options)
    with pytest.raises(ExportError, match=found) as raised:
        export_bundle(bundle, folder / "out", config, on_quality=told.append)
    assert raised.value.expected
    assert raised.value.hint
    assert not any(path.name.startswith((".out", "out")) for path in folder.iterdir())
    return told


def test_too_much_auc_lost(
    small: Bundle, click_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = {"quantize": "int4", "max_auc_loss": 0.001}
    assert not refuse(small, tmp_path, "without labelled data", **limited)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_auc_loss must be"):
            ExportConfig(format="onnx", quantize="int4", max_auc_loss=wrong)
    bare = {name: array for name, array in np.load(click_data).items() if name != "label"}
    np.savez(tmp_path / "test.npz", **bare)
    (tmp_path / "schema.json").write_bytes((click_data.parent / "schema.json").read_bytes())
    assert not refuse(small, tmp_path, "has no labels", data=tmp_path / "test.npz", **limited)
    bare["label"] = np.ones(300, dtype=np.uint8)
    np.savez(tmp_path / "test.npz", **bare)
    assert refuse(
        small, tmp_path, "labels of the data are the same", data=tmp_path / "test.npz", **limited
    )
    # labels that the model itself would give: what any code loses is seen
    scores = dict(np.load(click_data))
    logits = open_bundle_model(small)
    scores["label"] = click_labels(logits, small, click_data)
    np.savez(tmp_path / "test.npz", **scores)
    told = refuse(
        small,
        tmp_path,
        "int4 loses 0.0",
        data=tmp_path / "test.npz",
        quantize="int4",
        max_auc_loss=1e-6,
    )
    assert told[0]["auc"]["before"] == 1.0


def click_labels(model: Any, bundle: Bundle, data: Path) -> np.ndarray:
    from dmt_convert.data import adapt_batches, open_data

    dataset = open_data(data)
    spec = bundle.manifest.model.flat
    with torch.inference_mode():
        parts = [model(b).numpy() for b in adapt_batches(dataset, spec, dataset.batches(300))]
    logits = np.concatenate(parts)
    return (logits > np.median(logits)).astype(np.uint8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("code", CODES)
def test_quantised_exports_answer_like_their_model(
    large: Bundle, tmp_path: Path, code: RowCode
) -> None:
    export = export_bundle(large, tmp_path / "out", ExportConfig(format="onnx", quantize=code))
    assert all(check.passed for check in export.checks)
    assert export.manifest.quality["code"] == ExportedModel(export.path).manifest.quantize == code


@pytest.mark.slow
def test_the_checks_see_one_wrong_code(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*arguments: Any, **options: Any) -> PlacedWeights:
        weights = place_weights(*arguments, **options)
        file = next(file for file in weights.towers if "tables.t_cat_3.quantized" in file.tensors)
        descriptor = os.open(arguments[1] / file.path, os.O_RDWR)
        # in the first row of a table, which every generated batch reads
        offset = file.offset("tables.t_cat_3.quantized")
        byte = os.pread(descriptor, 1, offset)[0]
        os.pwrite(descriptor, bytes([byte ^ 4]), offset)
        os.close(descriptor)
        return weights

    monkeypatch.setattr(exporter, "place_weights", spoil)
    with pytest.raises(GraphsDifferError) as raised:
        export_bundle(small, tmp_path / "out", ExportConfig(format="onnx", quantize="int8"))
    assert any(line.startswith("whole") for line in raised.value.details)
    assert list(tmp_path.iterdir()) == []
