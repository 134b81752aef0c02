"""The picture: same bytes for the same partition, panels as the partition has them."""

from __future__ import annotations

import dataclasses

import pytest

from dmt_convert.conversion.partition import (
    PartitionConfig,
    figure_svg,
    partition_features,
    plot_partition,
)
from dmt_convert.errors import PartitionError
from support.affinities import random_affinity
from support.specs import build_spec


def test_svg_is_deterministic_and_names_the_features(tmp_path):
    spec = build_spec(12)
    partition = partition_features(spec, PartitionConfig(num_towers=3), random_affinity(12))
    svg = figure_svg(spec, partition)
    assert svg.startswith("<svg") and svg == figure_svg(spec, partition)
    for text in ("Affinity, by tower", "Features in the plane", ">f11<", "Lookups per sample"):
        assert text in svg
    plot_partition(spec, partition, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().endswith(svg)


def test_png_of_many_features(tmp_path):
    spec = build_spec(900)
    partition = partition_features(
        spec, PartitionConfig(num_towers=40, strategy="round-robin"), random_affinity(900)
    )
    plot_partition(spec, partition, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ">f11<" not in figure_svg(spec, partition)


def test_without_affinity_only_loads_are_drawn():
    spec = build_spec(5)
    partition = partition_features(spec, PartitionConfig(num_towers=2, strategy="round-robin"))
    svg = figure_svg(spec, partition)
    assert "Affinity" not in svg and "Features in the plane" not in svg
    assert "Lookups per sample" in svg


def test_one_feature():
    spec = build_spec(1)
    partition = partition_features(spec, PartitionConfig(num_towers=1), random_affinity(1))
    assert partition.within_affinity is None
    assert "1 feature in 1 tower" in figure_svg(spec, partition)


def test_other_suffixes_are_refused(tmp_path):
    spec = build_spec(5)
    partition = partition_features(spec, PartitionConfig(num_towers=2, strategy="round-robin"))
    with pytest.raises(PartitionError, match=r"p\.pdf"):
        plot_partition(spec, partition, tmp_path / "p.pdf")


def test_hostile_names_are_drawn_as_they_are():
    """`$` would start a formula, which may not parse; control characters have no place in XML."""
    spec = build_spec(3)
    names = (r"$\frac$", "a\x00b\ud800", "特徴")
    features = tuple(
        dataclasses.replace(feature, name=name)
        for feature, name in zip(spec.features, names, strict=True)
    )
    spec = dataclasses.replace(spec, features=features)
    found = partition_features(spec, PartitionConfig(num_towers=2), random_affinity(3, 0))
    svg = figure_svg(spec, found)
    assert "$\\frac$" in svg
    assert "\x00" not in svg
