"""The public functions do what the commands do, with the same names and defaults."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dmt_convert as dmt
from dmt_convert import api
from dmt_convert.config import COMMANDS, ConvertConfig, SettingsError, read_settings
from dmt_convert.data import Bag
from dmt_convert.errors import DataError, UsageError
from support.bundles import convert_quickly, make_bundle
from support.checkpoints.flat import make_flat
from support.commands import run_dmt
from support.rows import write_probe

ROWS = 8
FEATURES = ("cat_0", "cat_1", "cat_2", "cat_3")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("api"), compression=2)


@pytest.fixture
def rows() -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Dense inputs and bags of 0 to 3 ids, as tensors."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 1, 1, 3, 4, 7, 8, 8, 9])
    bags = {n: (torch.randint(0, 6, (9,), generator=generator), offsets) for n in FEATURES}
    return torch.randn(ROWS, 5, generator=generator), bags


def test_every_command_has_a_function() -> None:
    names = {config.command for config in COMMANDS}
    assert names == {"inspect", "convert", "partition", "plan", "data", "score", "evaluate",
                     "verify", "finetune", "export", "unshard", "selftest"}  # fmt: skip
    # `dmt.data` and `dmt.selftest` are packages
    functions = {"data": dmt.check_data, "selftest": dmt.check_machine}
    for config in COMMANDS:
        function = functions.get(config.command) or getattr(dmt, config.command)
        parameters = inspect.signature(function).parameters
        assert parameters["config"].annotation.startswith(config.__name__)


def test_importing_a_submodule_hides_no_function() -> None:
    code = (
        "import dmt_convert as dmt, pkgutil\n"
        "names = {m.name for m in pkgutil.iter_modules(dmt.__path__)}\n"
        "assert not names & set(dmt.__all__), names & set(dmt.__all__)\n"
        "assert callable(dmt.convert) and callable(dmt.partition) and callable(dmt.plan)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_library_and_command_find_the_same_towers(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt", rows=(7, 50, 11, 6, 20, 9))
    run = run_dmt("partition", source, "--towers", "2", "--json")
    assert run.code == 0, run.stderr
    partition = dmt.partition(str(source), towers=2)
    printed = json.loads(run.stdout)["towers"]

    assert printed == [list(tower) for tower in partition.assignment.towers]


@pytest.mark.slow
def test_settings_of_a_bundle_repeat_its_conversion(bundle: Path, tmp_path: Path) -> None:
    settings = read_settings(bundle / "dmt.json", ConvertConfig)
    again = convert_quickly(bundle.parent / "ckpt.pt", tmp_path / "again", report=True, **settings)
    assert (again.path / "dmt.json").read_bytes() == (bundle / "dmt.json").read_bytes()


@pytest.mark.slow
def test_a_settings_file_and_an_option_over_it(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    file = tmp_path / "settings.yaml"
    file.write_text("towers: 2\ncompression: 2\npartition: round-robin\ndistill_steps: 0\n")
    run = run_dmt("convert", source, "--config", file, "--compression", "4", "--dry-run", "--json")
    assert run.code == 0, run.stderr
    preview = dmt.preview(source, towers=2, compression=4, partition="round-robin")
    printed = json.loads(run.stdout)
    assert printed["compression"] == pytest.approx(preview.compression, rel=0.01)
    other = dmt.preview(source, towers=2, compression=2, partition="round-robin")
    assert other.compression < preview.compression
    file.write_text("towers: 2\ncompresion: 2\n")
    run = run_dmt("convert", source, "--config", file, "--dry-run")
    assert run.code == 3
    assert "did you mean compression?" in run.stderr


def test_wrong_settings_are_named_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        dmt.convert(tmp_path / "none.pt", towers=0, compresion=2)
    assert "towers must be an integer >= 1, got 0" in str(refused.value)
    assert "did you mean compression?" in str(refused.value)


def test_a_model_scores_like_the_command(bundle, rows, tmp_path) -> None:
    dense, bags = rows
    model = dmt.open_bundle(str(bundle)).model()
    assert isinstance(model, dmt.PlainModel)
    assert model.feature_names == FEATURES and model.num_dense == 5
    with torch.inference_mode():
        logits = model(dense, bags).numpy()
    stored = {n: Bag(values=v.numpy(), offsets=o.numpy()) for n, (v, o) in bags.items()}
    probe = write_probe(tmp_path / "probe.npz", dense.numpy(), stored)
    scores = dmt.score(bundle, probe)
    np.testing.assert_array_equal(scores.logits, logits)
    in_memory = dmt.open_bundle(bundle).model(in_memory=True)
    with torch.inference_mode():  # another kernel of torch sums the rows of a bag
        np.testing.assert_allclose(in_memory(dense, bags), logits, rtol=1e-5, atol=1e-6)


def test_ids_may_come_in_four_forms(bundle, rows) -> None:
    dense, _ = rows
    model = dmt.open_bundle(bundle).model()
    single = {n: torch.arange(ROWS) % 6 for n in FEATURES}
    padded = {n: torch.stack([ids, torch.full_like(ids, -1)], 1) for n, ids in single.items()}
    jagged = {n: (ids, torch.arange(ROWS + 1)) for n, ids in single.items()}
    weighted = {n: (*bag, torch.ones(ROWS)) for n, bag in jagged.items()}
    with torch.inference_mode():
        one, *others = [model(dense, form) for form in (single, padded, jagged, weighted)]
        for other in others:
            torch.testing.assert_close(other, one, rtol=0, atol=0)
        doubled = model(dense, {n: (*b, torch.full((ROWS,), 2.0)) for n, b in jagged.items()})
    assert not torch.equal(doubled, one)  # weights are used


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda f: f.pop("cat_1"), "missing: ['cat_1']"),
        (lambda f: f.update(other=f["cat_0"]), "does not have: ['other']"),
        (lambda f: f.update(cat_1=torch.zeros(3, dtype=torch.int64)), "'cat_1' has 3 rows"),
        (lambda f: f.update(cat_0=torch.full((ROWS,), 7)), "ids from 7 to 7"),
        (lambda f: f.update(cat_0=torch.full((ROWS,), 1.5)), "torch.float32"),
        (lambda f: f.update(cat_0=torch.full((ROWS,), -1)), "ids from -1 to -1"),
        (lambda f: f.update(cat_0=torch.full((ROWS, 2), -2)), "ids from -2 to -2"),
        (lambda f: f.update(cat_0=torch.zeros(ROWS, 2, 2, dtype=torch.int64)), "[8, 2, 2]"),
        (lambda f: f.update(cat_0=_jagged(first=1)), "offsets"),
        (lambda f: f.update(cat_0=_jagged(last=ROWS - 1)), "offsets"),
        (lambda f: f.update(cat_0=_jagged(third=7)), "offsets"),
        (lambda f: f.update(cat_0=(*_jagged(), torch.ones(3))), "3 weights"),
    ],
)
def test_a_model_refuses_wrong_inputs(bundle, change, found) -> None:
    features = {n: torch.zeros(ROWS, dtype=torch.int64) for n in FEATURES}
    change(features)
    with pytest.raises(DataError) as refused:
        dmt.open_bundle(bundle).model()(torch.zeros(ROWS, 5), features)
    assert found in str(refused.value)


def _jagged(
    *, first: int = 0, third: int = 2, last: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one id per row, with three of the offsets changed."""
    offsets = torch.arange(ROWS + 1)
    offsets[0], offsets[2], offsets[-1] = first, third, last
    return torch.zeros(ROWS, dtype=torch.int64), offsets


@pytest.mark.parametrize("dense", [None, torch.zeros(ROWS, 4), torch.zeros(ROWS)])
def test_a_model_refuses_dense_inputs_of_another_width(bundle, dense) -> None:
    features = {n: torch.zeros(ROWS, dtype=torch.int64) for n in FEATURES}
    with pytest.raises(DataError, match="dense inputs"):
        dmt.open_bundle(bundle).model()(dense, features)


def test_a_model_in_memory_learns(bundle, rows) -> None:
    dense, bags = rows
    model = dmt.open_bundle(bundle).model(in_memory=True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    labels, losses = torch.arange(ROWS) % 2, []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model(dense, bags), labels.float()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_path_that_is_needed(bundle: Path) -> None:
    with pytest.raises(UsageError, match="--out is missing"):
        dmt.export(bundle, "onnx")


def test_reprs_are_short(bundle: Path, tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    opened = dmt.open_bundle(bundle)
    for value in (opened, dmt.inspect(source), dmt.preview(source, towers=2),
                  dmt.plan(opened, hosts=2, ranks_per_host=1)):  # fmt: skip
        assert len(repr(value)) < 400, repr(value)


def test_functions_are_documented() -> None:
    for name in dmt.__all__:
        if inspect.isfunction(getattr(dmt, name)):
            assert inspect.getdoc(getattr(api, name)), name
