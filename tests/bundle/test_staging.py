"""A target is replaced whole or not at all, and nothing that is no bundle is ever deleted."""

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmt_convert.bundle import Bundle, check_digests, open_bundle
from dmt_convert.errors import BundleError, ConfigError
from dmt_convert.files import check_target, staging
from dmt_convert.files.staging import staged_file, staged_folder, write_text
from support.checkpoints.flat import make_flat

Writer = Callable[..., Bundle]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_empty_folder_may_be_the_target(tmp_path: Path, write: Writer) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_an_existing_bundle_stays_without_force(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(BundleError, match="exists") as refused:
        write(tmp_path / "out")
    assert "--force" in refused.value.hint
    assert content(tmp_path) == before


def test_force_replaces_a_bundle(tmp_path: Path, write: Writer) -> None:
    old = write(tmp_path / "out")
    source = make_flat(tmp_path / "other.pt", seed=1)
    new = write(tmp_path / "out", source=source, force=True)
    assert new.manifest.source.digest != old.manifest.source.digest
    check_digests(open_bundle(tmp_path / "out"))
    assert left(tmp_path) == ["other.pt", "out"]


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("ten years of work")


def make_bundle_with_notes(path: Path) -> None:
    make_folder(path)
    (path / "dmt.json").write_text("{}")


def make_link(path: Path) -> None:
    make_folder(path.with_name("elsewhere"))
    (path.with_name("elsewhere") / "dmt.json").write_text("{}")
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (make_folder, "is not a bundle"),
        (make_bundle_with_notes, "holds files beside the bundle's own"),
        (lambda path: path.write_text("a file"), "is not a bundle"),
        (make_link, "is a symbolic link"),
        (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
        (os.mkfifo, "is not a bundle"),
    ],
)
def test_force_deletes_nothing_but_bundles(
    tmp_path: Path, write: Writer, make: Callable[[Path], object], found: str
) -> None:
    make(tmp_path / "out")
    files = left(tmp_path)
    with pytest.raises(BundleError, match=found):
        write(tmp_path / "out", force=True)
    assert left(tmp_path) == files
    assert not (tmp_path / "out").is_dir() or (tmp_path / "out" / "thesis.txt").is_file()


@pytest.mark.parametrize("name", ["no/such/out", ".", "..", "file/out"])
def test_a_target_that_cannot_be_made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(BundleError):
        check_target(Path(name), force=True)


@pytest.mark.parametrize("name", ["a b", "[x]*?", "ü", "-n", "a.b.c"])
def test_odd_names(tmp_path: Path, write: Writer, name: str) -> None:
    stale = tmp_path / f".{name}.dmt-tmp-1"
    stale.mkdir()
    write(tmp_path / name)
    assert left(tmp_path) == [name]


def test_leftovers_of_other_targets_stay(tmp_path: Path, write: Writer) -> None:
    for name in (".out2.dmt-tmp-1", ".out.dmt-tmp-1", "out.dmt-tmp-1"):
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert left(tmp_path) == [".out2.dmt-tmp-1", "out", "out.dmt-tmp-1"]


def test_a_conversion_that_runs_is_not_disturbed(tmp_path: Path, write: Writer) -> None:
    running = tmp_path / ".out.dmt-tmp-1"
    running.mkdir()
    lock = os.open(running, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BundleError, match="another conversion"):
            write(tmp_path / "out")
        assert left(tmp_path) == [running.name]
    finally:
        os.close(lock)
    write(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_two_conversions_to_one_target(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        staged_folder(out, force=False, needed_bytes=0),
        pytest.raises(BundleError, match="another conversion"),
        staged_folder(out, force=False, needed_bytes=0),
    ):
        pytest.fail("both run")


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(BundleError, match="exists"),
        staged_folder(out, force=False, needed_bytes=0),
    ):
        make_folder(out)
    assert left(tmp_path) == ["out"]
    assert left(out) == ["thesis.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_any_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "out", force=False, needed_bytes=0) as folder:
            make_folder(folder / "weights")
            raise error

    with pytest.raises(error):
        fail()
    assert left(tmp_path) == []


def test_too_little_space_is_seen_at_once(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BundleError, match="GiB left"):
        write(tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_disk_that_fills_up(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch, code: int, nth: int
) -> None:
    write(tmp_path / "out")
    before = content(tmp_path)
    real, real_at, count = os.write, os.pwrite, 0

    def fill_up(write: Callable[..., int], descriptor: int, data: memoryview, *at: int) -> int:
        nonlocal count
        count += 1
        if count == nth:
            return write(descriptor, data[: max(1, len(data) // 2)], *at)  # a short write first
        if count > nth:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data, *at)

    monkeypatch.setattr(os, "write", functools.partial(fill_up, real))
    monkeypatch.setattr(os, "pwrite", functools.partial(fill_up, real_at))
    with pytest.raises(BundleError, match="is full") as refused:
        write(tmp_path / "out", force=True)
    monkeypatch.undo()
    assert count > nth
    assert "nothing was changed" in refused.value.hint
    assert content(tmp_path) == before


def test_short_writes_are_completed(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some, write_at = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write_some(fd, data[:97]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write_at(fd, data[:97], at))
    check_digests(write(tmp_path / "out"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    tiny_disk: Path, write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_flat(tmp_path / "large.pt", rows=(5000, 50, 11, 6))
    with pytest.raises(BundleError, match="left"):
        write(tiny_disk / "out", source=source)
    # and where the space goes only while it is written
    usage = type(shutil.disk_usage(tmp_path))(1 << 40, 0, 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BundleError, match="is full"):
        write(tiny_disk / "out", source=source)
    assert left(tiny_disk) == []


def test_no_exchange_on_this_file_system(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out")
    before = content(tmp_path)

    class Libc:
        @staticmethod
        def renameat2(*_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

        @staticmethod
        def sync_file_range(*_: object) -> int:
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc)
    with pytest.raises(BundleError, match="cannot be replaced in one step"):
        write(tmp_path / "out", force=True)
    assert content(tmp_path) == before
    # seen before any work is done
    target = staged_folder(tmp_path / "out", force=True, needed_bytes=1)
    with pytest.raises(BundleError, match="cannot be replaced in one step"), target:
        pytest.fail("the work began")


def test_the_root_of_a_file_system_is_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    target = staged_folder(tmp_path / "out", needed_bytes=1)
    with pytest.raises(BundleError, match="root of a mounted file system") as refused, target:
        pytest.fail("the work began")
    assert str(tmp_path / "out" / "bundle") in refused.value.hint
    assert left(tmp_path) == ["out"]


def unconfirmed(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A disk that fails when the names in a folder are synced."""
    real = staging.sync_folder

    def fail(path: Path) -> None:
        if path == folder:
            raise OSError(errno.EIO, "Input/output error", str(path))
        real(path)

    patch.setattr(staging, "sync_folder", fail)


def test_a_disk_that_does_not_confirm_the_exchange(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new bundle is in place, the old one is not lost, and the message says so."""
    write(tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    before = (tmp_path / "out").stat().st_ino
    unconfirmed(monkeypatch, tmp_path)
    with pytest.raises(BundleError, match="was written and put in place, but the disk") as refused:
        write(tmp_path / "out", force=True)
    assert f"the old one is kept as {tmp_path / 'out.old1'}" in refused.value.hint
    assert (tmp_path / "out.old1").stat().st_ino == before
    open_bundle(tmp_path / "out")
    open_bundle(tmp_path / "out.old1")
    assert left(tmp_path) == ["out", "out.old", "out.old1"]


def test_a_disk_that_does_not_confirm_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unconfirmed(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="was written, but the disk did not confirm"):
        write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"


def test_files_reach_the_disk_before_the_name(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a bundle that has its name is whole: sync everything, then rename."""
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append("RENAME")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write(tmp_path / "out")
    cut = events.index("RENAME")
    files = {path.name for path in (tmp_path / "out").rglob("*")}
    assert files < set(events[:cut])
    assert events[cut - 1].startswith(".out.dmt-tmp-")
    assert events[cut + 1 :] == [tmp_path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_old_bundle_is_there_until_the_new_one_is(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader sees at every sync of a replacement opens as a whole bundle."""
    write(tmp_path / "out")
    real, seen = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        open_bundle(tmp_path / "out")
        seen += 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "out", force=True)
    assert seen > 5


def test_a_folder_that_may_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    target = staged_folder(tmp_path / "out", force=False, needed_bytes=1)
    with pytest.raises(BundleError, match="nothing can be written to") as caught, target:
        pass
    assert str(tmp_path) in caught.value.found and "--out" in caught.value.hint


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with staged_file(path) as staged:
            staged.write_text("new, half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old" and left(tmp_path) == ["a.txt"]
    with staged_file(path) as staged:
        assert staged.name == path.name  # some writers go by the suffix
        staged.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and left(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with staged_file(path) as first:
        first.write_text("first")
        write_text(path, "second")
    assert path.read_text() == "first" and left(tmp_path) == ["a.txt"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "a.txt", tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_text(path, "x")
    # what cannot be read while it is written is another matter
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "a.txt"):
        (tmp_path / "source").read_text()
    assert left(tmp_path) == []


def test_leftovers_of_killed_writers_of_a_file_go_away(tmp_path: Path) -> None:
    stale = tmp_path / ".a.txt.dmt-tmp-1-0"
    make_folder(stale)
    write_text(tmp_path / "a.txt", "x")
    assert left(tmp_path) == ["a.txt"]
