"""Models that round what towers send: levels at an edge may differ, nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.model import Code, DmtModel, TowerCode
from dmt_convert.scoring import ScoredModel, open_model, verify_models
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.coded import BF16, write_coded

CODES = {"levels": TowerCode(precision="int8", int4=2), "bf16": BF16}


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Models are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flat(tmp_path_factory.mktemp("flat") / "ckpt.pt")


@pytest.fixture(scope="session", params=CODES)
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Bundle:
    folder = tmp_path_factory.mktemp("coded")
    plain = convert_quickly(source, folder / "plain", rows=128, tower_module="linear")
    return write_coded(plain, folder / "coded", CODES[request.param])


def noisy(model: DmtModel, noise: float) -> None:
    """Move every weight of the towers, as another order of sums moves what they emit."""
    generator = torch.Generator().manual_seed(0)
    for tower in model.tower_list:
        for weight in tower.tower_module.parameters():
            weight.data.mul_(1 + noise * torch.randn(weight.shape, generator=generator))


def verify_changed(bundle: Bundle, change: Callable[[DmtModel], None]) -> Any:
    model = open_bundle_model(bundle)
    change(model)
    reference = open_model(bundle.path)
    other = ScoredModel(path=bundle.path, kind="bundle", module=model, bundle=bundle)
    return verify_models(reference, other)


def test_other_levels_at_an_edge_are_the_same_model(bundle: Bundle) -> None:
    report = verify_changed(bundle, lambda model: noisy(model, 3e-6))
    assert report.same
    edges = {check.stage: check.at_edges for check in report.checks}
    assert 0 < edges["output of tower 0"] + edges["output of tower 1"] < 0.01 * 4096 * 8
    logit = report.checks[-1]
    assert logit.stage == "logit" and 0.9 * 4096 < logit.rows < 4096


@pytest.mark.parametrize("noise", [3e-3, 0.1])
def test_many_other_levels_are_another_model(bundle: Bundle, noise: float) -> None:
    report = verify_changed(bundle, lambda model: noisy(model, noise))
    assert report.first_difference.stage == "output of tower 0"


def shift(model: DmtModel) -> None:
    """Let one element of every row arrive a level higher or lower."""
    code = model.tower_list[1].tower_module.code
    assert isinstance(code, Code)
    was = code.round

    def other(emitted: torch.Tensor) -> torch.Tensor:
        arrived = was(emitted)
        moved = arrived.clone()
        moved[:, 0] += code.spacing(arrived)[:, 0]
        return moved

    code.round = other  # type: ignore[method-assign]


def test_an_element_that_is_always_at_the_next_level_is_another_model(bundle: Bundle) -> None:
    assert verify_changed(bundle, shift).first_difference.stage == "output of tower 1"


def test_passthrough_that_rounds_does_not_claim_to_be_exact(source: Path, tmp_path: Path) -> None:
    plain = convert_quickly(source, tmp_path / "plain", rows=128, tower_module="passthrough")
    coded = write_coded(plain, tmp_path / "coded", BF16)
    flat = open_model(source)
    assert verify_models(flat, open_model(plain.path)).remark is None
    report = verify_models(flat, open_model(coded.path))
    assert report.checks[-1].stage == "logit" and not report.checks[-1].equal
    assert "send 2.00x fewer bytes" in report.remark
    exact = replace(coded.manifest.model, towers=plain.manifest.model.towers)
    assert exact.is_passthrough
