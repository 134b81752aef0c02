"""Scoring flat checkpoints and bundles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmt_convert.conversion import Sample
from dmt_convert.conversion.quality import compare_models, logits_of
from dmt_convert.data import open_data
from dmt_convert.errors import CheckpointError, DataError
from dmt_convert.scoring import open_model, score_data, scored_model
from support.scored import write_rows


def _by_hand(checkpoint, data):
    """The logits of the dot model, row by row, from the saved tensors."""
    weights = {name: value.numpy().astype(float) for name, value in torch.load(checkpoint).items()}
    arrays = np.load(data)
    logits = []
    for row in range(len(arrays["dense"])):
        stem = "dense_arch.model._mlp.0._linear"
        dense = weights[f"{stem}.weight"] @ arrays["dense"][row] + weights[f"{stem}.bias"]
        vectors = [np.maximum(dense, 0)]
        for i in range(4):
            offsets = arrays[f"offsets_{i}"]
            ids = arrays[f"values_{i}"][offsets[row] : offsets[row + 1]]
            table = f"sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight"
            vectors.append(weights[table][ids].sum(axis=0))
        pairs = [vectors[i] @ vectors[j] for i in range(5) for j in range(i + 1, 5)]
        x = np.concatenate([vectors[0], pairs])
        for stem in ("over_arch.model.0._mlp.0._linear", "over_arch.model.1"):
            x = weights[f"{stem}.weight"] @ np.maximum(x, 0 if "1" in stem[-1] else -np.inf)
            x += weights[f"{stem}.bias"]
        logits.append(x[0])
    return np.array(logits)


def test_flat_and_passthrough_scores_are_the_models(scored_checkpoint, scored_bundles, tmp_path):
    data = write_rows(tmp_path / "probe.npz", 50)
    flat, bundle = open_model(scored_checkpoint), open_model(scored_bundles["passthrough"])
    assert (flat.kind, bundle.kind) == ("flat", "bundle")
    assert flat.bundle is None and bundle.bundle is not None
    assert flat.spec == bundle.spec
    scores = score_data(flat, data)
    np.testing.assert_allclose(
        scores.logits, _by_hand(scored_checkpoint, data), rtol=1e-4, atol=1e-4
    )
    assert np.array_equal(scores.logits, score_data(bundle, data).logits)
    assert scores.labels is None and scores.truth is None and scores.seconds > 0


def test_batches_keep_the_order_of_rows(scored_checkpoint, tmp_path, monkeypatch):
    logits = np.arange(50, dtype=np.float32)
    data = write_rows(tmp_path / "probe.npz", 50, logits=logits)
    model = open_model(scored_checkpoint)
    whole = score_data(model, data)
    monkeypatch.setattr(scored_model, "BATCH_ROWS", 7)
    seen = []
    parts = score_data(model, data, progress=lambda step, done, total: seen.append((done, total)))
    np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert np.array_equal(parts.truth, logits)
    assert seen[0] == (7, 50) and seen[-1] == (50, 50)
    some = score_data(model, data, max_rows=9)
    assert len(some.logits) == len(some.truth) == 9
    np.testing.assert_allclose(some.logits, whole.logits[:9], rtol=1e-4, atol=1e-4)


def test_data_without_rows_or_of_another_model_is_refused(scored_checkpoint, tmp_path):
    model = open_model(scored_checkpoint)
    with pytest.raises(DataError, match="rows"):
        score_data(model, write_rows(tmp_path / "empty.npz", 0))
    path = tmp_path / "other.npz"
    np.savez(path, dense=np.zeros((1, 3), np.float32), feature_names=np.array(["x"]),
             values_0=np.zeros(1, np.int64), offsets_0=np.array([0, 1]))  # fmt: skip
    with pytest.raises(DataError):
        score_data(model, path)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        open_model(tmp_path / "missing.pt")


def test_the_stages_end_in_the_score(scored_checkpoint, scored_bundles, tmp_path):
    data = open_data(write_rows(tmp_path / "probe.npz", 5))
    batch = next(iter(data.batches(5)))
    for path in (scored_checkpoint, *scored_bundles.values()):
        model = open_model(path)
        stages = dict(model.stages(batch))
        np.testing.assert_array_equal(stages["logit"].numpy(), model.score(batch))


def test_the_quality_table_holds_the_flat_model_first(scored_checkpoint, scored_bundles, tmp_path):
    data = open_data(write_rows(tmp_path / "probe.npz", 1500))
    batch = next(iter(data.batches(1500)))
    sample = Sample(
        batch=batch, pooled=np.zeros((1500, 16), np.float32), source="calibration",
        description="probe",
    )  # fmt: skip
    flat = open_model(scored_checkpoint).module
    models = {kind: open_model(path).module for kind, path in scored_bundles.items()}
    models["random initialisation"] = models["dlrm"]
    found = {name: (lambda model=model: model) for name, model in models.items()}
    quality = compare_models(flat, found, sample)
    assert [row.name for row in quality.rows] == [
        "flat", "passthrough", "dlrm", "random initialisation",
    ]  # fmt: skip
    assert quality.rows[0].r2 == 1 and quality.rows[1].max_abs_diff == 0
    assert 0 < quality.rows[2].r2 < 1 and quality.rows[2].auc is None
    assert quality.converted.name == "dlrm"
    assert quality.count == 1500 and not quality.labelled
    assert quality.to_json()["rows"][0]["name"] == "flat"
    assert logits_of(flat, batch).shape == (1500,)


@pytest.mark.parametrize("tensor", ["embedding_bags.t_cat_2", "over_arch.model.1"])
def test_bytes_that_changed_on_disk_are_not_scored(scored_checkpoint, tmp_path, tensor):
    raw = bytearray(scored_checkpoint.read_bytes())
    name, value = next((n, v) for n, v in torch.load(scored_checkpoint).items() if tensor in n)
    at = raw.index(value.numpy().tobytes())
    raw[at + 1] ^= 1
    copy = tmp_path / "flipped.pt"
    copy.write_bytes(raw)
    with pytest.raises(CheckpointError, match="has the checksum") as caught:
        open_model(copy)
    assert name in caught.value.found


def test_a_weight_that_is_no_number_is_named_as_the_trainer_does(scored_checkpoint, tmp_path):
    state = torch.load(scored_checkpoint)
    state["over_arch.model.1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"^over_arch\.model\.1\.bias holds NaN"):
        open_model(tmp_path / "nan.pt")
