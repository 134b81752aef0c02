"""Files that others write to while they are read are refused."""

import os

import numpy as np
import pytest

from dmt_convert.data import open_data, unchanged_files
from dmt_convert.errors import DataError
from support.data_files import WRITERS

STREAMED = [variant for variant in WRITERS if variant != "probe-npz"]  # a probe is held whole


def touch(file):
    """Write other bytes of the same size and, as a copy with its times kept does, an old date."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(1, 1))


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def replace(file):
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("change", [touch, cut, replace, remove])
@pytest.mark.parametrize("variant", STREAMED)
def test_a_change_is_refused(tmp_path, monkeypatch, variant, change):
    monkeypatch.setattr(unchanged_files, "_PAUSE", 0.0)
    dataset = open_data(WRITERS[variant](tmp_path))
    batches = dataset.batches(2)
    next(batches)
    change(dataset.files[-1])
    with pytest.raises(DataError, match="changed while it was read") as caught:
        list(batches)
    assert str(dataset.files[-1]) in caught.value.found and "copy" in caught.value.hint


@pytest.mark.parametrize("variant", STREAMED)
def test_the_last_look_comes_after_the_last_rows(tmp_path, monkeypatch, variant):
    monkeypatch.setattr(unchanged_files, "_PAUSE", 1e9)
    dataset = open_data(WRITERS[variant](tmp_path))
    batches = dataset.batches(dataset.num_rows)
    next(batches)
    touch(dataset.files[0])
    with pytest.raises(DataError, match="changed while it was read"):
        next(batches)
    with pytest.raises(DataError, match="changed while it was read"):
        next(dataset.batches(2))


@pytest.mark.parametrize("variant", WRITERS)
def test_rows_are_the_same(tmp_path, variant):
    dataset = open_data(WRITERS[variant](tmp_path))
    (whole,) = dataset.batches(dataset.num_rows)
    parts = list(dataset.batches(3, shuffle_seed=None))
    assert np.array_equal(whole.dense, np.concatenate([part.dense for part in parts]))
