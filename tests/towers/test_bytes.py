"""Bytes are spent exactly, and where they save most."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmt_convert.config import ConvertConfig
from dmt_convert.conversion.initialisation import allot_dims, initialise, trace_flat
from dmt_convert.conversion.initialisation.restored import allot_bits
from dmt_convert.conversion.module_choice import choose_modules, how_to_choose
from dmt_convert.conversion.start import Choice, Starter
from dmt_convert.model import TowerCode, TowerModuleSpec, converted_spec
from support.models import build_flat, build_sample, split_towers
from support.specs import build_spec, click_spec

_LEFT = {0: 1.0, 4: 1.2e-2, 8: 1e-4}


def lost(curves, dims, half):
    """What is lost if every tower's first elements take 8 bits, and the next ones 4."""
    total = 0.0
    for curve, dim, int4 in zip(curves, dims, half, strict=True):
        bits = [8] * (dim - int4) + [4] * int4 + [0] * (len(curve) - dim)
        total += sum(value * _LEFT[each] for value, each in zip(curve, bits, strict=True))
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [2, 3, 5, 8])
def test_no_other_choice_of_bits_loses_less(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    curves = [np.sort(rng.exponential(size=4) ** 3)[::-1] for _ in range(2)]
    dims, half = allot_bits(curves, budget)
    code = TowerCode(precision="int8")
    sent = sum(replace(code, int4=b).nbytes(a) for a, b in zip(dims, half, strict=True))
    assert sent <= budget
    best = min(
        lost(curves, dims, half)
        for dims in itertools.product(range(1, 5), repeat=2)
        for half in itertools.product(range(5), repeat=2)
        if all(b < a for a, b in zip(dims, half, strict=True))
        and sum(replace(code, int4=b).nbytes(a) for a, b in zip(dims, half, strict=True)) <= budget
    )
    # the greedy choice is the best one but for half a byte per tower that may stay empty
    assert lost(curves, dims, half) <= best * 1.02 + 1e-12


def test_what_saves_nothing_takes_no_bits() -> None:
    curves = [np.array([4.0, 1.0, 0.0]), np.array([]), np.array([2.0, 0.0, 0.0])]
    assert allot_bits(curves, 100) == ([2, 0, 1], [0, 0, 0])


@pytest.mark.parametrize("compression", [3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("kind", ["dot", "dcn", "cat", "projection"])
def test_the_budget_is_met_exactly(kind: str, compression: float) -> None:
    flat = build_flat(build_spec(kind=kind, dims=(8,) * 5, rows=40))
    sample = build_sample(flat, 200)
    config = ConvertConfig(towers=3, compression=compression)
    modules = choose_modules(SimpleNamespace(spec=flat.spec), config, 3)  # type: ignore[arg-type]
    towers = [flat.spec.feature_names[t::3] for t in range(3)]
    specs = [converted_spec(flat.spec, towers, module) for module in modules[:1]]
    choice = how_to_choose(config, [modules[0]])
    model, _ = Starter(flat, *sample.split(0.25)).solve(specs, choice)
    budget = int(4 * 40 / compression)
    if modules[0].kind == "passthrough":
        assert sum(model.spec.tower_bytes) == 40
    else:
        assert budget - 1 <= sum(model.spec.tower_bytes) <= budget
    assert model.spec.compression >= compression


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "mixed"])
def test_every_precision_keeps_the_budget_of_bytes(precision: str) -> None:
    flat = build_flat(build_spec(kind="dot", dims=(8,) * 4, rows=40))
    sample = build_sample(flat, 200)
    config = ConvertConfig(towers=2, compression=6, precision=precision, tower_module="linear")
    (module,) = choose_modules(SimpleNamespace(spec=flat.spec), config, 2)  # type: ignore[arg-type]
    spec = converted_spec(flat.spec, [flat.spec.feature_names[t::2] for t in range(2)], module)
    model, _ = Starter(flat, *sample.split(0.25)).solve([spec], how_to_choose(config, [module]))
    used, size = sum(model.spec.tower_bytes), {"fp32": 4, "bf16": 2}.get(precision, 1)
    assert 21 - size < used <= 21  # 128 bytes / 6
    halves = [t.module.code.int4 for t in model.spec.towers if t.module.code is not None]
    assert bool(sum(halves)) == (precision == "mixed")


@torch.no_grad()
def test_rounding_is_part_of_what_is_measured() -> None:
    """The same maps agree less if their elements have fewer bits: the quantiser is seen."""
    flat = build_flat(build_spec(kind="dot", dims=(8,) * 4, rows=40))
    sample = build_sample(flat, 400)
    target = flat.forward_pooled(
        torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
    )

    def error(int4: int | None) -> float:
        code = None if int4 is None else TowerCode(precision="int8", int4=int4)
        spec = split_towers(flat.spec, 2, TowerModuleSpec(kind="linear", dim=12, code=code))
        model, _ = initialise(flat, spec, sample, method="closed-form")
        dense, pooled = torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
        return float((model.forward_pooled(dense, pooled) - target).square().mean())

    whole, int8, half = error(None), error(0), error(11)
    assert whole < int8 < half
    assert int8 < whole + 0.01 * half


def test_ranges_hold_what_the_sample_holds() -> None:
    flat = build_flat(build_spec(kind="dot", dims=(8,) * 4, rows=40))
    sample = build_sample(flat, 300)
    module = TowerModuleSpec(kind="passthrough", code=TowerCode(precision="int8"))
    spec = split_towers(flat.spec, 2, module)
    model, _ = initialise(flat, spec, sample, method="exact")
    for tower, columns in zip(model.tower_list, spec.columns_by_tower, strict=True):
        code = tower.tower_module.code
        emitted = torch.from_numpy(sample.pooled[:, list(columns)])
        levels = code.levels(emitted)
        assert levels.min() > 0 and levels.max() < 254  # nothing is clipped
        assert (levels.amax(dim=0) - levels.amin(dim=0) > 220).all()  # nothing is wasted


def test_allotment_without_mixing_gives_8_bits_to_all() -> None:
    flat = build_flat(build_spec(kind="dot", dims=(8,) * 4, rows=40))
    code = TowerCode(precision="int8")
    spec = split_towers(flat.spec, 2, TowerModuleSpec(kind="linear", dim=6, code=code))
    trace = trace_flat(flat, build_sample(flat, 300))
    assert sum(allot_dims(trace, spec, 11, mix=False).tower_widths) == 11
    mixed = allot_dims(trace, spec, 11)
    assert sum(mixed.tower_bytes) == 11 < sum(mixed.tower_widths)


def test_compute_is_preferred_if_asked() -> None:
    flat = build_flat(build_spec(kind="dcn", dims=(8,) * 4, rows=40))
    starter = Starter(flat, *build_sample(flat, 400).split(0.25))
    towers = [flat.spec.feature_names[t::2] for t in range(2)]
    taken = {}
    for prefer in ("bytes", "compute"):
        config = ConvertConfig(towers=2, compression=4, prefer=prefer)
        modules = choose_modules(SimpleNamespace(spec=flat.spec), config, 2)  # type: ignore[arg-type]
        specs = [converted_spec(flat.spec, towers, module) for module in modules]
        model, notes = starter.solve(specs, how_to_choose(config, modules))
        taken[prefer] = model.spec.kind
        assert "passthrough" in notes[0] and "dcn" in notes[0] and "MFLOP" in notes[0]
    assert taken == {"bytes": "passthrough", "compute": "dcn"}


def test_a_sized_module_keeps_its_size() -> None:
    config = ConvertConfig(towers=2, dim=2)
    info = SimpleNamespace(spec=click_spec())
    modules = choose_modules(info, config, 2)  # type: ignore[arg-type]
    assert [(m.kind, m.dim, m.code) for m in modules] == [("dlrm", 2, None)]
    assert how_to_choose(config, modules) == Choice()


def test_by_default_elements_travel_as_bytes_and_none_is_left_out() -> None:
    info = SimpleNamespace(spec=click_spec())
    (module,) = choose_modules(info, ConvertConfig(towers=2), 2)  # type: ignore[arg-type]
    assert module == TowerModuleSpec(kind="passthrough", code=TowerCode(precision="int8"))
