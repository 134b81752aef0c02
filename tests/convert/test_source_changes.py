"""A checkpoint that is saved over while it is converted or unsharded is refused by name."""

import os
from pathlib import Path
from typing import Any

import pytest

import dmt_convert as dmt
from dmt_convert.checkpoint.held_files import HeldFile
from dmt_convert.errors import CheckpointError
from support.bundles import convert_quickly
from support.checkpoints.flat import flat_state, save_flat


def change_after(patch: pytest.MonkeyPatch, source: Path, reads: int, *, keep: int) -> None:
    """Save over a checkpoint in place once so many reads of it were begun."""
    other = save_flat(source.with_name(f"other{source.suffix}"), flat_state(seed=1))
    content, read_into, turns = other.read_bytes(), HeldFile.read_into, 0

    def counted(self: HeldFile, *args: Any) -> None:
        nonlocal turns
        read_into(self, *args)
        turns += self.path == source
        if turns == reads:
            with source.open("r+b") as file:
                file.write(content[:keep])
                file.truncate(keep)
            os.utime(source, ns=(0, source.stat().st_mtime_ns + 1_000_000))

    patch.setattr(HeldFile, "read_into", counted)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("reads", [1, 6])
def test_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, cut: bool, reads: int
) -> None:
    source = save_flat(tmp_path / f"ckpt{suffix}", flat_state())
    size = source.stat().st_size
    change_after(monkeypatch, source, reads, keep=size // 3 if cut else size)
    with pytest.raises(CheckpointError, match="changed while it was read") as refused:
        convert_quickly(source, tmp_path / "out")
    assert str(source) in refused.value.found and "copy it first" in refused.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_unshard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    source = save_flat(tmp_path / f"ckpt{suffix}", flat_state())
    change_after(monkeypatch, source, 3, keep=source.stat().st_size)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        dmt.unshard(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_change_after_the_last_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in place yet: what was read may be half of it."""
    source = save_flat(tmp_path / "ckpt.safetensors", flat_state())
    from dmt_convert.bundle import BundleWriter

    finish = BundleWriter.finish

    def late(self: BundleWriter, *args: Any) -> None:
        finish(self, *args)
        os.utime(source)

    monkeypatch.setattr(BundleWriter, "finish", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        convert_quickly(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
