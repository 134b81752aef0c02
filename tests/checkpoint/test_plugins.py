"""Readers that other distributions add through entry points."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import open_data
from dmt_convert.errors import CheckpointError, ConfigError, DmtError

READER = """
from dmt_convert.checkpoint import read_safetensors
from dmt_convert.readers import Reader

def is_ours(path):
    return path.suffix == ".ours"

def read(path):
    return read_safetensors(path)

READER = Reader(format="ours", can_read=is_ours, read=read)
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution of one module."""

    def put(
        code: str, name: str = "ours", group: str = "dmt_convert.readers", at: str = "READER"
    ) -> None:
        module = f"plugin_of_{name}"
        site = tmp_path / f"site-{name}"
        info = site / f"{name}-1.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{at}\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.ours"
    save_file({"emb_l.0.weight": np.ones((3, 2), dtype=np.float32)}, path)
    return path


def test_a_reader_of_a_plugin_reads(install, source, caplog):
    install(READER)
    with caplog.at_level(logging.INFO, "dmt_convert"):
        assert open_checkpoint(source).tensors
    assert "read by ours 1.5" in caplog.text


def test_without_the_plugin_another_reader_is_asked(source, caplog):
    with caplog.at_level(logging.INFO, "dmt_convert"):
        assert open_checkpoint(source).format == "safetensors"
    assert "ours 1.5" not in caplog.text


def refuse(source: Path, error: type[DmtError], match: str) -> DmtError:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(source)
    assert caught.value.expected and caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("def read", "import no_such\ndef read", r"ours 1\.5 .*cannot be loaded .*no_such"),
        ("def read", "def def read", "cannot be loaded .*SyntaxError"),
        ("READER = ", "OTHER = ", "cannot be loaded"),
        ("READER = Reader", "READER = dict", r"ours 1\.5 .*is a dict"),
        ('format="ours"', 'format="torch"', r"'torch', a name that dmt-convert itself uses"),
        ("return path.suffix", "return path.no_such", r"ours 1\.5 .*failed on .*no_such"),
        ("return read_safetensors(path)", "return 3", r"ours 1\.5 .*returned a int"),
        ("return read_safetensors(path)", "raise KeyError(7)", r"ours 1\.5 .*failed .*KeyError: 7"),
    ],
)
def test_a_broken_plugin_is_named(install, source, old, new, says):
    assert old in READER
    install(READER.replace(old, new))
    error = refuse(source, ConfigError, says)
    assert "ours" in error.hint


def test_two_plugins_of_one_name(install, source):
    install(READER)
    install(READER, name="theirs")
    refuse(source, ConfigError, r"theirs 1\.5 .*'ours', a name that ours 1\.5 uses")


def test_what_a_plugin_says_of_its_files_is_kept(install, source):
    install(
        READER.replace(
            "return read_safetensors(path)",
            "from dmt_convert.errors import CheckpointError\n"
            "    raise CheckpointError('it is cut short', expected='all', hint='copy it')",
        )
    )
    refuse(source, CheckpointError, "it is cut short")


def test_readers_of_data_sets(install, tmp_path):
    code = """
import numpy as np
from dmt_convert.data import open_data
from dmt_convert.readers import Reader

def read(path):
    np.savez(path.with_suffix(".npz"), sparse=np.zeros((3, 2), dtype=np.int64))
    return open_data(path.with_suffix(".npz"))

READER = Reader(format="lines", can_read=lambda path: path.suffix == ".lines", read=read)
"""
    (tmp_path / "rows.lines").write_text("three")
    install(code, group="dmt_convert.data_readers")
    assert open_data(tmp_path / "rows.lines").num_rows == 3
