"""FLOPs and parameters that are counted are those of the modules that run."""

from __future__ import annotations

import pytest

from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec
from dmt_convert.placement.predict.model_work import count_work
from dmt_convert.placement.predict.step_load import as_flat, as_passthrough
from dmt_convert.placement.predict.suggestion import dealt_model
from dmt_convert.spec import ModelSpec
from support.specs import mlperf_spec

torch = pytest.importorskip("torch")

KINDS = ["dot", "cat", "dcn", "projection"]


def build(model: DmtSpec) -> torch.nn.Module:
    from dmt_convert.model import DmtModel, MappedTables

    with torch.device("meta"):
        return DmtModel(model, [MappedTables(model.flat, {}) for _ in model.towers])


def compressed(flat: ModelSpec, ratio: float = 4) -> DmtSpec:
    model = dealt_model(flat, 3, ratio)
    assert model is not None
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bare", [False, True])
def test_parameters_are_those_of_the_model(kind: str, bare: bool) -> None:
    model = compressed(mlperf_spec(7, 16, kind=kind))
    model = as_passthrough(model) if bare else model
    built = build(model)
    counted = count_work(model)
    parts = {"towers": 0, "rest": 0}
    for name, value in built.named_parameters():
        parts["towers" if "tower_module" in name else "rest"] += value.numel()
    assert sum(tower.parameters for tower in counted.towers) == parts["towers"]
    assert counted.dense_arch.parameters + counted.over.parameters == parts["rest"]


def test_a_module_of_both_maps_is_counted() -> None:
    """c vectors per feature and p per tower."""
    module = TowerModuleSpec(kind="dlrm", c=2, p=3, dim=4)
    flat = mlperf_spec(5, 16)
    names = flat.feature_names
    model = DmtSpec(
        flat=flat,
        towers=tuple(TowerSpec(features=part, module=module) for part in (names[:3], names[3:])),
    )
    built = build(model)
    towers = [p.numel() for n, p in built.named_parameters() if "tower_module" in n]
    assert sum(work.parameters for work in count_work(model).towers) == sum(towers)
    assert [work.flops for work in count_work(model).towers] == [
        2 * 3 * 16 * 2 * 4 + 2 * 3 * 16 * 3 * 4,
        2 * 2 * 16 * 2 * 4 + 2 * 2 * 16 * 3 * 4,
    ]


def test_an_mlp_is_two_flops_per_weight() -> None:
    flat = mlperf_spec(4, 8, kind="cat")
    work = count_work(as_flat(flat))
    assert work.dense_arch.flops == 2 * (13 * 512 + 512 * 256 + 256 * 8)
    assert work.over.flops == 2 * (5 * 8 * 1024 + 1024 * 1024 + 1024 * 512 + 512 * 256 + 256)


def test_interactions_are_counted() -> None:
    base = count_work(as_flat(mlperf_spec(4, 8, kind="cat"))).over
    dcn = count_work(as_flat(mlperf_spec(4, 8, kind="dcn"))).over
    assert dcn.flops - base.flops == 3 * 4 * 40 * 64
    dot = mlperf_spec(4, 8)
    mlp = 2 * (18 * 1024 + 1024 * 1024 + 1024 * 512 + 512 * 256 + 256)
    assert count_work(as_flat(dot)).over.flops == mlp + 2 * 5 * 5 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_towers_without_compression_cost_what_the_flat_model_does(kind: str) -> None:
    flat = mlperf_spec(6, 16, kind=kind)
    assert count_work(as_passthrough(compressed(flat))).over == count_work(as_flat(flat)).over
