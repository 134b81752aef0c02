"""What rounding on the way between hosts does, and what it saves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmt_convert.errors import ConfigError
from dmt_convert.model import (
    Code,
    DmtModel,
    DmtSpec,
    TowerCode,
    TowerModuleSpec,
    TowerSpec,
    build_tower_module,
    converted_spec,
)
from support.models import split_towers
from support.specs import click_spec


def make_code(spec: TowerCode, values: torch.Tensor) -> Code:
    """A code whose ranges are those of some values."""
    code = Code(spec, values.shape[1])
    if spec.precision != "int8":
        return code
    highest = torch.full((values.shape[1],), 254.0)
    highest[values.shape[1] - spec.int4 :] = 15.0
    code.low.copy_(values.amin(dim=0))
    code.step.copy_((values.amax(dim=0) - values.amin(dim=0)) / highest)
    return code


def test_bytes_are_those_of_the_elements() -> None:
    assert TowerCode(precision="fp32").nbytes(10) == 40
    assert TowerCode(precision="bf16").nbytes(10) == 20
    assert TowerCode(precision="int8").nbytes(10) == 10
    assert TowerCode(precision="int8", int4=6).nbytes(10) == 4 + 3
    assert TowerCode(precision="int8", int4=5).nbytes(10) == 5 + 3  # half a byte stays empty


@pytest.mark.parametrize("spec", [{"precision": "int8", "int4": -1}, {"precision": "fp64"}])
def test_impossible_codes_are_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="code of precision"):
        TowerCode(**spec)  # type: ignore[arg-type]


def test_4_bits_beside_floats_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 bits"):
        TowerCode(precision="bf16", int4=2)


def test_int8_rounds_to_the_nearest_level_and_clips() -> None:
    torch.manual_seed(0)
    values = torch.randn(256, 6)
    code = make_code(TowerCode(precision="int8", int4=2), values)
    arrived = code(values)
    # half a level, and the rounding of float32 where it is computed
    assert ((arrived - values).abs() <= 0.5 * code.step * (1 + 1e-4)).all()
    assert len(torch.unique(arrived[:, 5])) <= 16 < len(torch.unique(arrived[:, 0]))
    torch.testing.assert_close(code(values + 100)[0], values.amax(dim=0))
    torch.testing.assert_close(code(values - 100)[0], values.amin(dim=0))


@pytest.mark.parametrize(("width", "int4"), [(6, 0), (6, 6), (7, 5), (7, 1), (5, 4)])
def test_what_is_packed_arrives_as_it_is_rounded(width: int, int4: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(64, width)
    spec = TowerCode(precision="int8", int4=int4)
    code = make_code(spec, values)
    packed = code.pack(2 * values)  # beyond both ends of the range, too
    assert packed.dtype == torch.uint8 and packed.shape == (64, spec.nbytes(width))
    assert torch.equal(code.unpack(packed), code.round(2 * values))
    packed[3, -1] ^= 1
    assert not torch.equal(code.unpack(packed), code.round(2 * values))


def test_nan_stays_nan() -> None:
    code = make_code(TowerCode(precision="int8"), torch.randn(16, 3))
    assert code(torch.tensor([[0.0, torch.nan, 0.0]])).isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_behind_the_bytes(bad: float) -> None:
    code = make_code(TowerCode(precision="int8", int4=2), torch.randn(16, 4))
    emitted = torch.randn(3, 4)
    emitted[1, 0] = bad
    arrived = code.unpack(code.pack(emitted))
    assert arrived.isnan().tolist() == [[False] * 4, [True, False, False, False], [False] * 4]
    assert torch.equal(arrived.isnan(), code(emitted).isnan())
    assert torch.equal(arrived[0], code(emitted)[0])


def test_a_tower_of_4_bits_alone_is_refused() -> None:
    code = TowerCode(precision="int8", int4=3)
    with pytest.raises(ConfigError, match="4 bits in a tower"):
        split_towers(click_spec(), 2, TowerModuleSpec(kind="linear", dim=3, code=code))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_gradient_passes_unchanged_and_the_value_is_the_same(precision: str) -> None:
    values = torch.randn(8, 4)
    code = make_code(TowerCode(precision=precision), values)  # type: ignore[arg-type]
    leaf = values.clone().requires_grad_()
    arrived = code(leaf)
    (arrived * torch.arange(4.0)).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.arange(4.0).expand(8, 4))
    with torch.no_grad():
        assert torch.equal(arrived, code(values))
    assert not torch.equal(arrived, values)


@pytest.mark.parametrize("kind", ["passthrough", "dlrm", "dcn", "linear"])
def test_every_module_takes_a_code(kind: str) -> None:
    spec = TowerModuleSpec(kind=kind, c=int(kind == "dlrm"), dim=3, cross_layers=1, cross_rank=2)
    torch.manual_seed(0)
    plain = build_tower_module(spec, (4, 4))
    coded = build_tower_module(replace(spec, code=TowerCode(precision="bf16")), (4, 4))
    coded.load_state_dict(plain.state_dict())
    pooled = torch.randn(5, 8)
    assert torch.equal(coded(pooled), plain(pooled).bfloat16().float())


def coded_spec() -> DmtSpec:
    """Two linear towers, the second one in int8."""
    spec = click_spec()
    towers = split_towers(spec, 2, TowerModuleSpec(kind="linear", dim=3)).towers
    code = TowerCode(precision="int8", int4=2)
    module = replace(towers[1].module, code=code)
    return DmtSpec(flat=spec, towers=(towers[0], replace(towers[1], module=module)))


def test_compression_counts_bytes() -> None:
    spec = coded_spec()
    assert spec.tower_bytes == (12, 2)
    assert spec.compression == 4 * sum(spec.flat.feature_dims) / 14
    assert DmtSpec.from_json(spec.to_json()) == spec
    assert "code" not in str(spec.to_json()["towers"][0])


def test_a_passthrough_that_rounds_is_not_exact() -> None:
    spec = split_towers(click_spec(), 2, TowerModuleSpec(kind="passthrough"))
    assert spec.is_passthrough
    module = TowerModuleSpec(kind="passthrough", code=TowerCode(precision="bf16"))
    rounded = split_towers(click_spec(), 2, module)
    assert not rounded.is_passthrough and rounded.keeps_network


def everywhere(spec: DmtSpec) -> DmtSpec:
    """Put the first tower on every rank."""
    module = TowerModuleSpec(kind="passthrough")
    first = TowerSpec(features=spec.towers[0].features, module=module, everywhere=True)
    return replace(spec, towers=(first, *spec.towers[1:]))


def test_what_is_everywhere_sends_nothing_and_is_exact() -> None:
    spec = everywhere(split_towers(click_spec(), 2, TowerModuleSpec(kind="linear", dim=2)))
    assert spec.kind == "linear" and spec.tower_bytes == (0, 8)
    assert DmtSpec.from_json(spec.to_json()) == spec
    model = DmtModel(spec).eval()
    exact = DmtModel(everywhere(split_towers(click_spec(), 2, TowerModuleSpec(kind="passthrough"))))
    flat = DmtModel(split_towers(click_spec(), 2, TowerModuleSpec(kind="passthrough")))
    exact.load_state_dict(flat.state_dict())
    model.load_state_dict(flat.state_dict(), strict=False)
    sample = build_sample_of(flat)
    with torch.no_grad():
        expected = flat.forward_pooled(*sample)
        assert torch.equal(exact.forward_pooled(*sample), expected)
        # a linear tower that emits 2 of many elements cannot be exact: the check can fail
        assert not torch.allclose(model.forward_pooled(*sample), expected)
        changed = sample[1].clone()
        changed[:, list(spec.columns_by_tower[0])] += 1.0
        assert not torch.allclose(
            model.forward_pooled(sample[0], changed), model.forward_pooled(*sample)
        )


def build_sample_of(model: DmtModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense inputs and pooled embeddings at random."""
    flat = model.spec.flat
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((8, flat.num_dense)).astype(np.float32)
    pooled = rng.standard_normal((8, sum(flat.feature_dims))).astype(np.float32)
    return torch.from_numpy(dense), torch.from_numpy(pooled)


@pytest.mark.parametrize("kind", ["dlrm", "linear"])
def test_impossible_towers_everywhere_are_refused(kind: str) -> None:
    module = TowerModuleSpec(kind=kind, c=int(kind == "dlrm"), dim=2)
    spec = split_towers(click_spec(), 2, module)
    local = everywhere if kind == "dlrm" else compressed_everywhere
    with pytest.raises(ConfigError, match="on every rank"):
        local(spec)


def compressed_everywhere(spec: DmtSpec) -> DmtSpec:
    """Put the first tower on every rank, its module as it is."""
    return replace(spec, towers=(replace(spec.towers[0], everywhere=True), *spec.towers[1:]))


def test_features_on_every_rank_are_the_last_tower() -> None:
    flat = click_spec()
    names = flat.feature_names
    module = TowerModuleSpec(kind="linear", dim=2)
    spec = converted_spec(flat, [names[2:3], names[3:]], module, everywhere=[names[:2]])
    assert [tower.everywhere for tower in spec.towers] == [False, False, True]
    assert spec.towers[2].features == names[:2] and spec.towers[2].module.kind == "passthrough"
    assert not any(t.everywhere for t in converted_spec(flat, [names], module).towers)
