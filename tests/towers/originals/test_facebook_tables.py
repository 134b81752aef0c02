"""Tables that dlrm_s_pytorch.py stores in parts give the logits that its modules give."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.config import ExportConfig
from dmt_convert.data import adapt_batches, open_data
from dmt_convert.errors import ArchitectureError, ConfigError, DataError, ExportError
from dmt_convert.families import FeatureConfig, ModelConfig, infer_model
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec
from dmt_convert.serving.export_config import plan_inputs
from dmt_convert.spec import ModelSpec
from support.originals import (
    assert_agrees,
    facebook_original,
    save_facebook,
)

ROWS = (3, 30, 11, 40)
DIM = 6


class QrBag(nn.Module):
    """Pools quotients and remainders apart, and joins the pooled vectors."""

    def __init__(
        self, rows: int, dim: int, operation: str, collisions: int = 4, mode: str = "sum"
    ) -> None:
        super().__init__()
        self.operation, self.collisions, self.mode = operation, collisions, mode
        self.weight_q = nn.Parameter(torch.randn(-(-rows // collisions), dim))
        self.weight_r = nn.Parameter(torch.randn(collisions, dim))

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, **weights: Any) -> torch.Tensor:
        kind: Any = {"mode": self.mode, "include_last_offset": True, **weights}
        pool = nn.functional.embedding_bag
        q = pool(ids // self.collisions, self.weight_q, offsets, **kind)
        r = pool(ids % self.collisions, self.weight_r, offsets, **kind)
        if self.operation == "concat":
            return torch.cat([q, r], dim=1)
        return q * r if self.operation == "mult" else q + r


class MdBag(nn.Module):
    """A narrow table behind a projection; as wide as the model, without one."""

    def __init__(self, rows: int, dim: int, base: int) -> None:
        super().__init__()
        self.embs = nn.EmbeddingBag(rows, dim, mode="sum", include_last_offset=True)
        self.proj: nn.Module = nn.Identity()
        if dim < base:
            self.proj = nn.Linear(dim, base, bias=False)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, **weights: Any) -> torch.Tensor:
        return self.proj(self.embs(ids, offsets, **weights))


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Give a model other tables, learned pooling weights if asked, and save it."""

    def store(
        tables: Iterable[nn.Module | None], *, weighted: bool = False, **options: Any
    ) -> tuple[Path, Any]:
        original = facebook_original("dot", rows=ROWS, dim=DIM, **options)
        torch.manual_seed(7)
        model = copy.deepcopy(original.model)
        for i, table in enumerate(tables):
            if table is not None:
                model.emb_l[i] = table
        if weighted:
            model.v_W_l = nn.ParameterList(nn.Parameter(torch.randn(rows)) for rows in ROWS)
            for table, factors in zip(model.emb_l, model.v_W_l, strict=True):
                table.register_forward_pre_hook(_weigh(factors), with_kwargs=True)
        wide = copy.deepcopy(model).double()
        if weighted:  # the copy's hooks look at the weights of the first
            model.double()
            wide = model
        batch = replace(original.batch, dense=original.batch.dense.astype(np.float64))
        with torch.no_grad():
            logits = torch.logit(wide(batch)).float().numpy()
        model.float()
        changed = replace(original, model=model, logits=logits)
        return save_facebook(changed, tmp_path / "model.pt"), changed

    return store


def _weigh(factors: nn.Parameter) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "per_sample_weights": factors[args[0]]}

    return hook


def qr(operation: str, dim: int = DIM, skip: int = 1) -> list[nn.Module | None]:
    """Tables above a threshold are split, the first ones are plain."""
    return [None if i < skip else QrBag(n, dim, operation) for i, n in enumerate(ROWS)]


def md() -> list[nn.Module | None]:
    return [MdBag(n, d, DIM) for n, d in zip(ROWS, (6, 2, 4, 1), strict=True)]


CASES: dict[str, tuple[Callable[[], list[nn.Module | None]], dict[str, Any], str | None]] = {
    "mult": (lambda: qr("mult"), {"lengths": 1}, "mult"),
    "add": (lambda: qr("add"), {"lengths": 4}, "add"),
    "concat": (lambda: qr("concat", DIM // 2, skip=0), {"lengths": 4}, None),
    "mixed dims": (md, {"lengths": 4}, None),
    "weighted": (lambda: [], {"lengths": 4, "weighted": True}, None),
    "weighted mixed dims": (md, {"lengths": 4, "weighted": True}, None),
    "weighted mult": (lambda: qr("mult"), {"lengths": 1, "weighted": True}, "mult"),
    "weighted add": (lambda: qr("add"), {"lengths": 4, "weighted": True}, "add"),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_in_parts(case, store):
    tables, options, operation = CASES[case]
    path, original = store(tables(), **options)
    assert_agrees(path, original, ModelConfig(qr_operation=operation))  # type: ignore[arg-type]
    config = ModelConfig(qr_operation=operation)  # type: ignore[arg-type]
    info = infer_model(open_checkpoint(path), config)
    # what an optimizer gathered for one form of a table is no state of another
    derived = {t.name for t in info.spec.tables if info.table_info(t.name).derivation is not None}
    assert not derived & set(info.accumulators)
    # but it tells how often rows were looked up, unless a row is made of two that others share
    split = {t.name for t in info.spec.tables if "weight_q" in info.table_info(t.name).name}
    assert set(info.row_state) == {"0", "1", "2", "3"} - split
    assert bool(split) == ("mult" in case or "add" in case or "concat" in case)
    facts = {fact.subject: fact for fact in info.facts}
    if "mixed" in case:
        assert facts["mixed-dimension tables"].value == "4 of 4"
    if "weighted" in case:
        assert facts["tables with learned pooling weights"].value == "4 of 4"


def test_whether_rows_are_multiplied_or_added_is_asked_for(store):
    path, _ = store(qr("add"), lengths=1)
    with pytest.raises(ArchitectureError, match="3 quotient-remainder tables") as caught:
        infer_model(open_checkpoint(path))
    assert "qr_operation: mult" in caught.value.hint and "qr_operation: add" in caught.value.hint


def test_longer_bags_of_multiplied_rows_are_refused(store, tmp_path):
    """The trainer multiplies what is pooled; a plain table pools what is multiplied."""
    path, original = store(qr("mult"), lengths=4)
    info = infer_model(open_checkpoint(path), ModelConfig(qr_operation="mult"))
    assert [feature.max_ids for feature in info.spec.features] == [None, 1, 1, 1]
    assert ModelSpec.from_json(info.spec.to_json()) == info.spec
    assert "max_ids" not in info.spec.to_json()["features"][0]
    batch, arrays = original.batch, {}
    for i, bag in enumerate(batch.bags):
        arrays |= {f"values_{i}": bag.values, f"offsets_{i}": bag.offsets}
    np.savez(tmp_path / "rows.npz", dense=batch.dense, feature_names=batch.feature_names, **arrays)
    rows = open_data(tmp_path / "rows.npz")
    with pytest.raises(DataError, match=r"has a bag of [234] ids"):
        list(adapt_batches(rows, info.spec, rows.batches(64)))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"emb_l.1.weight_r": None}, "missing: emb_l.1.weight_r"),
        ({"emb_l.1.weight_r": torch.ones(4, 2)}, "weight_r has 2 columns, .*weight_q has 6"),
        ({"emb_l.2.weight_q": torch.ones(4)}, r"weight_q has shape \[4\], not 2 dims"),
        ({"v_W_l.0": torch.ones(4)}, r"v_W_l.0 has shape \[4\], expected \[3\]"),
        ({"v_W_l.1": torch.ones(28)}, r"v_W_l.1 has shape \[28\], expected \[32\]"),
        ({"v_W_l.9": torch.ones(28)}, "missing: emb_l.9.weight"),
        ({"emb_l.3.proj.weight": torch.ones(6, 2)}, "missing: emb_l.3"),
    ],
)
def test_parts_that_do_not_fit(edit, says, store, tmp_path):
    path, original = store(qr("mult"), lengths=1)
    mult = ModelConfig(qr_operation="mult")
    state = {**original.state, **edit}
    if "emb_l.3.proj.weight" in state:
        del state["emb_l.3.weight_q"], state["emb_l.3.weight_r"]
    torch.save({name: t for name, t in state.items() if t is not None}, path)
    with pytest.raises(ArchitectureError) as caught:
        infer_model(open_checkpoint(path), mult)
    assert any(re.search(says, line) for line in caught.value.details), caught.value.details


@pytest.mark.parametrize(("dim", "given"), [(DIM, "concat"), (DIM // 2, "mult")])
def test_an_operation_that_the_shapes_contradict(dim, given, store):
    path, _ = store(qr("concat" if dim < DIM else "add", dim, skip=0), lengths=1)
    with pytest.raises(ConfigError, match=f"says qr_operation {given}, but"):
        infer_model(open_checkpoint(path), ModelConfig(qr_operation=given))  # type: ignore[arg-type]


def test_shared_tables_and_mean_pooling(store):
    shared = QrBag(40, DIM, "add", mode="mean")
    path, original = store([shared, None, None, shared], lengths=4)
    state = {n: t for n, t in original.state.items() if not n.startswith("emb_l.3.")}
    torch.save(state, path)
    # one table fewer is as wide as all of them with self-pairs would be: that is asked for
    config = ModelConfig(qr_operation="add")
    with pytest.raises(ArchitectureError, match="a dot with self-pairs of 3 features") as caught:
        infer_model(open_checkpoint(path), config)
    assert "self_pairs: false" in caught.value.hint
    names = [("a", "0"), ("b", "1"), ("c", "2"), ("d", "0")]
    features = tuple(FeatureConfig(name=name, table=table) for name, table in names)
    pooling: dict[str, Any] = {"a": "mean", "d": "mean"}
    given = ModelConfig(features=features, pooling=pooling, qr_operation="add")
    assert_agrees(path, original, given)


def test_a_file_of_one_rank_that_lacks_a_single_table_is_refused(store):
    """It looks like a model with self-pairs; DDP around the MLPs says that it is not."""
    path, original = store([None, None, None], lengths=1)
    last = max(n for n in original.state if n.startswith("emb_l."))
    state = {n: t for n, t in original.state.items() if n != last}
    torch.save(state, path)
    with pytest.raises(ArchitectureError, match="a dot with self-pairs of 3 features"):
        infer_model(open_checkpoint(path))
    state = {re.sub("^(bot_l|top_l)", r"\1.module", n): t for n, t in state.items()}
    torch.save(state, path)
    with pytest.raises(ArchitectureError, match="tables that are there only a dot") as caught:
        infer_model(open_checkpoint(path))
    assert "`self_pairs: true`" in caught.value.hint
    given = infer_model(open_checkpoint(path), ModelConfig(self_pairs=True))
    assert given.spec.interaction.self_pairs


@pytest.mark.parametrize("zipped", [True, False])
def test_files_saved_from_a_gpu(zipped, store, monkeypatch):
    path, original = store(qr("mult"), lengths=1)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save(original.state, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:3" in path.read_bytes()
    assert_agrees(path, original, ModelConfig(qr_operation="mult"))


def test_exports_take_one_id_where_only_one_is_right(store):
    path, _ = store(qr("mult"), lengths=1)
    info = infer_model(open_checkpoint(path), ModelConfig(qr_operation="mult"))
    tower = TowerSpec(features=info.spec.feature_names, module=TowerModuleSpec(kind="passthrough"))
    spec = DmtSpec(flat=info.spec, towers=(tower,))
    forms = [f.form for f in plan_inputs(spec, ExportConfig(format="pt2")).features]
    assert forms == ["jagged", "single", "single", "single"]
    asked = ExportConfig(format="pt2", pooling_input={"f1": "padded"})
    with pytest.raises(ExportError, match="f1 may have at most one id"):
        plan_inputs(spec, asked)
