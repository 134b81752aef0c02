"""Rows are drawn as often as training looked them up."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from dmt_convert.checkpoint import CHUNK_BYTES, Piece, TensorInfo, gather_rows, open_checkpoint
from dmt_convert.conversion import draw_rows, row_frequency
from support.sampled import saved_vector

MATRIX = ["vector", "column", "matrix"]


def _rng(seed=0):
    return np.random.default_rng(seed)


def _shaped(weight, shape):
    """The weight as an accumulator: its rows' averages are in the weight's proportion."""
    if shape == "vector":
        return weight
    return weight[:, None] if shape == "column" else np.stack([weight, weight * 3], axis=1)


def _check_proportional(drawn, weight, bins=40):
    """Chi-square over groups of rows that weigh about alike; rows without weight: never."""
    assert drawn.dtype == np.int64 and not np.isin(drawn, np.flatnonzero(weight == 0)).any()
    share = np.cumsum(weight, dtype=np.float64)
    group = np.minimum((share / share[-1] * bins).astype(int), bins - 1)
    expected = np.bincount(group, weights=weight, minlength=bins) * len(drawn) / share[-1]
    found = np.bincount(group[drawn], minlength=bins)
    filled = expected > 0
    # of 39 degrees of freedom 72 is exceeded once in a thousand
    assert (np.square(found - expected)[filled] / expected[filled]).sum() < 72


@pytest.mark.parametrize("shape", ["vector", "matrix"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_rows_are_drawn_in_proportion_to_their_accumulator(tmp_path, shape, dtype):
    weight = np.array([0, 1, 2, 0, 4, 3], dtype=dtype)
    state = weight if shape == "vector" else np.stack([weight, weight * 3, weight * 0], axis=1)
    drawn = draw_rows(6, saved_vector(tmp_path, state), 20_000, _rng())
    counts = np.bincount(drawn, minlength=6)
    expected = 20_000 * weight.astype(float) / 10
    assert counts[0] == counts[3] == 0
    live = expected > 0
    # chi-square of 3 degrees of freedom: 16.3 is exceeded once in a thousand seeds
    assert (np.square(counts - expected)[live] / expected[live]).sum() < 16.3


@pytest.mark.parametrize(
    "weight", [[0.0, 0, 0], [np.nan, np.nan, np.nan], [-1.0, 0, -3], [np.inf, 0, np.inf]]
)
def test_accumulators_that_tell_nothing_fall_back_to_uniform(tmp_path, weight):
    counts = np.bincount(draw_rows(3, saved_vector(tmp_path, weight), 9_000, _rng()), minlength=3)
    assert (np.abs(counts - 3000) < 300).all()


def test_rows_with_damaged_accumulators_are_passed_over(tmp_path):
    drawn = draw_rows(4, saved_vector(tmp_path, [np.nan, 1.0, np.inf, -5.0]), 1000, _rng())
    assert set(drawn.tolist()) == {1}


def test_without_state_rows_are_uniform_over_the_whole_table():
    drawn = draw_rows(5, None, 5_000, _rng())
    assert drawn.dtype == np.int64
    assert (np.abs(np.bincount(drawn, minlength=5) - 1000) < 200).all()


def test_a_vector_is_gathered_element_by_element(tmp_path):
    values = _rng().standard_normal(1000)
    info = saved_vector(tmp_path, values)
    rows = np.array([0, 5, 999, 500])
    np.testing.assert_allclose(gather_rows(info, rows)[:, 0], values[rows], rtol=1e-6)


def test_a_strided_vector_is_gathered(tmp_path):
    values = torch.arange(40.0)
    torch.save({"state": {"sum": values[::2], "whole": values}}, tmp_path / "state.pt")
    tensors = open_checkpoint(tmp_path / "state.pt").tensors
    info = next(t for t in tensors if t.name == "sum")
    assert gather_rows(info, np.array([0, 1, 19]))[:, 0].tolist() == [0, 2, 38]


@pytest.mark.parametrize("name", ["sum", "exp_avg_sq"])
def test_adams_average_weighs_as_adagrads_sum(tmp_path, name):
    counts = np.bincount(
        draw_rows(3, saved_vector(tmp_path, [[0.0, 0], [1, 0], [4, 0]], name=name), 10_000, _rng())
    )
    assert counts[0] == 0 and abs(counts[2] / counts[1] - 4) < 0.4


@pytest.mark.parametrize("shape", MATRIX)
@pytest.mark.parametrize("rows", [8192, 8193, 16_384, 16_385])
def test_no_row_is_missed_on_either_side_of_the_thresholds(tmp_path, rows, shape):
    weight = np.full(rows, 1e-6, dtype=np.float32)
    weight[[0, 8191, rows - 1]] = [1, 2, 3] if rows > 8192 else [1, 0, 3]
    counts = np.bincount(
        draw_rows(rows, saved_vector(tmp_path, _shaped(weight, shape)), 6000, _rng())
    )
    assert len(counts) == rows and abs(counts[rows - 1] / counts[0] - 3) < 0.5


@pytest.mark.parametrize("shape", MATRIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tables_that_are_scanned(tmp_path, monkeypatch, shape, dtype):
    """Read in chunks that end within a row, with one of weight zero and a short last one."""
    weight = torch.as_tensor(_rng().gamma(0.5, size=30_000)).to(dtype)
    weight[10_000:14_000] = 0
    state = saved_vector(
        tmp_path, torch.as_tensor(_shaped(weight.double().numpy(), shape)).to(dtype)
    )
    weight = weight.double().numpy()
    whole, item = b"".join(raw.tobytes() for raw in row_frequency.stream_tensor(state)), 1000
    item *= state.nbytes // weight.size // (2 if shape == "matrix" else 1)
    pieces = [np.frombuffer(whole[i : i + item], np.uint8) for i in range(0, len(whole), item)]
    monkeypatch.setattr(row_frequency, "stream_tensor", lambda info: iter(pieces))
    monkeypatch.setattr(row_frequency, "_draw_candidates", None)
    drawn = draw_rows(len(weight), state, 20_000, _rng())
    _check_proportional(drawn, weight)
    # in no order: held-out rows are the last of a sample
    assert abs(np.corrcoef(np.arange(20_000), drawn)[0, 1]) < 0.04
    monkeypatch.setattr(row_frequency, "_KEPT_ROWS", 0)
    assert np.array_equal(draw_rows(len(weight), state, 20_000, _rng()), drawn)


def test_chunks_that_end_within_a_row(tmp_path):
    rows = CHUNK_BYTES // 12 + 1000
    weight = np.zeros((rows, 3), dtype=np.float32)
    split = CHUNK_BYTES // 12  # the row that two chunks share
    weight[split], weight[-1] = [0, 1, 2], [0, 0, 1]
    assert CHUNK_BYTES % 12
    counts = np.bincount(draw_rows(rows, saved_vector(tmp_path, weight), 4000, _rng()))
    assert counts[split] + counts[-1] == 4000 and abs(counts[split] / counts[-1] - 3) < 0.5


@pytest.mark.parametrize("last", [0.0, np.nan, -1.0])
def test_a_chunk_without_weight_is_never_drawn_from(tmp_path, monkeypatch, last):
    weight = np.ones(20_000, dtype=np.float32)
    weight[10_000:] = last
    monkeypatch.setattr(row_frequency, "_KEPT_ROWS", 0)
    state = saved_vector(tmp_path, weight)
    raw = weight.view(np.uint8)
    monkeypatch.setattr(
        row_frequency, "stream_tensor", lambda info: iter([raw[:40_000], raw[40_000:]])
    )
    assert draw_rows(20_000, state, 5000, _rng()).max() < 10_000


@pytest.mark.parametrize("shape", MATRIX)
def test_behind_the_head_a_row_stands_for_many(tmp_path, monkeypatch, shape):
    """The tail is looked at in part, and yet drawn from as often as the whole weighs."""
    monkeypatch.setattr(row_frequency, "_SCANNED_BYTES", 0)
    weight = np.full(100_000, 1.0, dtype=np.float32)
    weight[:8192] = 4
    state = saved_vector(tmp_path, _shaped(weight, shape))
    drawn = draw_rows(100_000, state, 20_000, _rng())
    share = 4 * 8192 / weight.sum()
    assert abs((drawn < 8192).mean() - share) < 0.015
    assert len(set(drawn[drawn >= 8192].tolist())) <= 8192


def test_the_head_and_tail_are_as_likely_as_the_whole_says(tmp_path, monkeypatch):
    """Over many draws, every part of a table that is looked at in part gets its share."""
    monkeypatch.setattr(row_frequency, "_SCANNED_BYTES", 0)
    monkeypatch.setattr(row_frequency, "_MAX_CANDIDATES", 160)
    monkeypatch.setattr(row_frequency, "_HEAD_ROWS", 160)
    weight = np.ones(1000, dtype=np.float32)
    state = saved_vector(tmp_path, weight)
    drawn = np.concatenate([draw_rows(1000, state, 200, _rng(seed)) for seed in range(1500)])
    parts = np.bincount(drawn // 40, minlength=25) / len(drawn) * 25
    assert np.abs(parts - 1).max() < 0.15
    # the rows at the ends of the tail are as likely as those within
    ends = np.isin(drawn, [*range(160, 168), *range(992, 1000)]).mean() * 1000 / 16
    assert abs(ends - 1) < 0.2


def test_large_tables_are_weighed_on_candidates_only(tmp_path, monkeypatch):
    """Of what would take long to scan, only the candidates' elements are read."""
    monkeypatch.setattr(row_frequency, "_SCANNED_BYTES", 0)
    monkeypatch.setattr(row_frequency, "_MAX_CANDIDATES", 50)
    monkeypatch.setattr(row_frequency, "_HEAD_ROWS", 30)
    monkeypatch.setattr(row_frequency, "stream_tensor", None)
    asked = []

    def spy(info, rows):
        asked.append(len(rows))
        return gather_rows(info, rows)

    monkeypatch.setattr(row_frequency, "gather_rows", spy)
    weight = np.zeros(10_000, dtype=np.float32)
    weight[5000:] = 1
    drawn = draw_rows(10_000, saved_vector(tmp_path, weight), 2_000, _rng())
    assert len(asked) == 1 and asked[0] <= 80
    assert drawn.min() >= 5000 and len(set(drawn.tolist())) <= 50


def test_a_slice_of_a_long_tensor_is_not_read_whole(tmp_path, monkeypatch):
    table = torch.zeros(20_000, 64)
    table[:, 0] = torch.arange(20_000) < 100
    torch.save({"state": {"sum": table[:, 0]}}, tmp_path / "state.pt")
    state = open_checkpoint(tmp_path / "state.pt").tensors[0]
    assert state.pieces[0].strides is not None
    assert draw_rows(20_000, state, 500, _rng()).max() < 100
    monkeypatch.setattr(row_frequency, "_SCANNED_BYTES", 1 << 20)
    monkeypatch.setattr(row_frequency, "stream_tensor", None)
    assert draw_rows(20_000, state, 500, _rng()).max() < 100


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("shape", MATRIX)
@pytest.mark.parametrize("rows", [600, 40_000])
def test_sharded_accumulators(tmp_path, rows, shape):
    """DCP saves a tensor in blocks: the order in which they lie need not be that of the rows."""
    weight = _rng().gamma(0.5, size=rows).astype(np.float32)
    values = _shaped(weight, shape)
    dcp.save({"optimizer": {"sum": torch.as_tensor(values)}}, checkpoint_id=tmp_path / "whole")
    whole = open_checkpoint(tmp_path / "whole").tensors[0]
    cuts = [0, rows // 3, rows // 3, rows // 2, rows]
    item = values[:1].nbytes
    path = tmp_path / "blocks"
    blocks, pieces, offset = list(pairwise(cuts)), [], 0
    with path.open("wb") as file:
        for begin, end in reversed(blocks):
            file.write(values[begin:end].tobytes())
            rest = values.shape[1:]
            pieces.append(
                Piece(
                    path=path,
                    offset=offset,
                    length=(end - begin) * item,
                    starts=(begin, *(0 for _ in rest)),
                    sizes=(end - begin, *rest),
                )
            )
            offset += (end - begin) * item
    sharded = TensorInfo(name="sum", dtype="fp32", shape=values.shape, pieces=tuple(pieces))
    _check_proportional(draw_rows(rows, whole, 20_000, _rng()), weight)
    _check_proportional(draw_rows(rows, sharded, 20_000, _rng()), weight)


@pytest.mark.parametrize("rows", [10, 20_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -7.0, 1e300])
def test_one_damaged_number_spoils_its_row_only(tmp_path, rows, bad):
    weight = np.zeros((rows, 2))
    weight[[2, 5, rows - 1]] = [[1, bad], [1, 1], [3, 3]]
    counts = np.bincount(
        draw_rows(rows, saved_vector(tmp_path, weight), 4000, _rng()), minlength=rows
    )
    assert counts[5] + counts[rows - 1] == 4000 and abs(counts[rows - 1] / counts[5] - 3) < 0.5


@pytest.mark.parametrize("fill", [0.0, np.nan, -1.0])
@pytest.mark.parametrize("shape", MATRIX)
def test_long_accumulators_that_tell_nothing(tmp_path, monkeypatch, fill, shape):
    state = saved_vector(tmp_path, _shaped(np.full(50_000, fill, dtype=np.float32), shape))
    for limit in (row_frequency._SCANNED_BYTES, 0):
        monkeypatch.setattr(row_frequency, "_SCANNED_BYTES", limit)
        drawn = draw_rows(50_000, state, 5000, _rng())
        assert (np.abs(np.bincount(drawn // 10_000, minlength=5) - 1000) < 400).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", MATRIX)
@pytest.mark.parametrize("rows", [6, 20_000])
def test_what_the_accumulator_held_before_training_is_no_weight(tmp_path, dtype, shape, rows):
    values = np.full(rows, 0.1)
    values[[1, 4, rows - 1]] = [1.1, 2.1, 4.1]
    values = values if shape == "vector" else values[:, None].repeat(1 + (shape == "matrix"), 1)
    state = saved_vector(tmp_path, torch.as_tensor(values).to(dtype))
    counts = np.bincount(draw_rows(rows, state, 7000, _rng(), initial=0.1))
    assert counts[[1, 4, rows - 1]].sum() == 7000
    np.testing.assert_allclose(counts[[1, 4, rows - 1]], [1000, 2000, 4000], rtol=0.1)


@pytest.mark.parametrize("rows", [100, 8193, 50_000])
@pytest.mark.parametrize("shape", [None, *MATRIX])
def test_draws_follow_their_seed(tmp_path, rows, shape):
    weight = _rng().random(rows).astype(np.float32)
    state = None if shape is None else saved_vector(tmp_path, _shaped(weight, shape))
    one, two, three = (draw_rows(rows, state, 300, _rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one, two) and not np.array_equal(one, three)
    # in no order: rows are split into those that fit and those that are held out
    assert abs(np.corrcoef(np.arange(300), one)[0, 1]) < 0.25
    assert len(draw_rows(rows, state, 0, _rng())) == 0
