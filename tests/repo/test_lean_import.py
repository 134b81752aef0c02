"""What a command does not need is not imported."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchrec", "fbgemm_gpu", "matplotlib", "pyarrow", "onnx")


def imported_by(module: str) -> set[str]:
    """Heavy modules that a fresh interpreter holds after importing this one."""
    code = f"import sys, {module}; print(*(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "dmt_convert",
        "dmt_convert.spec",
        "dmt_convert.training",
        "dmt_convert.placement",
        "dmt_convert.cluster.launcher",
        "dmt_convert.cli.main",
        "dmt_convert.recipes",
        "dmt_convert.recipes.finetune_dmt",
    ],
)
def test_import_is_lean(module: str) -> None:
    assert imported_by(module) == set()


def test_a_heavy_import_is_noticed() -> None:
    assert imported_by("matplotlib") == {"matplotlib"}
