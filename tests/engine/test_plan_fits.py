"""A plan that places other tables than the bundle's is refused before ranks shard anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle import open_bundle
from dmt_convert.cluster import RankLayout, choose_plan
from dmt_convert.errors import PlanError
from dmt_convert.placement import read_plan
from support.bundles import make_bundle

LAYOUT = RankLayout(rank=0, world_size=16, local_rank=0, ranks_per_host=8, backend="gloo")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def change_rows(tables: list[Any]) -> None:
    tables[0]["shards"][0]["rows"] -= 1


def rename(tables: list[Any]) -> None:
    tables[1]["table"] = "t_cat_9"


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (list.pop, "missing in the plan"),
        (change_rows, "6 x 8 in tower 0 in the plan, 7 x 8"),
        (rename, "'t_cat_9'"),
    ],
)
def test_a_plan_of_other_tables(
    bundle: Path, tmp_path: Path, edit: Callable[[list[Any]], object], found: str
) -> None:
    content = json.loads((bundle / "plan.json").read_text())
    good = tmp_path / "good.json"
    good.write_text(json.dumps(content))
    assert choose_plan(open_bundle(bundle), LAYOUT, read_plan(good))
    edit(content["tables"])
    faulty = tmp_path / "plan.json"
    faulty.write_text(json.dumps(content))
    with pytest.raises(PlanError) as refused:
        choose_plan(open_bundle(bundle), LAYOUT, read_plan(faulty))
    assert any(found in line for line in refused.value.details)
    assert "dmt plan" in refused.value.hint
