"""What only reading the weights or the data can tell is refused as well, and changes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.checkpoints.flat import make_flat
from support.commands import run_dmt
from support.paths import read_files
from support.refusals import Arguments, Scene, check_refusal

TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"
QUICKLY = ("--distill-steps", 0)
FEATURES = ["cat_0", "cat_1", "cat_2", "cat_3"]
Call = Callable[..., Any]


def big_table_with(value: float) -> Callable[[Scene], Arguments]:
    """Spoil one element of a table so large that no sample touches its row."""

    def make(scene: Scene) -> Arguments:
        def edit(state: dict[str, Any]) -> None:
            state[TABLE.format(1)] = torch.zeros(400_000, 8)
            state[TABLE.format(1)][399_998, 5] = value

        return make_flat(scene.folder / "nan.safetensors", edit=edit), "--towers", 2

    return make


def dense_with(value: float) -> Callable[[Scene], Arguments]:
    def make(scene: Scene) -> Arguments:
        def edit(state: dict[str, Any]) -> None:
            state["over_arch.model.1.weight"][0, 3] = value

        return make_flat(scene.folder / "nan.pt", edit=edit), "--towers", 2

    return make


def flipped_in(name: str, *options: object) -> Callable[[Scene], Arguments]:
    """Flip one bit in the bytes of one tensor."""

    def make(scene: Scene) -> Arguments:
        tensor = torch.load(scene.good, weights_only=True)[name]
        data = bytearray(scene.good.read_bytes())
        at = bytes(data).index(tensor.numpy().tobytes())
        data[at + tensor.numel() * 2] ^= 1
        scene.good.write_bytes(data)
        return scene.good, "--towers", 2, *options

    return make


def flipped_in_a_shard(scene: Scene) -> Arguments:
    folder = make_flat(scene.folder / "dcp")
    tensor = torch.load(scene.good, weights_only=True)[TABLE.format(1)]
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[bytes(data).index(tensor.numpy().tobytes()) + 700] ^= 1
    path.write_bytes(data)
    return folder, "--towers", 2


def calibration(**arrays: np.ndarray) -> Callable[[Scene], Arguments]:
    def make(scene: Scene) -> Arguments:
        rows = 100
        made: dict[str, np.ndarray] = {
            "dense": np.zeros((rows, 5), np.float32),
            "sparse": np.zeros((rows, 4), np.int32),
            "label": np.zeros(rows, np.uint8),
        }
        made.update(arrays)
        np.savez(scene.folder / "data.npz", **made)
        schema = {"sparse_features": [{"name": name} for name in FEATURES]}
        (scene.folder / "schema.json").write_text(json.dumps(schema))
        return scene.good, "--towers", 2, "--calibration", scene.folder / "data.npz"

    return make


def fp16_overflow(scene: Scene) -> Arguments:
    def edit(state: dict[str, Any]) -> None:
        state[TABLE.format(1)][49, 7] = 70_000.0

    return make_flat(scene.folder / "big.pt", edit=edit), "--towers", 2, "--dtype", "fp16"


DEEP_CASES: dict[str, tuple[Callable[[Scene], Arguments], str, str]] = {
    "NaN in a far row": (big_table_with(float("nan")), "CheckpointError", "first at [399998, 5]"),
    "Inf in a far row": (big_table_with(float("-inf")), "CheckpointError", "NaN or Inf"),
    "NaN in a dense weight": (dense_with(float("nan")), "CheckpointError", "NaN or Inf"),
    "Inf in a dense weight": (dense_with(float("inf")), "CheckpointError", "NaN or Inf"),
    "flip in a table": (flipped_in(TABLE.format(1)), "CheckpointError", "has the checksum"),
    "flip, recoded": (
        flipped_in(TABLE.format(1), "--dtype", "bf16"),
        "CheckpointError",
        "has the checksum",
    ),
    "flip in a dense weight": (
        flipped_in("over_arch.model.0._mlp.0._linear.weight"),
        "CheckpointError",
        "has the checksum",
    ),
    "flip in DCP": (flipped_in_a_shard, "CheckpointError", "has the checksum"),
    "fp16 overflow": (fp16_overflow, "CheckpointError", "NaN or Inf"),
    "no calibration": (
        lambda s: (s.good, "--towers", 2, "--calibration", s.folder / "no.npz"),
        "DataError",
        "no.npz",
    ),
    "id too large": (
        calibration(sparse=np.full((100, 4), 6, np.int32)),
        "DataError",
        "6",
    ),
    "negative id": (calibration(sparse=np.full((100, 4), -1, np.int32)), "DataError", "-1"),
    "NaN input": (
        calibration(dense=np.full((100, 5), np.nan, np.float32)),
        "DataError",
        "",
    ),
    "other dense width": (calibration(dense=np.zeros((100, 3), np.float32)), "DataError", "3"),
    "few rows": (
        calibration(
            dense=np.zeros((3, 5), np.float32),
            sparse=np.zeros((3, 4), np.int32),
            label=np.zeros(3, np.uint8),
        ),
        "DataError",
        "3 rows",
    ),
}


@pytest.mark.usefixtures("few_rows", "no_report")
@pytest.mark.parametrize("case", DEEP_CASES)
def test_refused_by_content(case: str, tmp_path: Path, scene: Scene, call_dmt: Call) -> None:
    make, error, found = DEEP_CASES[case]
    arguments = make(scene)
    out = tmp_path / "out"
    before = read_files(tmp_path)
    run = call_dmt("convert", *arguments, *QUICKLY, "--out", out, "--json")
    check_refusal(run, error, found)
    assert read_files(tmp_path) == before
    assert not out.exists()
    assert not any(".dmt-tmp" in path.name for path in tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows", "no_report")
def test_the_old_bundle_survives_a_refusal(tmp_path: Path, scene: Scene, call_dmt: Call) -> None:
    out = tmp_path / "out"
    assert call_dmt("convert", scene.good, "--towers", 2, *QUICKLY, "--out", out).code == 0
    arguments = big_table_with(float("nan"))(scene)
    before = read_files(tmp_path)
    run = call_dmt("convert", *arguments, *QUICKLY, "--out", out, "--force", "--json")
    check_refusal(run, "CheckpointError", "NaN or Inf")
    assert read_files(tmp_path) == before


@pytest.mark.slow
def test_a_far_nan_is_refused_in_a_process_of_its_own(tmp_path: Path, scene: Scene) -> None:
    run = run_dmt("convert", *big_table_with(float("nan"))(scene), *QUICKLY, "--json")
    check_refusal(run, "CheckpointError", "NaN or Inf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "nan.safetensors"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows", "no_report")
def test_no_flipped_bit_passes_unnoticed(tmp_path: Path, scene: Scene, call_dmt: Call) -> None:
    """Wherever a bit of the file flips, the conversion is refused or gives the same tables."""
    good = scene.good
    out = tmp_path / "out"
    assert call_dmt("convert", good, "--towers", 2, *QUICKLY, "--out", out, "--json").code == 0
    digest = json.loads((out / "dmt.json").read_text("utf-8"))["source"]["digest"]
    shutil.rmtree(out)
    original = good.read_bytes()
    refused = 0
    for position in np.random.default_rng(0).integers(0, len(original), size=16):
        data = bytearray(original)
        data[position] ^= 1 << int(position) % 8
        good.write_bytes(data)
        run = call_dmt("convert", good, "--towers", 2, *QUICKLY, "--out", out, "--json")
        assert run.code in (0, 3), (position, run.stderr)
        refused += run.code == 3
        if run.code == 0:
            value = json.loads((out / "dmt.json").read_text("utf-8"))
            assert value["source"]["digest"] == digest, position
            shutil.rmtree(out)
    assert refused > 4
