"""What fewer bytes cost: every point is what a conversion starts with, and the choice is honest."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dmt_convert as dmt
from dmt_convert.bundle.manifest import read_manifest
from dmt_convert.config import ConvertConfig
from dmt_convert.config.base import SettingsError
from dmt_convert.conversion.frontier import (
    COMPRESSIONS,
    FrontierRequest,
    is_cheap,
    measure_frontier,
    plan_frontier,
    round_bf16,
    round_int8,
    rows_to_judge,
)
from dmt_convert.conversion.initialisation import restored
from dmt_convert.conversion.sample import Sample, draw_sample, further_rows
from dmt_convert.conversion.start import Starter
from dmt_convert.documents import Frontier, FrontierPoint
from dmt_convert.errors import DataError, UsageError
from dmt_convert.metrics import area_under_curve, compare_auc
from dmt_convert.model import converted_spec
from dmt_convert.report import plot_frontier
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.models import build_flat, build_sample
from support.rows import write_clicks
from support.specs import build_spec


@pytest.fixture(scope="module")
def starter() -> Starter:
    flat = build_flat(build_spec(kind="dot", dims=(32,) * 4, rows=40))
    return Starter(flat, *build_sample(flat, 1000).split(0.25))


def request_of(starter: Starter, **limits: float) -> FrontierRequest:
    towers = [starter.spec.feature_names[t::2] for t in range(2)]
    info: Any = SimpleNamespace(spec=starter.spec)
    planned = plan_frontier(
        info, ConvertConfig(towers=2), 2, lambda m: converted_spec(starter.spec, towers, m)
    )
    return replace(planned, **limits)


@pytest.fixture(scope="module")
def found(starter: Starter) -> Frontier:
    return measure_frontier(starter, request_of(starter))


def test_points_fall_with_the_bytes(found: Frontier) -> None:
    assert [point.compression for point in found.points] == [*COMPRESSIONS]
    sizes = [point.bytes for point in found.points]
    assert sizes[0] == 512 and sizes == sorted(set(sizes), reverse=True)
    assert all(point.bytes <= 512 / point.compression for point in found.points)
    lost = [1 - (point.r2 or 0.0) for point in found.points]
    assert lost[0] == 0 and found.points[0].auc_lost == found.points[0].auc_bound == 0
    # on held-out rows, so only within noise
    assert all(after > before - 0.02 for before, after in itertools.pairwise(lost))
    assert lost[-1] > 10 * lost[4] > 0
    assert found.labelled and "250" in str(found.count)


def test_towers_are_solved_once_for_all_budgets(
    starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    plain = restored._solve_block
    monkeypatch.setattr(
        restored, "_solve_block", lambda *args: solved.append(args[2:]) or plain(*args)
    )
    fresh = Starter(starter._flat, starter._fit, starter.held)
    measured = measure_frontier(fresh, request_of(fresh))
    # two towers: three metrics on a part of the rows, and the metrics that were taken, on all
    assert len(measured.points) > 9 and len(solved) <= 2 * (3 + 3)


def test_flat_rivals_are_rounded_as_they_are_sent(found: Frontier) -> None:
    assert [point.bytes for point in found.flat] == [512, 256, 128 + 4 * 4]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 12)).astype(np.float32) * 7
    np.testing.assert_array_equal(
        round_bf16(rows), torch.from_numpy(rows).bfloat16().float().numpy()
    )
    arrived = round_int8(rows, (8, 4))
    for columns in (slice(0, 8), slice(8, 12)):
        step = np.abs(rows[:, columns]).max(axis=1, keepdims=True) / 127
        assert (np.abs(arrived - rows)[:, columns] <= 0.501 * step).all()
        assert np.abs(arrived - rows)[:, columns].max() > 0.1 * step.max()


def test_large_models_are_not_measured_unasked() -> None:
    small, large = (
        SimpleNamespace(spec=build_spec(features, dims=dim))
        for features, dim in ((8, 16), (400, 64))
    )
    for info, cheap in ((small, True), (large, False)):
        names = info.spec.feature_names
        towers = [names[t::2] for t in range(2)]
        planned = plan_frontier(
            info,  # type: ignore[arg-type]
            ConvertConfig(towers=2),
            2,
            lambda m, spec=info.spec, towers=towers: converted_spec(spec, towers, m),
        )
        assert is_cheap(planned, 4096) is cheap


def test_the_fewest_bytes_that_are_good_enough(starter: Starter, found: Frontier) -> None:
    by_r2 = measure_frontier(starter, request_of(starter, min_r2=0.98))
    good = [point for point in found.points if (point.r2 or 0) >= 0.98]
    assert by_r2.chosen == good[-1].compression and by_r2.chosen > 4
    assert "--min-r2 0.98 chose --compression" in by_r2.reason and "has R^2" in by_r2.reason
    loose = measure_frontier(starter, request_of(starter, max_auc_loss=0.5))
    assert loose.chosen == 128 and "fewest bytes that were tried" in loose.reason
    strict = measure_frontier(starter, request_of(starter, max_auc_loss=0.0))
    # what 250 rows cannot tell is not taken, however well it looks
    assert strict.chosen_point is not None and (strict.chosen_point.auc_bound or 0) <= 0
    assert any((p.auc_lost or 0) <= 0 < (p.auc_bound or 0) for p in strict.points)


def test_further_rows_narrow_the_bound(starter: Starter, found: Frontier) -> None:
    """AUC is that of all rows together, R^2 that of the held-out ones."""
    blocks = [build_sample(starter._flat, 2000, seed=seed) for seed in (1, 2)]
    asked: list[int] = []

    def further(rows: int) -> Iterator[Sample]:
        asked.append(rows)
        return iter(blocks)

    wanted = replace(request_of(starter, max_auc_loss=0.02), further=further)
    more = measure_frontier(starter, wanted)
    assert more.judged == 4250 and set(asked) == {rows_to_judge(wanted)} and asked[0] > 4250
    assert "on 4,250 held-out rows" in more.reason and "(AUC: 4,250 rows)" in more.rows
    for few, many in zip(found.points[1:], more.points[1:], strict=True):
        assert many.r2 == few.r2
        width = [(p.auc_bound or 0) - (p.auc_lost or 0) for p in (few, many)]
        # 17 times the rows, about 4 times narrower
        assert 0 < width[1] < 0.5 * width[0]
    rows = [starter.held, *blocks]
    labels = np.concatenate([each.batch.labels for each in rows])
    target = np.concatenate([starter.logits(each) for each in rows])
    rounded = [replace(each, pooled=round_bf16(each.pooled)) for each in rows]
    other = np.concatenate([starter.logits(each) for each in rounded])
    expected = area_under_curve(target, labels) - area_under_curve(other, labels)
    assert more.flat[1].auc_lost == pytest.approx(expected, abs=1e-12)
    assert more.flat[1].auc_lost != found.flat[1].auc_lost  # the check can fail
    # by R^2 alone, nothing further is read
    asked.clear()
    by_r2 = measure_frontier(starter, replace(wanted, max_auc_loss=None, min_r2=0.98))
    assert by_r2.judged is None and not asked


def test_further_rows_are_those_that_were_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 300)
    info = dmt.inspect(make_flat(tmp_path / "ckpt.pt", rows=(7, 5000, 11, 6)))
    rows = write_clicks(tmp_path / "clicks", "valid", 1000, seed=1, tables=(7, 5000, 11, 6))

    def ids(*samples: Sample) -> list[tuple[int, ...]]:
        columns = [np.concatenate([s.batch.bags[f].values for s in samples]) for f in range(4)]
        return list(zip(*columns, strict=True))

    drawn = draw_sample(info, calibration=rows, seed=3)
    rest = list(further_rows(info, rows, 10**6, seed=3))
    whole = draw_sample(info, calibration=rows, rows=1000, seed=5)
    assert [each.batch.num_rows for each in rest] == [300, 300, 100]
    assert sorted([*ids(drawn), *ids(*rest)]) == sorted(ids(whole))
    other = list(further_rows(info, rows, 10**6, seed=4))  # the check can fail
    assert sorted([*ids(drawn), *ids(*other)]) != sorted(ids(whole))
    assert sum(each.batch.num_rows for each in further_rows(info, rows, 450, seed=3)) == 450


def test_auc_needs_labels_of_both_classes(starter: Starter) -> None:
    wanted = request_of(starter, max_auc_loss=0.001)
    for labels, said in ((None, "no labels"), (np.zeros(250, dtype=np.float32), "0 positive")):
        held = replace(starter.held, batch=replace(starter.held.batch, labels=labels))
        with pytest.raises(DataError, match=said) as refused:
            measure_frontier(Starter(starter._flat, starter._fit, held), wanted)
        assert "--min-r2" in str(refused.value)


def test_the_standard_error_of_a_difference_of_auc() -> None:
    """DeLong's error is the spread over many sets of rows, within the noise of 400 of them."""
    rng = np.random.default_rng(1)
    lost, errors = [], []
    for _ in range(400):
        labels = (rng.random(300) < 0.3).astype(np.float32)
        one = (labels + rng.standard_normal(300)).astype(np.float32)
        other = (one + 0.5 * rng.standard_normal(300)).astype(np.float32)
        difference = compare_auc(one, other, labels)
        assert difference is not None
        plain = area_under_curve(one, labels) - area_under_curve(other, labels)
        assert difference[0] == pytest.approx(plain, abs=1e-12)
        lost.append(difference[0])
        errors.append(difference[1])
    assert np.mean(errors) == pytest.approx(np.std(lost), rel=0.12)
    assert compare_auc(one, other, np.zeros(300)) is None


def test_pictures_are_deterministic(found: Frontier, tmp_path: Path) -> None:
    for name, frontier in (("auc", found), ("r2", replace(found, labelled=False))):
        texts = []
        for again in "ab":
            plot_frontier(tmp_path / f"{name}{again}.svg", frontier)
            texts.append((tmp_path / f"{name}{again}.svg").read_text())
        assert texts[0] == texts[1]
        assert "/ 128" in texts[0] and "flat, int8" in texts[0]
        assert ("AUC lost" in texts[0]) is (name == "auc")
    marked = replace(found, chosen=8.0)
    plot_frontier(tmp_path / "c.svg", marked)
    assert ">chosen<" in (tmp_path / "c.svg").read_text() and ">chosen<" not in texts[0]


def test_points_are_what_a_conversion_gives(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt", dim=16)
    options: dict[str, Any] = {"towers": 2, "partition": "round-robin"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 1024)
        measured = dmt.frontier(source, plot=tmp_path / "f.svg", **options)
    assert (tmp_path / "f.svg").read_text().count("<svg") == 1
    for point in measured.points[1:5]:
        bundle = convert_quickly(
            source, tmp_path / f"{point.compression:g}", compression=point.compression,
            precision={2: "bf16", 4: "int8"}.get(int(point.compression), "mixed"), **options,
        )  # fmt: skip
        assert sum(bundle.manifest.model.tower_bytes) == point.bytes
        assert bundle.quality.converted.r2 == pytest.approx(point.r2, abs=1e-6)  # float32 sums
    other = measured.points[3].r2 or 0.0
    assert abs(other - (measured.points[2].r2 or 0.0)) > 1e-6  # the check can fail


def test_a_conversion_takes_what_was_chosen(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt", dim=16)
    rows = write_clicks(tmp_path / "clicks", "valid", 800, seed=1)
    bundle = convert_quickly(
        source, tmp_path / "out", max_auc_loss=0.05, calibration=rows, report=True
    )
    manifest = read_manifest(tmp_path / "out")
    frontier = manifest.frontier
    assert frontier is not None and frontier.chosen_point is not None
    assert sum(bundle.manifest.model.tower_bytes) == frontier.chosen_point.bytes < 256
    assert manifest.initialisation.notes[-1] and any(
        note.startswith("--max-auc-loss 0.05 chose") for note in manifest.initialisation.notes
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="frontier"' in page and "Other compressions" in page and "this bundle" in page
    # a bundle of an earlier version has no frontier
    document = json.loads((tmp_path / "out" / "dmt.json").read_text())
    del document["frontier"]
    assert type(manifest).from_json(document).frontier is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_auc_loss": 0.1}, "--max-auc-loss without --calibration"),
        ({"min_r2": 0.9, "compression": 4.0}, "beside --compression"),
        ({"min_r2": 0.9, "tower_module": "dcn", "dim": 2}, "beside --tower-module, --dim"),
        ({"min_r2": 0.9, "max_auc_loss": 0.1, "calibration": Path("x")}, "together"),
        ({"min_r2": 1.5}, "min_r2 must be"),
    ],
)
def test_contradictory_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ConvertConfig(towers=2, **options)


def test_the_frontier_takes_no_module(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--compression"):
        dmt.frontier(tmp_path / "none.pt", towers=2, compression=8)
    point = FrontierPoint(name="x", compression=12, bytes=10, r2=0.991)
    assert point.is_fair and "--compression 12 has R^2 0.991" in point.advice
