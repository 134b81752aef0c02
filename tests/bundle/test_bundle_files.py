"""What lies in a bundle: names, modes, keys, and the bytes of every table."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmt_convert.bundle import Bundle, Manifest, check_digests, open_bundle, open_bundle_model
from dmt_convert.bundle.manifest import read_manifest
from dmt_convert.files.digest import PREFIX

TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_files_of_a_bundle(bundle_path: Path) -> None:
    assert files_of(bundle_path) == [
        "dmt.json",
        "plan.json",
        "report.html",
        "weights/dense.safetensors",
        "weights/tower_000.blocks",
        "weights/tower_000.safetensors",
        "weights/tower_001.blocks",
        "weights/tower_001.safetensors",
    ]
    assert [p.name for p in bundle_path.parent.iterdir()] == [bundle_path.name]


@pytest.mark.usefixtures("strict_umask")
def test_the_umask_says_who_may_read_it(tmp_path: Path, write: Callable[..., Bundle]) -> None:
    out = write(tmp_path / "out").path
    modes = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in (out, *out.rglob("*"))
    }
    folders = {"out", "out/weights"}
    assert modes == {name: "0o700" if name in folders else "0o600" for name in modes}
    assert folders < set(modes)


def test_the_official_library_reads_the_same_values(bundle_path: Path, source: Path) -> None:
    flat = torch.load(source, weights_only=True)
    towers = [load_file(bundle_path / f"weights/tower_00{t}.safetensors") for t in range(2)]
    where = {0: 0, 2: 0, 1: 1, 3: 1}
    for feature, tower in where.items():
        ours, theirs = towers[tower][f"tables.t_cat_{feature}.weight"], flat[TABLE.format(feature)]
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    assert {len(tower) for tower in towers} == {2}
    dense = load_file(bundle_path / "weights/dense.safetensors")
    assert torch.equal(dense["over_arch.1.weight"], flat["over_arch.model.1.weight"])
    with safe_open(bundle_path / "weights/dense.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "dmt_schema": "1"}


def test_manifest_keys_do_not_change_unnoticed(bundle_path: Path) -> None:
    value = json.loads((bundle_path / "dmt.json").read_text("utf-8"))
    assert list(value) == [
        "schema_version",
        "tool",
        "source",
        "compression",
        "model",
        "facts",
        "partition",
        "initialisation",
        "optimizer_state",
        "quality",
        "weights",
        "model_digest",
    ]
    assert value["schema_version"] == 1
    assert list(value["tool"]) == ["name", "version"]
    assert list(value["source"]) == ["format", "name", "files", "bytes", "digest"]
    assert list(value["model"]) == ["flat", "towers"]
    assert value["model"]["towers"][0] == {
        "features": ["cat_0", "cat_2"],
        "module": {
            "kind": "passthrough",
            "c": 0,
            "p": 0,
            "dim": 0,
            "cross_layers": 0,
            "cross_rank": 0,
        },
    }
    tower = value["weights"]["weights/tower_001.safetensors"]
    assert list(tower) == ["bytes", "digests"]
    assert list(tower["digests"]) == ["tables.t_cat_1.weight", "tables.t_cat_3.weight"]
    assert tower["digests"]["tables.t_cat_1.weight"].startswith(PREFIX)
    assert value["source"]["digest"].startswith("sha256:")


def test_manifest_round_trips(bundle_path: Path) -> None:
    manifest = read_manifest(bundle_path)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_documents_see_the_final_manifest(bundle_path: Path) -> None:
    manifest = read_manifest(bundle_path)
    assert (bundle_path / "report.html").read_text("utf-8") == manifest.source.digest


def test_a_bundle_opens_with_its_plan_and_its_model(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    check_digests(bundle)
    assert bundle.plan.cluster.hosts == 2
    model = open_bundle_model(bundle)
    assert not any(p.is_meta for p in model.parameters())


def test_no_machine_path_is_written(bundle_path: Path, source: Path) -> None:
    for name in ("dmt.json", "plan.json"):
        assert str(source.parent) not in (bundle_path / name).read_text("utf-8")
