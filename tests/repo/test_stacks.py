"""Releases that go together are declared once: extras, scripts, README and the check agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dmt_convert.cluster import requirements
from dmt_convert.cluster.requirements import check_requirements
from dmt_convert.errors import ConfigError
from dmt_convert.stacks import DEFAULT, STACKS, Stack
from support.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
OLD, NEW = STACKS


def test_extras_are_the_stacks() -> None:
    wanted = {}
    for stack in STACKS:
        both = {f"torch=={stack.torch_series}.*", f"torchrec=={stack.torchrec}"}
        wanted[f"cuda{stack.suffix}"] = both | {f"fbgemm-gpu=={stack.fbgemm}"}
        stand_in = {"fbgemm-gpu==0+cpu", f"fbgemm-gpu-cpu=={stack.fbgemm}"}
        wanted[f"cpu{stack.suffix}"] = both | stand_in
    extras = PROJECT["optional-dependencies"]
    found = {name: set(extras[name]) for name in extras if name.startswith(("cpu", "cuda"))}
    assert found == wanted
    stand_in_project = REPOSITORY / "packaging" / "fbgemm-gpu-cpu" / "pyproject.toml"
    assert tomllib.loads(stand_in_project.read_text("utf-8"))["project"]["version"] == "0+cpu"


def test_the_range_of_torch_is_that_of_the_stacks() -> None:
    (torch,) = [need for need in PROJECT["dependencies"] if need.startswith("torch>")]
    numbers = [int(stack.torch.split(".")[1]) for stack in STACKS]
    assert torch == f"torch>=2.{min(numbers)},<2.{max(numbers) + 1}"


def test_the_readme_has_the_table() -> None:
    rows = re.findall(
        r"^\| (\d[\d.]+) \| ([\d.]+) \| ([\d.]+) \| `(\w+)`.*\| `cpu(\S*)`, `cuda(\S*)` \|$",
        (REPOSITORY / "README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert rows == [
        (s.torch_series, s.torchrec, s.fbgemm, s.name, s.suffix, s.suffix) for s in STACKS
    ]


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(requirements, "missing_packages", list)
    monkeypatch.setattr(
        requirements, "_version", lambda name: versions.get(name.replace("-", "_"), "")
    )
    monkeypatch.delenv("DMT_ANY_STACK", raising=False)


@pytest.mark.parametrize("stack", STACKS)
def test_stacks_are_taken(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"torch": f"{stack.torch_series}.7+cu130", "torchrec": stack.torchrec}
    for build in (
        {"fbgemm_gpu_cpu": stack.fbgemm, "fbgemm_gpu": "0+cpu"},
        {"fbgemm_gpu_cpu": stack.fbgemm},
        {"fbgemm_gpu": stack.fbgemm},
    ):
        install(monkeypatch, **both, **build)
        check_requirements()


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm", "tries"),
    [
        (NEW.torch, OLD.torchrec, OLD.fbgemm, f".[cpu{NEW.suffix}]"),
        (OLD.torch, NEW.torchrec, NEW.fbgemm, f".[cpu{OLD.suffix}]"),
        (NEW.torch, NEW.torchrec, OLD.fbgemm, f".[cuda{NEW.suffix}]"),
        ("2.15.0", NEW.torchrec, NEW.fbgemm, f".[cuda{STACKS[-1].suffix}]"),
        ("2.9.1", "1.4.0", "1.4.0", "pip install"),
        (OLD.torch, OLD.torchrec, "", "pip install"),
    ],
)
def test_others_are_refused_with_what_to_install(
    torch: str,
    torchrec: str,
    fbgemm: str,
    tries: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch, torch=torch, torchrec=torchrec, fbgemm_gpu=fbgemm)
    with pytest.raises(ConfigError) as refused:
        check_requirements()
    told = refused.value
    assert (
        f"torch {torch}, torchrec {torchrec} and fbgemm-gpu {fbgemm or '(unknown)'}" in told.found
    )
    assert all(str(stack) in told.expected for stack in STACKS)
    assert tries in told.hint and "DMT_ANY_STACK=1" in told.hint
    monkeypatch.setenv("DMT_ANY_STACK", "1")
    check_requirements()
    assert "not known to go together" in caplog.text


def test_two_builds_of_fbgemm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"fbgemm_gpu_cpu": DEFAULT.fbgemm, "fbgemm_gpu": DEFAULT.fbgemm}
    install(monkeypatch, torch=DEFAULT.torch, torchrec=DEFAULT.torchrec, **both)
    with pytest.raises(ConfigError, match="both builds of fbgemm"):
        check_requirements()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the scripts read, with a Python that only notes what it is to run."""
    for name in ("setup", "test"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts" / "check").write_text("#!/bin/sh\necho check $* >>noted\n")
    (tmp_path / "scripts" / "check").chmod(0o755)
    for name in ("pyproject.toml", "packaging/fbgemm-gpu-cpu/pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "dmt_convert").mkdir()
    shutil.copy(REPOSITORY / "dmt_convert" / "stacks.py", tmp_path / "dmt_convert")
    for folder in (".venv", ".venv-torch214"):
        python = tmp_path / folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            f'#!/bin/sh\ncase $1 in -P) exec {sys.executable} "$@";; esac\n'
            f'echo {folder} "$@" >>noted\n'
        )
        python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (["tests/x", "--fast"], ["check --fast", ".venv -m pytest {} tests/x --fast"]),
        ([], ["check", ".venv -m pytest {}"]),
        (
            ["--stack", "torch214", "tests/x"],
            [
                ".venv-torch214 -m pip install -qq --disable-pip-version-check torch==2.14.1 "
                "./packaging/fbgemm-gpu-cpu --editable .[cpu-torch214,dev]",
                ".venv-torch214 -m pytest {} tests/x",
            ],
        ),
    ],
)
def test_scripts_run_the_tests_in_the_environment_of_a_stack(
    tree: Path, arguments: list[str], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DMT_VENV", raising=False)
    for _ in range(2):  # the second time, the environment is up to date
        (tree / "noted").write_text("")
        subprocess.run(["scripts/test", *arguments], cwd=tree, check=True)
        noted = (tree / "noted").read_text().splitlines()
        assert noted == [line.format("--numprocesses 2 --dist loadgroup") for line in ran]
        ran = [line for line in ran if " pip " not in line]


def test_the_default_environment_is_that_of_the_default_stack(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DMT_VENV", raising=False)
    subprocess.run(["scripts/setup"], cwd=tree, check=True, capture_output=True)
    (noted,) = (tree / "noted").read_text().splitlines()
    assert noted.endswith(
        f"torch=={DEFAULT.torch} ./packaging/fbgemm-gpu-cpu --editable .[cpu,dev]"
    )
    unknown = subprocess.run(
        ["scripts/setup", "torch9"], cwd=tree, check=False, capture_output=True, text=True
    )
    assert unknown.returncode == 2
    assert "there is no stack torch9" in unknown.stderr
    assert "torch213 or torch214" in unknown.stderr
