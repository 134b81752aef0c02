"""Linear tower modules in graphs: what the receiver restores, for every interaction."""

from __future__ import annotations

import pytest

from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.serving import onnx_over_arch
from support.exports import checks_of

GROUPS = (("user", ("cat_0", "cat_1")), ("item", ("cat_2", "cat_3")))


def linear_bundle(make_bundle, interaction):
    partition = PartitionConfig(num_towers=2, groups=GROUPS)
    return make_bundle("linear", interaction=interaction, convert={"partition": partition})


@pytest.mark.parametrize("interaction", ["dot", pytest.param("dcn", marks=pytest.mark.exhaustive)])
def test_graphs_restore_what_linear_towers_emit(make_bundle, export_unchecked, interaction):
    bundle = linear_bundle(make_bundle, interaction)
    for options in ({}, {"per_request": ("cat_0", "cat_1"), "dense_per_request": True}):
        checks = checks_of(export_unchecked(bundle, **options), bundle)
        assert checks and [check.line for check in checks if not check.passed] == []


def test_towers_that_are_restored_by_each_others_maps_are_noticed(
    make_bundle, export_unchecked, monkeypatch
):
    plain = onnx_over_arch.restore
    monkeypatch.setattr(
        onnx_over_arch, "restore", lambda b, job, emitted: plain(b, job, emitted)[::-1]
    )
    bundle = linear_bundle(make_bundle, "dot")
    failed = {c.part for c in checks_of(export_unchecked(bundle), bundle) if not c.passed}
    assert failed == {"joined", "whole"}
