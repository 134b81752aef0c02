"""Streams become files that the official library reads; damage on the way is refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dmt_convert.checkpoint import CHUNK_BYTES, ZEROS, ByteRows
from dmt_convert.errors import CheckpointError
from dmt_convert.files.digest import TreeDigest
from dmt_convert.files.safetensors_writer import (
    StreamedFile,
    TensorSource,
    array_source,
    first_non_finite,
    write_safetensors,
)

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def chunked(data: bytes, sizes: list[int]) -> Iterator[ByteRows]:
    position = 0
    for size in [*sizes, len(data)]:
        part = data[position : position + size]
        if part:
            yield np.frombuffer(part, dtype=np.uint8)
        position += size


def source_of(tensor: torch.Tensor, sizes: list[int]) -> TensorSource:
    data = tensor.view(torch.uint8).numpy().tobytes()
    return TensorSource(
        name="table",
        dtype=next(name for name, dtype in TORCH.items() if dtype == tensor.dtype),
        shape=tuple(tensor.shape),
        chunks=lambda: chunked(data, sizes),
        origin="table 'x'",
    )


@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 9),
    dtype=st.sampled_from(list(TORCH)),
    sizes=st.lists(st.integers(1, 50).map(lambda n: n * 4), max_size=4),
)
def test_tensors_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: int, dim: int, dtype: str, sizes: list[int]
) -> None:
    tensor = torch.randn(rows, dim).to(TORCH[dtype])
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    extra = np.arange(3, dtype=np.float32)
    digests = write_safetensors(
        path, [source_of(tensor, sizes), array_source("extra", extra)], metadata={"a": "b"}
    )
    found = load_file(path)
    assert torch.equal(found["table"].view(torch.uint8), tensor.view(torch.uint8))
    assert found["extra"].tolist() == [0, 1, 2]
    whole = TreeDigest()
    whole.update(np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), dtype=np.uint8))
    assert digests["table"] == whole.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", TORCH)
def test_non_finite_values_are_refused_with_their_place(
    tmp_path: Path, dtype: str, value: float
) -> None:
    tensor = torch.zeros(50, 8, dtype=TORCH[dtype])
    tensor[41, 3] = value
    with pytest.raises(CheckpointError, match=r"table 'x' holds NaN or Inf \(first at \[41, 3\]"):
        write_safetensors(tmp_path / "x", [source_of(tensor, [64, 128])], metadata={})


@pytest.mark.parametrize("dtype", TORCH)
def test_the_largest_and_smallest_finite_values_pass(dtype: str) -> None:
    info = torch.finfo(TORCH[dtype])
    values = torch.tensor([info.max, info.min, info.tiny, -0.0, info.smallest_normal / 2])
    chunk = values.to(TORCH[dtype]).view(torch.uint8).numpy()
    assert first_non_finite(chunk, dtype) is None


def test_holes_stay_holes_and_have_the_digest_of_zeros(tmp_path: Path) -> None:
    length = 4 * CHUNK_BYTES + 4096
    zeros = np.zeros(length, dtype=np.uint8)

    def source(holes: bool) -> TensorSource:
        def chunks() -> Iterator[ByteRows]:
            for begin in range(0, length, CHUNK_BYTES):
                part = zeros[begin : begin + CHUNK_BYTES]
                yield ZEROS if holes and len(part) == CHUNK_BYTES else part

        return TensorSource(
            name="t",
            dtype="fp32",
            shape=(length // 16, 4),
            chunks=chunks,
            origin="t",
        )

    sparse = write_safetensors(tmp_path / "sparse", [source(True)], metadata={})
    dense = write_safetensors(tmp_path / "dense", [source(False)], metadata={})
    assert sparse == dense
    assert (tmp_path / "sparse").read_bytes() == (tmp_path / "dense").read_bytes()
    assert (tmp_path / "sparse").stat().st_blocks * 512 < CHUNK_BYTES


def test_any_number_of_late_tensors(tmp_path: Path) -> None:
    """The dense part of a deep model has thousands of tensors, which are known last."""
    late = [array_source(f"cross.{i}.bias", np.full(2, i, np.float32)) for i in range(3000)]
    file = StreamedFile(tmp_path / "x", [], metadata={})
    file.write_large()
    assert len(file.finish(late)) == 3000
    found = load_file(tmp_path / "x")
    assert all(found[f"cross.{i}.bias"].tolist() == [i, i] for i in range(3000))


def test_late_tensors_follow_large_ones(tmp_path: Path) -> None:
    table = torch.randn(30, 4)
    file = StreamedFile(tmp_path / "x", [source_of(table, [64])], metadata={"a": "b"})
    file.write_large()
    digests = file.finish([array_source("module", np.ones(3, np.float32))])
    assert list(digests) == ["table", "module"]
    found = load_file(tmp_path / "x")
    assert torch.equal(found["table"], table)
    assert found["module"].tolist() == [1, 1, 1]


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x", [], metadata={})
    assert (tmp_path / "x").read_text() == "precious"
