"""What an older version wrote still opens, and gives the same numbers; see `make.py`.

Only the `dmt` command line is used, so that these tests outlive every module behind it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from dmt_convert.cli.main import main

HERE = Path(__file__).parent
OLD = HERE / "v0"
MADE = json.loads((OLD / "made.json").read_text("utf-8"))
SCORED: Mapping[str, str] = MADE["scored"]
BUNDLES = ("dlrm", "tuned", "dcn", "network")
EXPORTS = ("dlrm-onnx", "network-onnx")
ROUNDING = 1e-5
"""Times the largest logit. Other processors and libraries sum in another order, which changes the
last bits of float32; a few sums of at most 52 terms follow each other here."""
TRAINED = 1e-3
"""Likewise after a few training steps, each of which may amplify what the one before rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    code: int
    stdout: str
    stderr: str


def dmt(*words: object) -> Ended:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("dmt_convert")
    handlers, level = logger.handlers, logger.level
    try:
        with (
            patch.object(sys, "argv", ["dmt", *map(str, words)]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            main()
        code: Any = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        signal.signal(signal.SIGTERM, before)
        logger.handlers = handlers
        logger.setLevel(level)
    assert isinstance(code, int)
    return Ended(code=code, stdout=out.getvalue(), stderr=err.getvalue())


def do(*words: object) -> Any:
    """Run the command, which has to succeed; returns what `--json` printed."""
    done = dmt(*words, "--json")
    assert done.code == 0, done.stderr or done.stdout
    return json.loads(done.stdout)


def score(model: Path, data: str, folder: Path) -> np.ndarray:
    do("score", model, "--data", OLD / data, "--out", folder / "scores.npz")
    with np.load(folder / "scores.npz") as arrays:
        logits: np.ndarray = arrays["logits"]
    return logits


def logits_before(model: str) -> np.ndarray:
    with np.load(OLD / "logits" / f"{model}.npz") as arrays:
        logits: np.ndarray = arrays["logits"]
    return logits


def same_arithmetic() -> bool:
    """Whether sums are rounded here as where the old logits were computed."""
    found: dict[str, str] = runpy.run_path(str(HERE / "make.py"))["arithmetic"]()
    return found == MADE["arithmetic"]


def check_logits(found: np.ndarray, before: np.ndarray, *, exact: bool, within: float) -> None:
    """Compare bit by bit where `exact`, else within a share of the largest logit."""
    assert found.shape == before.shape and found.dtype == before.dtype == np.float32
    assert np.isfinite(before).all() and before.std() > 0.01  # no constant, which hides mistakes
    if exact:
        assert found.tobytes() == before.tobytes(), f"max |diff| {np.abs(found - before).max()}"
    else:
        np.testing.assert_allclose(found, before, rtol=0, atol=within * np.abs(before).max())


def says_still(now: Any, before: Any, where: str = "") -> None:
    """Check that a document says all that it said before; it may say more."""
    if isinstance(before, dict):
        assert isinstance(now, dict), where
        for key, value in before.items():
            assert key in now, f"{where}/{key} is gone"
            says_still(now[key], value, f"{where}/{key}")
    elif isinstance(before, list):
        assert isinstance(now, list) and len(now) == len(before), where
        for i, value in enumerate(before):
            says_still(now[i], value, f"{where}/{i}")
    else:
        assert now == before, f"{where}: {now!r} was {before!r}"


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read(path) | changes), "utf-8")


def flip_bit(path: Path, tensor: str) -> None:
    """Change the first number of a tensor in a safetensors file by a few percent."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + size])[tensor]["data_offsets"][0]
    content[8 + size + start + 2] ^= 0x20
    path.write_bytes(content)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What the old version wrote, to change; the test data must not be written to."""
    return Path(shutil.copytree(OLD, tmp_path / "v0"))


def test_data_is_complete() -> None:
    """Every model that was scored is there, with its batch; nothing was made by a later version."""
    for model, data in SCORED.items():
        assert (OLD / model).exists() and (OLD / data).is_file()
    versions = {read(OLD / name / "dmt.json")["tool"]["version"] for name in BUNDLES}
    versions |= {read(OLD / name / "export.json")["tool"]["version"] for name in EXPORTS}
    assert versions == {"0.1.0"}
    assert {read(OLD / name / "dmt.json")["schema_version"] for name in BUNDLES} == {1}
    assert MADE["commit"] == "164d59a"


@pytest.mark.parametrize("model", SCORED)
def test_logits_are_those_of_before(model: str, tmp_path: Path) -> None:
    found = score(OLD / model, SCORED[model], tmp_path)
    check_logits(found, logits_before(model), exact=same_arithmetic(), within=ROUNDING)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("change", [1e-4, -1e-4])
def test_a_changed_logit_is_noticed(exact: bool, change: float) -> None:
    before = logits_before("dlrm")
    found = before.copy()
    check_logits(found, before, exact=exact, within=ROUNDING)
    found[5] += np.float32(change * np.abs(before).max())
    with pytest.raises(AssertionError):
        check_logits(found, before, exact=exact, within=ROUNDING)


def test_a_last_bit_is_noticed_where_the_arithmetic_is_the_same() -> None:
    before = logits_before("dlrm")
    found = before.copy()
    found[5] = np.nextafter(found[5], np.float32(np.inf))
    with pytest.raises(AssertionError):
        check_logits(found, before, exact=True, within=ROUNDING)
    check_logits(found, before, exact=False, within=ROUNDING)


def test_a_changed_weight_changes_the_logits(copied: Path) -> None:
    flip_bit(copied / "dlrm" / "weights" / "dense.safetensors", "over_arch.1.bias")
    done = dmt("score", copied / "dlrm", "--data", OLD / "probe.npz", "--out", copied / "now.npz")
    if done.code:  # a version that compares digests before it scores
        assert done.code == 3 and "digest" in done.stderr
        return
    with np.load(copied / "now.npz") as arrays, pytest.raises(AssertionError):
        check_logits(arrays["logits"], logits_before("dlrm"), exact=False, within=ROUNDING)


@pytest.mark.parametrize(
    ("reference", "other"),
    [("network.pt", "network"), ("dlrm", "dlrm-onnx"), ("network", "network-onnx")],
)
def test_verify_agrees(reference: str, other: str) -> None:
    data = OLD / SCORED[other]
    value = do("verify", OLD / reference, OLD / other, "--data", data, "--checksums")
    assert value["same"] and value["first_difference"] is None
    assert value["checks"]


def test_verify_tells_models_apart() -> None:
    done = dmt("verify", OLD / "dlrm", OLD / "tuned", "--data", OLD / "probe.npz", "--json")
    assert done.code == 4
    assert not json.loads(done.stdout)["same"]


@pytest.mark.parametrize("model", [*BUNDLES, *EXPORTS])
def test_digests_hold(model: str) -> None:
    """They are those of the old version, of every byte of every tensor."""
    words = ("--data", OLD / SCORED[model], "--checksums")
    assert do("verify", OLD / model, OLD / model, *words)["same"]


@pytest.mark.parametrize(
    ("model", "file", "tensor"),
    [
        ("dlrm", "weights/tower_000.safetensors", "tables.t_age.weight"),
        ("tuned", "weights/dense.safetensors", "over_arch.1.bias"),
        ("dlrm", "weights/accumulators_001.safetensors", "tables.t_shop.accumulator"),
        ("dlrm-onnx", "tower_000/tower.safetensors", "tables.t_age.weight"),
    ],
)
def test_a_changed_byte_is_refused(copied: Path, model: str, file: str, tensor: str) -> None:
    flip_bit(copied / model / file, tensor)
    done = dmt("verify", copied / model, OLD / model, "--checksums")
    assert done.code == 3
    assert tensor in done.stderr


@pytest.mark.parametrize(
    ("model", "document"), [("dlrm", "dmt.json"), ("dlrm-onnx", "export.json")]
)
def test_a_layout_that_nobody_knows_is_refused(copied: Path, model: str, document: str) -> None:
    edit(copied / model / document, schema_version=999)
    done = dmt("score", copied / model, "--data", OLD / "probe.npz", "--out", copied / "now.npz")
    assert done.code == 3
    assert "999" in done.stderr


def test_the_plan_is_that_of_before(tmp_path: Path) -> None:
    """For the same cluster, and for the one that the bundle's own plan is for."""
    own = read(OLD / "dlrm" / "plan.json")
    cluster = own["cluster"]
    for size, before in ((("1", "1"), read(OLD / "plan.json")),
                         ((cluster["hosts"], cluster["ranks_per_host"]), own)):  # fmt: skip
        out = tmp_path / f"plan-{size[0]}.json"
        words = ("--hosts", size[0], "--ranks-per-host", size[1], "--out", out)
        do("plan", OLD / "dlrm", *words)
        says_still(read(out), before)


def test_a_changed_plan_is_noticed() -> None:
    plan = read(OLD / "plan.json")
    says_still(plan | {"more": 1}, plan)
    for key in plan:
        with pytest.raises(AssertionError):
            says_still({name: value for name, value in plan.items() if name != key}, plan)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dlrm", "network"])
def test_exports_again(model: str, tmp_path: Path) -> None:
    """A new export of an old bundle takes the same inputs and gives the same logits."""
    command = next(c for c in MADE["commands"] if c.startswith(f"export {model} "))
    words = [word.replace(f"{model}-onnx", str(tmp_path / "out")) for word in command.split()[2:]]
    do("export", OLD / model, *words)
    old, new = read(OLD / f"{model}-onnx" / "export.json"), read(tmp_path / "out" / "export.json")
    says_still(new["inputs"], old["inputs"])
    assert new["parts"].keys() == old["parts"].keys()
    found = score(tmp_path / "out", SCORED[model], tmp_path)
    check_logits(found, logits_before(f"{model}-onnx"), exact=False, within=ROUNDING)


@pytest.mark.slow
def test_the_towers_of_a_file_are_taken(tmp_path: Path) -> None:
    """`dmt convert --partition` reads what `dmt partition --out` wrote; exact towers are exact."""
    words = ("--partition", OLD / "partition.json", "--tower-module", "passthrough")
    do("convert", OLD / "dlrm.pt", *words, "--out", tmp_path / "out")
    towers = read(tmp_path / "out" / "dmt.json")["model"]["towers"]
    assert [t["features"] for t in towers] == read(OLD / "partition.json")["towers"]
    found = score(tmp_path / "out", "probe.npz", tmp_path)
    check_logits(found, logits_before("dlrm.pt"), exact=False, within=ROUNDING)


def finetune(bundle: Path, plan: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, which starts the rank; the old version knew labels alone."""
    command = [sys.executable, "-m", "dmt_convert.cli.main", "finetune", bundle, "--data",
               OLD / "clicks.npz", "--config", OLD / "settings.yaml", "--plan", plan, "--out", out,
               "--teacher", "none", "--json"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip


@pytest.mark.slow
def test_training_goes_as_before(tmp_path: Path) -> None:
    """Old bundle, old settings, old plan: the same evaluations, and the same model in the end."""
    done = finetune(OLD / "dlrm", OLD / "plan.json", tmp_path / "out")
    assert done.returncode == 0, done.stderr or done.stdout
    old = read(OLD / "tuned" / "dmt.json")["initialisation"]["finetune"]
    new = read(tmp_path / "out" / "dmt.json")["initialisation"]["finetune"]
    assert new["best_step"] == old["best_step"] > 0
    assert [e["step"] for e in new["history"]] == [e["step"] for e in old["history"]]
    for now, before in zip(new["history"], old["history"], strict=True):
        assert now["ne"] == pytest.approx(before["ne"], rel=TRAINED)
    found = score(tmp_path / "out", "probe.npz", tmp_path)
    check_logits(found, logits_before("tuned"), exact=False, within=TRAINED)
    drift = np.abs(logits_before("tuned") - logits_before("dlrm")).max()
    assert drift > 10 * TRAINED * np.abs(found).max()  # the steps did something


@pytest.mark.slow
def test_training_goes_on_from_a_tuned_bundle(tmp_path: Path) -> None:
    done = finetune(OLD / "tuned", OLD / "plan.json", tmp_path / "out")
    assert done.returncode == 0, done.stderr or done.stdout
    record = read(tmp_path / "out" / "dmt.json")["initialisation"]["finetune"]
    before = read(OLD / "tuned" / "dmt.json")["initialisation"]["finetune"]
    says_still(record["previous"], {"best_step": before["best_step"], "steps": before["steps"]})


@pytest.mark.slow
def test_a_damaged_plan_is_refused(copied: Path) -> None:
    edit(copied / "plan.json", tower_hosts="none")
    done = finetune(OLD / "dlrm", copied / "plan.json", copied / "out")
    assert done.returncode == 3, done.stderr
    assert "plan" in done.stderr
    assert not (copied / "out").exists()


@pytest.mark.exhaustive
def test_a_plan_for_another_cluster_is_refused(tmp_path: Path) -> None:
    done = finetune(OLD / "tuned", OLD / "tuned" / "plan.json", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "plan" in done.stderr
    assert not (tmp_path / "out").exists()
