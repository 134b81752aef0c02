"""Seeded mutations of every container: each ends in an answer or in a DmtError, and soon."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.errors import DmtError
from dmt_convert.families import infer_model
from support.checkpoints.containers import SAVES

MUTATIONS = 150
MAX_SECONDS = 2.0
INTERESTING = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x80\x02", b".", b"PK\x03\x04")


def outcome(path: Path) -> str:
    """Open, understand and read all of a file."""
    try:
        info = infer_model(open_checkpoint(path))
        for tensor in info.checkpoint.tensors:
            read_tensor(tensor)
    except DmtError as error:
        return "refused" if error.expected and error.hint else "refused without a hint"
    return "read"


def mutate(raw: bytes, limits: list[tuple[int, int]], rng: random.Random) -> bytes:
    """Change a few bytes within the given ranges: flip, overwrite, cut out or repeat."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        begin, end = rng.choice(limits)
        at = rng.randrange(begin, min(end, len(data)))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            piece = rng.choice(INTERESTING)
            data[at : at + len(piece)] = piece
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        else:
            data[at:at] = data[at : at + rng.randrange(1, 9)]
    return bytes(data)


def header_ranges(kind: str, raw: bytes) -> list[tuple[int, int]]:
    """Where the container keeps what is not weights."""
    if kind == "safetensors":
        return [(0, 8 + int.from_bytes(raw[:8], "little"))]
    if kind == "torch":
        pickled = raw.index(b"PK\x03\x04", 1)
        return [(0, pickled), (raw.index(b"PK\x01\x02"), len(raw))]
    return [(0, len(raw))]


@pytest.mark.parametrize("checksums", [True, False])
def test_mutations(save, checksums, state, tmp_path):
    import torch

    torch.serialization.set_crc32_options(checksums)
    try:
        path = save(state, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert outcome(path) == "read"
    kind = {".pt": "torch", ".pth": "legacy", ".safetensors": "safetensors"}.get(path.suffix, "dcp")
    target = path / ".metadata" if path.is_dir() else path
    raw = target.read_bytes()
    limits = header_ranges(kind, raw)
    rng = random.Random(f"{kind} {checksums}")
    counts: Counter[str] = Counter()
    for number in range(MUTATIONS):
        target.write_bytes(mutate(raw, limits, rng))
        begin = time.process_time()
        try:
            counts[outcome(path)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} of {kind}") from error
        assert time.process_time() - begin < MAX_SECONDS, number
    assert counts["refused"] > MUTATIONS // 4, counts


def test_mutated_payloads(state, tmp_path):
    path = SAVES["dcp"](state, tmp_path)
    payload = path / "__0_0.distcp"
    raw = payload.read_bytes()
    rng = random.Random(5)
    counts = Counter[str]()
    for _ in range(60):
        payload.write_bytes(mutate(raw, [(0, len(raw))], rng))
        counts[outcome(path)] += 1
    assert counts["refused"] > 10
