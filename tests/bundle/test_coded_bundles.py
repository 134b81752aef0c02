"""Bundles whose towers send in a code, and with towers on every rank."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dmt_convert as dmt
from dmt_convert.bundle import Bundle, check_digests, open_bundle, open_bundle_model
from dmt_convert.config import TrainingConfig
from dmt_convert.errors import BundleError, DmtError
from dmt_convert.model import TowerCode
from dmt_convert.training import load_bundle, open_training_data, train, write_finetuned
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.coded import BF16, INT8, write_coded
from support.rows import build_batch, write_clicks

MIXED = TowerCode(precision="int8", int4=3)
CODED = [
    ("linear", MIXED, ()),
    ("linear", BF16, (1,)),
    ("linear", None, (0,)),
    ("passthrough", BF16, ()),
    ("passthrough", INT8, (0,)),
    ("dlrm", INT8, ()),
]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """float32 bundles by their kind of module."""
    folder = tmp_path_factory.mktemp("plain")
    source = make_flat(folder / "ckpt.pt")
    return {
        kind: convert_quickly(source, folder / kind, rows=128, tower_module=kind)
        for kind in ("linear", "passthrough", "dlrm")
    }


@pytest.fixture(scope="session")
def mixed(plain: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Linear towers, elements of 8 and 4 bits."""
    return write_coded(plain["linear"], tmp_path_factory.mktemp("mixed") / "bundle", MIXED)


@pytest.mark.parametrize(("kind", "code", "everywhere"), CODED)
def test_a_written_bundle_scores_like_its_model(
    plain: dict[str, Bundle],
    tmp_path: Path,
    kind: str,
    code: TowerCode | None,
    everywhere: Sequence[int],
) -> None:
    bundle = open_bundle(
        write_coded(plain[kind], tmp_path / "out", code, everywhere=everywhere).path
    )
    model, batch = open_bundle_model(bundle), build_batch(bundle.manifest.model.flat, 64)
    spec = bundle.manifest.model
    sending = [t for t in range(2) if t not in everywhere]
    assert [tower.everywhere for tower in spec.towers] == [t in everywhere for t in range(2)]
    assert all(spec.towers[t].module.code == code for t in sending)
    check_digests(bundle)
    with torch.no_grad():
        stages, before = (
            dict(model.stages(batch)),
            dict(open_bundle_model(plain[kind]).stages(batch)),
        )
        for t in sending:
            arrived, emitted = stages[f"output of tower {t}"], before[f"output of tower {t}"]
            own = model.tower_list[t].tower_module.code
            assert torch.equal(arrived, emitted if own is None else own.round(emitted))
            assert torch.equal(arrived, emitted) == (code is None)
        logits = model(batch)
        plain_model = bundle.model()
        ids = {
            name: torch.from_numpy(bag.values)
            for name, bag in zip(batch.feature_names, batch.bags, strict=True)
        }
        assert torch.equal(plain_model(torch.from_numpy(batch.dense), ids), logits)
    assert torch.isfinite(logits).all()


def flip_a_step(bundle: Path) -> None:
    """Change one bit of the first tower's steps."""
    path = bundle / "weights/tower_000.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + size])["tower_module.code.step"]["data_offsets"][0]
    data[8 + size + begin] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_a_flipped_bit_of_a_step_is_refused(
    mixed: Bundle, click_data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(mixed.path, tmp_path / "copy")
    dmt.score(copy, click_data)
    flip_a_step(copy)
    for use in (
        lambda: dmt.score(copy, click_data),
        lambda: check_digests(open_bundle(copy)),
        lambda: dmt.export(copy, "onnx", tmp_path / "served"),
    ):
        with pytest.raises(DmtError, match=r"code\.step"):
            use()


def test_a_bundle_without_its_steps_is_refused(mixed: Bundle) -> None:
    towers = [dict(tensors) for tensors in mixed.towers]
    del towers[1]["tower_module.code.step"]
    with pytest.raises(BundleError, match="does not hold the model") as refused:
        open_bundle_model(replace(mixed, towers=tuple(towers)))
    assert refused.value.details == ("missing: towers.1.tower_module.code.step",)


def test_fine_tuning_keeps_the_ranges(mixed: Bundle, tmp_path: Path) -> None:
    write_clicks(tmp_path, "train", 600, seed=0)
    write_clicks(tmp_path, "valid", 200, seed=1)
    data, config = open_training_data(tmp_path), TrainingConfig(max_steps=6, batch_size=64)
    model = load_bundle(mixed)
    result = train(model, data.train, data.valid, config)
    done = write_finetuned(mixed, tmp_path / "tuned", model, result, config=config, data=data)
    before, after = (open_bundle_model(bundle) for bundle in (mixed, done.bundle))
    own, tuned = before.state_dict(), after.state_dict()
    ranges = [name for name in own if ".code." in name]
    assert len(ranges) == 4
    assert all(torch.equal(own[name], tuned[name]) for name in ranges)
    assert not all(torch.equal(own[name], tuned[name]) for name in own)
    assert done.bundle.manifest.model == mixed.manifest.model
    batch = build_batch(before.spec.flat, 32)
    with torch.no_grad():
        assert torch.equal(after(batch), model(batch))
