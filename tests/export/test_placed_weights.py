"""Weights below an export: shared where that is good for a server, else copied and checked."""

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.checkpoint import TensorInfo, read_safetensors, stream_tensor
from dmt_convert.documents import WeightsFile
from dmt_convert.errors import BundleError
from dmt_convert.files.digest import TreeDigest
from dmt_convert.files.safetensors_writer import safetensors_header
from dmt_convert.serving.placed_weights import PlacedFile, PlacedWeights, place_weights
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.exports import umask


def convert(flat: Path, out: Path, **options: Any) -> Bundle:
    return convert_quickly(flat, out, tower_module="passthrough", **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return convert(make_flat(folder / "ckpt.pt"), folder / "bundle").path


@pytest.fixture
def bundle(tmp_path: Path, original: Path) -> Bundle:
    """A bundle of one's own."""
    return open_bundle(shutil.copytree(original, tmp_path / "bundle"))


def files_of(weights: PlacedWeights) -> Iterator[PlacedFile]:
    yield from (*weights.towers, weights.over_arch)


def check_against_bundle(weights: PlacedWeights, bundle: Bundle, out: Path) -> None:
    sources = [*bundle.towers, bundle.dense]
    for file, tensors in zip(files_of(weights), sources, strict=True):
        path = out / file.path
        source = next(iter(tensors.values())).pieces[0].path
        assert path.read_bytes() == source.read_bytes()
        assert file.bytes == path.stat().st_size
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
        assert file.tensors.keys() == tensors.keys() == file.digests.keys()
        for name, info in file.tensors.items():
            assert file.offset(name) == tensors[name].pieces[0].offset
            assert info.pieces[0].path == path
            digest = TreeDigest()
            for chunk in stream_tensor(info):
                digest.update(chunk)
            assert digest.finish() == file.digests[name]


def no_link(*_: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("obstacle", ["none", "no links", "asked for", "a symbolic link"])
def test_shared_or_copied(
    tmp_path: Path, bundle: Bundle, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bundle.path / "weights/tower_000.safetensors"
    if obstacle == "no links":
        monkeypatch.setattr(os, "link", no_link)
    if obstacle == "a symbolic link":  # as in a cache of downloaded files
        first.rename(tmp_path / "blob")
        first.symlink_to(tmp_path / "blob")
    told: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    weights = place_weights(
        bundle,
        out,
        lambda part: f"dmt_{part}/1",
        copy=obstacle == "asked for",
        progress=lambda *step: told.append(step),
    )
    check_against_bundle(weights, bundle, out)
    assert [file.path for file in files_of(weights)] == [
        "dmt_tower_000/1/tower.safetensors",
        "dmt_tower_001/1/tower.safetensors",
        "dmt_over_arch/1/over_arch.safetensors",
    ]
    links = [(out / file.path).stat().st_nlink for file in files_of(weights)]
    assert links == ([1, 1, 1] if obstacle in ("no links", "asked for") else [2, 2, 2])
    assert not any((out / file.path).is_symlink() for file in files_of(weights))
    assert bool(told) == (1 in links)
    size = sum(file.bytes for file in files_of(weights))
    assert all(step == "copying" and done <= total == size for step, done, total in told)


def test_a_copy_finds_altered_bytes(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_link)
    name, info = next(iter(bundle.towers[1].items()))
    with info.pieces[0].path.open("r+b") as file:
        file.seek(info.pieces[0].offset + 9)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(BundleError, match="changed on disk") as raised:
        place_weights(open_bundle(bundle.path), tmp_path / "out", lambda part: part)
    assert f"{name} (rows" in raised.value.found


def test_holes_are_copied_as_holes(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_link)
    name = next(iter(bundle.towers[0]))
    hole = TensorInfo(name=name, dtype="uint8", shape=(3 << 23,), pieces=())
    path = bundle.path / "weights/tower_000.safetensors"
    header = safetensors_header([hole], {})
    path.write_bytes(header)
    os.truncate(path, len(header) + hole.nbytes)
    digest = TreeDigest()
    digest.update(np.zeros(hole.nbytes, dtype=np.uint8))
    tensors = {info.name: info for info in read_safetensors(path).tensors}
    entry = WeightsFile(bytes=path.stat().st_size, digests={name: digest.finish()})
    altered = replace(
        bundle,
        towers=(tensors, *bundle.towers[1:]),
        manifest=replace(
            bundle.manifest,
            weights={**bundle.manifest.weights, "weights/tower_000.safetensors": entry},
        ),
    )
    weights = place_weights(altered, tmp_path / "out", lambda part: part)
    check_against_bundle(weights, altered, tmp_path / "out")
    assert (tmp_path / "out" / weights.towers[0].path).stat().st_blocks * 512 < 9 << 20


def test_a_bundle_that_is_replaced_leaves_an_export_as_it_is(
    tmp_path: Path, bundle: Bundle
) -> None:
    weights = place_weights(bundle, tmp_path / "out", lambda part: part)
    before = [(tmp_path / "out" / file.path).read_bytes() for file in files_of(weights)]
    convert(make_flat(tmp_path / "other.pt", seed=1), bundle.path, force=True)
    after = [(tmp_path / "out" / file.path).read_bytes() for file in files_of(weights)]
    assert after == before
    found = open_bundle(bundle.path).towers[0]
    assert next(iter(found.values())).pieces[0].path.read_bytes() != before[0]
