"""The self-test on CPUs, and that its checks can fail."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dmt_convert as dmt
from dmt_convert.cluster import Floats, Scaled
from dmt_convert.selftest import exchange, kernels, steps, training, wire
from dmt_convert.selftest.model import write_flat
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.steps import StepMeter
from support.shortcuts import sample_few, skip_report


@pytest.mark.slow
def test_it_works_here(call_dmt: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    done = call_dmt("selftest", "--quick", "--nproc", "2", "--out", tmp_path, "--json")
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert done.code == 0, [check["line"] for check in found.values()]
    expected = {"nccl", "syncs", "resume", "export"} if not torch.cuda.is_available() else set()
    skipped = {name for name, check in found.items() if check["status"] == "skipped"}
    assert expected <= skipped <= {*expected, "resume", "export"}
    assert 0 < found["training"]["details"]["largest_difference"] < training.LIMIT
    assert found["gloo"]["details"]["wrong"] == []


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_of_it_works_here(call_dmt: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    done = call_dmt("selftest", "--nproc", "2", "--out", tmp_path, "--json")
    assert done.code == 0, done.stdout
    found = {check["name"]: check["line"] for check in json.loads(done.stdout)["checks"]}
    assert "to the bit" in found["resume"] and "onnx" in found["export"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [None, "rate", "weights", "empty"])
def test_a_wrong_kernel_is_found(broken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fbgemm_gpu")
    if broken == "rate":
        right = kernels.fused_parameters
        monkeypatch.setattr(
            kernels,
            "fused_parameters",
            lambda kind, lr: right(kind, lr=lr * 1.001),
        )
    elif broken == "weights":
        look_up = kernels._look_up
        monkeypatch.setattr(
            kernels, "_look_up", lambda *given, weighted: look_up(*given, weighted=False)
        )
    elif broken == "empty":
        monkeypatch.setattr(kernels, "_empty_batch", lambda device: False)
    context = Context(folder=Path(), quick=True, nproc=2)
    outcome = kernels.check_kernels(context)
    assert outcome.status == ("ok" if broken is None else "differs"), outcome


def test_bytes_that_were_not_planned_or_say_something_else_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = Context(folder=Path(), quick=True, nproc=2)
    assert wire.check_wire(context).status == "ok"
    with monkeypatch.context() as patch:
        pack = Scaled.pack
        padded = torch.nn.functional.pad
        patch.setattr(Scaled, "pack", lambda self, x: padded(pack(self, x), (0, 2)))
        assert "were planned" in wire.check_wire(context).line
    with monkeypatch.context() as patch:
        unpack = Floats.unpack
        patch.setattr(Floats, "unpack", lambda self, data: unpack(self, data) * 1.01)
        assert wire.check_wire(context).line.startswith("fp32, 4 elements: arrives with an error")


def test_a_training_that_ends_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "ranks": {"w": np.float32([1, 2])},
        "alone": {"w": np.float32([1, 2 + 2e-4])},
        "lost": {"w": np.float32([1, np.nan])},
    }
    monkeypatch.setattr(training, "tensors_of", lambda path: found[path.name])
    compare = training.compare
    assert compare(Path(), "ranks", "ranks", 0.0, "").status == "ok"
    assert compare(Path(), "ranks", "alone", 1e-3, "").status == "ok"
    for other, limit in (("alone", training.LIMIT), ("alone", 0.0), ("lost", 1.0)):
        assert compare(Path(), "ranks", other, limit, "").status == "differs"


def test_an_exchange_of_other_numbers_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert exchange._wrong(torch.device("cpu"), None) == []
        right = dist.all_to_all_single
        for name, broken in (
            ("all_to_all_single", lambda got, sent, *s, **g: right(got, sent + 1, *s, **g)),
            ("all_reduce", lambda total, **g: total.add_(1)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(dist, name, broken)
                assert exchange._wrong(torch.device("cpu"), None) != []
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_step_is_told_beside_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flat(tmp_path / "flat.pt")
    sample_few(monkeypatch)
    skip_report(monkeypatch)
    dmt.convert(tmp_path / "flat.pt", tmp_path / "bundle", towers=2, tower_module="passthrough")
    costs = {"seconds": [0.002, 0.003, 0.1], "syncs": {"cluster/exchange.py:7": 1.2, "x.py:1": 0.2}}
    (tmp_path / "steps.json").write_text(json.dumps(costs))
    context = Context(folder=tmp_path, quick=True, nproc=8, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GB200")
    assert re.match(
        r"3\.0 ms for 256 rows over 8 ranks; predicted \d+\.\d ms", steps.check_step(context).line
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla K80")
    assert "not predicted (no preset for tesla k80)" in steps.check_step(context).line
    line = steps.check_syncs(context).line
    assert line == "1.4 per step: 1.2 at cluster/exchange.py:7, 0.2 at x.py:1"


def test_steps_are_timed_after_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    meter = StepMeter(tmp_path / "steps.json")
    assert [meter.measure(lambda i=i: i) for i in range(12)] == [*range(12)]  # type: ignore[misc]
    written = json.loads((tmp_path / "steps.json").read_text())
    # on a GPU, five more have their waits counted
    assert len(written["seconds"]) == (2 if torch.cuda.is_available() else 7)
