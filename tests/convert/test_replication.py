"""`dmt convert --replicate`: what leaves the towers, what is refused, and that scores stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dmt_convert as dmt
from dmt_convert.config import ConvertConfig
from dmt_convert.conversion.replication import choose_replicated, partition_beside
from dmt_convert.errors import ConfigError, PartitionError, UsageError
from dmt_convert.model import DmtSpec, TowerModuleSpec
from dmt_convert.spec import ModelSpec
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.specs import build_spec

PASSTHROUGH = TowerModuleSpec(kind="passthrough")
ROWS = (9000, 30, 800, 20, 7000, 10)


@pytest.fixture(scope="module")
def flat() -> ModelSpec:
    return build_spec(6, kind="cat", dims=8, rows=ROWS, dense=(5,), hidden=(8,))


def chosen(flat: ModelSpec, *, module: TowerModuleSpec = PASSTHROUGH, **options: Any) -> str:
    """Numbers of the features that leave."""
    config = ConvertConfig(**{"towers": 2, "replicate": "auto", **options})
    return "".join(name[-1] for name in choose_replicated(flat, config, module))


def test_auto_takes_what_is_cheaper_by_cluster_batch_and_compression(flat: ModelSpec) -> None:
    # two hosts of 8 ranks: R < 0.8 * 8 * B * (1 / CR + 1/8) * 8/15
    assert chosen(flat, batch=64) == "135"
    assert chosen(flat) == "1235"
    assert chosen(flat, hosts=1) == ""
    linear = TowerModuleSpec(kind="linear", dim=3)  # a compression of 8
    assert chosen(flat, batch=256) == "1235"
    assert chosen(flat, batch=256, module=linear) == "135"
    assert chosen(flat, replicate="none") == ""


def test_ids_that_need_not_travel_count(flat: ModelSpec) -> None:
    config = ConvertConfig(towers=2, replicate="auto", batch=64)
    many = dict.fromkeys(flat.feature_names, 30.0)
    assert len(choose_replicated(flat, config, PASSTHROUGH, many)) == 4


def test_a_number_takes_all_tables_of_up_to_as_many_rows(flat: ModelSpec) -> None:
    assert chosen(flat, replicate="29") == "35"
    assert chosen(flat, replicate=30) == "135"


def test_every_tower_keeps_a_feature(flat: ModelSpec) -> None:
    assert chosen(flat, replicate="99999") == "1235"
    assert chosen(flat, replicate="99999", towers=5) == "5"
    assert chosen(flat, replicate="99999", towers=6) == ""


def names(flat: ModelSpec, numbers: str) -> tuple[str, ...]:
    return tuple(flat.feature_names[int(number)] for number in numbers)


def test_what_must_be_together_leaves_together_or_stays(flat: ModelSpec) -> None:
    assert chosen(flat, replicate="30", together=[names(flat, "03")]) == "15"
    assert chosen(flat, replicate="30", together=[names(flat, "13")]) == "135"


def test_what_must_be_apart_cannot_both_be_on_every_rank(flat: ModelSpec) -> None:
    assert chosen(flat, replicate="30", apart=[names(flat, "01")]) == "135"
    with pytest.raises(PartitionError, match="must be apart"):
        chosen(flat, replicate="30", apart=[names(flat, "13")])


def partition(flat: ModelSpec, **options: Any) -> tuple[tuple[str, ...], ...]:
    config = ConvertConfig(**{"towers": 2, "replicate": "30", **options})
    replicated = choose_replicated(flat, config, PASSTHROUGH)
    affinity = np.eye(len(flat.features)) if config.partition != "round-robin" else None
    found = partition_beside(flat, config, affinity, replicated)
    assert found.towers == (*found.sending, *found.everywhere)
    assert len(found.loads) == len(found.towers)
    return tuple("".join(name[-1] for name in tower) for tower in found.towers)  # type: ignore[misc]


def test_the_others_are_partitioned_as_asked(flat: ModelSpec) -> None:
    assert partition(flat, partition="round-robin") == ("04", "2", "135")
    assert partition(flat, apart=[names(flat, "02")])[2] == "135"
    together = partition(flat, together=[names(flat, "24"), names(flat, "15")])
    assert together == ("0", "24", "135")


def test_groups_do_not_share_a_tower_on_every_rank_either(flat: ModelSpec) -> None:
    groups = {"user": names(flat, "01"), "item": names(flat, "234")}
    towers = partition(flat, group=groups)
    assert set(towers[:2]) == {"0", "24"} and set(towers[2:]) == {"1", "3", "5"}


def test_a_file_keeps_its_towers_without_what_leaves(flat: ModelSpec, tmp_path: Path) -> None:
    file = tmp_path / "towers.json"
    towers = [list(names(flat, "01")), list(names(flat, "35")), list(names(flat, "24"))]
    file.write_text(str({"towers": towers}).replace("'", '"'))
    # the tower of 3 and 5 keeps 3, which has more rows
    assert partition(flat, partition=file, towers=None) == ("0", "24", "3", "15")


@pytest.mark.parametrize("value", ["some", "0", "-3", "1.5"])
def test_what_is_no_number_of_rows_is_refused(value: str) -> None:
    with pytest.raises((UsageError, ConfigError, ValueError), match="number of rows"):
        ConvertConfig(towers=2, replicate=value)


def test_modules_that_change_the_interaction_are_refused(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError, match="beside dlrm tower modules"):
        convert_quickly(source, tmp_path / "out", tower_module="dlrm", replicate="auto")


def test_a_bundle_with_tables_on_every_rank_scores_as_the_flat_model(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    bundle = convert_quickly(
        source, tmp_path / "out", tower_module="passthrough", replicate="8", report=True
    )
    model: DmtSpec = bundle.manifest.model
    assert [tower.everywhere for tower in model.towers] == [False, False, True]
    assert all(
        (model.flat.table_of(name).rows <= 8) == tower.everywhere
        for tower in model.towers
        for name in tower.features
    )
    assert bundle.plan.tower_hosts == ((0,), (1,), ())
    assert bundle.plan.traffic.replicated_step_bytes > 0
    assert dmt.verify(source, bundle.path).same
    assert (bundle.path / "report.html").stat().st_size > 0
    without = convert_quickly(source, tmp_path / "plain", tower_module="passthrough")
    assert bundle.manifest.model.compression > without.manifest.model.compression == 1.0


def test_a_preview_says_what_would_leave(tmp_path: Path) -> None:
    source = make_flat(tmp_path / "ckpt.pt")
    found = dmt.preview(source, towers=2, tower_module="passthrough", replicate="8")
    assert found.replicated and found.compression > 1.0
    assert dmt.preview(source, towers=2, tower_module="passthrough").replicated == ()


@pytest.mark.parametrize("interaction", ["dot", "dcn", "projection"])
def test_bytes_that_are_saved_go_to_the_linear_towers(tmp_path: Path, interaction: str) -> None:
    """At the same bytes, the logits agree better: two features are exact, the others wider."""
    source = make_flat(
        tmp_path / "ckpt.pt", interaction=interaction, rows=(7, 50, 300, 6, 400, 500)
    )
    found = {
        replicate: convert_quickly(
            source,
            tmp_path / replicate,
            tower_module="linear",
            compression=4.0,
            partition="round-robin",
            replicate=replicate,
        )
        for replicate in ("none", "8")
    }
    models = {name: bundle.manifest.model for name, bundle in found.items()}
    assert models["8"].compression == models["none"].compression == 4.0
    assert [tower.everywhere for tower in models["8"].towers] == [False, False, True]
    assert sum(t.module.dim for t in models["8"].sending_towers) == sum(
        t.module.dim for t in models["none"].towers
    )
    r2 = {name: bundle.quality.rows[1].r2 or 0.0 for name, bundle in found.items()}
    assert r2["8"] > r2["none"]
    assert all(bundle.quality.rows[1].name == "closed form" for bundle in found.values())
