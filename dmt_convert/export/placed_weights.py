"""Put a bundle's weights below an export: shared by hard link, else copied, or quantised."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmt_convert.bundle import Bundle
from dmt_convert.bundle.weights import DENSE_FILE, tower_file
from dmt_convert.checkpoint import SafetensorsReader, TensorInfo
from dmt_convert.serving import OVER_ARCH, TableCode, tower_name

Progress = Callable[[str, int, int], None]

TOWER_WEIGHTS: Final = "tower.safetensors"
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
    progress: Progress = lambda *_: None,
) -> PlacedWeights:
    """Share or copy the weights of a bundle, or write quantised tables.

    Args:
        bundle: The bundle.
        staging: The export's folder while it is being written.
        folder_of: Part (`tower_000`, ..., `over_arch`) -> folder of its weights below `staging`.
        quantize: How to store the tables.
        progress: Told of step, done and total.

    Raises:
        OSError: The disk is full, or fails.
    """
    assert quantize == "none"

    def place(source: str, part: str, name: str) -> PlacedFile:
        relative = f"{folder_of(part)}/{name}"
        target = staging / relative
        share_file(bundle.path / source, target)
        tensors = SafetensorsReader().read(target).tensors
        entry = bundle.manifest.weights[source]
        return PlacedFile(
            path=relative,
            tensors={tensor.name: tensor for tensor in tensors},
            bytes=entry["bytes"],
            digests=entry["digests"],
        )

    return PlacedWeights(
        towers=tuple(
            place(tower_file(t), tower_name(t), TOWER_WEIGHTS) for t in range(len(bundle.towers))
        ),
        over_arch=place(DENSE_FILE, OVER_ARCH, OVER_ARCH_WEIGHTS),
    )


def share_file(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o644)
