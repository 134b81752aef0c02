"""Every way in which a bundle can be damaged is refused, in words."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dmt_convert.bundle import check_digests, open_bundle, open_bundle_model
from dmt_convert.errors import BundleError

DENSE = "weights/dense.safetensors"
TOWER = "weights/tower_000.safetensors"


@pytest.fixture
def copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "copy"))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / "dmt.json").read_text("utf-8"))
    value.pop("model_digest", None)
    edit(value)
    (folder / "dmt.json").write_text(json.dumps(value), "utf-8")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def resave(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a weights file, and let the manifest know its new size."""
    tensors = load_file(folder / name)
    edit(tensors)
    (folder / name).unlink()
    save_file(tensors, folder / name, metadata={"format": "pt", "dmt_schema": "1"})
    size = (folder / name).stat().st_size
    edit_manifest(folder, lambda value: value["weights"][name].update(bytes=size))


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def truncate(folder: Path, name: str, cut: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) - cut])


def overwrite(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, "utf-8")


def wrong_table(tensors: dict[str, torch.Tensor]) -> None:
    tensors["tables.t_cat_0.weight"] = torch.zeros(7, 9)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: drop(f, "dmt.json"), "it has no dmt.json"),
    "empty manifest": (lambda f: overwrite(f, "dmt.json", ""), "cannot be read"),
    "cut manifest": (lambda f: truncate(f, "dmt.json", 100), "cannot be read"),
    "binary manifest": (lambda f: (f / "dmt.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "manifest is a list": (lambda f: overwrite(f, "dmt.json", "[]"), "not an object"),
    "manifest without keys": (
        lambda f: overwrite(f, "dmt.json", '{"schema_version": 1}'),
        "cannot be read",
    ),
    "newer schema": (
        lambda f: edit_manifest(f, lambda v: v.update(schema_version=2)),
        "has schema version 2",
    ),
    "schema is true": (
        lambda f: edit_manifest(f, lambda v: v.update(schema_version=True)),
        "schema_version is true, not a valid integer",
    ),
    "model without towers": (
        lambda f: edit_manifest(f, lambda v: v["model"].pop("towers")),
        "model.towers is missing",
    ),
    "weights are a list": (
        lambda f: edit_manifest(f, lambda v: v.update(weights=[])),
        "cannot be read",
    ),
    "source is a list": (
        lambda f: edit_manifest(f, lambda v: v.update(source=[])),
        "source is [], not an object",
    ),
    "weights entry is null": (
        lambda f: edit_manifest(f, lambda v: v["weights"].update({TOWER: None})),
        "cannot be read",
    ),
    "weights entry without digests": (
        lambda f: edit_manifest(f, lambda v: v["weights"][TOWER].pop("digests")),
        "cannot be read",
    ),
    "no tower file": (lambda f: drop(f, TOWER), f"{TOWER} is missing"),
    "no dense file": (lambda f: drop(f, DENSE), f"{DENSE} is missing"),
    "no weights folder": (lambda f: shutil.rmtree(f / "weights"), "is missing"),
    "cut tower file": (lambda f: truncate(f, TOWER, 1), "bytes, the manifest says"),
    "empty tower file": (lambda f: overwrite(f, TOWER, ""), "bytes, the manifest says"),
    "damaged header": (lambda f: flip(f / TOWER, 8), "header"),
    "table of another shape": (lambda f: resave(f, TOWER, wrong_table), "of shape [7, 9]"),
    "tensor missing": (
        lambda f: resave(f, TOWER, lambda t: t.pop("tables.t_cat_2.weight")),
        "does not hold the tensors",
    ),
    "tensor too many": (
        lambda f: resave(f, DENSE, lambda t: t.update(more=torch.zeros(1))),
        "does not hold the tensors",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_bundle_is_refused(copy: Path, kind: str) -> None:
    damage, found = DAMAGES[kind]
    damage(copy)
    with pytest.raises(BundleError) as refused:
        open_bundle(copy)
    assert found in str(refused.value)


def test_the_undamaged_copy_opens(copy: Path) -> None:
    open_bundle(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "no")


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path / "file")


def test_dense_tensor_of_another_shape(copy: Path) -> None:
    resave(copy, DENSE, lambda t: t.update({"over_arch.0.bias": torch.zeros(3)}))
    with pytest.raises(BundleError, match=r"over_arch\.0\.bias has shape \[3\]"):
        open_bundle_model(open_bundle(copy))


def test_all_problems_of_the_dense_part_at_once(copy: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["odd"] = tensors.pop("over_arch.0.bias")
        tensors["over_arch.1.bias"] = torch.zeros(2)

    resave(copy, DENSE, edit)
    names = list(load_file(copy / DENSE))
    edit_manifest(
        copy, lambda v: v["weights"][DENSE].update(digests=dict.fromkeys(names, "sha256/8MiB:0"))
    )
    with pytest.raises(BundleError) as refused:
        open_bundle_model(open_bundle(copy))
    text = str(refused.value)
    assert "missing: over_arch.0.bias" in text
    assert "extra: odd" in text
    assert "over_arch.1.bias has shape [2], expected [1]" in text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cluster": 1}'])
def test_a_damaged_plan_is_refused(copy: Path, text: str) -> None:
    overwrite(copy, "plan.json", text)
    from dmt_convert.errors import DmtError

    with pytest.raises(DmtError):
        _ = open_bundle(copy).plan


@given(st.data())
def test_every_flipped_bit_of_a_tensor_is_found(bundle_path: Path, data: st.DataObject) -> None:
    """Digests cover every byte behind the headers."""
    name = data.draw(st.sampled_from([DENSE, TOWER]))
    original = (bundle_path / name).read_bytes()
    begin = 8 + int.from_bytes(original[:8], "little")
    position = data.draw(st.integers(begin, len(original) - 1))
    try:
        flip(bundle_path / name, position)
        with pytest.raises(BundleError, match="1 tensors have other bytes") as refused:
            check_digests(open_bundle(bundle_path))
        assert refused.value.details[0].startswith(name)
    finally:
        (bundle_path / name).write_bytes(original)
    check_digests(open_bundle(bundle_path))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    st.data(),
)
def test_any_value_anywhere_in_the_manifest_is_no_crash(
    bundle_path: Path, value: object, data: st.DataObject
) -> None:
    """Whatever stands in place of one part, the bundle opens or is refused."""
    path = bundle_path / "dmt.json"
    text = path.read_text("utf-8")
    manifest = json.loads(text)
    manifest.pop("model_digest")
    place, last = manifest, data.draw(st.sampled_from(list(manifest)))
    while isinstance(place[last], dict | list) and place[last] and data.draw(st.booleans()):
        place = place[last]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        last = data.draw(st.sampled_from(keys))
    place[last] = value
    try:
        path.write_text(json.dumps(manifest), "utf-8")
        with suppress(BundleError):
            open_bundle_model(open_bundle(bundle_path))
    finally:
        path.write_text(text, "utf-8")
