"""0 done, 1 bug, 2 usage, 3 something to mend, 4 verification found a difference."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmt_convert.conversion import convert
from dmt_convert.files.digest import TreeDigest
from support.checkpoints.flat import make_flat

Call = Callable[..., Any]


def resave(bundle: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a weights file of a bundle and make its manifest agree."""
    path = bundle / "weights" / name
    tensors = load_file(path)
    edit(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt", "dmt_schema": "1"})
    manifest = json.loads((bundle / "dmt.json").read_text("utf-8"))
    digests = {}
    for key, tensor in tensors.items():
        digest = TreeDigest()
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        digests[key] = digest.finish()
    manifest["weights"][f"weights/{name}"] = {"bytes": path.stat().st_size, "digests": digests}
    (bundle / "dmt.json").write_text(json.dumps(manifest), "utf-8")


@pytest.fixture
def copy(exact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exact, tmp_path / "copy"))


@pytest.fixture
def square(tmp_path: Path, call_dmt: Call, no_report: None, few_rows: None) -> tuple[Path, Path]:
    """A model of two tables of one shape in one tower, and its exact bundle."""
    source = make_flat(tmp_path / "square.pt", rows=(9, 9))
    out = tmp_path / "square"
    run = call_dmt("convert", source, "--towers", 1, "--tower-module", "passthrough", "--out", out)
    assert run.code == 0, run.stderr
    return source, out


def first_difference(run: Any) -> str:
    assert run.code == 4, run
    value = json.loads(run.stdout)
    assert value["same"] is False
    assert run.stderr == ""
    return str(value["first_difference"])


def test_verify_agrees_with_the_untouched_copy(flat: Path, copy: Path, call_dmt: Call) -> None:
    resave(copy, "dense.safetensors", lambda tensors: None)
    run = call_dmt("verify", flat, copy, "--checksums", "--json")
    assert run.code == 0
    assert json.loads(run.stdout)["first_difference"] is None


def test_verify_notices_two_tables_swapped(square: tuple[Path, Path], call_dmt: Call) -> None:
    source, bundle = square

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = "tables.t_cat_0.weight", "tables.t_cat_1.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    assert call_dmt("verify", source, bundle, "--json").code == 0
    resave(bundle, "tower_000.safetensors", swap)
    run = call_dmt("verify", source, bundle, "--checksums", "--json")
    assert first_difference(run) == "pooled embedding of cat_0"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("dense_arch.0.weight", "dense_arch"),
        ("dense_arch.1.bias", "dense_arch"),
        ("over_arch.0.weight", "over_arch layer 0"),
        ("over_arch.1.weight", "logit"),
    ],
)
def test_verify_names_the_stage_of_a_changed_weight(
    flat: Path, copy: Path, call_dmt: Call, name: str, stage: str
) -> None:
    def perturb(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] += 0.1

    resave(copy, "dense.safetensors", perturb)
    assert first_difference(call_dmt("verify", flat, copy, "--json")) == stage
    text = call_dmt("verify", flat, copy)
    assert text.code == 4
    assert f"different, first at: {stage}" in text.stdout


def test_verify_notices_a_transposed_weight(
    tmp_path: Path, square: tuple[Path, Path], call_dmt: Call
) -> None:
    source, bundle = square

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["dense_arch.1.weight"]
        assert weight.shape == (8, 16)
        halves = weight[:, :8].T, weight[:, 8:].T
        tensors["dense_arch.1.weight"] = torch.cat(halves, dim=1).contiguous()

    resave(bundle, "dense.safetensors", transpose)
    assert first_difference(call_dmt("verify", source, bundle, "--json")) == "dense_arch"


def test_verify_tolerates_what_it_is_told_to(flat: Path, copy: Path, call_dmt: Call) -> None:
    def perturb(tensors: dict[str, torch.Tensor]) -> None:
        tensors["over_arch.1.bias"] += 1e-3

    resave(copy, "dense.safetensors", perturb)
    assert call_dmt("verify", flat, copy).code == 4
    assert call_dmt("verify", flat, copy, "--atol", 2e-3).code == 0


def test_verify_of_a_compressed_bundle_explains(
    flat: Path, compressed: Path, call_dmt: Call
) -> None:
    run = call_dmt("verify", flat, compressed)
    assert run.code == 4
    assert "send 4.00x fewer" in run.stdout
    assert "passthrough" in run.stdout


def test_verify_checksums_find_a_flipped_bit(flat: Path, copy: Path, call_dmt: Call) -> None:
    path = copy / "weights" / "tower_000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run = call_dmt("verify", flat, copy, "--checksums", "--json")
    assert run.code == 3
    value = json.loads(run.stdout)
    assert value["error"] == "BundleError"
    assert value["details"][0].startswith("weights/tower_000.safetensors: tables.")


def test_models_that_cannot_be_compared(
    flat: Path, exact: Path, tmp_path: Path, call_dmt: Call
) -> None:
    other = make_flat(tmp_path / "other.pt", rows=(7, 50), num_dense=4)
    run = call_dmt("verify", exact, other)
    assert run.code == 3
    assert "dense inputs: 5 and 4" in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["convert"],
        ["convert", "x", "--towers", "many"],
        ["plan", "x"],
        ["score", "x"],
        ["verify", "x"],
        ["evaluate", "x"],
        ["convert", "x", "--towers", "2", "--distill-steps", "-1"],
        ["inspect", "x", "y"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], call_dmt: Call) -> None:
    text = call_dmt(*arguments)
    assert text.code == 2
    assert text.stdout == ""
    assert "─ Error ─" in text.stderr or text.stderr.startswith("error: ")
    run = call_dmt(*arguments, "--json")
    assert run.code == 2
    assert set(json.loads(run.stdout)) == {"error", "found", "expected", "hint", "details"}
    assert json.loads(run.stdout)["error"] == "UsageError"


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "no.pt"],
        ["convert", "no.pt", "--towers", 2],
        ["partition", "no.pt", "--towers", 2],
        ["plan", "no", "--hosts", 2, "--ranks-per-host", 2],
        ["score", "no.pt", "--data", "no.npz", "--out", "x.npz"],
        ["evaluate", "no.pt", "--data", "no.npz"],
        ["verify", "no.pt", "no"],
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_what_is_not_there(arguments: list[object], call_dmt: Call, tmp_path: Path) -> None:
    run = call_dmt(*arguments, "--json")
    assert run.code == 3
    value = json.loads(run.stdout)
    assert "does not exist" in value["found"]
    assert run.stderr.startswith("error: no")


@pytest.mark.parametrize(
    "options",
    [("--hosts", 0, "--ranks-per-host", 1), ("--hosts", 2, "--ranks-per-host", -1)],
    ids=str,
)
def test_a_plan_for_no_cluster(
    compressed: Path, options: tuple[object, ...], call_dmt: Call
) -> None:
    run = call_dmt("plan", compressed, *options, "--json")
    assert run.code == 2
    assert json.loads(run.stdout)["error"] == "UsageError"


@pytest.mark.parametrize("option", ["--hbm-gib", "--intra-gbps", "--inter-gbps"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-3"])
def test_a_plan_with_odd_numbers(compressed: Path, option: str, value: str, call_dmt: Call) -> None:
    run = call_dmt("plan", compressed, "--hosts", 2, "--ranks-per-host", 1, option, value)
    assert run.code == 2
    assert option in run.stderr


def test_a_bug_is_called_one(flat: Path, call_dmt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(convert, "open_checkpoint", fail)
    run = call_dmt("inspect", flat, "--json")
    assert run.code == 1
    value = json.loads(run.stdout)
    assert value["error"] == "ZeroDivisionError"
    assert value["found"] == "this is a bug in dmt: ZeroDivisionError: of all things"
    assert "DMT_TRACEBACK=1" in value["hint"]
    assert "Traceback" not in run.stderr
    monkeypatch.setenv("DMT_TRACEBACK", "1")
    run = call_dmt("inspect", flat)
    assert run.code == 1
    assert run.stdout == ""
    assert "Traceback" in run.stderr
    assert ", in fail" in run.stderr


@pytest.mark.parametrize("code", [5, 13, 30])
def test_what_the_system_refuses_is_no_bug(
    flat: Path, call_dmt: Call, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(path: Path) -> None:
        raise OSError(code, "The system says no", str(path))

    monkeypatch.setattr(convert, "open_checkpoint", fail)
    run = call_dmt("inspect", flat, "--json")
    assert run.code == 3
    assert json.loads(run.stdout)["found"] == f"{flat}: The system says no"
    assert "expected: " in run.stderr
    assert "try: " in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--json",)], ids=str)
def test_a_reader_that_goes_away_is_no_error(flat: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "dmt_convert.cli.main", "inspect", str(flat), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["good", "missing"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_result_that_cannot_be_printed_is_no_traceback(
    flat: Path, name: str, options: list[str]
) -> None:
    source = flat if name == "good" else flat.with_name("missing.pt")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dmt_convert.cli.main", "inspect", source, *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    expected = "No space left" if name == "good" else "does not exist"
    assert expected in done.stderr and "try:" in done.stderr


def test_a_closed_stdout_is_no_bug(flat: Path) -> None:
    command = f"exec {sys.executable} -m dmt_convert.cli.main inspect {flat} --json >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_partition_leaves_no_half_file(
    flat: Path, tmp_path: Path, call_dmt: Call, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def write(path: Path, data: Any, **_: Any) -> int:
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(Path, "write_text", write)
    run = call_dmt("partition", flat, "--towers", 2, option, tmp_path / "x.png")
    assert run.code == 3
    assert "x.png cannot be written (No space left on device)" in run.stderr
    assert not [*tmp_path.iterdir()]


def test_a_plot_of_another_kind_is_named(flat: Path, tmp_path: Path, call_dmt: Call) -> None:
    run = call_dmt("partition", flat, "--towers", 2, "--plot", tmp_path / "x.gif")
    assert run.code == 3 and "a plot named x.gif" in run.stderr
    assert not [*tmp_path.iterdir()]
