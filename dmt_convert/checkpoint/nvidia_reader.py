"""Directories that NVIDIA DeepLearningExamples' DLRM saves: one file per table, two of MLPs.

Tables are raw fp32 (`bottom_model.embeddings.N.bin`, shape in `embeddings.N.meta.pt`), or, in the
first releases, `torch.save` files (`bottom_model.embeddings.N.pt`), each of which may hold the
tables of a whole device and point at its own. N is the feature's number in the data; the order in
the model is in `metadata.pt`.
Source: `dlrm/utils/checkpointing/{model,distributed,serial}.py`, formerly
`dlrm/utils/checkpointing.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Piece, Scalar, TensorInfo
from dmt_convert.checkpoint.torch_reader import TorchReader
from dmt_convert.errors import CheckpointError

NVIDIA_TABLE_ORDER: Final = "dmt.table_order"
"""Scalar that says from where the order of the tables was read."""
_TABLE: Final = re.compile(r"bottom_model\.embeddings\.(\d{1,6})\.(bin|pt)")
_METADATA: Final = "metadata.pt"
_LAYERS: Final = (
    # torch's Sequential has activations between the layers, apex's MLP numbers its parameters
    (re.compile(r"(.*?)layers\.(\d{1,4})\.(weight|bias)"), 2),
    (re.compile(r"(.*?)mlp\.()(weight|bias)_(\d{1,4})"), 1),
)


class NvidiaReader:
    """A directory of DLRM checkpoint parts."""

    format = "nvidia-dlrm"

    def can_read(self, path: Path) -> bool:
        """Tell by the names of the files."""
        return path.is_dir() and (
            (path / "bottom_model.mlp.pt").is_file()
            or any(_TABLE.fullmatch(file.name) for file in path.glob("bottom_model.embeddings.*"))
        )

    def read(self, path: Path) -> FlatCheckpoint:
        """Read the headers of all files; tables in the order in which the model takes them.

        Raises:
            CheckpointError: A file is missing, damaged, or does not have its stated size.
        """
        scalars = dict(TorchReader().read(_existing(path / _METADATA)).scalars)
        order, reason = _table_order(path, scalars)
        tensors = [_table(path, number) for number in order]
        files = [path / _METADATA]
        for stem in ("bottom_model.mlp", "top_model.mlp", "top_model.out", "top_model"):
            file = path / f"{stem}.pt"
            if stem in _other_layout(path):
                continue
            tensors += _part(_existing(file), stem)
            files.append(file)
        return FlatCheckpoint(
            source=path,
            format=self.format,
            tensors=tuple(tensors),
            ordered=True,
            files=(*files, *sorted(_table_files(path))),
            scalars=scalars | {NVIDIA_TABLE_ORDER: reason},
        )


def _other_layout(path: Path) -> tuple[str, ...]:
    """Parts that the layout of this directory has not: the first releases had one top model."""
    return (
        ("top_model.mlp", "top_model.out") if (path / "top_model.pt").is_file() else ("top_model",)
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} holds no {path.name}",
            expected="all files that the trainer saved: metadata.pt, bottom_model.mlp.pt, the top "
            "model's, and one per table",
            hint="a run over several hosts saves to each host's disk: bring the files together",
        )
    return path


def _table_files(path: Path) -> Iterator[Path]:
    """Yield the files that belong to tables."""
    for file in path.iterdir():
        if _TABLE.fullmatch(file.name) or re.fullmatch(r"embeddings\.\d+\.meta\.pt", file.name):
            yield file


def _table_order(path: Path, scalars: Mapping[str, Scalar]) -> tuple[list[int], str]:
    """Return the tables' numbers in the order of the model, and what says so."""
    found = {int(m[1]) for file in path.iterdir() if (m := _TABLE.fullmatch(file.name))}
    places = {}
    for key, value in scalars.items():
        match = re.fullmatch(r"(?:data\.)?device_mapping\.embedding\.(\d+)\.(\d+)", key)
        if match is not None and type(value) is int:
            places[int(match[1]), int(match[2])] = value
    mapped = [number for _, number in sorted(places.items())]
    missing = sorted(set(mapped or range(max(found, default=0) + 1)) - found)
    if missing or (mapped and sorted(mapped) != sorted(found)):
        extra = sorted(found - set(mapped))
        raise CheckpointError(
            f"{path} holds {len(found)} tables; missing: {missing[:20]}, of no device: "
            f"{extra[:20]}",
            expected="the tables of all devices, each once, as metadata.pt maps them",
            hint="a run over several hosts saves to each host's disk: bring the files together",
        )
    if scalars.get("config.bottom_features_ordered") is True:
        return sorted(found), "bottom_features_ordered"
    return (mapped, "device_mapping") if mapped else (sorted(found), "no device_mapping")


def _table(path: Path, number: int) -> TensorInfo:
    name = f"bottom_model.embeddings.{number}.weight"
    file = path / f"bottom_model.embeddings.{number}.bin"
    if not file.is_file():
        return replace(_only_tensor(file.with_suffix(".pt")), name=name, container=())
    scalars = TorchReader().read(_existing(path / f"embeddings.{number}.meta.pt")).scalars
    rows, dim = scalars.get("shape.0"), scalars.get("shape.1")
    size = file.stat().st_size
    if type(rows) is not int or type(dim) is not int or "shape.2" in scalars:
        raise CheckpointError(
            f"{path / f'embeddings.{number}.meta.pt'} holds no shape of a table",
            expected="{'shape': (rows, dim)}",
            hint="the file is damaged; copy it again",
        )
    if rows < 1 or dim < 1 or rows * dim * 4 != size:
        raise CheckpointError(
            f"{file} has {size} bytes",
            expected=f"{rows} x {dim} fp32 numbers, as embeddings.{number}.meta.pt says",
            hint="the file was cut short, or belongs to another save; copy it again",
        )
    piece = Piece(path=file, offset=0, length=size, starts=(0, 0), sizes=(rows, dim))
    return TensorInfo(name=name, dtype="fp32", shape=(rows, dim), pieces=(piece,))


def _only_tensor(file: Path) -> TensorInfo:
    tensors = TorchReader().read(_existing(file)).tensors
    if len(tensors) != 1:
        raise CheckpointError(
            f"{file} holds {len(tensors)} tensors",
            expected="one table: {'weight': ...}",
            hint="the file is damaged; copy it again",
        )
    return tensors[0]


def _part(file: Path, stem: str) -> Iterator[TensorInfo]:
    """Yield the tensors of one file, layers under one name whatever wrote them."""
    for info in TorchReader().read(file).tensors:
        name = f"{stem}.{info.path.removeprefix('module.')}"
        for pattern, step in _LAYERS:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            kind, number = match[3], int(match[2] or match[4])
            kinds = "weights" if kind == "weight" else "biases"
            if number % step == 0:
                name = f"{match[1]}{kinds}.{number // step}"
            break
        yield replace(info, name=name, container=())
