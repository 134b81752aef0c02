"""Families of other installed packages: found by entry points, refused with the package's name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmt_convert.errors import ConfigError
from dmt_convert.families import FAMILIES, infer_model, list_families
from support.checkpoints.shapes import make_checkpoint

FAMILY = """
from dmt_convert.families import DlrmFamily, NameMap

ACME = DlrmFamily(
    name="{name}",
    trainer="Acme",
    anchor=r"(?P<prefix>.*?)acme\\.(?P<table>[^.]+)\\.weight",
    names=NameMap(
        {{
            "acme.{{}}.weight": "tables.{{}}.weight",
            "bottom.{{}}.weight": "dense_arch.{{}}.weight",
            "bottom.{{}}.bias": "dense_arch.{{}}.bias",
            "top.{{}}.weight": "over_arch.{{}}.weight",
            "top.{{}}.bias": "over_arch.{{}}.bias",
        }}
    ),
)
NUMBER = 3
"""
SHAPES = {
    "acme.user.weight": (5, 4),
    "acme.item.weight": (7, 4),
    "bottom.0.weight": (4, 3),
    "bottom.0.bias": (4,),
    "top.0.weight": (1, 7),
    "top.0.bias": (1,),
}
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package with one module and one entry point."""

    def make(package: str, code: str, point: str) -> None:
        site = tmp_path / f"site-{package}"
        info = site / f"{package}-2.1.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}_module.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.1\n")
        (info / "entry_points.txt").write_text(f"[dmt_convert.families]\nmine = {point}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"{package}_module", raising=False)

    return make


def test_a_family_of_another_package_is_known(install):
    install("acme", FAMILY.format(name="acme-dlrm"), "acme_module:ACME")
    assert [family.name for family in list_families()] == [f.name for f in FAMILIES] + ["acme-dlrm"]
    info = infer_model(make_checkpoint(("", SHAPES)))
    assert info.spec.family == "acme-dlrm" and info.spec.feature_names == ("user", "item")


def test_without_plugins_the_tuple_is_all():
    assert list_families() == FAMILIES


@pytest.mark.slow
def test_its_checkpoints_convert(install, tmp_path, call_dmt):
    install("acme", FAMILY.format(name="acme-dlrm"), "acme_module:ACME")
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save({name: torch.randn(shape) for name, shape in SHAPES.items()}, path)
    run = call_dmt("inspect", path, "--json")
    assert run.code == 0, run.stderr
    assert json.loads(run.stdout)["spec"]["family"] == "acme-dlrm"
    run = call_dmt("convert", path, "--towers", 2, "--tower-module", "passthrough", "--quiet")
    assert run.code == 0, run.stderr
    assert (tmp_path / "model-dmt2" / "dmt.json").is_file()


@pytest.mark.parametrize(
    ("code", "point", "says"),
    [
        ("1 / 0", "acme_module:ACME", "ZeroDivisionError"),
        ("", "acme_module:ACME", "AttributeError"),
        ("", "no_such_module:ACME", "ModuleNotFoundError"),
        (FAMILY.format(name="acme-dlrm"), "acme_module:NUMBER", "an object of type int"),
        (FAMILY.format(name="acme-dlrm"), "acme_module:DlrmFamily", "an object of type ABCMeta"),
        (FAMILY.format(name="torchrec-dlrm"), "acme_module:ACME", "which dmt-convert has already"),
    ],
)
def test_a_broken_plugin_is_refused_by_its_package(code, point, says, install):
    install("acme", code, point)
    with pytest.raises(ConfigError, match=r"the plugin 'mine' of acme 2\.1") as caught:
        infer_model(make_checkpoint(("", SHAPES)))
    assert says in caught.value.found and "uninstall acme" in caught.value.hint


def test_two_plugins_cannot_have_one_name(install):
    for package in ("first", "second"):
        install(package, FAMILY.format(name="acme-dlrm"), f"{package}_module:ACME")
    with pytest.raises(ConfigError, match=r"'acme-dlrm', which (first|second) 2\.1 has already"):
        list_families()
