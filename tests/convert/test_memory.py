"""Memory of a conversion: bounded whatever the number of features, stated beforehand, refused."""

from __future__ import annotations

import json

import pytest

from dmt_convert import free_memory
from dmt_convert.conversion import memory
from support.checkpoints.flat import make_flat
from support.peak_memory import peak_memory
from support.refusals import check_refusal

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(("features", "interaction"), [(26, "dcn"), (140, "dot")])
def test_the_estimate_is_what_a_conversion_takes(tmp_path, call_dmt, interaction, features):
    """All pairs of 140 features at once would take 1.2 GB (of 200, 2.4 GB were measured)."""
    source = make_flat(tmp_path / "ckpt.pt", interaction=interaction, rows=[20] * features)
    options = ("convert", source, "--towers", 4, "--distill-steps", 0)
    run = call_dmt(*options, "--dry-run", "--json")
    expected = sum(json.loads(run.stdout)["memory_bytes"].values())
    peak = peak_memory(*options, "--quiet")
    assert peak < 1024 * MIB
    assert peak / 1.4 < expected < 1.7 * peak


def test_a_dry_run_states_memory_and_what_is_free(tmp_path, call_dmt):
    source = make_flat(tmp_path / "ckpt.pt")
    run = call_dmt("convert", source, "--towers", 2, "--dry-run", "--json")
    value = json.loads(run.stdout)
    assert set(value["memory_bytes"]) >= {"program", "dense part", "sample", "pairs of features"}
    assert value["free_memory_bytes"] > 0 and value["weight_bytes"] > 0
    run = call_dmt("convert", source, "--towers", 2, "--dry-run")
    assert "of memory" not in run.stderr and "that are free" in run.stdout


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_what_does_not_fit_is_refused_with_numbers(tmp_path, call_dmt, monkeypatch, dry_run):
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 * MIB)
    source = make_flat(tmp_path / "ckpt.pt")
    run = call_dmt("convert", source, "--towers", 2, "--json", *dry_run)
    check_refusal(run, "ConfigError", "the conversion needs about 0.")
    assert "0.10 GiB that are free" in run.stderr and "passthrough" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("interaction", ["dot", "dcn", "projection"])
@pytest.mark.parametrize("module", ["auto", "passthrough", "linear"])
def test_written_weights_are_counted(tmp_path, interaction, module):
    import torch

    from dmt_convert.config import ConvertConfig
    from dmt_convert.conversion import describe_flat
    from dmt_convert.model import DmtModel, converted_spec, module_spec

    source = make_flat(tmp_path / "ckpt.pt", interaction=interaction)
    flat = describe_flat(source, ConvertConfig(towers=2))
    chosen = module_spec(flat.spec, module, num_towers=2)
    names = flat.spec.feature_names
    spec = converted_spec(flat.spec, (names[:2], names[2:]), chosen)
    with torch.device("meta"):
        model = DmtModel(spec)
    built = sum(v.nbytes for n, v in model.state_dict().items() if ".tables." not in n)
    assert memory.weight_bytes(flat, spec) == pytest.approx(built, rel=0.02)


def test_free_memory_is_the_machines_or_the_control_groups(tmp_path, monkeypatch):
    meminfo, own, root = tmp_path / "meminfo", tmp_path / "own", tmp_path / "cgroup"
    (root / "job" / "step").mkdir(parents=True)
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:     800 kB\n")
    for name, path in (("_MEMINFO", meminfo), ("_OWN_GROUPS", own), ("_CGROUP", root)):
        monkeypatch.setattr(free_memory, name, path)
    left = free_memory.available_bytes
    assert left() == 800 * 1024
    (root / "memory.max").write_text("500000\n")
    (root / "memory.current").write_text("200000\n")
    assert left() == 300_000
    own.write_text("0::/job/step\n")
    (root / "job" / "memory.max").write_text("250000\n")
    (root / "job" / "memory.current").write_text("200000\n")
    assert left() == 50_000
    (root / "job" / "memory.stat").write_text("anon 1\ninactive_file 30000\n")
    assert left() == 80_000
    (root / "job" / "memory.max").write_text("max\n")
    (root / "memory.max").write_text("max\n")
    assert left() == 800 * 1024
    (root / "memory" / "batch").mkdir(parents=True)
    own.write_text("5:cpu:/other\n4:memory:/batch\n")
    (root / "memory" / "batch" / "memory.limit_in_bytes").write_text("7000\n")
    (root / "memory" / "batch" / "memory.usage_in_bytes").write_text("3000\n")
    assert left() == 4000
    meminfo.unlink()
    assert left() == 4000
    own.unlink()
    assert left() is None
