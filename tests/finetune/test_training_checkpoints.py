"""Checkpoints of a training over gloo ranks: whole or not there, and the same on any number."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint, read_tensor, resolve_pieces
from dmt_convert.cluster import checkpoint_store
from dmt_convert.cluster.checkpoint_folder import CheckpointFolder, digest_file
from dmt_convert.cluster.checkpoint_store import CheckpointStore
from dmt_convert.cluster.ranks import Ranks
from dmt_convert.errors import CheckpointError
from support.cluster.client import RunRanks

ROW_WISE = "model.towers.towers.0.embedding.embedding_bags.t_0.weight"

KILLED = -9


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def read_all(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, as bytes."""
    return {info.path: read_tensor(info).tobytes() for info in open_checkpoint(folder).tensors}


@pytest.fixture(scope="module")
def saved(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, saved by four ranks."""
    folder = tmp_path_factory.mktemp("saved") / "deep" / "checkpoints"
    run_ranks(4, "save", folder=folder, steps=[10, 20])
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_loads_what_four_saved(
    run_ranks: RunRanks, saved: Path, size: int
) -> None:
    for report in run_ranks(size, "load", folder=saved):
        assert report["result"] == {
            "step": 20,
            "num_ranks": 4,
            "same": True,
            "progress": True,
            "notes": [],
        }


def test_four_ranks_load_what_one_saved(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(1, "save", folder=tmp_path, steps=[3])
    assert all(report["result"]["same"] for report in run_ranks(4, "load", folder=tmp_path))


def test_an_earlier_checkpoint_can_be_asked_for(run_ranks: RunRanks, saved: Path) -> None:
    result = run_ranks(2, "load", folder=saved, before=20)[1]["result"]
    assert (result["step"], result["same"], result["progress"]) == (10, True, True)
    assert run_ranks(2, "load", folder=saved, before=10)[0]["result"] is None


def test_asynchronous_saves_hold_what_was_there_when_they_began(
    run_ranks: RunRanks, saved: Path, tmp_path: Path
) -> None:
    reports = run_ranks(4, "save", folder=tmp_path, steps=[10, 20], asynchronous=True)
    assert all(report["result"]["done"] for report in reports)
    assert names(tmp_path) == ["step_000000010", "step_000000020"]
    for name in names(tmp_path):
        assert read_all(tmp_path / name) == read_all(saved / name)
        assert (tmp_path / name / "progress.json").read_bytes() == (
            saved / name / "progress.json"
        ).read_bytes()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept(run_ranks: RunRanks, tmp_path: Path, asynchronous: bool) -> None:
    run_ranks(2, "save", folder=tmp_path, steps=[1, 2, 3, 5], keep=2, asynchronous=asynchronous)
    assert names(tmp_path) == ["step_000000003", "step_000000005"]
    run_ranks(2, "save", folder=tmp_path, steps=[8], keep=1)
    assert names(tmp_path) == ["step_000000008"]


def forge_manifest(folder: Path, *files: str) -> None:
    """Let a manifest list files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in files:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "digest": digest_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_tensor(folder: Path) -> None:
    """Flip a bit of a tensor's first element."""
    (info,) = (i for i in open_checkpoint(folder).tensors if i.path == ROW_WISE)
    piece = resolve_pieces(info)[0]
    data = bytearray(piece.path.read_bytes())
    data[piece.offset] ^= 1
    piece.path.write_bytes(data)


class AloneRanks(Ranks):
    """The only rank there is, in this process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.rank, self.size, self.group = 0, 1, None

    def on_first(self, work: Callable[[], Any]) -> Any:
        return work()

    def on_all(self, work: Callable[[], Any]) -> list[Any]:
        return [work()]

    def close(self) -> None:
        pass


@contextmanager
def store_alone(folder: Path) -> Iterator[CheckpointStore]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_store, "Ranks", AloneRanks)
        store = CheckpointStore(folder)
    yield store
    store.close()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a rank's file is short": lambda path: cut(path / "__1_0.distcp"),
    "a rank's file is missing": lambda path: (path / "__3_0.distcp").unlink(),
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "no progress": lambda path: (path / "progress.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "an empty manifest": lambda path: (path / "manifest.json").write_text("{}"),
    "a manifest that is none": lambda path: (path / "manifest.json").write_text("[" * 9),
    "metadata of the same size": lambda path: (path / ".metadata").write_bytes(
        b"\0" * (path / ".metadata").stat().st_size
    ),
    "another step's files": lambda path: shutil.copytree(
        path.with_name("step_000000010"), path, dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, marks=() if number % 3 == 0 else pytest.mark.exhaustive)
        for number, damage in enumerate(DAMAGES)
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_note(
    copy: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](copy / "step_000000020")
    with store_alone(copy) as store:
        found = store.newest()
    assert found is not None
    assert found.step == 10
    assert "step_000000020 is damaged" in caplog.text
    assert "set aside as step_000000020-damaged, and step 10 is taken" in caplog.text
    assert names(copy) == ["step_000000010", "step_000000020-damaged"]


def test_all_ranks_resume_from_the_one_before_a_damaged_one(
    run_ranks: RunRanks, copy: Path
) -> None:
    cut(copy / "step_000000020" / "__2_0.distcp")
    reports = run_ranks(2, "load", folder=copy)
    for report in reports:
        assert (report["result"]["step"], report["result"]["same"]) == (10, True)
    assert len(reports[0]["result"]["notes"]) == 1
    # the damaged one neither counts as kept, nor is it ever removed
    run_ranks(2, "save", folder=copy, steps=[30, 40], keep=2)
    assert names(copy) == ["step_000000020-damaged", "step_000000030", "step_000000040"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(run_ranks: RunRanks, copy: Path) -> None:
    cut(copy / "step_000000020" / "__2_0.distcp")
    run_ranks(2, "save", folder=copy, steps=[20])
    result = run_ranks(2, "load", folder=copy)[0]["result"]
    assert (result["step"], result["num_ranks"], result["same"]) == (20, 2, True)


def flip(path: Path, place: float) -> None:
    """Flip one bit of a file, at a part of its length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


FILES = ("__0_0.distcp", "__3_0.distcp", ".metadata", "progress.json", "manifest.json")


@pytest.mark.parametrize("place", [0.0, 0.31, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_damage(copy: Path, name: str, place: float) -> None:
    """Sizes agree: only the digests show it. Of the manifest, some bits mean nothing."""
    flip(copy / "step_000000020" / name, place)
    with store_alone(copy) as store:
        found = store.newest()
    assert found is not None
    assert found.step == 10 or (name == "manifest.json" and place == 1.0)


def test_flipped_bits_are_found_by_all_ranks(run_ranks: RunRanks, copy: Path) -> None:
    flip(copy / "step_000000020" / "__1_0.distcp", 0.6)
    for report in run_ranks(2, "load", folder=copy):
        assert (report["result"]["step"], report["result"]["same"]) == (10, True)
    assert names(copy) == ["step_000000010", "step_000000020-damaged"]


def test_a_checkpoint_is_compared_again_when_it_is_loaded_later(
    run_ranks: RunRanks, copy: Path
) -> None:
    for report in run_ranks(2, "load_twice", folder=copy):
        assert "__1_0.distcp has other bytes" in report["result"]["found"]
        assert report["result"]["error"] == "DamagedCheckpointError"


def test_all_damaged_is_refused_and_nothing_changes(copy: Path) -> None:
    """Otherwise hours of work would be lost without a word."""
    flip(copy / "step_000000010" / "__0_0.distcp", 0.5)
    cut(copy / "step_000000020" / "__2_0.distcp")
    with store_alone(copy) as store, pytest.raises(CheckpointError) as refused:
        store.newest()
    assert "all 2 checkpoints" in refused.value.found
    assert "--force" in refused.value.hint
    assert [detail.rpartition("step_")[2][:9] for detail in refused.value.details] == [
        "000000020",
        "000000010",
    ]
    assert names(copy) == ["step_000000010", "step_000000020"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_now_is_refused_and_stays(
    copy: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the file system says nothing about the checkpoint."""
    real = Path.open

    def fail_once(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name and path.parent.name == "step_000000020":
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    with store_alone(copy) as store:
        monkeypatch.setattr(Path, "open", fail_once)
        with pytest.raises(CheckpointError) as refused:
            store.newest()
        monkeypatch.undo()
        assert name in refused.value.found
        assert os.strerror(number) in refused.value.found
        assert "run it again" in refused.value.hint
        assert names(copy) == ["step_000000010", "step_000000020"]
        found = store.newest()
        assert found is not None
        assert found.step == 20


def test_an_error_of_reading_names_the_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python names it for `open` only."""
    path = saved / "step_000000020" / "__0_0.distcp"

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=r"__0_0\.distcp"):
        digest_file(path)


def test_checkpoints_of_version_1_are_compared_with_their_own_checksums(copy: Path) -> None:
    """Their manifest has sizes only; the tensors' CRC-32 is DCP's."""
    for step in (10, 20):
        path = copy / f"step_{step:09d}" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["version"] = 1
        manifest["files"] = {name: file["bytes"] for name, file in manifest["files"].items()}
        path.write_text(json.dumps(manifest))
    flip_tensor(copy / "step_000000020")
    with store_alone(copy) as store:
        found = store.newest()
        assert found is not None
        assert found.step == 10
        assert "checksum" in store.notes[0]


def test_the_digests_are_of_what_was_written(saved: Path) -> None:
    manifest = json.loads((saved / "step_000000020" / "manifest.json").read_text())
    assert set(FILES) - {"manifest.json"} <= set(manifest["files"])
    for name, file in manifest["files"].items():
        assert digest_file(saved / "step_000000020" / name) == file["digest"]


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_metadata_that_would_run_code_is_refused(
    run_ranks: RunRanks, copy: Path, tmp_path: Path
) -> None:
    path = copy / "step_000000020" / ".metadata"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "pwned")))
    forge_manifest(path.parent, ".metadata")
    result = run_ranks(2, "load", folder=copy)[0]["result"]
    assert result["step"] == 10
    assert "asks to run code" in result["notes"][0]
    assert not (tmp_path / "pwned").exists()


def test_values_that_torch_would_unpickle_are_refused(run_ranks: RunRanks, copy: Path) -> None:
    """DCP stores what is no tensor as a pickle, and loads it without a guard."""
    import torch.distributed.checkpoint as dcp

    folder = copy / "step_000000020"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"epoch": 3, "w": torch.ones(2)}, checkpoint_id=folder.with_name("other"))
    for name in (".metadata", "__0_0.distcp"):
        shutil.copy(folder.with_name("other") / name, folder / name)
    forge_manifest(folder, ".metadata", "__0_0.distcp")
    result = run_ranks(1, "load", folder=copy)[0]["result"]
    assert result["step"] == 10
    assert "holds pickled values (epoch)" in result["notes"][0]


def test_another_model_is_refused_by_all_ranks_with_the_tensors(
    run_ranks: RunRanks, saved: Path
) -> None:
    for report in run_ranks(2, "load_another_model", folder=saved):
        assert report["result"]["found"].endswith("lacks 3 of the 7 tensors to load")
        assert report["result"]["details"] == [
            "model.over_arch.weight: fp32 of shape [3, 5], not fp32 of shape [3, 6]",
            "model.new: missing",
            "optimizer.step: fp32 of shape [], not int64 of shape []",
        ]


def test_values_are_no_tensors(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert "lr is a float" in run_ranks(1, "save_no_tensor", folder=tmp_path)[0]["result"]


def test_a_step_before_the_newest_is_refused_until_that_is_discarded(
    run_ranks: RunRanks, copy: Path
) -> None:
    for report in run_ranks(2, "save_earlier", folder=copy, step=15):
        (refused,) = report["result"]
        assert refused["found"].endswith("holds step_000000020, which is later than step 15")
    assert names(copy) == ["step_000000010", "step_000000015"]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("limited", "limit"),
    [
        (1, 0),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(1, 3000), (0, 200)]),
    ],
)
def test_a_full_disk_of_one_rank_stops_all_and_spoils_nothing(
    run_ranks: RunRanks, tmp_path: Path, asynchronous: bool, limited: int, limit: int
) -> None:
    reports = run_ranks(
        2,
        "save_in_little_room",
        folder=tmp_path,
        asynchronous=asynchronous,
        limited=limited,
        limit=limit,
    )
    for report in reports:
        refused = report["result"]["refused"]
        assert refused["error"] == "CheckpointError"
        assert f"the disk of {tmp_path} is full on rank {limited}" in refused["found"]
        assert report["result"]["names"] == [".lock", "step_000000001"]
    assert run_ranks(2, "load", folder=tmp_path)[0]["result"]["step"] == 2


def test_a_folder_that_cannot_be_made_is_refused_by_all_ranks(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for report in run_ranks(2, "open_folder", folder=tmp_path / "file" / "checkpoints"):
        assert "cannot be written to" in report["result"]["found"]
        assert report["result"]["hint"]


def test_two_trainings_cannot_write_to_one_folder(run_ranks: RunRanks, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for report in run_ranks(2, "open_folder", folder=tmp_path):
        assert report["result"]["found"].startswith("another training writes")
    folder.close()
    assert run_ranks(2, "open_folder", folder=tmp_path)[0]["result"] is None


def test_a_rank_that_never_comes_is_not_waited_for(run_ranks: RunRanks, tmp_path: Path) -> None:
    reports = run_ranks(2, "save_without_the_others", folder=tmp_path)
    assert "Timed out" in reports[0]["result"]


# moment, which rank is killed, whether it is written in the background, whether it is whole then
KILLS = [
    ("begun", 0, False, False),
    ("planning", 1, False, False),
    ("planning", 1, True, False),
    ("first bytes written", 0, False, False),
    ("first bytes written", 1, False, False),
    ("first bytes written", 1, True, False),
    ("tensors written", 1, False, False),
    ("metadata written", 0, False, False),
    ("metadata written", 0, True, False),
    ("progress written", 0, False, False),
    ("before the name", 0, False, False),
    ("manifest written", 0, True, False),
    ("named", 0, False, True),
    ("named", 0, True, True),
    ("old one half removed", 0, False, True),
    ("old one removed", 0, True, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "rank", "asynchronous", "whole"),
    [
        pytest.param(*kill, marks=() if number % 3 == 2 else pytest.mark.exhaustive)
        for number, kill in enumerate(KILLS)
    ],
)
def test_whatever_is_killed_when_a_whole_checkpoint_remains(
    run_ranks: RunRanks, tmp_path: Path, moment: str, rank: int, whole: bool, asynchronous: bool
) -> None:
    reports = run_ranks(
        2,
        "save_and_die",
        ends=False,
        folder=tmp_path,
        moment=moment,
        rank=rank,
        asynchronous=asynchronous,
    )
    assert reports[rank]["code"] == KILLED
    assert reports[1 - rank]["code"] == 1, reports  # it noticed, and did not wait
    assert "RuntimeError" in reports[1 - rank]["errors"]
    result = run_ranks(2, "load", folder=tmp_path)[0]["result"]
    assert (result["step"], result["same"], result["notes"]) == (1 + whole, True, [])
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_what_another_host_wrote_elsewhere_is_missed(saved: Path, tmp_path: Path) -> None:
    """A folder that hosts do not share holds the first host's files only."""
    folder = CheckpointFolder(tmp_path)
    partial = folder.begin(20)
    shutil.copytree(saved / "step_000000020", partial, dirs_exist_ok=True)
    (partial / "__2_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="not all in") as refused:
        folder.complete(20, {}, num_ranks=4)
    folder.close()
    assert refused.value.expected == "one folder that all hosts share"
    assert refused.value.details == ("__2_0.distcp: missing",)
    assert names(tmp_path) == [".step_000000020-partial"]
