"""What export refuses: always in three parts, and nothing is left behind."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle import open_bundle
from dmt_convert.config import ExportConfig
from dmt_convert.documents import GraphCheck
from dmt_convert.errors import BundleError, DmtError
from dmt_convert.serving import export_bundle, exporter
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat

ROWS = (20_000, 50, 11, 6)
TOWER = "weights/tower_000.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    flat = make_flat(folder / "ckpt.pt", rows=ROWS)
    return convert_quickly(flat, folder / "bundle", tower_module="dlrm").path


@pytest.fixture
def bundle(tmp_path: Path, original: Path) -> Path:
    """A bundle of one's own, to be spoiled."""
    return shutil.copytree(original, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the graphs takes seconds, and comes after all that is refused here."""
    check = GraphCheck(part="whole", what="", rows=1, max_abs_diff=0, limit=0, passed=True)
    monkeypatch.setattr(exporter, "check_graphs", lambda *_: (check,))


def export(bundle: Path, **options: Any) -> Any:
    config = ExportConfig(**{"format": "onnx", **options})
    return export_bundle(open_bundle(bundle), bundle.parent / "out", config)


def refuse(
    bundle: Path, found: str, kind: type[DmtError] = BundleError, **options: Any
) -> DmtError:
    before = sorted(bundle.parent.iterdir())
    with pytest.raises(kind, match=found) as raised:
        export(bundle, **options)
    assert raised.value.expected
    assert raised.value.hint
    assert sorted(bundle.parent.iterdir()) == before
    return raised.value


def flip(bundle: Path, prefix: str) -> str:
    """Change one bit of the first tensor of a tower whose name begins so."""
    tensors = open_bundle(bundle).towers[0]
    name = next(name for name in tensors if name.startswith(prefix))
    with (bundle / TOWER).open("r+b") as file:
        file.seek(tensors[name].pieces[0].offset + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return name


@pytest.mark.slow
def test_an_untouched_bundle_is_exported(bundle: Path) -> None:
    for quantize in ("none", "int8"):
        export(bundle, quantize=quantize)
        names = {path.name for path in bundle.parent.iterdir()}
        assert names == {"bundle", "out"}
        shutil.rmtree(bundle.parent / "out")


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_altered_weights(bundle: Path, quantize: str) -> None:
    name = flip(bundle, "tower_module.")
    error = refuse(bundle, "changed on disk", quantize=quantize, checksums=False)
    assert error.details == (f"{TOWER}: {name}",)


def test_altered_tables(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = flip(bundle, "tables.")
    error = refuse(bundle, "changed on disk")
    assert error.details == (f"{TOWER}: {name}",)
    # of large bundles they are read when they are asked for, or when they have to be read anyway
    monkeypatch.setattr(exporter, "_CHECKED_BYTES", 1000)
    refuse(bundle, "changed on disk", checksums=True)
    refuse(bundle, "changed on disk", quantize="int8")
    monkeypatch.setattr(os, "link", no_link)
    refuse(bundle, "changed on disk")


def no_link(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_missing_and_truncated_files(bundle: Path) -> None:
    path = bundle / TOWER
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refuse(bundle, f"has {size - 1} bytes, the manifest says {size}")
    path.unlink()
    refuse(bundle, "tower_000.safetensors is missing")


def test_a_newer_schema(bundle: Path) -> None:
    manifest = json.loads((bundle / "dmt.json").read_text())
    (bundle / "dmt.json").write_text(json.dumps({**manifest, "schema_version": 2}))
    assert "upgrade dmt-convert" in refuse(bundle, "has schema version 2").hint


@pytest.mark.parametrize(
    "there",
    [
        "a file",
        "a folder",
        pytest.param("an export", marks=pytest.mark.slow),
        "a dangling link",
    ],
)
def test_what_is_there_is_never_touched(bundle: Path, there: str) -> None:
    out = bundle.parent / "out"
    if there == "a file":
        out.write_text("mine")
    elif there == "a dangling link":
        out.symlink_to("nowhere")
    elif there == "a folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        export(bundle)
    before = {path: path.lstat() for path in (out, *out.rglob("*"))}
    refuse(bundle, "exists")
    assert {path: path.lstat() for path in (out, *out.rglob("*"))} == before


def test_what_came_while_the_export_was_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bundle.parent / "out"

    def interfere(*_: object) -> tuple[GraphCheck, ...]:
        out.write_text("mine")
        return ()

    monkeypatch.setattr(exporter, "check_graphs", interfere)
    with pytest.raises(BundleError, match="exists"):
        export(bundle)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "out"]


def test_no_folder_to_write_into(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExportConfig(format="onnx")
    with pytest.raises(BundleError, match="does not exist"):
        export_bundle(open_bundle(bundle), bundle.parent / "no" / "out", config)
    make = Path.mkdir

    def read_only(path: Path, *options: Any, **more: Any) -> None:
        if ".dmt-tmp-" in path.name:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make(path, *options, **more)

    monkeypatch.setattr(Path, "mkdir", read_only)
    refuse(bundle, "nothing can be written to")


@contextmanager
def file_limit(limit: int) -> Iterator[None]:
    """Stop writes behind so many bytes of a file, just as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("quantize", ["none", "fp16", "int8", "int4"])
def test_a_full_disk(bundle: Path, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_link)
    with file_limit(60_000):
        refuse(bundle, "is full", quantize=quantize)


def test_a_disk_that_is_too_small(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(bundle))(1 << 30, 0, 65 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(exporter, "placed_bytes", lambda *_, **__: 2 << 20)
    assert "--quantize int8" in refuse(bundle, "GiB left").hint


def test_links_need_no_room(bundle: Path) -> None:
    with file_limit(400_000):  # the manifest and the graphs are smaller, the tables are not
        export(bundle)
    assert (bundle.parent / "out/tower_000/tower.safetensors").stat().st_nlink == 2
