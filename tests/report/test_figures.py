"""The picture: same bytes for the same partition, colours of the page, harmless inside it."""

from __future__ import annotations

import dataclasses

import pytest

from dmt_convert.config import PartitionConfig
from dmt_convert.conversion import describe_partition
from dmt_convert.conversion.partition import Partition, partition_features
from dmt_convert.documents import PartitionRecord, TowerLoadRecord
from dmt_convert.errors import PartitionError
from dmt_convert.report import plot_partition
from dmt_convert.report.figures import figure_svg, tower_colours, tower_loads
from dmt_convert.report.page import embed_figure
from dmt_convert.spec import ModelSpec
from support.affinities import random_affinity
from support.reports import build_view
from support.specs import build_spec


def draw(spec: ModelSpec, found: Partition) -> str:
    return figure_svg(spec, found.towers, describe_partition(found), found.affinity)


def plot(path, spec: ModelSpec, found: Partition) -> None:
    plot_partition(path, spec, found.towers, describe_partition(found), found.affinity)


def test_svg_is_deterministic_and_names_the_features(tmp_path):
    spec = build_spec(12)
    partition = partition_features(spec, PartitionConfig(towers=3), random_affinity(12))
    svg = draw(spec, partition)
    assert svg.startswith("<svg") and svg == draw(spec, partition)
    for text in ("Affinity, model order", "Affinity, by tower", ">f11<", "Lookups per sample"):
        assert text in svg
    plot(tmp_path / "p.svg", spec, partition)
    assert (tmp_path / "p.svg").read_text("utf-8").endswith(svg)


def test_png_of_many_features(tmp_path):
    spec = build_spec(900)
    partition = partition_features(
        spec, PartitionConfig(towers=40, partition="round-robin"), random_affinity(900)
    )
    plot(tmp_path / "p.png", spec, partition)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ">f11<" not in draw(spec, partition)


def test_without_affinity_only_loads_are_drawn():
    spec = build_spec(5)
    partition = partition_features(spec, PartitionConfig(towers=2, partition="round-robin"))
    svg = draw(spec, partition)
    assert "Affinity" not in svg
    assert "Lookups per sample" in svg


def test_one_feature():
    spec = build_spec(1)
    partition = partition_features(spec, PartitionConfig(towers=1), random_affinity(1))
    assert partition.within_affinity is None
    assert "1 feature in 1 tower" in draw(spec, partition)


def test_other_suffixes_are_refused(tmp_path):
    spec = build_spec(5)
    partition = partition_features(spec, PartitionConfig(towers=2, partition="round-robin"))
    with pytest.raises(PartitionError, match=r"p\.pdf"):
        plot(tmp_path / "p.pdf", spec, partition)


def test_hostile_names_are_drawn_as_they_are():
    """`$` would start a formula, which may not parse; control characters have no place in XML."""
    spec = build_spec(3)
    names = (r"$\frac$", "a\x00b\ud800", "特徴")
    features = tuple(
        dataclasses.replace(feature, name=name)
        for feature, name in zip(spec.features, names, strict=True)
    )
    spec = dataclasses.replace(spec, features=features)
    found = partition_features(spec, PartitionConfig(towers=2), random_affinity(3, 0))
    svg = draw(spec, found)
    assert "$\\frac$" in svg
    assert "\x00" not in svg


@pytest.mark.slow
@pytest.mark.parametrize("towers", [3, 10, 11, 16])
def test_towers_have_the_colours_of_the_figure(towers):
    svg = build_view(features=towers + 1, towers=towers, figure=None).figure
    colours = tower_colours(towers)
    assert len(set(colours)) == towers
    at = [svg.find(f"fill: {colour}") for colour in colours]
    assert min(at) >= 0 and at == sorted(at)


def test_the_embedded_figure_keeps_to_itself():
    svg = embed_figure(build_view(figure=None).figure, "what <it> shows")
    for part in ("<style", "<metadata", "<?xml", "<!", "xmlns", ' width="684pt"'):
        assert part not in svg
    assert "what &lt;it&gt; shows</desc>" in svg and 'viewBox="' in svg
    assert "Affinity, by tower" in svg


def test_loads_are_the_recorded_ones_or_computed():
    spec = build_spec(4)
    towers = (("f0", "f1", "f2"), ("f3",))
    recorded = tuple(
        TowerLoadRecord(features=n, table_bytes=n, lookups=2.5) for n in map(len, towers)
    )
    assert tower_loads(spec, towers, PartitionRecord(loads=recorded)) == recorded
    computed = tower_loads(spec, towers, PartitionRecord(loads=recorded[:1]))
    assert [(load.features, load.lookups) for load in computed] == [(3, 3.0), (1, 1.0)]
    assert sum(load.table_bytes for load in computed) == sum(table.nbytes for table in spec.tables)
