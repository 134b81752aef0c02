"""HugeCTR, from its documented layout: graphs score as their layers say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import gather_rows, open_checkpoint
from dmt_convert.errors import ArchitectureError, CheckpointError, ConfigError
from dmt_convert.families import infer_model
from dmt_convert.model.networks import LayerGraph
from support.trainers import hugectr_files
from support.trainers.comparison import draw_rows, same_logits

SIZES = [6, 9, 4]


def shuffled(count: int, dim: int, seed: int, absent=()) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = np.setdiff1d(rng.permutation(count), absent)[rng.permutation(count - len(absent))]
    return keys, rng.standard_normal((len(keys), dim)).astype(np.float32)


def by_key(sparse, count: int) -> torch.Tensor:
    table = np.zeros((count, sparse[1].shape[1]), np.float32)
    table[sparse[0]] = sparse[1]
    return torch.from_numpy(table)


def look_up(table: torch.Tensor, bag, shift: int = 0) -> torch.Tensor:
    values, offsets = torch.from_numpy(bag.values + shift), torch.from_numpy(bag.offsets)
    return torch.nn.functional.embedding_bag(
        values, table, offsets, mode="sum", include_last_offset=True
    )


@pytest.fixture
def wide_and_deep(tmp_path):
    """A wide part, FM, a cross network and a DNN, all in one graph."""
    w, width = hugectr_files.Weights(), 3 * hugectr_files.DIM + hugectr_files.DENSE
    layers = [
        hugectr_files.data_layer(),
        hugectr_files.embedding("wide_data", "wide", 1),
        hugectr_files.embedding("deep_data", "deep", hugectr_files.DIM, SIZES),
        {"type": "Reshape", "bottom": "deep", "top": "flat", "leading_dim": 3 * hugectr_files.DIM},
        {"type": "Reshape", "bottom": "wide", "top": "wide1", "leading_dim": 1},
        {"type": "Concat", "bottom": ["flat", "dense"], "top": "x"},
        {"type": "Slice", "bottom": "x", "top": ["x1", "x2"], "ranges": [[0, width], [0, width]]},
        {"type": "MultiCross", "bottom": "x1", "top": "crossed", "mc_param": {"num_layers": 2}},
        hugectr_files.fc("x2", "fc1", 6),
        {"type": "ReLU", "bottom": "fc1", "top": "relu1"},
        {"type": "Dropout", "bottom": "relu1", "top": "drop1", "rate": 0.5},
        {"type": "WeightMultiply", "bottom": "dense", "top": "scaled", "weight_dims": [5, 4]},
        {"type": "Concat", "bottom": ["flat", "scaled"], "top": "fields"},
        {"type": "FmOrder2", "bottom": "fields", "top": "fm", "out_dim": 4},
        {"type": "ReduceSum", "bottom": "fm", "top": "fm1", "axis": 1},
        {"type": "Concat", "bottom": ["drop1", "crossed"], "top": "joined"},
        hugectr_files.fc("joined", "fc2", 1),
        {"type": "Add", "bottom": ["fc2", "wide1", "fm1"], "top": "logit"},
        hugectr_files.LOSS,
    ]
    cross = [(w(width), w(width)) for _ in range(2)]
    fc1, scale, fc2 = (w(width, 6), w(6)), w(5, 4), (w(6 + width, 1), w(1))
    sparse = [shuffled(11, 1, 0), shuffled(19, hugectr_files.DIM, 1, absent=[2, 7])]
    hugectr_files.write(tmp_path, layers, w, sparse)
    names = ["wide", "deep_0", "deep_1", "deep_2"]
    batch = draw_rows(dict(zip(names, [11, *SIZES], strict=True)), 5, multi=("wide",))
    wide, deep = by_key(sparse[0], 11), by_key(sparse[1], 19)
    vectors = [look_up(deep, batch.bags[i + 1], sum(SIZES[:i])) for i in range(3)]
    dense = torch.from_numpy(batch.dense)
    x0 = x = torch.cat([*vectors, dense], dim=1)
    for weight, bias in cross:
        x = x0 * (x @ weight)[:, None] + bias + x
    deep_out = torch.relu(x0 @ fc1[0] + fc1[1])
    fields = torch.stack([*vectors, *(dense[:, i : i + 1] * scale[i] for i in range(5))], dim=1)
    fm = 0.5 * (fields.sum(1) ** 2 - (fields**2).sum(1)).sum(1)
    head = torch.cat([deep_out, x], dim=1) @ fc2[0] + fc2[1]
    return tmp_path, batch, head.squeeze(1) + look_up(wide, batch.bags[0]).squeeze(1) + fm


def test_a_graph_scores_as_its_layers_say(wide_and_deep):
    info = same_logits(*wide_and_deep)
    assert info.spec.family == "hugectr" and info.spec.num_dense == 5
    assert [table.rows for table in info.spec.tables] == [11, *SIZES]
    assert not np.any(gather_rows(info.table_info("deep_0"), np.array([2])))  # never seen
    assert np.all(gather_rows(info.table_info("deep_1"), np.array([0, 5])))


def test_swapped_keys_show(wide_and_deep):
    path, batch, expected = wide_and_deep
    keys = path / "wdl1_sparse_20.model" / "key"
    keys.write_bytes(np.frombuffer(keys.read_bytes(), "<i8")[::-1].tobytes())
    with pytest.raises(AssertionError, match="Mismatch"):
        same_logits(path, batch, expected)


def test_a_dlrm_whose_slots_share_their_keys(tmp_path):
    w, dim = hugectr_files.Weights(), hugectr_files.DIM
    layers = [
        hugectr_files.data_layer(),
        hugectr_files.embedding("deep_data", "deep", dim, combiner="mean"),
        hugectr_files.fc("dense", "bottom", dim, fused=True),
        {"type": "Interaction", "bottom": ["bottom", "deep"], "top": "pairs"},
        hugectr_files.fc("pairs", "logit", 1),
        hugectr_files.LOSS,
    ]
    bottom, top = (w(5, dim), w(dim)), (w(dim + 6 + 1, 1), w(1))
    sparse = shuffled(12, dim, 2)
    hugectr_files.write(tmp_path, layers, w, [sparse])
    batch = draw_rows({f"deep_{i}": 12 for i in range(3)}, 5)
    table = by_key(sparse, 12)
    dense = torch.relu(torch.from_numpy(batch.dense) @ bottom[0] + bottom[1])
    vectors = [dense, *(look_up(table, bag) for bag in batch.bags)]
    pairs = [(vectors[i] * vectors[j]).sum(1, keepdim=True) for i in range(4) for j in range(i)]
    x = torch.cat([dense, *pairs, torch.zeros(len(dense), 1)], dim=1)
    info = same_logits(tmp_path, batch, x @ top[0] + top[1])
    assert [f.pooling for f in info.spec.features] == ["mean"] * 3
    assert {f.table for f in info.spec.features} == {"deep"}


def edit_graph(path: Path, change) -> None:
    graph = json.loads((path / "model.json").read_text())
    change(graph["layers"])
    (path / "model.json").write_text(json.dumps(graph))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda layers: layers[8].update(type="GRU"), "a layer of type GRU"),
        (lambda layers: layers[8]["fc_param"].update(num_output=7), "tensors"),
        (lambda layers: layers[8]["fc_param"].update(num_output=-1), "layer 8 of the graph"),
        (lambda layers: layers.pop(), "without one logit"),
        (lambda layers: layers[5].update(bottom=["flat", "nothing"]), "layer 5 of the graph"),
        (lambda layers: layers[2]["sparse_embedding_hparam"].pop("slot_size_array"), None),
    ],
)
def test_graphs_that_do_not_fit(wide_and_deep, change, says):
    path, *_ = wide_and_deep
    edit_graph(path, change)
    if says is None:  # without sizes all slots share one table
        assert len(infer_model(open_checkpoint(path)).spec.tables) == 2
        return
    with pytest.raises(ArchitectureError, match=says):
        infer_model(open_checkpoint(path))


def test_two_models_in_one_folder_are_refused(wide_and_deep):
    path, *_ = wide_and_deep
    (path / "other_dense_20.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds 2 dense models of step 20"):
        open_checkpoint(path)
    (path / "other_dense_20.model").rename(path / "other_dense_10.model")
    infer_model(open_checkpoint(path))


def test_a_network_with_unknown_layers_is_not_built():
    layers = [{"type": "GRU", "bottom": ["dense"], "top": ["out"]}]
    config = {"dense": "dense", "output": "out", "embeddings": [], "layers": layers}
    with pytest.raises(ConfigError, match="a layer of type 'GRU'"):
        LayerGraph(config, [], 1)


def test_hashed_keys_are_refused(wide_and_deep):
    path, *_ = wide_and_deep
    keys = path / "wdl1_sparse_20.model" / "key"
    values = np.frombuffer(keys.read_bytes(), "<i8").copy()
    values[3] = 2**60
    keys.write_bytes(values.tobytes())
    with pytest.raises(ArchitectureError, match="hashed keys have no row number"):
        infer_model(open_checkpoint(path))
    values[3] = values[4]
    keys.write_bytes(values.tobytes())
    with pytest.raises(ArchitectureError, match="keys that occur twice"):
        infer_model(open_checkpoint(path))
    keys.write_bytes(values.tobytes()[:-8])
    with pytest.raises(CheckpointError, match="a vector of the same length"):
        open_checkpoint(path)
