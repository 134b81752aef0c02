"""Requests, options and files that the partitioner refuses, and how it says so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmt_convert.conversion.partition import PartitionConfig, needs_affinity, partition_features
from dmt_convert.errors import ConfigError, PartitionError
from support.affinities import random_affinity
from support.specs import build_spec


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_towers": 9}, "9 towers for 8 features"),
        ({"num_towers": 2, "together": (("f0", "nope"),)}, "1 features of the request"),
        (
            {"num_towers": 2, "together": (("f0", "f1"), ("f1", "f2")), "apart": (("f0", "f2"),)},
            "contradictions",
        ),
        (
            {
                "num_towers": 2,
                "together": (("f0", "f1"),),
                "groups": (("u", ("f0",)), ("v", ("f1",))),
            },
            "contradictions",
        ),
        ({"num_towers": 7, "together": (("f0", "f1", "f2"),)}, "form 6 units"),
        (
            {"num_towers": 4, "size_ratio": 1.2, "together": (("f0", "f1", "f2", "f3"),)},
            "4 features that cannot be parted, for towers of at most 3",
        ),
        ({"num_towers": 1, "groups": (("u", ("f0",)), ("v", ("f1",)))}, "2 groups"),
        ({"num_towers": 2, "apart": (("f0", "f1", "f2"),)}, "3 features apart, for 2 towers"),
        (
            {
                "num_towers": 2,
                "apart": (("f0", "f1"), ("f1", "f2"), ("f0", "f2")),
            },
            "no assignment of 8 features",
        ),
    ],
)
def test_refusals_of_requests(options, expected):
    with pytest.raises(PartitionError, match=expected) as caught:
        partition_features(build_spec(8), PartitionConfig(**options), random_affinity(8))
    assert caught.value.expected and caught.value.hint


def test_a_shared_table_contradicts_apart():
    config = PartitionConfig(num_towers=2, apart=(("f0", "f3"),))
    with pytest.raises(PartitionError, match="f0,f3 cannot be parted"):
        partition_features(build_spec(4, shared={3: 0}), config, random_affinity(4))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "without a number"),
        ({"num_towers": 0}, "0 towers"),
        ({"num_towers": 2, "strategy": "best"}, "strategy 'best'"),
        ({"num_towers": 2, "affinity": "x"}, "affinity 'x'"),
        ({"num_towers": 2, "size_ratio": 0.5}, "size ratio 0.5"),
        ({"num_towers": 2, "size_ratio": math.nan}, "size ratio nan"),
        ({"num_towers": 2, "load_ratio": 0.9}, "load ratio 0.9"),
        ({"num_towers": 2, "seed": -1}, "seed -1"),
        ({"num_towers": 2, "together": (("a",),)}, "together a"),
        ({"num_towers": 2, "apart": (("a", "a"),)}, "apart a,a"),
        ({"num_towers": 2, "groups": (("u", ()),)}, "group u="),
        ({"num_towers": 2, "groups": (("u", ("a",)), ("u", ("b",)))}, "given twice"),
        ({"num_towers": 2, "groups": (("u", ("a",)), ("v", ("a",)))}, "several groups"),
    ],
)
def test_refusals_of_options(options, expected):
    with pytest.raises(ConfigError, match=expected):
        PartitionConfig(**options)


@pytest.mark.parametrize(
    ("affinity", "expected"),
    [
        (None, "no affinity"),
        (np.ones((3, 3)), "shape"),
        (np.full((4, 4), np.nan), "finite"),
        (np.full((4, 4), 2.0), "between"),
        (np.triu(np.ones((4, 4))), "symmetric"),
    ],
)
def test_refusals_of_affinities(affinity, expected):
    with pytest.raises(PartitionError, match=expected):
        partition_features(build_spec(4), PartitionConfig(num_towers=2), affinity)


def test_only_coherent_and_diverse_need_affinity():
    needs = [
        needs_affinity(PartitionConfig(num_towers=2, strategy=s))
        for s in ("coherent", "diverse", "round-robin")
    ]
    assert needs == [True, True, False]
    assert not needs_affinity(PartitionConfig(strategy=Path("towers.json")))


def _write(path, towers):
    path.write_text(json.dumps({"towers": towers}))
    return path


def test_a_file_is_taken_in_canonical_order(tmp_path):
    path = _write(tmp_path / "t.json", [["f3", "f2"], ["f1", "f0"]])
    partition = partition_features(
        build_spec(4), PartitionConfig(num_towers=2, strategy=path), random_affinity(4)
    )
    assert partition.assignment.towers == (("f0", "f1"), ("f2", "f3"))
    assert partition.strategy == "file" and partition.within_affinity is not None


def test_a_file_is_refused_with_all_findings(tmp_path):
    path = _write(tmp_path / "t.json", [["f0", "f1", "f1"], ["x"], []])
    with pytest.raises(PartitionError) as caught:
        partition_features(build_spec(4), PartitionConfig(num_towers=2, strategy=path))
    assert set(caught.value.details) == {
        "3 towers, where 2 were asked for",
        "tower 2 is empty",
        "repeated: f1",
        "unknown: x",
        "forgotten: f2",
        "forgotten: f3",
    }


def test_a_file_must_keep_tables_and_constraints(tmp_path):
    path = _write(tmp_path / "t.json", [["f0", "f1"], ["f2", "f3"]])
    config = PartitionConfig(
        strategy=path,
        together=(("f1", "f2"),),
        apart=(("f2", "f3"),),
        groups=(("u", ("f0",)), ("v", ("f1",))),
    )
    with pytest.raises(PartitionError) as caught:
        partition_features(build_spec(4), config)
    assert len(caught.value.details) == 3
    with pytest.raises(PartitionError, match="f0,f3 share tables"):
        partition_features(build_spec(4, shared={3: 0}), PartitionConfig(strategy=path))


@pytest.mark.parametrize("content", ["", "[]", '{"towers": 3}', '{"towers": [["f0", 1]]}'])
def test_a_malformed_file_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(PartitionError, match=r"t\.json"):
        partition_features(build_spec(4), PartitionConfig(strategy=path))
    with pytest.raises(PartitionError, match="cannot be read"):
        partition_features(build_spec(4), PartitionConfig(strategy=tmp_path / "none.json"))


def test_importing_the_partitioner_is_cheap():
    code = (
        "import sys, dmt_convert.conversion.partition; "
        "print({'torch', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "set()"
