"""Widths of converted models, the choice of modules, JSON, and every refusal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.errors import BundleError, ConfigError, PartitionError
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec, module_spec
from support.models import split_towers
from support.specs import build_spec

DLRM = TowerModuleSpec(kind="dlrm", c=1, p=0, dim=4)
DCN = TowerModuleSpec(kind="dcn", dim=4, cross_layers=1, cross_rank=2)


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize(
    ("c", "p", "towers", "vectors"), [(1, 0, 2, 5), (2, 1, 2, 12), (0, 3, 2, 6), (1, 2, 5, 15)]
)
def test_dot_pairs_all_vectors_and_the_dense_one(self_pairs, c, p, towers, vectors):
    module = TowerModuleSpec(kind="dlrm", c=c, p=p, dim=3)
    spec = split_towers(build_spec(kind="dot", self_pairs=self_pairs), towers, module)
    count = vectors + 1
    pairs = sum(1 for i in range(count) for j in range(i + 1) if self_pairs or i != j)
    assert spec.dense_dim == 3
    assert spec.interaction_dims == (3,) * count
    # the dense vector is passed on whole, and paired in its projection
    assert spec.over_arch.widths == (8 + pairs, 12, 1)
    assert sum(spec.tower_widths) == vectors * 3
    assert spec.compression == pytest.approx(40 / (vectors * 3))
    assert spec.tower_widths[0] == (c * len(spec.towers[0].features) + p) * 3


@pytest.mark.parametrize("kind", ["cat", "dcn"])
def test_mixed_dims_side_by_side(kind):
    module = DLRM if kind == "cat" else DCN
    spec = split_towers(build_spec(kind=kind, dims=(3, 5, 8, 2), dense_dim=6), 2, module)
    assert spec.tower_dims(0) == (3, 8) and spec.tower_dims(1) == (5, 2)
    assert spec.tower_widths == (8, 8)
    assert spec.interaction_dims == (6, 4, 4, 4, 4)
    assert spec.over_arch.widths == (22, 12, 1)
    assert spec.compression == pytest.approx(18 / 16)


def test_projection_changes_its_branches_and_not_over_arch():
    flat = build_spec(kind="projection")
    spec = split_towers(flat, 2, DLRM)
    assert spec.interaction.branch1.widths == (8 + 20, 7, 16)
    assert spec.interaction.branch2.widths == (8 + 20, 6, 24)
    assert spec.over_arch == flat.over_arch


@pytest.mark.parametrize("kind", ["dot", "cat", "dcn", "projection"])
def test_passthrough_changes_no_width(kind):
    flat = build_spec(kind=kind)
    spec = split_towers(flat, 2, TowerModuleSpec(kind="passthrough"))
    assert spec.is_passthrough and spec.compression == 1
    assert spec.tower_widths == (24, 16)
    assert (spec.interaction, spec.over_arch) == (flat.interaction, flat.over_arch)
    assert spec.interaction_dims == flat.input_dims


@given(
    kind=st.sampled_from(["dot", "cat", "projection"]),
    towers=st.integers(1, 5),
    c=st.integers(0, 3),
    p=st.integers(1, 3),
    dim=st.integers(1, 9),
)
def test_json_gives_the_same_spec(kind, towers, c, p, dim):
    spec = split_towers(
        build_spec(kind=kind), towers, TowerModuleSpec(kind="dlrm", c=c, p=p, dim=dim)
    )
    assert DmtSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_of_dcn_and_passthrough():
    for module in (DCN, TowerModuleSpec(kind="passthrough")):
        spec = split_towers(build_spec(kind="dcn", dims=(3, 4), dense_dim=8), 2, module)
        assert DmtSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("towers"),
        lambda v: v["towers"][0].pop("module"),
        lambda v: v["towers"][0]["module"].update(size=1),
        lambda v: v["flat"].update(tables=None),
        lambda v: v["flat"].update(features=["f0"]),
        lambda v: v["towers"].__setitem__(0, "tower"),
    ],
)
def test_damaged_json_is_refused(damage):
    value = json.loads(json.dumps(split_towers(build_spec(kind="dot"), 2, DLRM).to_json()))
    damage(value)
    with pytest.raises(BundleError, match="damaged"):
        DmtSpec.from_json(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "dlrm", "c": 0, "p": 0, "dim": 4},
        {"kind": "dlrm", "c": -1, "p": 3, "dim": 4},
        {"kind": "dlrm", "c": 1, "p": -1, "dim": 4},
        {"kind": "dlrm", "c": 1, "p": 0, "dim": 0},
        {"kind": "dcn", "dim": 0},
        {"kind": "mlp"},
    ],
)
def test_impossible_modules_are_refused(fields):
    with pytest.raises(ConfigError, match="tower module"):
        TowerModuleSpec(**fields)


def test_towers_must_agree():
    flat = build_spec(kind="dot")
    halves = flat.feature_names[:2], flat.feature_names[2:]
    others = (
        TowerModuleSpec(kind="dlrm", c=2, dim=2),
        TowerModuleSpec(kind="dlrm", c=1, p=1, dim=2),
        TowerModuleSpec(kind="passthrough"),
    )
    for other in others:
        towers = tuple(
            TowerSpec(features=f, module=m) for f, m in zip(halves, (DLRM, other), strict=True)
        )
        with pytest.raises(ConfigError, match="towers with modules"):
            DmtSpec(flat=flat, towers=towers)
    with pytest.raises(PartitionError, match="do not hold"):
        DmtSpec(flat=flat, towers=(TowerSpec(features=("f0", "new"), module=DLRM),))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dot", TowerModuleSpec(kind="dlrm", c=1, p=0, dim=4)),
        ("cat", TowerModuleSpec(kind="dlrm", c=1, p=0, dim=4)),
        ("projection", TowerModuleSpec(kind="dlrm", c=1, p=0, dim=4)),
        ("dcn", TowerModuleSpec(kind="dcn", dim=4, cross_layers=1, cross_rank=5)),
    ],
)
def test_auto_is_the_architectures_own_at_compression_two(kind, expected):
    flat = build_spec(kind=kind)
    module = module_spec(flat, "auto", num_towers=2)
    assert module == expected
    assert split_towers(flat, 2, module).compression == 2


@given(
    towers=st.integers(1, 5),
    c=st.integers(0, 2),
    p=st.integers(0, 3),
    compression=st.floats(1, 12),
)
def test_compression_is_reached_with_the_largest_dim(towers, c, p, compression):
    flat = build_spec(kind="dot")
    options = {"num_towers": towers, "c": c, "p": p, "compression": compression}
    vectors = c * 5 + p * towers
    if vectors == 0 or 40 / (vectors * compression) < 1 - 1e-9:
        with pytest.raises(ConfigError):
            module_spec(flat, "auto", **options)
        return
    module = module_spec(flat, "auto", **options)
    assert split_towers(flat, towers, module).compression >= compression - 1e-6
    assert 40 / (vectors * (module.dim + 1)) < compression


def test_a_given_dim_is_taken():
    module = module_spec(build_spec(kind="dot"), "dlrm", num_towers=2, c=2, p=1, dim=3)
    assert module == TowerModuleSpec(kind="dlrm", c=2, p=1, dim=3)


@pytest.mark.parametrize(
    ("flat", "kind", "options", "match"),
    [
        ("dot", "passthrough", {"dim": 4}, "passthrough with"),
        ("dot", "passthrough", {"compression": 2.0}, "passthrough with"),
        ("dot", "dcn", {}, "dot interaction"),
        ("dcn", "dlrm", {}, "dcn interaction"),
        ("dcn", "auto", {"c": 2}, "c=2"),
        ("dcn", "auto", {"p": 1}, "p=1"),
        ("dot", "auto", {"dim": 4, "compression": 2.0}, "together"),
        ("dot", "auto", {"compression": 0.5}, "--compression 0.5"),
        ("dot", "auto", {"compression": 9.0}, "--compression 9"),
        ("dot", "auto", {"compression": float("nan")}, "--compression nan"),
        ("dot", "auto", {"compression": float("inf")}, "--compression inf"),
        ("dot", "auto", {"c": 0, "p": 0, "dim": 4}, "c=0, p=0"),
        ("dot", "auto", {"dim": 0}, "D=0"),
        ("dot", "auto", {"c": -1}, "c"),
    ],
)
def test_contradicting_options_are_refused(flat, kind, options, match):
    with pytest.raises(ConfigError, match=match):
        module_spec(build_spec(kind=flat), kind, num_towers=2, **options)


@pytest.mark.parametrize("kind", ["dot", "cat", "dcn", "projection"])
def test_auto_cannot_halve_a_dim_of_one(kind):
    flat = build_spec(kind=kind, dims=(1, 1, 1), dense_dim=1)
    assert module_spec(flat, "auto", num_towers=2).dim == 1
    with pytest.raises(ConfigError, match="--compression 2"):
        module_spec(flat, "auto", num_towers=2, compression=2)
