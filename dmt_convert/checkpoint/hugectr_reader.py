"""Folders of HugeCTR: a graph in JSON, a dense model file, sparse model folders.

`<name>.json` (graph_to_json), `<prefix>_dense_<step>.model` (raw fp32 in the graph's order) and
`<prefix><i>_sparse_<step>.model/{key,emb_vector}` (raw int64 keys and fp32 rows, in any order).
Written after HugeCTR's documentation and its ONNX converter; not tried on files of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.documents import read_document
from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Piece, TensorInfo
from dmt_convert.errors import CheckpointError

_DENSE: Final = re.compile(r"(?P<prefix>.*)(?<!_opt)_dense_(?P<step>\d{1,18})\.model")
GRAPH: Final = "graph.json"
"""Under which name the graph is found among the documents."""


class HugectrReader:
    """A folder of HugeCTR's files; of several steps the newest is taken."""

    format = "hugectr"

    def can_read(self, path: Path) -> bool:
        """Tell by the names."""
        if not path.is_dir():
            return False
        return bool(_dense_models(path)) and any(_documents(path))

    def read(self, path: Path) -> FlatCheckpoint:
        """Read the graph; weights stay on disk.

        Raises:
            CheckpointError: A file is missing or has a size that does not fit.
        """
        step, prefix, dense = _newest(path)
        graph_path, graph = _find_graph(path)
        tensors = [_raw(dense, "dense", "fp32", 4)]
        sparse = 0
        while (folder := path / f"{prefix}{sparse}_sparse_{step}.model").exists():
            tensors += _read_sparse(folder, sparse)
            sparse += 1
        if not sparse:
            raise CheckpointError(
                f"{path} holds no {prefix}0_sparse_{step}.model",
                expected="the folders of the sparse models of the same step",
                hint="copy all that save_params_to_files wrote",
            )
        return FlatCheckpoint(
            source=path,
            format=self.format,
            tensors=tuple(tensors),
            ordered=True,
            files=(graph_path, *(piece.path for info in tensors for piece in info.pieces)),
            documents={GRAPH: graph},
        )


def _dense_models(path: Path) -> list[tuple[int, str, Path]]:
    """Return step, prefix and file of all dense models."""
    return [
        (int(match["step"]), match["prefix"], file)
        for file in sorted(path.iterdir())
        if (match := _DENSE.fullmatch(file.name)) and file.is_file()
    ]


def _documents(path: Path) -> Iterator[Path]:
    """Yield what may be the graph, in the order of the names."""
    for file in sorted(path.glob("*.json")):
        if file.is_file() and not file.name.endswith(".ntp.json"):
            yield file


def _newest(path: Path) -> tuple[int, str, Path]:
    """Return the last step, its prefix, and its dense model file."""
    found = _dense_models(path)
    step = max(number for number, _, _ in found)
    newest = [entry for entry in found if entry[0] == step]
    if len(newest) != 1:
        raise CheckpointError(
            f"{path} holds {len(newest)} dense models of step {step}: "
            + ", ".join(file.name for _, _, file in newest[:5]),
            expected="the files of one model",
            hint="put each model into a folder of its own",
        )
    return newest[0]


def _find_graph(path: Path) -> tuple[Path, Any]:
    """Return the one JSON file that holds layers."""
    found = []
    for file in _documents(path):
        document = read_document(file)
        if isinstance(document, dict) and isinstance(document.get("layers"), list):
            found.append((file, document))
    if len(found) != 1:
        raise CheckpointError(
            f"{path} holds {len(found)} graphs: " + ", ".join(file.name for file, _ in found[:5]),
            expected="one JSON file with `layers`, as Model.graph_to_json writes it",
            hint="put the graph of this model alone beside its weights",
        )
    return found[0]


def _read_sparse(folder: Path, index: int) -> list[TensorInfo]:
    files = [folder / name for name in ("key", "emb_vector")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}",
            expected="a folder with the files key and emb_vector (HugeCTR 3 and later)",
            hint="copy it again; older versions wrote one file, which is not supported",
        )
    keys = _raw(files[0], f"sparse.{index}.key", "int64", 8)
    vectors = _raw(files[1], f"sparse.{index}.emb_vector", "fp32", 4)
    (count,), (elements,) = keys.shape, vectors.shape
    if not count or not elements or elements % count:
        raise CheckpointError(
            f"{folder} holds {count} keys and {elements} elements of vectors",
            expected="a vector of the same length for each key",
            hint="the save did not finish, or a file was cut short",
        )
    return [keys, _raw(files[1], vectors.name, "fp32", 4, width=elements // count)]


def _raw(path: Path, name: str, dtype: str, item: int, width: int | None = None) -> TensorInfo:
    """Describe a file of raw elements as a vector, or as a matrix of that width."""
    size = path.stat().st_size
    if size % item:
        raise CheckpointError(
            f"{path} has {size} bytes",
            expected=f"whole elements of {item} bytes",
            hint="the file was cut short; copy it again",
        )
    count = size // item
    shape = (count,) if width is None else (count // width, width)
    piece = Piece(path=path, offset=0, length=size, starts=(0,) * len(shape), sizes=shape)
    return TensorInfo(name=name, dtype=dtype, shape=shape, pieces=(piece,))
