"""Adagrad's accumulators of a checkpoint go into the bundle, number by number."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmt_convert as dmt
from dmt_convert.bundle import Bundle, check_digests
from dmt_convert.checkpoint import gather_rows
from dmt_convert.conversion import convert as conversion_steps
from dmt_convert.documents import OptimizerState
from dmt_convert.errors import CheckpointError
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat

ROWS, DIM = (7, 50, 11, 6), 8
EBC = "sparse_arch.embedding_bag_collection.embedding_bags"


def squares(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).square()
    values[2] = 0.0  # a row that was never touched
    return values


def facebook_adagrad(state: dict[str, Any]) -> None:
    """`dlrm_s_pytorch.py --optimizer=adagrad`: a number per element, by parameter index."""
    states = {i: {"sum": squares(n, DIM, seed=i), "step": 3} for i, n in enumerate(ROWS)}
    nest(state, "state_dict", "opt_state_dict", {"state": states, "param_groups": []})


def facebook_rowwise(state: dict[str, Any]) -> None:
    """`dlrm_s_pytorch.py --optimizer=rwsadagrad`: a number per row."""
    states = {i: {"momentum": squares(n, seed=i)} for i, n in enumerate(ROWS)}
    nest(state, "state_dict", "opt_state_dict", {"state": states, "param_groups": []})


def fused(width: int, second: str = "") -> Callable[[dict[str, Any]], None]:
    """What TorchRec's fused optimizer of tables saves, by parameter name."""

    def edit(state: dict[str, Any]) -> None:
        states: dict[str, dict[str, torch.Tensor]] = {}
        for i, rows in enumerate(ROWS):
            shape = (rows, width) if width > 1 else (rows,)
            values = {f"t_cat_{i}.momentum1": squares(*shape, seed=i)}
            if second:
                values[f"t_cat_{i}.{second}"] = squares(*shape, seed=i)
            states[f"model.{EBC}.t_cat_{i}.weight"] = values
        nest(state, "model", "optimizer", {"state": states})

    return edit


def nest(state: dict[str, Any], model: str, optimizer: str, value: object) -> None:
    weights = dict(state)
    state.clear()
    state.update({model: weights, optimizer: value})


LAYOUTS = {
    "facebook adagrad": ("ckpt.pt", "facebook", facebook_adagrad),
    "facebook row-wise": ("ckpt.pt", "facebook", facebook_rowwise),
    "torchrec adagrad": ("ckpt.pt", "torchrec", fused(DIM)),
    "torchrec row-wise": ("ckpt.pt", "torchrec", fused(1)),
    "torchrec row-wise, dcp": ("ckpt", "torchrec", fused(1)),
    "torchrec adagrad, dcp": ("ckpt", "torchrec", fused(DIM)),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., Path]:
    """Write a checkpoint with optimizer state: `make(layout)` or `make(edit=...)`."""

    def write(layout: str = "torchrec row-wise", *, edit: Any = None) -> Path:
        name, names, usual = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("flat")
        return make_flat(folder / name, names=names, edit=edit or usual)

    return write


@pytest.fixture
def convert(tmp_path) -> Callable[..., Bundle]:
    def run(source: Path, out: str = "out", **options: Any) -> Bundle:
        options = {"partition": "round-robin", "tower_module": "passthrough", **options}
        return convert_quickly(source, tmp_path / out, **options)

    return run


def expected(layout: str, index: int) -> np.ndarray:
    whole = layout.split(",")[0].endswith("adagrad")
    values = squares(ROWS[index], DIM, seed=index) if whole else squares(ROWS[index], seed=index)
    means = values.double().mean(dim=1) if whole else values
    return means.float().numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_the_checkpoints(layout: str, make, convert) -> None:
    bundle = convert(make(layout))
    check_digests(bundle)
    positional = layout.startswith("facebook")
    names = [str(i) if positional else f"t_cat_{i}" for i in range(len(ROWS))]
    assert sorted(bundle.accumulators) == sorted(names)
    for i, name in enumerate(names):
        info = bundle.accumulators[name]
        assert (info.shape, info.dtype) == ((ROWS[i], 1), "fp32")
        values = gather_rows(info, np.arange(ROWS[i]))[:, 0]
        assert values[2] == 0
        assert np.array_equal(values, expected(layout, i))
    averaged = 0 if layout.split(",")[0].endswith("row-wise") else 4
    state = bundle.manifest.optimizer_state
    assert (state.accumulators, state.averaged) == (4, averaged)
    assert len(state.notes) == bool(averaged)
    assert list(bundle.accumulator_files) == [
        "weights/accumulators_000.safetensors",
        "weights/accumulators_001.safetensors",
    ]
    for t, tensors in enumerate(bundle.towers):
        tables = {name for name in tensors if name.startswith("tables.")}
        file = bundle.accumulator_files[f"weights/accumulators_{t:03d}.safetensors"]
        assert {name.replace(".accumulator", ".weight") for name in file} == tables


def states_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the accumulators of a trainer's checkpoint with torch's own means."""
    if checkpoint.is_file():
        states = torch.load(checkpoint, weights_only=False)["opt_state_dict"]["state"]
        return {str(i): states[i]["sum"] for i in range(26)}
    import torch.distributed.checkpoint as dcp

    names = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    chosen = {n: torch.empty(names[n].size) for n in names if n.endswith(".momentum1")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(chosen, checkpoint_id=checkpoint, no_dist=True)
    return {name.split(".")[-2]: value for name, value in chosen.items()}


@pytest.mark.parametrize("sample", ["fb-dlrm-dot/model.pt", "torchrec-dcn-dcp-2rank/dcp"])
def test_the_numbers_are_those_that_a_trainer_wrote(sample: str, shared: Path, convert) -> None:
    source = shared / "checkpoints" / sample
    bundle, states = convert(source), states_of(source)
    assert len(states) == 26 and set(bundle.accumulators) == set(states)
    for name, info in bundle.accumulators.items():
        values = gather_rows(info, np.arange(info.shape[0]))[:, 0]
        assert np.array_equal(values, states[name].double().mean(dim=1).float().numpy())
        assert values.max() > 0


def test_a_checkpoint_without_state_makes_the_bundle_of_before(convert, tmp_path):
    plain = convert(make_flat(tmp_path / "plain.pt"))
    assert plain.accumulators == {}
    assert plain.manifest.optimizer_state == OptimizerState()
    assert not any("accumulators" in path.name for path in plain.path.rglob("*"))


def test_dropped_as_asked_for(make, convert) -> None:
    source = make()
    kept, dropped = convert(source), convert(source, "dropped", optimizer_state="drop")
    assert len(kept.accumulators) == 4
    assert dropped.accumulators == {}
    assert "dropped, as asked for" in dropped.manifest.optimizer_state.notes[0]
    assert not any("accumulators" in path.name for path in dropped.path.rglob("*"))
    # the flat model's digest is that of its tables, whatever lies beside them
    assert kept.manifest.source.digest == dropped.manifest.source.digest


@pytest.mark.parametrize("second", ["exp_avg_sq", "momentum2"])
def test_adams_state_is_not_carried_and_a_note_says_why(second: str, make, convert) -> None:
    bundle = convert(make(edit=fused(DIM, second)))
    assert bundle.accumulators == {}
    (note,) = bundle.manifest.optimizer_state.notes
    assert "4 tables is Adam's" in note and "decays" in note


def spoil(value: float, *, tables: tuple[int, ...], width: int) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        fused(width)(state)
        for i in tables:
            values = state["optimizer"]["state"][f"model.{EBC}.t_cat_{i}.weight"]
            values[f"t_cat_{i}.momentum1"].view(-1)[-1] = value

    return edit


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, DIM])
@pytest.mark.parametrize(
    ("value", "found"),
    [(float("nan"), "NaN"), (float("inf"), "Inf"), (-1e-30, "negative"), (-np.inf, "negative")],
)
def test_a_damaged_accumulator_is_left_out(value, found, width, make, convert) -> None:
    bundle = convert(make(edit=spoil(value, tables=(1,), width=width)))
    check_digests(bundle)
    assert sorted(bundle.accumulators) == ["t_cat_0", "t_cat_2", "t_cat_3"]
    note = bundle.manifest.optimizer_state.notes[-1]
    assert "table 't_cat_1'" in note and f"holds {found}" in note
    for i in (0, 2, 3):
        values = gather_rows(bundle.accumulators[f"t_cat_{i}"], np.arange(ROWS[i]))[:, 0]
        layout = "torchrec row-wise" if width == 1 else "torchrec adagrad"
        assert np.array_equal(values, expected(layout, i))


def test_a_tower_whose_accumulators_are_all_damaged_has_no_file(make, convert) -> None:
    bundle = convert(make(edit=spoil(-1.0, tables=(0, 2), width=1)))
    (lost,) = {0, 1} - {int(name[-15:-12]) for name in bundle.accumulator_files}
    assert {"tables.t_cat_0.weight", "tables.t_cat_2.weight"} <= set(bundle.towers[lost])
    assert len([*(bundle.path / "weights").glob("*.safetensors")]) == 4
    assert len(bundle.manifest.optimizer_state.notes) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_accumulators_in_other_types_become_float32(dtype, make, convert) -> None:
    def edit(state: dict[str, Any]) -> None:
        fused(1)(state)
        for values in state["optimizer"]["state"].values():
            values |= {name: value.to(dtype) for name, value in values.items()}

    bundle = convert(make(edit=edit), dtype="bf16")
    for i, rows in enumerate(ROWS):
        info = bundle.accumulators[f"t_cat_{i}"]
        values = gather_rows(info, np.arange(rows))[:, 0]
        assert info.dtype == "fp32"
        assert np.array_equal(values, squares(rows, seed=i).to(dtype).float().numpy())


@pytest.mark.slow
def test_bytes_that_changed_on_disk_are_refused(make, convert) -> None:
    source = make()
    state = torch.load(source)["optimizer"]["state"][f"model.{EBC}.t_cat_1.weight"]
    data = source.read_bytes()
    needle = state["t_cat_1.momentum1"].numpy().tobytes()
    assert data.count(needle) == 1
    place = data.index(needle) + 9
    source.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CheckpointError, match=r"accumulator of table 't_cat_1'") as refused:
        convert(source)
    assert "--optimizer-state drop" in refused.value.hint
    assert convert(source, optimizer_state="drop").accumulators == {}


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_what_is_said_before_and_after(make, call_dmt, tmp_path) -> None:
    source, out = make("torchrec adagrad"), tmp_path / "out"
    arguments = ("convert", source, "--towers", 2, "--out", out)
    size = sum(ROWS) * 4
    dry = call_dmt(*arguments, "--dry-run", "--json")
    assert json.loads(dry.stdout)["accumulator_bytes"] == size
    dry = call_dmt(*arguments, "--dry-run", "--optimizer-state", "drop", "--json")
    assert json.loads(dry.stdout)["accumulator_bytes"] == 0
    assert f"{size} B" in call_dmt(*arguments, "--dry-run").stdout
    run = call_dmt(*arguments, "--distill-steps", 0)
    assert "accumulators of 4 tables" in run.stdout
    assert "note: 4 tables had an accumulator per element" in run.stderr
    value = json.loads(call_dmt("inspect", out, "--json").stdout)
    assert value["optimizer_state"]["accumulators"] == 4
    written = sum(path.stat().st_size for path in (out / "weights").glob("accumulators_*"))
    entries = value["weights"].items()
    assert sum(e["bytes"] for name, e in entries if "accumulators" in name) == written >= size
    assert "accumulators of 4 tables" in call_dmt("inspect", out).stdout
    flat = json.loads(call_dmt("inspect", source, "--json").stdout)
    assert set(flat["accumulators"]) == {f"t_cat_{i}" for i in range(4)}
    run = call_dmt(*arguments, "--optimizer-state", "some")
    assert run.code == 2 and "keep, drop" in run.stderr


def test_the_free_space_must_hold_them_too(make, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(conversion_steps, "check_space", lambda out, size: seen.append(size))
    for state in ("keep", "drop"):
        dmt.preview(make(), towers=2, optimizer_state=state, out=tmp_path / "out")
    assert seen[0] - seen[1] == sum(ROWS) * 4
