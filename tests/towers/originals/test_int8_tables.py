"""Tables that TorchRec's `quantize_embeddings` made into bytes give that model's logits."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import ArchitectureError
from dmt_convert.families import ModelConfig, infer_model
from support.originals import assert_agrees, difference, torchrec_original

EBC = "sparse_arch.embedding_bag_collection.embedding_bags"


def quantise(original: Any, *, split: bool = False) -> Any:
    """Quantise the tables with TorchRec itself, and score with the quantised model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchrec.inference.modules import quantize_embeddings
        from torchrec.modules.embedding_modules import EmbeddingBagCollection
        from torchrec.quant.embedding_modules import (
            quant_prep_enable_quant_state_dict_split_scale_bias_for_types,
        )
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        model = copy.deepcopy(original.model)
        if split:
            quant_prep_enable_quant_state_dict_split_scale_bias_for_types(
                model, [EmbeddingBagCollection]
            )
        model = quantize_embeddings(model, dtype=torch.qint8, inplace=True)
        batch = original.batch
        jagged = KeyedJaggedTensor.from_lengths_sync(
            keys=[*batch.feature_names],
            values=torch.cat([torch.from_numpy(bag.values) for bag in batch.bags]),
            lengths=torch.cat([torch.from_numpy(np.diff(bag.offsets)) for bag in batch.bags]),
        )
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.dense), jagged).squeeze(1).numpy()
    return replace(original, model=model, logits=logits)


@pytest.mark.parametrize(
    ("kind", "dim", "split", "pooling", "said"),
    [
        ("dot", 6, False, "sum", "int8"),
        ("dot", 32, False, "sum", None),  # no other rows are as wide
        ("dcn", 12, False, "mean", "int8"),
        ("projection", 6, False, "sum", "int8"),
        ("dot", 6, True, "sum", None),
    ],
)
def test_quantised_models(kind, dim, split, pooling, said, tmp_path):
    exact = torchrec_original(kind, lengths=4, dim=dim, pooling=pooling)
    original = quantise(exact, split=split)
    assert original.state[f"{EBC}.t_cat_0.weight"].dtype == torch.uint8
    assert difference(exact.logits, original.logits) > 1e-5  # quantising is seen
    # torch refuses to save the parts as they are: views of the same bytes in two dtypes
    state = {name: tensor.clone() for name, tensor in original.state.items()}
    torch.save(state if split else original.state, tmp_path / "model.pt")
    config = ModelConfig(pooling=pooling, table_type=said)
    assert_agrees(tmp_path / "model.pt", original, config)
    info = infer_model(open_checkpoint(tmp_path / "model.pt"), config)
    assert {table.dtype for table in info.spec.tables} == {"fp32"}
    fact = next(fact for fact in info.facts if fact.subject == "table types")
    assert fact.value == "11 of 11 tables int8, decoded to fp32"
    assert fact.source == ("inferred" if said is None else "given")
    if said is not None:
        with pytest.raises(ArchitectureError, match="the type of 11 tables") as caught:
            infer_model(open_checkpoint(tmp_path / "model.pt"))
        assert "table_type: {t_cat_0: " in caught.value.hint


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            {"t_cat_1.weight": torch.ones(7, 9, dtype=torch.uint8)},
            "rows of 9 bytes; those of 6 elements",
        ),
        ({"t_cat_1.weight_qscale": torch.ones(3)}, r"has shape \[3\], expected \[7, 1\]"),
        ({"t_cat_1.weight_qscale": torch.ones(7)}, "has a scale or a bias, not both"),
    ],
)
def test_rows_that_do_not_fit(edit, says, tmp_path):
    state = torchrec_original("dot").state
    table = f"{EBC}.t_cat_1.weight"
    state[table] = torch.ones(len(state[table]), 16, dtype=torch.uint8)
    state |= {f"{EBC}.{name}": tensor for name, tensor in edit.items()}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ArchitectureError) as caught:
        infer_model(open_checkpoint(tmp_path / "model.pt"), ModelConfig(table_type="int8"))
    assert any(re.search(says, line) for line in caught.value.details), caught.value.details


def test_tables_of_one_pooling_stand_together(tmp_path):
    """Quantising regroups them: with pooling given feature by feature, the file tells no order."""
    state = quantise(torchrec_original("dot", lengths=1, dim=6)).state
    renamed = {re.sub(r"t_cat_(\d+)", lambda m: "t_" + "xb"[int(m[1]) % 2] * (int(m[1]) + 1), n): t
               for n, t in state.items()}  # fmt: skip
    torch.save(renamed, tmp_path / "model.pt")
    int8 = ModelConfig(table_type="int8")
    names = infer_model(open_checkpoint(tmp_path / "model.pt"), int8).spec.feature_names
    mixed = ModelConfig(table_type="int8", pooling={names[0]: "mean"})
    with pytest.raises(ArchitectureError, match="the order in which the features"):
        infer_model(open_checkpoint(tmp_path / "model.pt"), mixed)
