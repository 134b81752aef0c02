"""Inputs that users had, and that were misread once: they score right, or are asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import DmtError
from dmt_convert.families import infer_model
from dmt_convert.families.model_config import parse_model_config, read_model_config
from support.originals import difference, flat_logits

ALICCP = ("101", "121", "122", "124", "125", "126", "127", "128", "129", "205", "206", "207")
ALICCP += ("216", "508", "509", "702", "853", "301")


@pytest.fixture
def cases(shared: Path) -> Path:
    if not (shared / "cases" / "checkpoints").is_dir():
        pytest.skip("needs shared/cases beside the repository")
    return shared / "cases" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("dcp-to-torch-save/model.pt", {}),
        ("dcp-to-torch-save/dcp", {}),
        ("order-aliccp-numbers/model.safetensors", {"features": ALICCP}),
        ("order-aliccp-numbers/sorted.pt", {"features": ALICCP}),
        ("order-aliccp-numbers/dcp", {"features": ALICCP}),
        ("quant-fp16-tables-dim8/model.pt", {"table_type": "fp16"}),
        ("quant-byte-prepack-dim24/model.pt", {"table_type": "byte_prepack"}),
        ("deepctr-feature-module/model.h5", {}),
        ("fp64-tables/model.pt", {}),
        ("swa-averaged-model/model.pt", {}),
    ],
)
def test_what_can_be_read_scores_as_its_probe_says(
    name: str, facts: dict[str, Any], cases: Path
) -> None:
    path = cases / name
    probe = np.load(cases / name.split("/")[0] / "probe.npz")
    facts = {key: list(v) if isinstance(v, tuple) else v for key, v in facts.items()}
    info = infer_model(open_checkpoint(path), parse_model_config("facts", facts))
    place = {str(feature): i for i, feature in enumerate(probe["feature_names"])}
    bags = tuple(
        Bag(values=probe[f"values_{i}"], offsets=probe[f"offsets_{i}"])
        for i in (place[feature] for feature in info.spec.feature_names)
    )
    batch = Batch(dense=probe["dense"], feature_names=info.spec.feature_names, bags=bags)
    assert difference(flat_logits(info, batch)[1], probe["logits"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "found", "line"),
    [
        ("order-aliccp-numbers/model.safetensors", "order in which the features", "features: ["),
        ("order-aliccp-numbers/sorted.pt", "order in which the features", "features: ["),
        ("order-aliccp-numbers/dcp", "order in which the features", "features: ["),
        ("quant-fp16-tables-dim8/model.pt", "type of 3 tables", "table_type: {t_cat_0: fp16}"),
        ("quant-byte-prepack-dim24/model.pt", "type of 3 tables", "table_type: byte_prepack"),
        ("deepctr-xdeepfm-ignore-hint/model.h5", "an xDeepFM", "--model"),
        ("fuxictr-deepfm-two-models/ck", "neither a DLRM nor a DCNv2", "--model"),
        ("zero-row-table/model.pt", "1 misshapen", "save the whole model"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, found: str, line: str, cases: Path) -> None:
    with pytest.raises(DmtError, match=found) as caught:
        infer_model(open_checkpoint(cases / name))
    wanted = line.replace("byte_prepack", "int8") if "prepack" in name else line
    assert wanted in caught.value.hint and "ignore" not in caught.value.hint


def test_the_advice_of_earlier_versions_is_refused(cases: Path) -> None:
    folder = cases / "deepctr-xdeepfm-ignore-hint"
    config = read_model_config(folder / "as-the-hint-says.yaml")
    with pytest.raises(DmtError, match="inside the model's own modules"):
        infer_model(open_checkpoint(folder / "model.h5"), config)


def test_a_table_without_rows_is_said_to_have_none(cases: Path) -> None:
    with pytest.raises(DmtError) as caught:
        infer_model(open_checkpoint(cases / "zero-row-table" / "model.pt"))
    assert any("has no rows" in line for line in caught.value.details)


def test_tables_in_fp8_are_named(cases: Path) -> None:
    with pytest.raises(DmtError) as caught:
        infer_model(open_checkpoint(cases / "safetensors-fp8-tables" / "model.safetensors"))
    assert "t_cat_0" in str(caught.value) and "F8_E4M3" in str(caught.value).upper()
