"""Every family, interaction and container converts, exactly or compressed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dmt_convert as dmt
from dmt_convert.conversion import default_out
from dmt_convert.documents import Quality, QualityRow
from dmt_convert.errors import ConfigError
from dmt_convert.families import ModelConfig
from dmt_convert.scoring import ScoredModel, open_model
from dmt_convert.scoring.verify import verify_models
from support.checkpoints.flat import make_flat

pytestmark = pytest.mark.usefixtures("few_rows")

FAMILIES = [
    ("torchrec", "dot"),
    ("torchrec", "dcn"),
    ("torchrec", "projection"),
    ("facebook", "dot"),
    ("facebook", "self-pairs"),
    ("facebook", "cat"),
]
CONTAINERS = ["ckpt.pt", "ckpt.safetensors", "ckpt"]


def facts_of(interaction: str) -> dict[str, Any] | None:
    """What has to be said of a model: a dot with self-pairs is as wide as one of a feature more."""
    return {"self_pairs": True} if interaction == "self-pairs" else None


def open_flat(source: Path, interaction: str) -> ScoredModel:
    facts = facts_of(interaction)
    return open_model(source, None if facts is None else ModelConfig(**facts))


def convert(source: Path, out: Path, *, towers: int = 2, **options: Any) -> dmt.Bundle:
    return dmt.convert(source, out, towers=towers, **options)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("names", "interaction", "container"),
    [
        pytest.param(*family, name, marks=[] if i % 3 == j else pytest.mark.exhaustive)
        for i, family in enumerate(FAMILIES)
        for j, name in enumerate(CONTAINERS)
    ],
)
def test_every_family_from_every_container(
    tmp_path: Path, names: str, interaction: str, container: str
) -> None:
    source = make_flat(tmp_path / container, names=names, interaction=interaction)
    config = facts_of(interaction)
    exact = convert(source, tmp_path / "exact", tower_module="passthrough", model_config=config)
    assert exact.quality.converted.max_abs_diff == 0
    flat = open_flat(source, interaction)
    report = verify_models(flat, open_model(exact.path), max_rows=200)
    assert report.same
    assert all(check.identical for check in report.checks)
    assert report.checks[-1].stage == "logit"

    compressed = convert(source, tmp_path / "auto", distill_steps=0, dim=4, model_config=config)
    model = compressed.manifest.model
    assert model.kind == ("dcn" if interaction == "dcn" else "dlrm")
    assert model.compression == 2
    row = compressed.quality.converted
    random = compressed.quality.rows[-1]
    assert random.name == "random initialisation"
    assert random.r2 < row.r2 <= 1
    different = verify_models(flat, open_model(compressed.path), max_rows=200)
    assert not different.same


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("towers", [1, 3, 4])
@pytest.mark.parametrize(("names", "interaction"), FAMILIES)
def test_passthrough_is_exact_for_any_number_of_towers(
    tmp_path: Path, names: str, interaction: str, towers: int
) -> None:
    source = make_flat(tmp_path / "ckpt.pt", names=names, interaction=interaction)
    config = facts_of(interaction)
    done = convert(
        source, tmp_path / "out", towers=towers, tower_module="passthrough", model_config=config
    )
    assert len(done.towers) == towers
    flat = open_flat(source, interaction)
    report = verify_models(flat, open_model(done.path), max_rows=300)
    assert all(check.identical for check in report.checks)


SIZES = [
    {"c": 0, "p": 2},
    {"c": 2},
    {"c": 1, "p": 2, "dim": 5},
    {"compression": 4.0},
    {"c": 2, "p": 1, "compression": 1.5},
]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("names", "interaction", "options"),
    [
        pytest.param(
            *family,
            options,
            marks=[] if (i + j) % 2 == 0 else pytest.mark.exhaustive,
            id=f"{'-'.join(family)}-{options}",
        )
        for i, family in enumerate(FAMILIES)
        for j, options in enumerate(SIZES)
    ],
)
def test_sizes_of_tower_modules(
    tmp_path: Path, names: str, interaction: str, options: dict[str, Any]
) -> None:
    source = make_flat(tmp_path / "ckpt.pt", names=names, interaction=interaction)
    options = {**options, "model_config": facts_of(interaction)}
    if interaction == "dcn" and {"c", "p"} & set(options):
        with pytest.raises(ConfigError, match="a dcn tower module with"):
            convert(source, tmp_path / "out", **options)
        return
    done = convert(source, tmp_path / "out", towers=2, **options)
    model = done.manifest.model
    kept = [(t.module.c, t.module.p, t.module.dim) for t in model.towers]
    emitted = sum(
        (c * len(t.features) + p) * d for t, (c, p, d) in zip(model.towers, kept, strict=True)
    )
    if model.kind == "dcn":
        emitted = sum(len(t.features) * d for t, (_, _, d) in zip(model.towers, kept, strict=True))
    if model.rules.exact:  # every element travels as a byte
        assert model.compression == options["compression"] == 4
        return
    assert model.compression == 4 * 8 / emitted
    assert model.compression >= (
        2.0 if set(options) == {"model_config"} else options.get("compression", 0.0)
    )
    if "compression" not in options or {"c", "p"} & set(options):
        asked = options.get("c", 1), options.get("p", 0)
        assert all((c, p) == asked for c, p, _ in kept if model.kind == "dlrm")
    if "dim" in options:
        assert {d for _, _, d in kept} == {options["dim"]}
    elif len({d for _, _, d in kept}) == 1 and kept[0][0]:
        vectors = emitted // kept[0][2]
        assert 4 * 8 / (vectors * (kept[0][2] + 1)) < options.get("compression", 2.0)  # the largest
    assert np.isfinite(done.quality.converted.r2)
    report = verify_models(open_flat(source, interaction), open_model(done.path), max_rows=100)
    assert np.isfinite(report.checks[-1].max_abs_diff)


def test_default_target_lies_beside(tmp_path: Path, call_dmt: Callable[..., Any]) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    assert call_dmt("convert", source, "--towers", 4).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-dmt4", "ckpt.pt"]
    assert sorted(path.name for path in (tmp_path / "ckpt-dmt4").iterdir()) == [
        "dmt.json",
        "partition.svg",
        "plan.json",
        "report.html",
        "weights",
    ]


def test_default_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step.100").mkdir()
    monkeypatch.chdir(tmp_path / "step.100")
    assert default_out(Path("a/ckpt.v2.pt"), 4) == Path("a/ckpt.v2-dmt4")
    assert default_out(tmp_path / "step.100", 8) == tmp_path / "step.100-dmt8"
    assert default_out(Path(), 8) == tmp_path / "step.100-dmt8"
    for inside in (".metadata", "__0_0.distcp"):
        assert default_out(tmp_path / "step.100" / inside, 8) == tmp_path / "step.100-dmt8"
    assert default_out(Path("m.pt"), None) == Path("m-dmt")


@pytest.mark.slow
def test_same_seed_same_bundle(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    files = []
    for name in ("a", "b"):
        convert(source, tmp_path / name, seed=3)
        weights = sorted((tmp_path / name / "weights").iterdir())
        files.append([path.read_bytes() for path in weights])
        value = json.loads((tmp_path / name / "dmt.json").read_text("utf-8"))
        files[-1].append(json.dumps(value).encode())
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_partition_file_decides(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    (tmp_path / "t.json").write_text('{"towers": [["cat_3"], ["cat_1", "cat_0", "cat_2"]]}')
    bundle = dmt.convert(source, tmp_path / "out", partition=tmp_path / "t.json")
    towers = {frozenset(tower.features) for tower in bundle.manifest.model.towers}
    assert towers == {frozenset({"cat_3"}), frozenset({"cat_0", "cat_1", "cat_2"})}


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_recoded_tables_are_rounded_as_torch_rounds(
    tmp_path: Path, dtype: str, container: str
) -> None:
    source = make_flat(tmp_path / container)
    flat = torch.load(make_flat(tmp_path / "same.pt"), weights_only=True)
    done = convert(source, tmp_path / "out", tower_module="passthrough", dtype=dtype)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    found = {}
    for t in range(2):
        found |= load_file(tmp_path / "out" / "weights" / f"tower_00{t}.safetensors")
    assert len(found) == 4
    for i in range(4):
        table = flat[f"sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight"]
        ours = found[f"tables.t_cat_{i}.weight"]
        assert ours.dtype == wanted
        assert torch.equal(ours, table.to(wanted))
    # what is reported is the model that was written, not the one before rounding
    assert done.quality.converted.max_abs_diff > 0
    probe = verify_models(open_model(source), open_model(tmp_path / "out"), max_rows=500)
    logit = probe.checks[-1]
    assert logit.max_abs_diff > 0
    assert 0.1 < done.quality.converted.max_abs_diff / logit.max_abs_diff < 10
    shutil.rmtree(tmp_path / "out")


def test_a_model_with_constant_logits_has_a_report(
    tmp_path: Path, call_dmt: Callable[..., Any]
) -> None:
    """R^2 is not defined there: JSON has no -Infinity."""

    def edit(state: dict[str, Any]) -> None:
        for i in range(4):
            state[f"sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight"].zero_()
        state["dense_arch.model._mlp.1._linear.weight"].zero_()

    source = make_flat(tmp_path / "ckpt.pt", edit=edit)
    run = call_dmt("convert", source, "--towers", 2, "--dim", 2, "--json")
    assert run.code == 0, run.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = json.loads(run.stdout, parse_constant=refuse)
    assert value["quality"]["rows"][-1]["name"] == "random initialisation"
    manifest = (tmp_path / "ckpt-dmt2" / "dmt.json").read_text("utf-8")
    assert json.loads(manifest, parse_constant=refuse)["quality"]["rows"][0]["r2"] == 1


def test_what_is_not_finite_is_null_in_json() -> None:
    row = QualityRow(name="x", r2=float("-inf"), max_abs_diff=0.5, rank_correlation=float("nan"))
    value = Quality(rows=(row,), data="d", count=1, labelled=False).to_json()
    assert json.loads(json.dumps(value, allow_nan=False))["rows"][0] == {
        "name": "x",
        "r2": None,
        "max_abs_diff": 0.5,
        "rank_correlation": None,
        "auc": None,
        "log_loss": None,
        "ne": None,
    }
