"""Bundles whose towers send fewer bits than float32, or nothing, made of bundles that send it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dmt_convert.bundle import Bundle, StreamedWeights, open_bundle_model, split_state, write_bundle
from dmt_convert.model import (
    Code,
    CodedModule,
    DmtModel,
    DmtSpec,
    TowerCode,
    TowerModuleSpec,
    TowerSpec,
)
from dmt_convert.training.finetuned import table_sources
from support.rows import build_batch

INT8 = TowerCode(precision="int8")
BF16 = TowerCode(precision="bf16")


def write_coded(
    bundle: Bundle, out: Path, *codes: TowerCode | None, everywhere: Sequence[int] = ()
) -> Bundle:
    """Write a bundle of the same weights whose towers send in a code.

    Args:
        bundle: float32 towers.
        out: the new bundle.
        codes: of every tower, or one for all that send; the ranges are those of generated rows.
        everywhere: towers that are on every rank instead.
    """
    parent = open_bundle_model(bundle)
    if len(codes) == 1:
        codes = tuple(None if t in everywhere else codes[0] for t in range(len(bundle.towers)))
    pairs = zip(parent.spec.towers, codes, strict=True)
    towers = [_changed(tower, code, t in everywhere) for t, (tower, code) in enumerate(pairs)]
    spec = replace(parent.spec, towers=tuple(towers))
    model = _with_weights(spec, parent)
    batch = build_batch(spec.flat, 256)
    with torch.no_grad():
        for t, tower in enumerate(model.tower_list):
            bags = dict(zip(batch.feature_names, batch.bags, strict=True))
            pooled = torch.cat(tower.pool([bags[name] for name in tower.features]), dim=1)
            assert isinstance(tower.tower_module, CodedModule)
            if tower.tower_module.code is not None:
                fit_ranges(tower.tower_module.code, tower.tower_module.emit(pooled))
            assert (tower.tower_module.code is None) == (codes[t] is None)
    manifest = replace(bundle.manifest, model=spec)
    return write_bundle(
        out,
        StreamedWeights(tables=table_sources(bundle, None), accumulators={}),
        small=split_state(model),
        describe=lambda: (manifest, bundle.plan, lambda _: {}),
    )


def fit_ranges(code: Code, emitted: Tensor) -> None:
    """Give a code the range of some values."""
    if code.spec.precision != "int8":
        return
    highest = torch.full((code.width,), 254.0)
    highest[code.width - code.spec.int4 :] = 15.0
    low, high = emitted.amin(dim=0), emitted.amax(dim=0)
    code.low.copy_(low)
    code.step.copy_((high - low).clamp(min=1e-6) / highest)


def _changed(tower: TowerSpec, code: TowerCode | None, everywhere: bool) -> TowerSpec:
    if everywhere:
        return replace(tower, module=TowerModuleSpec(kind="passthrough"), everywhere=True)
    return replace(tower, module=replace(tower.module, code=code))


def _with_weights(spec: DmtSpec, parent: DmtModel) -> DmtModel:
    """The model of a spec, with all weights of another one that it has a place for."""
    tables = [tower.tables for tower in parent.tower_list]
    with torch.device("meta"):
        model = DmtModel(spec, tables)
    own = model.state_dict()
    state = {name: value for name, value in parent.state_dict().items() if name in own}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and all(".code." in name for name in missing), (missing, unexpected)
    return model.eval()
