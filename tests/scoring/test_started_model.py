"""What a conversion starts from: the best that was tried, and never worse than the closed form."""

from __future__ import annotations

import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion import draw_sample, start
from dmt_convert.conversion.start import Choice, start_model
from dmt_convert.families import infer_model
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec
from support.scored import write_model


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    path = tmp_path_factory.mktemp("started") / "flat.pt"
    return infer_model(open_checkpoint(write_model(path)))


def _spec(info, **sizes):
    names = info.spec.feature_names
    module = TowerModuleSpec(kind="dlrm", **sizes)
    towers = tuple(TowerSpec(features=half, module=module) for half in (names[:2], names[2:]))
    return DmtSpec(flat=info.spec, towers=towers)


def _start(info, spec, **options):
    return start_model(info, spec, draw_sample(info, rows=800), **options)


def _r2(started):
    return {row.name: row.r2 for row in started.quality.rows}


@pytest.mark.slow
def test_distillation_is_kept_only_where_it_is_better(info, monkeypatch):
    started = _start(info, _spec(info, c=1, dim=2), distill_steps=300)
    assert started.method == "closed form, then distilled"
    assert _r2(started)["distilled"] > _r2(started)["closed form"]

    def spoil(flat, model, fit, **options):
        worse, _ = start.initialise(flat, model.spec, None, method="random")
        return worse, "distilled"

    monkeypatch.setattr(start, "distill", spoil)
    spoilt = _start(info, _spec(info, c=1, dim=2), distill_steps=300)
    assert spoilt.method == "closed form" and "distilled" not in _r2(spoilt)
    assert any("did not beat the closed form" in note for note in spoilt.notes)


@pytest.mark.slow
def test_unasked_it_distils_where_there_is_something_to_gain(info):
    lossy = _start(info, _spec(info, c=1, dim=2))
    assert any("distilled, best after" in note for note in lossy.notes)
    exact = _start(info, _spec(info, c=1, dim=4))
    assert any(note.startswith("not distilled") for note in exact.notes)
    assert exact.method == "closed form"
    none = _start(info, _spec(info, c=1, dim=2), distill_steps=0)
    assert none.method == "closed form" and "not distilled: not asked for" in none.notes


def test_large_models_are_not_distilled_unasked(info, monkeypatch):
    monkeypatch.setattr(start, "default_steps", lambda spec: 0)
    started = _start(info, _spec(info, c=1, dim=2))
    assert any("--distill-steps" in note for note in started.notes)


def test_the_better_alternative_is_taken(info):
    poor, good = _spec(info, c=1, dim=1), _spec(info, c=1, dim=3)
    for first, other in ((poor, good), (good, poor)):
        started = _start(info, first, alternatives=[other], distill_steps=0)
        assert started.spec == good
        assert any("tower modules tried" in note for note in started.notes)
    assert _start(info, poor, distill_steps=0).spec == poor


def test_dense_arch_stays_the_flat_models(info):
    started = _start(info, _spec(info, c=1, dim=2), distill_steps=100)
    flat = {
        name: torch.from_numpy(value)
        for name, value in _start(info, _spec(info, c=1, dim=4)).weights.dense.items()
        if name.startswith("dense_arch.")
    }
    assert flat
    for name, value in flat.items():
        assert torch.equal(torch.from_numpy(started.weights.dense[name]), value)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(info):
    one, two = (
        _start(info, _spec(info, c=1, dim=2), distill_steps=100, choice=Choice(allot=True))
        for _ in range(2)
    )
    for name, value in one.weights.dense.items():
        assert (two.weights.dense[name] == value).all()
