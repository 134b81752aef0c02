"""What is read of a bundle is compared with its digests: whole tensors, and single rows."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dmt_convert as dmt
from dmt_convert.bundle import bundle as bundle_module
from dmt_convert.bundle import open_bundle
from dmt_convert.checkpoint import (
    ZEROS,
    TensorInfo,
    gather_bytes,
    gather_rows,
    read_safetensors,
    read_tensor,
    stream_tensor,
)
from dmt_convert.errors import BundleError
from dmt_convert.files import (
    TreeDigest,
    array_source,
    exchange_folders,
    guarded,
    write_blocks,
)
from dmt_convert.files.digest import BLOCK_BYTES, PREFIX, digest_of_blocks
from dmt_convert.files.safetensors_writer import write_safetensors
from support.commands import run_dmt
from support.refusals import check_refusal
from support.scored import ROWS as TABLE_ROWS
from support.scored import convert_model, write_model, write_rows

ROWS, WIDTH = 3001, 32
"""A table of several blocks, the last of which is cut."""
ROWS_PER_BLOCK = BLOCK_BYTES // (4 * WIDTH)


@pytest.fixture(params=["with blocks", "of an older version", "damaged blocks"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> TensorInfo:
    """A table that checks itself, behind another tensor."""
    rng = np.random.default_rng(0)
    sources = [
        array_source("before", rng.standard_normal(5)),
        array_source("table", rng.standard_normal((ROWS, WIDTH))),
    ]
    path = tmp_path / "weights.safetensors"
    digests = write_safetensors(path, sources, metadata={})
    if request.param != "of an older version":
        found = []
        for source in sources:
            digest = TreeDigest()
            for chunk in source.chunks():
                digest.update(chunk)
            digest.finish()
            found.append(digest.blocks ^ (request.param == "damaged blocks"))
        write_blocks(path, found)
    return reopen(path, digests)


def reopen(path: Path, digests: dict[str, str]) -> TensorInfo:
    tensors = {tensor.name: tensor for tensor in read_safetensors(path).tensors}
    return guarded(tensors, digests, error=BundleError, what="the bundle b", hint="copy it again")[
        "table"
    ]


def flip(info: TensorInfo, row: int, bit: int = 6) -> None:
    (piece,) = info.pieces
    with piece.path.open("r+b") as file:
        file.seek(piece.offset + row * 4 * WIDTH + 3)
        (value,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value ^ 1 << bit]))


READS: dict[str, Callable[[TensorInfo], object]] = {
    "stream": lambda info: [*stream_tensor(info)],
    "read": read_tensor,
    "row": lambda info: gather_rows(info, np.array([700])),
    "rows around": lambda info: gather_bytes(info, np.array([3000, 699, 701])),
}


@pytest.mark.parametrize("read", READS)
def test_whole_tables_pass(table: TensorInfo, read: str) -> None:
    READS[read](table)
    READS[read](table)


@pytest.mark.parametrize("read", READS)
def test_a_flipped_bit_in_what_is_touched_is_found(table: TensorInfo, read: str) -> None:
    flip(table, 700)
    with pytest.raises(BundleError, match=r"the bundle b changed on disk: table") as refused:
        READS[read](table)
    assert "copy" in refused.value.hint


def test_the_rows_are_named(table: TensorInfo) -> None:
    blocks = table.pieces[0].path.with_suffix(".blocks")
    flip(table, ROWS - 1)
    named = blocks.exists() and len(blocks.read_bytes()) and "rows 2816 to 3000"
    with pytest.raises(BundleError) as refused:
        gather_rows(table, np.array([ROWS - 1]))
    known = table.pieces[0].guard._known_blocks()  # type: ignore[union-attr]
    assert (str(named) in refused.value.found) == (known is not None)


def test_rows_that_are_not_touched_cost_nothing(table: TensorInfo) -> None:
    """Where the checksums of blocks are known, others may be damaged; a stream finds it."""
    known = table.pieces[0].guard._known_blocks() is not None  # type: ignore[union-attr]
    flip(table, 700)
    far = np.array([0, 5 * ROWS_PER_BLOCK, ROWS - 1])
    if known:
        gather_rows(table, far)
    else:
        with pytest.raises(BundleError):
            gather_rows(table, far)
    with pytest.raises(BundleError):
        read_tensor(table)


@given(st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=5), st.booleans())
def test_the_digest_follows_from_the_blocks(sizes: list[int], hole: bool) -> None:
    digest, plain, total = TreeDigest(), TreeDigest(), 0
    if hole:
        digest.update(ZEROS)
        plain.update(ZEROS.copy())
        total += ZEROS.nbytes
    for i, size in enumerate(sizes):
        chunk = np.full(size, i + 1, dtype=np.uint8)
        digest.update(chunk)
        plain.update(chunk)
        total += size
    found = digest.finish()
    assert found == plain.finish() == digest_of_blocks(digest.blocks, total)
    assert len(digest.blocks) == -(-total // BLOCK_BYTES)


def test_digests_are_those_of_earlier_versions() -> None:
    digest = TreeDigest()
    digest.update(np.arange(9 << 18, dtype="<u4").view(np.uint8))
    expected = "293b431e51910ce0"
    assert digest.finish().startswith(PREFIX + expected)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of the same shape."""
    folder = tmp_path_factory.mktemp("bundles")
    return (
        convert_model(write_model(folder / "x.pt"), folder / "x"),
        convert_model(write_model(folder / "y.pt", seed=1), folder / "y"),
    )


@pytest.fixture
def copy(bundles: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.npz", 40)


def damage(bundle: Path, tensor: str, *, old: bool = False) -> None:
    opened = open_bundle(bundle)
    infos = dict(opened.dense)
    for tower in opened.towers:
        infos |= tower
    (piece,) = infos[tensor].pieces
    data = bytearray(piece.path.read_bytes())
    data[piece.offset + 3] ^= 0x40
    piece.path.write_bytes(data)
    if old:
        for path in piece.path.parent.glob("*.blocks"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "tensor", "old"),
    [
        ("score", "tables.t_cat_0.weight", False),
        ("score", "tables.t_cat_0.weight", True),
        ("verify", "over_arch.0.weight", False),
    ],
)
def test_a_command_refuses_a_damaged_bundle(
    copy: Path, rows: Path, tensor: str, command: str, old: bool
) -> None:
    damage(copy, tensor, old=old)
    args = {"score": (copy, "--data", rows), "verify": (copy, copy)}[command]
    run = run_dmt(command, *args, "--json")
    check_refusal(run, "BundleError", f"changed on disk: {tensor}")


def test_a_reader_goes_on_with_what_it_opened(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """`--force` replaces a bundle that somebody has open."""
    x, y = (Path(shutil.copytree(bundle, tmp_path / bundle.name)) for bundle in bundles)
    bundle = open_bundle(x)
    table = bundle.towers[0]["tables.t_cat_0.weight"]
    before = read_tensor(table)
    exchange_folders(x, y)
    shutil.rmtree(y)
    assert np.array_equal(read_tensor(table), before)
    assert np.array_equal(gather_rows(table, np.arange(TABLE_ROWS[0])), before)
    assert not np.array_equal(
        read_tensor(open_bundle(x).towers[0]["tables.t_cat_0.weight"]), before
    )


def test_what_is_read_by_name_is_of_the_same_bundle(
    bundles: tuple[Path, Path], tmp_path: Path, rows: Path
) -> None:
    x, y = (Path(shutil.copytree(bundle, tmp_path / bundle.name)) for bundle in bundles)
    bundle, plan = open_bundle(x), open_bundle(x).plan
    expected = dmt.score(x, rows).logits
    bundle.check_in_place()
    assert bundle.plan == plan
    exchange_folders(x, y)
    assert np.array_equal(dmt.score(bundle, rows).logits, expected)
    assert not np.array_equal(dmt.score(x, rows).logits, expected)
    for use in (bundle.check_in_place, lambda: bundle.plan):
        with pytest.raises(BundleError, match="was replaced since it was opened"):
            use()


def test_a_bundle_that_is_replaced_while_it_is_opened(
    bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader sees one of the two, and no damage."""
    x, y = (Path(shutil.copytree(bundle, tmp_path / bundle.name)) for bundle in bundles)
    expected = {name: read_tensor(info).tolist() for name, info in open_bundle(y).dense.items()}
    read, turns = bundle_module.read_manifest, []

    def replaced(folder: Path) -> object:
        manifest = read(folder)
        if not turns:
            exchange_folders(x, y)
        turns.append(folder)
        return manifest

    monkeypatch.setattr(bundle_module, "read_manifest", replaced)
    bundle = open_bundle(x)
    assert len(turns) == 2
    assert {name: read_tensor(info).tolist() for name, info in bundle.dense.items()} == expected
