"""Writes the directories of torchsnapshot, whose package need not be there.

Raw bytes under `<rank>/`, `sharded/`, `replicated/`, or several tensors in one file under
`batched/`, and a manifest of all ranks.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Block = tuple[int, int, int, int, int]
"""First row, first column, rows, columns, rank."""


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Snapshot:
    """A directory being written."""

    def __init__(self, folder: Path, *, ranks: int = 2, batched: bool = False) -> None:
        self.folder, self.ranks, self.batched = folder, ranks, batched
        self.manifest: dict[str, Any] = {}
        self._batch = bytearray()

    def _store(self, location: str, data: bytes) -> tuple[str, list[int] | None]:
        if self.batched:
            begin = len(self._batch)
            self._batch += data
            return "batched/8d8e", [begin, begin + len(data)]
        path = self.folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return location, None

    def entry(self, location: str, tensor: torch.Tensor, *, saved: bool = False) -> dict[str, Any]:
        data = raw_bytes(tensor)
        if saved:
            buffer = io.BytesIO()
            torch.save(tensor.clone(), buffer)
            data = buffer.getvalue()
        location, limits = self._store(location, data)
        return {
            "type": "Tensor",
            "location": location,
            "serializer": "torch_save" if saved else "buffer_protocol",
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "replicated": location.startswith("replicated"),
            "byte_range": limits,
        }

    def keys(self, path: str, keys: Sequence[str | int]) -> None:
        for rank in range(self.ranks):
            self.manifest[f"{rank}/{path}"] = {"type": "OrderedDict", "keys": list(keys)}

    def dense(self, path: str, tensor: torch.Tensor, **options: Any) -> None:
        for rank in range(self.ranks):
            self.manifest[f"{rank}/{path}"] = self.entry(f"{rank}/{path}", tensor, **options)

    def replicated(self, path: str, tensor: torch.Tensor) -> None:
        entry = self.entry(f"replicated/{path}", tensor)
        for rank in range(self.ranks):
            self.manifest[f"{rank}/{path}"] = entry

    def sharded(self, path: str, tensor: torch.Tensor, blocks: Sequence[Block]) -> None:
        for rank in range(self.ranks):
            self.manifest[f"{rank}/{path}"] = {
                "type": "ShardedTensor",
                "shards": [
                    self._shard(path, tensor, block) for block in blocks if block[4] == rank
                ],
            }

    def chunked(self, path: str, tensor: torch.Tensor, blocks: Sequence[Block]) -> None:
        self.manifest[f"0/{path}"] = {
            "type": "ChunkedTensor",
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "chunks": [self._shard(path, tensor, block) for block in blocks],
            "replicated": False,
        }

    def _shard(self, path: str, tensor: torch.Tensor, block: Block) -> dict[str, Any]:
        row, col, rows, cols, _ = block
        part = tensor[row : row + rows, col : col + cols]
        return {
            "offsets": [row, col],
            "sizes": [rows, cols],
            "tensor": self.entry(f"sharded/{path}_{row}_{col}", part),
        }

    def pickled(self, path: str, value: object) -> None:
        location, _ = self._store(f"0/{path}", pickle.dumps(value))
        self.manifest[f"0/{path}"] = {
            "type": "object",
            "location": location,
            "serializer": "torch_save",
            "obj_type": type(value).__name__,
            "replicated": False,
        }

    def primitive(self, path: str, kind: str, text: str, readable: str | None = None) -> None:
        self.manifest[f"0/{path}"] = {
            "type": kind,
            "serialized_value": text,
            "readable": readable,
            "replicated": False,
        }

    def finish(self, *, as_yaml: bool = False, changes: Mapping[str, Any] | None = None) -> Path:
        value = {"version": "0.1.0", "world_size": self.ranks, "manifest": self.manifest}
        value.update(changes or {})
        if self.batched:
            (self.folder / "batched").mkdir(parents=True, exist_ok=True)
            (self.folder / "batched/8d8e").write_bytes(self._batch)
        text = json.dumps(value, indent=2)
        if as_yaml:
            import yaml

            text = yaml.safe_dump(json.loads(text), sort_keys=False)
        (self.folder / ".snapshot_metadata").write_text(text)
        return self.folder
