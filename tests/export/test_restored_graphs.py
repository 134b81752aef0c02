"""Linear tower modules in graphs: what the receiver restores, for every interaction."""

from __future__ import annotations

import pytest
import torch

from dmt_convert.model.assembly import Restore
from dmt_convert.serving import onnx_dense
from support.exports import checks_of

GROUPS = (("user", ("cat_0", "cat_1")), ("item", ("cat_2", "cat_3")))


def linear_bundle(make_bundle, interaction):
    return make_bundle("linear", interaction=interaction, convert={"group": GROUPS})


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["dot", pytest.param("dcn", marks=pytest.mark.exhaustive)])
def test_graphs_restore_what_linear_towers_emit(make_bundle, export_unchecked, interaction):
    bundle = linear_bundle(make_bundle, interaction)
    for options in ({}, {"per_request": ("cat_0", "cat_1"), "dense_per_request": True}):
        checks = checks_of(export_unchecked(bundle, **options), bundle)
        assert checks and [check.line for check in checks if not check.passed] == []


@pytest.mark.slow
def test_towers_that_are_restored_by_each_others_maps_are_noticed(
    make_bundle, export_unchecked, monkeypatch
):
    def swapped(self, emitted_BO):
        parts = torch.split(emitted_BO, self.widths, dim=1)
        return torch.cat([layer(x) for layer, x in zip(self, parts, strict=True)][::-1], dim=1)

    bundle = linear_bundle(make_bundle, "dot")
    with monkeypatch.context() as patch:
        patch.setattr(Restore, "forward", swapped)
        patch.setattr(onnx_dense, "trace_parts", onnx_dense.trace_parts.__wrapped__)
        exported = export_unchecked(bundle)
    failed = {c.part for c in checks_of(exported, bundle) if not c.passed}
    assert failed == {"joined", "whole"}
