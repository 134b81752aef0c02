"""Documents that ask for too much, nest too deeply or were edited are refused at once."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.bundle import Bundle, open_bundle, open_bundle_model
from dmt_convert.config import PartitionConfig, read_settings
from dmt_convert.conversion.partition.partitioner import _parse_towers
from dmt_convert.documents import digest_document, read_json, read_whole, to_text
from dmt_convert.errors import BundleError, ConfigError, DmtError, PartitionError, PlanError
from dmt_convert.families import read_model_config
from dmt_convert.placement import read_plan
from support.paths import REPOSITORY
from support.scored import convert_model, write_model

HUGE = 1 << 33
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of each kind of tower module."""
    folder = tmp_path_factory.mktemp("bundles")
    dot = write_model(folder / "dot.pt")
    dcn = write_model(folder / "dcn.pt", interaction="dcn")
    return {
        "dlrm": convert_model(dot, folder / "dlrm", "dlrm"),
        "linear": convert_model(dot, folder / "linear", "linear"),
        "dcn": convert_model(dcn, folder / "dcn", "dcn"),
        "passthrough": convert_model(dcn, folder / "passthrough"),
    }


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Whatever asks for 8 GiB more fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (8 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def edited(bundle: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(bundle, out)
    value = json.loads((out / "dmt.json").read_text("utf-8"))
    edit(value)
    del value["model_digest"]
    (out / "dmt.json").write_text(to_text(value), "utf-8")
    return out


def use(bundle: Bundle) -> None:
    repr(bundle)
    open_bundle_model(bundle)
    _ = bundle.plan


@pytest.mark.parametrize("kind", ["dlrm", "linear", "dcn", "passthrough"])
def test_whole_bundles_pass(bundles: dict[str, Path], kind: str) -> None:
    use(open_bundle(bundles[kind]))


@pytest.mark.parametrize("number", ["c", "p", "dim", "cross_layers", "cross_rank"])
@pytest.mark.parametrize("kind", ["dlrm", "linear", "dcn", "passthrough"])
@pytest.mark.parametrize("value", [HUGE, 100_000, -HUGE])
def test_a_huge_tower_module(
    bundles: dict[str, Path], tmp_path: Path, kind: str, number: str, value: int
) -> None:
    def edit(document: dict[str, Any]) -> None:
        for tower in document["model"]["towers"]:
            tower["module"][number] = value

    path = edited(bundles[kind], tmp_path / "out", edit)
    with suppress(DmtError):  # or it plays no part
        use(open_bundle(path))


@pytest.mark.parametrize(
    "place",
    [
        ("dense_arch", "widths", 0),
        ("dense_arch", "widths", -1),
        ("over_arch", "widths", 1),
        ("interaction", "cross_layers"),
        ("interaction", "cross_rank"),
        ("tables", 0, "rows"),
        ("tables", 0, "dim"),
    ],
)
@pytest.mark.parametrize("value", [HUGE, 1 << 62, 10**30, -1])
def test_a_huge_flat_model(
    bundles: dict[str, Path], tmp_path: Path, place: tuple[str | int, ...], value: int
) -> None:
    def edit(document: dict[str, Any]) -> None:
        part = document["model"]["flat"]
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value

    path = edited(bundles["dcn"], tmp_path / "out", edit)
    with pytest.raises(BundleError):
        use(open_bundle(path))


def test_a_plan_for_more_hosts_than_it_names(bundles: dict[str, Path], tmp_path: Path) -> None:
    plan = json.loads((bundles["dlrm"] / "plan.json").read_text())
    plan["cluster"]["hosts"] = 1 << 50
    (tmp_path / "plan.json").write_text(to_text(plan))
    with pytest.raises(PlanError, match="cannot be read") as refused:
        read_plan(tmp_path / "plan.json")
    assert any("entries for" in line for line in refused.value.details)


READERS: dict[str, Callable[[Path], object]] = {
    "bundle": lambda path: open_bundle(path.parent),
    "plan": read_plan,
    "partition": _parse_towers,
    "settings": lambda path: read_settings(path, PartitionConfig),
    "facts": read_model_config,
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "text", [DEEP, '{"towers": ' + DEEP, '{"schema_version": 1' + "0" * 6000 + "}", "\ud800"]
)
def test_deep_and_odd_json(tmp_path: Path, kind: str, text: str) -> None:
    path = tmp_path / "dmt.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises((BundleError, ConfigError, PartitionError, PlanError), match="cannot be"):
        READERS[kind](path)


@pytest.mark.parametrize("kind", ["plan", "partition", "settings", "facts"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DmtError) as refused:
            READERS[kind](path)
        assert "file" in str(refused.value).replace("a regular", "a").split("not a ")[1]


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(ValueError, match="more than 16 MiB"):
        read_json(tmp_path / "large.json")


def test_a_pipe_of_a_shell_is_read() -> None:
    read, write = os.pipe()
    os.write(write, b'{"a": 1}')
    os.close(write)
    assert read_whole(Path(f"/dev/fd/{read}"), 100) == b'{"a": 1}'
    os.close(read)


def swap_tables(document: dict[str, Any]) -> None:
    first, _, second, _ = document["model"]["flat"]["features"]  # of one tower
    first["name"], second["name"] = second["name"], first["name"]


def test_an_edited_model_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    """It could be read, and would mean something else."""
    out = Path(shutil.copytree(bundles["dlrm"], tmp_path / "out"))
    value = json.loads((out / "dmt.json").read_text())
    assert value["model_digest"] == digest_document(value["model"])
    swap_tables(value)
    (out / "dmt.json").write_text(json.dumps(value))
    with pytest.raises(BundleError, match="does not fit its own model_digest") as refused:
        open_bundle(out)
    assert "remove its key `model_digest`" in refused.value.hint
    del value["model_digest"]  # as in bundles of earlier versions
    (out / "dmt.json").write_text(json.dumps(value, indent=7))
    open_bundle(out)


@given(st.data())
def test_any_flipped_bit_of_a_manifest_leaves_the_model(
    bundles: dict[str, Path], data: st.DataObject
) -> None:
    path = bundles["dlrm"] / "dmt.json"
    before, model = path.read_bytes(), open_bundle(bundles["dlrm"]).manifest.model
    changed = bytearray(before)
    changed[data.draw(st.integers(0, len(before) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(changed)
        with suppress(BundleError):
            assert open_bundle(bundles["dlrm"]).manifest.model == model
    finally:
        path.write_bytes(before)


CASES = sorted((REPOSITORY.parent / "shared/cases/reliability").glob("*bundle-*"))


@pytest.mark.skipif(not CASES, reason="needs the shared cases")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_shared_cases(bundles: dict[str, Path], tmp_path: Path, case: Path) -> None:
    out = Path(shutil.copytree(bundles["dlrm"], tmp_path / "out"))
    shutil.copy(case / "dmt.json", out / "dmt.json")
    with pytest.raises(BundleError):
        open_bundle(out)
