"""The script of docs/data.md, as it stands there, makes data that a model can be fed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dmt_convert as dmt
from support.checkpoints.flat import make_flat
from support.paths import REPOSITORY

LOG = """user,item,tags,price,age,click
ann,tea,hot|green,3.5,31,1
bob,soup,hot,7.25,40,0
eve,tea,,3.5,25,0
"""
VOCABULARIES = {
    "user": {"ann": 1, "bob": 2},
    "item": {"tea": 3, "soup": 4},
    "tags": {"hot": 0, "green": 5},
}


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs/data.md").read_text("utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(script.splitlines()) <= 24
    (tmp_path / "log.csv").write_text(LOG)
    for name, rows in VOCABULARIES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "docs/data.md", "exec"), {})  # noqa: S102 (our own page)

    def rename(state: dict[str, Any]) -> None:
        for i, name in enumerate(VOCABULARIES):
            table = "sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"
            state[table.format(name)] = state.pop(table.format(f"cat_{i}"))

    flat = make_flat(tmp_path / "ckpt.pt", rows=(3, 5, 6), num_dense=2, edit=rename)
    report = dmt.check_data(flat, "clicks/test.parquet")
    assert report.usable, report.faults
    assert report.inputs is not None
    assert report.inputs.dense == ("price", "age")
    by_name = {column.feeds: column for column in report.features}
    assert (by_name["user"].min, by_name["user"].max) == (0, 2)
    assert by_name["tags"].ids_per_row == 1
    assert by_name["tags"].empty_share == pytest.approx(1 / 3)
    assert report.dense[0].max == pytest.approx(np.log1p(7.25))
    assert dmt.evaluate(flat, "clicks/test.parquet").rows == 3
