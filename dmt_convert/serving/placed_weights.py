"""Put a bundle's weights below an export: shared by hard link, else copied, or quantised."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.bundle import DENSE_FILE, Bundle, tower_file
from dmt_convert.checkpoint import TensorInfo, read_safetensors, stream_tensor
from dmt_convert.config import TableCode
from dmt_convert.errors import BundleError
from dmt_convert.files import AlignedWriter, TreeDigest
from dmt_convert.model import RowCode
from dmt_convert.progress import Progress, no_progress
from dmt_convert.serving.export_manifest import OVER_ARCH, TOWER_WEIGHTS, tower_name
from dmt_convert.serving.quantisation import coded_bytes, read_ahead, write_coded

OVER_ARCH_WEIGHTS: Final = "over_arch.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFile:
    """A `.safetensors` file below an export, its header read."""

    path: str
    """Its path, relative to the export's folder."""
    tensors: Mapping[str, TensorInfo]
    """Its tensors by name, each one contiguous piece: a bundle's names; a table that is quantised
    has `tables.T.quantized`, `tables.T.scale` and `tables.T.zero_point` instead of `.weight`."""
    bytes: int
    """Its size."""
    digests: Mapping[str, str]
    """Digest of every tensor."""

    def weight(self, name: str) -> TensorInfo:
        """Return a tensor by name."""
        return self.tensors[name]

    def offset(self, name: str) -> int:
        """Where the bytes of a tensor begin in the file."""
        (piece,) = self.tensors[name].pieces
        return piece.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeights:
    """All weights of an export."""

    towers: tuple[PlacedFile, ...]
    """Tables and module of every tower."""
    over_arch: PlacedFile
    """Everything outside towers, under a bundle's names (`dense_arch.*`, `over_arch.*`, ...)."""


def place_weights(
    bundle: Bundle,
    staging: Path,
    folder_of: Callable[[str], str],
    *,
    quantize: TableCode = "none",
    copy: bool = False,
    progress: Progress = no_progress,
) -> PlacedWeights:
    """Share or copy the weights of a bundle, or write quantised tables.

    A shared file is the bundle's own under a second name: nothing here ever writes into one, and
    a bundle that is replaced or removed leaves it as it is.

    Args:
        bundle: The bundle.
        staging: The export's folder while it is being written.
        folder_of: Part (`tower_000`, ..., `over_arch`) -> folder of its weights below `staging`.
        quantize: How to store the tables.
        copy: Whether to share nothing.
        progress: Told of step, done and total, in bytes.

    Raises:
        BundleError: Bytes that were read are not those that the bundle was written with.
        ExportError: A row of a table does not fit the code.
        OSError: The disk is full, or fails.
    """
    placer = _Placer(bundle, staging, progress, copy=copy)
    towers = []
    for t, tensors in enumerate(bundle.towers):
        source, path = tower_file(t), f"{folder_of(tower_name(t))}/{TOWER_WEIGHTS}"
        if quantize == "none" or _is_stored_as(tensors, quantize):
            towers.append(placer.share(source, tensors, path))
        else:
            towers.append(placer.quantise(source, tensors, path, quantize))
    over_arch = placer.share(
        DENSE_FILE, bundle.dense, f"{folder_of(OVER_ARCH)}/{OVER_ARCH_WEIGHTS}"
    )
    return PlacedWeights(towers=tuple(towers), over_arch=over_arch)


def placed_bytes(bundle: Bundle, target: Path, quantize: TableCode, *, copy: bool = False) -> int:
    """Bytes that `place_weights` will write, where it can share what it may.

    Args:
        bundle: The bundle.
        target: A folder on the disk of the export.
        quantize: How to store the tables.
        copy: Whether to share nothing.
    """
    shares = not copy and bundle.path.stat().st_dev == target.stat().st_dev
    tables = bundle.manifest.model.flat.tables
    if quantize == "none":
        return 0 if shares else sum(table.nbytes for table in tables)
    return sum(coded_bytes(table, quantize) for table in tables)


def share_file(source: Path, target: Path) -> bool:
    """Give a file a second name; returns whether that was possible."""
    source = source.resolve()  # of a symbolic link, the link itself would be shared
    try:
        os.link(source, target)
    except OSError:  # another disk, a file system without links, too many of them, a foreign file
        return False
    return True


def _is_stored_as(tensors: Mapping[str, TensorInfo], code: RowCode) -> bool:
    """Whether all tables of a tower already are what they are to become."""
    return all(info.dtype == code for name, info in tensors.items() if name.startswith("tables."))


class _Placer:
    """Places one file after the other, and counts bytes."""

    def __init__(self, bundle: Bundle, staging: Path, progress: Progress, *, copy: bool) -> None:
        self._is_copying = copy
        self._bundle, self._staging, self._progress = bundle, staging, progress
        names = [tower_file(t) for t in range(len(bundle.towers))]
        self._total = sum(bundle.manifest.weights[name].bytes for name in (*names, DENSE_FILE))
        self._done = 0

    def share(self, source: str, tensors: Mapping[str, TensorInfo], path: str) -> PlacedFile:
        """Place a file as it is."""
        target = self._target(path)
        entry = self._bundle.manifest.weights[source]
        if not self._is_copying and share_file(self._bundle.path / source, target):
            self._done += entry.bytes
        else:
            read = self._copy(self._bundle.path / source, target, tensors)
            self._check(source, read)
        return self._placed(path, entry.digests)

    def quantise(
        self, source: str, tensors: Mapping[str, TensorInfo], path: str, code: RowCode
    ) -> PlacedFile:
        """Place a file with coded tables."""
        digests, read = write_coded(
            self._target(path), tensors, code, lambda count: self._count("quantising", count)
        )
        self._check(source, read)
        return self._placed(path, digests)

    def _target(self, path: str) -> Path:
        target = self._staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _copy(
        self, source: Path, target: Path, tensors: Mapping[str, TensorInfo]
    ) -> dict[str, str]:
        """Copy header and tensors, which follow each other without gaps; return their digests."""
        in_order = sorted(tensors.values(), key=lambda info: info.pieces[0].offset)
        with source.open("rb") as file:
            header = np.frombuffer(file.read(in_order[0].pieces[0].offset), dtype=np.uint8)
        digests = {}
        with AlignedWriter(target, 0) as writer:
            writer.write(header)
            for info in in_order:
                digest = TreeDigest()
                for chunk in read_ahead(stream_tensor(info), digest):
                    writer.write(chunk)
                    self._count("copying", chunk.nbytes)
                digests[info.name] = digest.finish()
        return digests

    def _count(self, step: str, count: int) -> None:
        self._done += count
        self._progress(step, self._done, self._total)

    def _check(self, source: str, read: Mapping[str, str]) -> None:
        expected = self._bundle.manifest.weights[source].digests
        changed = [f"{source}: {name}" for name, digest in read.items() if digest != expected[name]]
        if changed:
            raise BundleError(
                f"the bundle {self._bundle.path} changed on disk: {len(changed)} tensors "
                "differ from what was written",
                expected="the digests in its manifest",
                hint="copy it again, or convert the checkpoint again",
                details=changed,
            )

    def _placed(self, path: str, digests: Mapping[str, str]) -> PlacedFile:
        target = self._staging / path
        return PlacedFile(
            path=path,
            tensors={info.name: info for info in read_safetensors(target).tensors},
            bytes=target.stat().st_size,
            digests=digests,
        )
