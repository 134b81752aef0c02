"""A repository goes on to another generation: what `switch.sh` does to files, and what it asks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dmt_convert.bundle import Bundle
from dmt_convert.serving import ExportedModel
from support.paths import read_files

Exporter = Callable[..., ExportedModel]
URL = "localhost:8000"


@pytest.fixture(scope="session")
def bundles(make_bundle: Callable[..., Bundle]) -> tuple[Bundle, Bundle]:
    return make_bundle("dlrm"), make_bundle("passthrough")


@pytest.fixture
def exports(bundles: tuple[Bundle, Bundle], export_unchecked: Exporter) -> tuple[Path, Path]:
    """Two generations of one model."""
    old, new = (export_unchecked(bundle, format="triton").path for bundle in bundles)
    return old, new


@pytest.fixture
def live(exports: tuple[Path, Path], tmp_path: Path) -> Path:
    """The folder that a server reads; its name has a space."""
    return Path(shutil.copytree(exports[0], tmp_path / "the live one"))


def generation_of(folder: Path) -> str:
    return str(json.loads((folder / "export.json").read_text())["details"]["generation"])


def served_parts(folder: Path) -> set[str]:
    """Folders of the models that the ensemble asks."""
    lines = (folder / "dmt/config.pbtxt").read_text().splitlines()
    return {line.split('"')[1] for line in lines if "model_name:" in line}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a `curl` that stands in for the server writes what it was asked."""
    (tmp_path / "bin").mkdir()
    curl = tmp_path / "bin/curl"
    curl.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n'
        'case $* in *$REFUSED/load*) printf %s "$ANSWER"; exit 7;; esac\nprintf 200\n'
    )
    curl.chmod(0o755)
    monkeypatch.setenv("REFUSED", "none")
    monkeypatch.setenv("PATH", f"{curl.parent}:{os.environ['PATH']}")
    return tmp_path / "asked"


def switch(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", script / "switch.sh", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_ensemble_goes_on_and_back(exports: tuple[Path, Path], live: Path, asked: Path) -> None:
    old, new = map(generation_of, exports)
    assert old != new
    before = read_files(live)
    done = switch(exports[1], live, URL)
    assert done.returncode == 0, done.stderr
    loads = [line.split("/models/")[1] for line in asked.read_text().splitlines()]
    assert {name.removesuffix("/load") for name in loads[:-1]} == served_parts(live)
    assert loads[-1] == "dmt/load"  # when all of its parts are there
    assert served_parts(live) == served_parts(exports[1])
    assert all(new in name for name in served_parts(live))
    assert ExportedModel(live).manifest.digest == ExportedModel(exports[1]).manifest.digest
    ExportedModel(live).check_files()
    files = read_files(live)
    changed = {name for name, content in before.items() if files[name] != content}
    assert changed == {"dmt/config.pbtxt", "export.json"}  # nothing that a server has open
    back = switch(live, live, URL, old)
    assert back.returncode == 0, back.stderr
    assert served_parts(live) == served_parts(exports[0])
    assert generation_of(live) == old
    ExportedModel(live).check_files()
    assert not list(live.rglob("*.next")) and not (live / ".incoming").exists()


def test_the_same_export_twice_changes_nothing(
    exports: tuple[Path, Path], live: Path, asked: Path
) -> None:
    switch(exports[1], live, URL)
    before = {path: path.stat().st_ino for path in live.rglob("dmt_*/1/*")}
    assert switch(exports[1], live, URL).returncode == 0
    assert {path: path.stat().st_ino for path in live.rglob("dmt_*/1/*")} == before


@pytest.mark.parametrize("refused", ["_tower_001", "_over_arch", "/dmt"])
def test_what_a_server_refuses_is_taken_back(
    exports: tuple[Path, Path], live: Path, asked: Path, monkeypatch: pytest.MonkeyPatch,
    refused: str,
) -> None:  # fmt: skip
    config, document = (live / "dmt/config.pbtxt").read_bytes(), (live / "export.json").read_bytes()
    monkeypatch.setenv("REFUSED", refused)
    monkeypatch.setenv("ANSWER", '{"error":"out of memory"}400')
    done = switch(exports[1], live, URL)
    assert done.returncode == 3 and "out of memory" in done.stderr
    assert generation_of(exports[0]) in done.stderr or refused == "/dmt"
    assert ("/dmt/load" in asked.read_text()) == (refused == "/dmt")
    assert (live / "dmt/config.pbtxt").read_bytes() == config
    assert (live / "export.json").read_bytes() == document


def test_a_copy_that_was_cut_off_is_made_again(
    exports: tuple[Path, Path], live: Path, asked: Path
) -> None:
    part = next(exports[1].glob("dmt_*_tower_000")).name
    (live / ".incoming/1").mkdir(parents=True)
    (live / ".incoming/1/tower.safetensors").write_bytes(b"half")
    assert switch(exports[1], live, URL).returncode == 0
    assert read_files(live / part) == read_files(exports[1] / part)


def test_a_server_that_polls_is_not_asked(
    exports: tuple[Path, Path], live: Path, asked: Path
) -> None:
    assert switch(exports[1], live, "-").returncode == 0
    assert not asked.exists()
    assert served_parts(live) == served_parts(exports[1])


def test_a_repository_of_an_early_version_goes_on_and_back(
    exports: tuple[Path, Path], live: Path, asked: Path
) -> None:
    config = live / "dmt/config.pbtxt"
    text = config.read_text()
    config.write_text(text[: text.index("parameters {")])
    shutil.rmtree(live / "dmt/configs")
    (live / "switch.sh").unlink()
    early = config.read_bytes()
    assert switch(exports[1], live, URL).returncode == 0
    assert switch(live, live, URL, "first").returncode == 0
    assert config.read_bytes() == early


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        ((), 2, "sh NEW/switch.sh LIVE URL"),
        (("nowhere", URL), 3, "is not a model repository that serves dmt"),
        (("LIVE", URL, "0badc0de"), 3, "has no generation 0badc0de; it has "),
    ],
)
def test_what_cannot_be_is_refused(
    exports: tuple[Path, Path], live: Path, asked: Path, arguments: tuple[str, ...], code: int,
    found: str,
) -> None:  # fmt: skip
    before = served_parts(live)
    done = switch(exports[1], *(live if word == "LIVE" else word for word in arguments))
    assert done.returncode == code and found in done.stderr
    assert served_parts(live) == before and not asked.exists()


def test_a_generation_is_what_was_exported(
    bundles: tuple[Bundle, Bundle], export_unchecked: Exporter
) -> None:
    def generation(bundle: Bundle, **options: object) -> str:
        exported = export_unchecked(bundle, format="triton", **options)
        return str(exported.manifest.details["generation"])

    first = generation(bundles[0])
    assert generation(bundles[0]) == first
    others = [
        generation(bundles[1]),
        generation(bundles[0], pooling_input="single"),
        generation(bundles[0], out_of_range="clip"),
    ]
    assert len({first, *others}) == 4


def test_the_readme_says_how_to_go_on_and_back(exports: tuple[Path, Path]) -> None:
    readme = (exports[0] / "README.md").read_text()
    assert "--model-control-mode=explicit --load-model=dmt" in readme
    assert "/v2/models/dmt/ready" in readme
    assert "sh NEW/switch.sh LIVE" in readme and "sh LIVE/switch.sh LIVE" in readme
    assert generation_of(exports[0]) in readme
