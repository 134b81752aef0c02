"""The picture, and the colours that the page shares with it."""

from __future__ import annotations

import pytest

from dmt_convert.conversion.partition import figure_svg
from dmt_convert.errors import PartitionError
from dmt_convert.report import write_partition_svg
from dmt_convert.report.partition_figure import embed_figure, tower_colours
from support.reports import build_data


def test_svg_file(tmp_path):
    data = build_data()
    path = tmp_path / "partition.svg"
    write_partition_svg(data.spec.flat, data.partition, path)
    assert path.read_text("utf-8").endswith(figure_svg(data.spec.flat, data.partition))


def test_other_suffixes_are_refused(tmp_path):
    data = build_data()
    with pytest.raises(PartitionError, match=r"p\.pdf"):
        write_partition_svg(data.spec.flat, data.partition, tmp_path / "p.pdf")


@pytest.mark.parametrize("towers", [3, 10, 11, 16])
def test_towers_have_the_colours_of_the_figure(towers):
    data = build_data(features=towers + 1, towers=towers)
    svg = figure_svg(data.spec.flat, data.partition)
    colours = tower_colours(towers)
    assert len(set(colours)) == towers
    at = [svg.find(f"fill: {colour}") for colour in colours]
    assert min(at) >= 0 and at == sorted(at)


def test_the_embedded_figure_keeps_to_itself():
    data = build_data()
    svg = embed_figure(data.spec.flat, data.partition, description="what <it> shows")
    for part in ("<style", "<metadata", "<?xml", "<!", "xmlns", ' width="972pt"'):
        assert part not in svg
    assert "what &lt;it&gt; shows</desc>" in svg and 'viewBox="' in svg
    assert "Affinity, by tower" in svg
