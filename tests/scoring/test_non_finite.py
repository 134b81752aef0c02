"""Logits that are not finite end the command, and what is absurd is named."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert.data import Bag, Batch
from dmt_convert.errors import BundleError, CheckpointError
from dmt_convert.scoring import evaluate_model, open_model, score_data, score_to_file
from support.checkpoints.flat import TORCHREC_TABLE
from support.commands import run_dmt
from support.refusals import check_refusal
from support.rows import write_probe, write_schema
from support.scored import convert_model, write_model, write_rows
from support.specs import CLICK_NAMES


def spoil(path: Path, name: str, place: tuple[int, ...], value: float) -> Path:
    state = torch.load(path)
    state[name][place] = value
    torch.save(state, path)
    return path


def labelled(folder: Path, rows: int) -> Path:
    """Rows with labels, one id in every bag."""
    rng = np.random.default_rng(0)
    write_schema(folder, CLICK_NAMES)
    np.savez(
        folder / "clicks.npz",
        dense=rng.standard_normal((rows, 2)).astype(np.float32),
        sparse=rng.integers(0, 7, (rows, 4)),
        label=np.arange(rows) % 2,
    )
    return folder / "clicks.npz"


PLACES = {
    "over_arch.model.0._mlp.0._linear.weight": ((0, 0), "over_arch.0.weight holds 2e+38"),
    TORCHREC_TABLE.format(2): ((3, 1), "table 't_cat_2' gives up to inf: look at its rows"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_absurd_tensor_is_named(tmp_path: Path, name: str) -> None:
    place, found = PLACES[name]
    model = open_model(spoil(write_model(tmp_path / "m.pt"), name, place, 2e38))
    data = write_rows(tmp_path / "rows.npz", 400)
    with pytest.raises(CheckpointError, match=r"of 400 logits .* are NaN") as refused:
        score_data(model, data)
    assert found in "\n".join(refused.value.details)
    assert any("first step whose result" in line for line in refused.value.details)


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_the_commands_say_which_rows_and_nothing_else(tmp_path: Path, command: str) -> None:
    name = "over_arch.model.0._mlp.0._linear.weight"
    model = spoil(write_model(tmp_path / "m.pt"), name, (0, 0), 2e38)
    data = labelled(tmp_path, 40)
    more = ("--out", tmp_path / "scores.npz") if command == "score" else ()
    run = run_dmt(command, model, "--data", data, *more, "--json")
    check_refusal(run, "CheckpointError", "are NaN or infinite (rows")
    assert "Warning" not in run.stderr
    assert not (tmp_path / "scores.npz").exists()


def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = convert_model(write_model(tmp_path / "m.pt"), tmp_path / "b")
    model = open_model(bundle)
    data = labelled(tmp_path, 10)
    score_data(model, data)
    real = type(model).score

    def some_nan(self: object, batch: Batch) -> np.ndarray:
        logits = real(self, batch).copy()  # type: ignore[arg-type]
        logits[[2, 7]] = np.nan, np.inf
        return logits

    monkeypatch.setattr(type(model), "score", some_nan)
    for run in (
        lambda: score_data(model, data),
        lambda: evaluate_model(model, data),
        lambda: score_to_file(model, data, tmp_path / "s.npz"),
    ):
        with pytest.raises(BundleError, match=r"2 of 10 logits .* \(rows 2, 7\)"):
            run()
    assert not (tmp_path / "s.npz").exists()


def test_absurd_dense_inputs_are_the_data_s(tmp_path: Path) -> None:
    dense = np.zeros((3, 2), np.float32)
    dense[1, 1] = 3e38
    bags = {f"cat_{i}": Bag(values=np.zeros(3, np.int64), offsets=np.arange(4)) for i in range(4)}
    data = write_probe(tmp_path / "rows.npz", dense, bags)
    with pytest.raises(CheckpointError) as refused:
        score_data(open_model(write_model(tmp_path / "m.pt")), data)
    assert "dense input 1 of the data is 3e+38" in refused.value.details[0]
