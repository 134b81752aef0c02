"""Seeded mutations of the files that describe a model: each ends in an answer or in a DmtError."""

from __future__ import annotations

import random
import re
import shutil

import pytest

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import DmtError
from dmt_convert.families import infer_model
from dmt_convert.model import open_flat_model

MUTATIONS = 30
WORDS = (
    b"null",
    b"{}",
    b"[]",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"9" * 30,
    b"\xff",
    b"{",
)


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Flip a bit, cut out or repeat some bytes, or put an odd word in a word's place."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(data)), rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 30)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        else:
            spans = [m.span() for m in re.finditer(rb'-?\d+|"[^"]*"|\w+', bytes(data))]
            begin, end = rng.choice(spans)
            data[begin:end] = rng.choice(WORDS)
    return bytes(data)


@pytest.mark.parametrize(
    ("sample", "name"),
    [
        ("fuxictr-dlrm-dot", "feature_map.json"),
        ("fuxictr-dlrm-dot", "params.json"),
        ("tzrec-dlrm", "pipeline.config"),
    ],
)
def test_mutations(shared, tmp_path, sample, name):
    folder = tmp_path / sample
    shutil.copytree(shared / "checkpoints" / sample, folder)
    raw, rng = (folder / name).read_bytes(), random.Random(name)
    refused: list[DmtError] = []
    for _ in range(MUTATIONS):
        (folder / name).unlink()
        (folder / name).write_bytes(mutate(raw, rng))
        try:
            open_flat_model(infer_model(open_checkpoint(folder)))
        except DmtError as error:
            refused.append(error)
    assert MUTATIONS // 2 < len(refused) < MUTATIONS
    assert all(error.expected and error.hint and str(error).encode() for error in refused)
