"""No option that names a file to write replaces an input, or a file of another kind."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmt_convert.errors import ConfigError
from dmt_convert.files import (
    FIGURE_FILE,
    PARTITION_FILE,
    PLAN_FILE,
    SCORES_FILE,
    FileKind,
    check_distinct,
    check_output,
)
from support.commands import Run
from support.refusals import check_refusal

Call = Callable[..., Run]
PNG = b"\x89PNG\r\n"


@pytest.fixture
def commands(exact: Path, click_data: Path, tmp_path: Path, flat: Path) -> dict[str, list[object]]:
    """Commands without the file to write, by the option that names it."""
    plan = ["plan", exact, "--hosts", 2, "--ranks-per-host", 2]
    partition = ["partition", flat, "--towers", 2, "--partition", "round-robin"]
    return {
        "partition --out": partition,
        "partition --plot": partition,
        "plan --out": plan,
        "plan --plot": [*plan, "--predict-scaling"],
        "score --out": ["score", exact, "--data", click_data],
        "unshard --out": ["unshard", flat],
    }


OPTIONS = [
    "partition --out",
    "partition --plot",
    "plan --out",
    "plan --plot",
    "score --out",
    "unshard --out",
]


def input_of(command: list[object]) -> Path:
    source = Path(str(command[1]))
    return source / "weights" / "dense.safetensors" if source.is_dir() else source


@pytest.mark.parametrize("how", ["itself", "symlink", "hard link"])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_input_is_never_replaced(
    commands: dict[str, list[object]], option: str, how: str, tmp_path: Path, call_dmt: Call
) -> None:
    command = commands[option]
    source = input_of(command)
    out = tmp_path / "link.svg" if how != "itself" else source
    if how == "symlink":
        out.symlink_to(source)
    elif how == "hard link":
        os.link(source, out)
    before = source.read_bytes()
    run = call_dmt(*command, option.split()[1], out, "--json")
    assert run.code in (2, 3)
    error = "ExportError" if option.startswith("unshard") else "ConfigError"
    check_refusal(run, error, str(out))
    assert source.read_bytes() == before
    assert out.read_bytes() == before


@pytest.mark.parametrize("option", OPTIONS)
def test_a_file_of_another_kind_is_never_replaced(
    commands: dict[str, list[object]], option: str, tmp_path: Path, call_dmt: Call
) -> None:
    out = tmp_path / "thesis.svg"
    out.write_text('{"towers": [], "thesis": 1}')
    run = call_dmt(*commands[option], option.split()[1], out, "--json")
    error = "ExportError" if option.startswith("unshard") else "ConfigError"
    check_refusal(run, error, f"{out} exists")
    assert out.read_text() == '{"towers": [], "thesis": 1}'


@pytest.mark.parametrize("option", OPTIONS[:5])
def test_what_the_command_wrote_is_replaced(
    commands: dict[str, list[object]], option: str, tmp_path: Path, call_dmt: Call
) -> None:
    out = tmp_path / "out.svg"
    for _ in range(2):
        run = call_dmt(*commands[option], option.split()[1], out)
        assert run.code == 0, run.stderr
        assert out.stat().st_size


def test_nothing_is_written_into_a_bundle(exact: Path, click_data: Path, call_dmt: Call) -> None:
    before = sorted(exact.rglob("*"))
    for name in ("dmt.json", "plan.json", "new.json", "weights/new.npz"):
        run = call_dmt("score", exact, "--data", click_data, "--out", exact / name, "--json")
        check_refusal(run, "ConfigError", "which is read")
        run = call_dmt(
            "plan", exact, "--hosts", 2, "--ranks-per-host", 2, "--out", exact / name, "--json"
        )
        check_refusal(run, "ConfigError", "which is read")
    assert sorted(exact.rglob("*")) == before


def test_other_inputs_of_a_partition(flat: Path, tmp_path: Path, call_dmt: Call) -> None:
    towers = tmp_path / "towers.json"
    assert call_dmt("partition", flat, "--towers", 2, "--out", towers).code == 0
    run = call_dmt("partition", flat, "--partition", towers, "--out", towers, "--json")
    check_refusal(run, "ConfigError", "which is read")


WRITTEN: dict[str, tuple[FileKind, bytes]] = {
    "partition": (PARTITION_FILE, b'{"towers": [["a"], ["b"]]}'),
    "plan": (PLAN_FILE, b'{"schema_version": 1, "cluster": {}, "tower_hosts": []}'),
    "png": (FIGURE_FILE, PNG),
    "svg": (FIGURE_FILE, b"<?xml version"),
    "empty": (SCORES_FILE, b""),
}
OTHERS: dict[str, bytes] = {
    "text": b"a thesis",
    "list": b"[1]",
    "deep": b"[" * 200_000,
    "zip": b"PK\x03\x04 cut",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_kinds(tmp_path: Path, name: str) -> None:
    kind, content = WRITTEN[name]
    (tmp_path / "file").write_bytes(content)
    check_output(tmp_path / "file", kind)
    for other in (PARTITION_FILE, PLAN_FILE, FIGURE_FILE, SCORES_FILE):
        if other is not kind and content:
            with pytest.raises(ConfigError, match="exists and is not"):
                check_output(tmp_path / "file", other)


@pytest.mark.parametrize("content", OTHERS)
@pytest.mark.parametrize("kind", [PARTITION_FILE, PLAN_FILE, FIGURE_FILE, SCORES_FILE])
def test_other_files(tmp_path: Path, content: str, kind: FileKind) -> None:
    (tmp_path / "file").write_bytes(OTHERS[content])
    with pytest.raises(ConfigError, match="exists and is not"):
        check_output(tmp_path / "file", kind)


def test_a_probe_is_no_file_of_scores(tmp_path: Path) -> None:
    np.savez(tmp_path / "probe.npz", logits=np.zeros(2), dense=np.zeros(2))
    with pytest.raises(ConfigError, match="exists and is not scores"):
        check_output(tmp_path / "probe.npz", SCORES_FILE)
    np.savez(tmp_path / "scores.npz", logits=np.zeros(2))
    check_output(tmp_path / "scores.npz", SCORES_FILE)


def test_devices_and_folders(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match=r"is a (device|folder)"):
            check_output(path, PLAN_FILE)
    with pytest.raises(ConfigError, match="does not exist"):
        check_output(tmp_path / "no" / "file", PLAN_FILE)


def test_a_file_in_a_data_folder(tmp_path: Path) -> None:
    """A new one is harmless; one that is there is data."""
    (tmp_path / "part.json").write_text(json.dumps({"towers": []}))
    check_output(tmp_path / "new.json", PARTITION_FILE, inputs=[tmp_path])
    with pytest.raises(ConfigError, match="which is read"):
        check_output(tmp_path / "part.json", PARTITION_FILE, inputs=[tmp_path])


def test_two_outputs_in_one_file(tmp_path: Path) -> None:
    check_distinct(out=tmp_path / "a", plot=None)
    check_distinct(out=tmp_path / "a", plot=tmp_path / "b")
    with pytest.raises(ConfigError, match="--out and --plot are the same file"):
        check_distinct(out=tmp_path / "a", plot=tmp_path / "." / "a")
