"""A value that is absurd beside all others is found; heavy tails and frozen tables are not."""

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import (
    check_outliers,
    find_outlier,
    find_outlier_in_bytes,
    outliers,
)
from dmt_convert.errors import CheckpointError
from dmt_convert.files.safetensors_writer import TensorSource, write_safetensors


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.05


@pytest.mark.parametrize("value", [1e37, -1e37, 1e20, -4e7, 1e5])
@pytest.mark.parametrize("shape", [(500, 16), (16,), (3, 4, 5)])
def test_one_absurd_value_is_found(value, shape):
    array = weights(*shape)
    array.reshape(-1)[7] = value
    found = find_outlier(array)
    assert found is not None and found.index == 7 and found.count == 1
    assert found.value == pytest.approx(value) and found.rms == pytest.approx(0.05, rel=0.5)


def test_several_do_not_hide_each_other():
    array = weights(1000, 16)
    array.reshape(-1)[[5, 99, 7000]] = [3e8, -5e9, 1e6]
    found = find_outlier(array)
    assert found is not None and (found.index, found.count) == (99, 3)
    array[:] = 0
    array[3, :4] = 1e30
    assert find_outlier(array).count == 4


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1000, 8), np.float32),
        np.float32([]),
        np.float32([1e10]),
        np.where(np.arange(1000)[:, None] == 3, weights(1000, 8) * 1e5, 0),
        np.where(np.arange(100_000)[:, None] == 3, np.float32(1), np.float32(0)),
        np.where(np.arange(1000)[:, None] == 3, np.float32(1), weights(1000, 8) * 1e-12),
        weights(1000, 8) * 1e9,
        np.random.default_rng(0).pareto(0.5, 200_000).astype(np.float32),
        np.random.default_rng(0).standard_cauchy(200_000).astype(np.float32),
        np.exp(4 * np.random.default_rng(0).standard_normal(200_000)).astype(np.float32),
        np.column_stack([np.arange(50) * 1e6 + 1.7e9, weights(50, 3)]),
    ],
    ids=[
        "zeros", "nothing", "a scalar", "one trained row", "one trained row of a vector",
        "one trained row over a tiny start", "large all over", "pareto", "cauchy", "log-normal",
        "a column of another unit",
    ],
)  # fmt: skip
def test_what_is_legitimate_passes(array):
    assert find_outlier(array) is None
    check_outliers(array, "weight")


def test_a_large_tensor_is_looked_at_in_blocks(monkeypatch):
    """Sorting all of it at once would take five times its memory."""
    seen = []

    def count(values, **options):
        seen.append(values.size)
        return find_outlier(values, **options)

    monkeypatch.setattr(outliers, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(outliers, "find_outlier", count)
    array = weights(401, 5)
    check_outliers(array, "w")
    assert seen == [669, 669, 667]
    array[300, 2] = 1e37
    with pytest.raises(CheckpointError, match="w, row 300, column 2: 1e"):
        check_outliers(array, "w")
    check_outliers(np.float32([]), "w")


def test_statistics_of_inputs_may_have_any_scale():
    array = np.float32([1.0, 1.0, 1e30, 2.0])
    check_outliers(array, "model.bn.running_var")
    with pytest.raises(CheckpointError, match=r"model.w, \[2\]: 1e\+30"):
        check_outliers(array, "model.w")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_type_is_looked_at_in_its_bytes(dtype, sign):
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    name, value = names.get(dtype, "fp16"), 6e4 if dtype is torch.float16 else 1e19
    tensor = torch.from_numpy(weights(2000, 8)).to(dtype)
    assert find_outlier_in_bytes(tensor.view(torch.uint8).numpy().reshape(-1), name) is None
    tensor[30, 2] = sign * value
    found = find_outlier_in_bytes(tensor.view(torch.uint8).numpy().reshape(-1), name)
    assert found is not None and found.index == 242
    assert find_outlier_in_bytes(np.full(80, 255, np.uint8), "int64") is None


@pytest.mark.parametrize("is_weight", [True, False])
def test_a_table_that_streams_past_is_refused_by_row_and_column(tmp_path, is_weight):
    table = weights(300, 8)
    table[250, 3] = 1e20
    raw = table.reshape(-1).view(np.uint8)
    source = TensorSource(
        name="table",
        dtype="fp32",
        shape=table.shape,
        chunks=lambda: iter([raw[:6400], raw[6400:]]),
        origin="table 't'",
        is_weight=is_weight,
    )
    if not is_weight:
        write_safetensors(tmp_path / "x", [source], metadata={})
        return
    with pytest.raises(CheckpointError, match="table 't', row 250, column 3: 1e\\+20") as caught:
        write_safetensors(tmp_path / "x", [source], metadata={})
    assert "--outliers accept" in caught.value.hint and "RMS" in caught.value.found
