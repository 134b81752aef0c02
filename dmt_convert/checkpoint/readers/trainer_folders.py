"""Folders that trainers write: weights beside descriptions of the model.

- FuxiCTR: a `.model` file of `torch.save`, `feature_map.json`, `params.json`.
- TorchEasyRec: `pipeline.config` beside `model.ckpt-<step>/{model,optimizer}`, DCP directories.
- NVIDIA DeepLearningExamples' DLRM: one file per table and two of MLPs. Tables are raw fp32
  (`bottom_model.embeddings.N.bin`, shape in `embeddings.N.meta.pt`) or, in the first releases,
  `torch.save` files (`bottom_model.embeddings.N.pt`), each of which may hold the tables of a whole
  device and point at its own. N is the feature's number in the data; the order in the model is in
  `metadata.pt`. Source: `dlrm/utils/checkpointing/{model,distributed,serial}.py`, formerly
  `dlrm/utils/checkpointing.py`.
- HugeCTR (experimental): `<name>.json` (graph_to_json), `<prefix>_dense_<step>.model` (raw fp32 in
  the graph's order) and `<prefix><i>_sparse_<step>.model/{key,emb_vector}` (raw int64 keys and fp32
  rows, in any order). Written after HugeCTR's documentation and its ONNX converter; it has never
  been tested on a checkpoint that HugeCTR itself wrote.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, Piece, Scalar, TensorInfo
from dmt_convert.checkpoint.readers.dcp_reader import read_dcp, read_dcp_pair
from dmt_convert.checkpoint.readers.documents import read_document
from dmt_convert.checkpoint.readers.torch_reader import is_torch_file, read_torch
from dmt_convert.errors import CheckpointError

_FUXICTR_MAP: Final = "feature_map.json"
_FUXICTR_PARAMS: Final = "params.json"
_TZREC_CONFIG: Final = "pipeline.config"
_AVERAGES: Final = "dense_ema"
_TZREC_STEP: Final = re.compile(r"model\.ckpt-(\d{1,18})")
_DENSE: Final = re.compile(r"(?P<prefix>.*)(?<!_opt)_dense_(?P<step>\d{1,18})\.model")
_GRAPH: Final = "graph.json"
"""The name of HugeCTR's graph among the documents."""
NVIDIA_TABLE_ORDER: Final = "dmt.table_order"
"""Scalar that says where the order of the tables was read."""
_TABLE: Final = re.compile(r"bottom_model\.embeddings\.(\d{1,6})\.(bin|pt)")
_METADATA: Final = "metadata.pt"
_LAYERS: Final = (
    # torch's Sequential has activations between the layers, apex's MLP numbers its parameters
    (re.compile(r"(.*?)layers\.(\d{1,4})\.(weight|bias)"), 2),
    (re.compile(r"(.*?)mlp\.()(weight|bias)_(\d{1,4})"), 1),
)

_log = logging.getLogger(__name__)


def is_fuxictr(path: Path) -> bool:
    """Tell by the names a folder with a `.model` file and its `feature_map.json`, or that file."""
    if path.is_dir():
        return (path / _FUXICTR_MAP).is_file() and any(path.glob("*.model"))
    return (
        path.suffix == ".model" and (path.parent / _FUXICTR_MAP).is_file() and is_torch_file(path)
    )


def read_fuxictr(path: Path) -> FlatCheckpoint:
    """Read headers and descriptions.

    Raises:
        CheckpointError: The folder holds several checkpoints, or a file is damaged.
    """
    folder = path if path.is_dir() else path.parent
    models = sorted(folder.glob("*.model")) if path.is_dir() else [path]
    if len(models) != 1:
        raise CheckpointError(
            f"{folder} holds {len(models)} checkpoints: "
            + ", ".join(model.name for model in models[:5]),
            expected="one .model file",
            hint="name the file itself",
        )
    if not is_torch_file(models[0]):
        raise CheckpointError(
            f"{models[0]} was not written by torch.save",
            expected="a checkpoint of FuxiCTR",
            hint="the file is damaged; copy it again",
        )
    described = [folder / name for name in (_FUXICTR_MAP, _FUXICTR_PARAMS)]
    return _with_documents(read_torch(models[0]), path, "fuxictr", described)


def is_torcheasyrec(path: Path) -> bool:
    """Tell a model folder, or one checkpoint in it, by the names."""
    return path.is_dir() and _checkpoint_of(path) is not None


def read_torcheasyrec(path: Path) -> FlatCheckpoint:
    """Read the metadata of the weights and of the optimizer, and `pipeline.config`.

    Args:
        path: A model folder, of which the newest checkpoint is taken, or one checkpoint in it.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    step = _checkpoint_of(path)
    assert step is not None
    # without its .metadata the save did not finish, which the reader of DCP says
    whole = (step / "model" / ".metadata").is_file()
    checkpoint = read_dcp_pair(step) if whole else read_dcp(step / "model")
    checkpoint = replace(checkpoint, tensors=_with_averages(step, checkpoint.tensors))
    return _with_documents(checkpoint, step, "torcheasyrec", [step.parent / _TZREC_CONFIG])


def _with_averages(step: Path, tensors: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
    """Complete the averaged weights of the dense part by the tables, to a model of its own.

    The trainer evaluates and exports with the averages if it has any; which of the two models is
    meant, the user has to say.
    """
    averages = {t.name: t for t in tensors if t.container == (_AVERAGES,)}
    model = [t for t in tensors if t.container == ("model",)]
    shapes = {tensor.name: tensor.shape for tensor in model}
    strange = [name for name, info in averages.items() if shapes.get(name) != info.shape]
    if strange:
        raise CheckpointError(
            f"{step / _AVERAGES} holds averaged weights that are not those of {step / 'model'}",
            expected="the dense tensors of the model, under the same names",
            hint=f"to convert the weights as trained, move {step / _AVERAGES} elsewhere",
            details=strange[:20],
        )
    if not averages:
        return tensors
    rest = [replace(t, container=(_AVERAGES,)) for t in model if t.name not in averages]
    return (*tensors, *rest)


def _checkpoint_of(path: Path) -> Path | None:
    """Return the checkpoint with the largest step in a folder, or the one it belongs to."""
    steps = {
        int(match[1]): folder
        for folder in path.glob("model.ckpt-*")
        if (match := _TZREC_STEP.fullmatch(folder.name)) and (folder / "model").is_dir()
    }
    if steps:
        return steps[max(steps)]
    path = path.resolve()
    for folder in (path, path.parent) if path.name == "model" else (path,):
        if _TZREC_STEP.fullmatch(folder.name) and (folder / "model").is_dir():
            return folder
    return None


def _with_documents(
    checkpoint: FlatCheckpoint, source: Path, format_name: str, documents: list[Path]
) -> FlatCheckpoint:
    """Add the descriptions that exist to a checkpoint of weights."""
    described = [file for file in documents if file.is_file()]
    return replace(
        checkpoint,
        source=source,
        format=format_name,
        files=(*checkpoint.files, *described),
        documents={
            **checkpoint.documents,
            **{file.name: read_document(file) for file in described},
        },
    )


def is_hugectr(path: Path) -> bool:
    """Tell a folder of HugeCTR's files by the names."""
    return path.is_dir() and bool(_dense_models(path)) and any(_graphs(path))


def read_hugectr(path: Path) -> FlatCheckpoint:
    """Read the graph; weights stay on disk. Of several steps the newest is taken.

    Experimental: see the module.

    Raises:
        CheckpointError: A file is missing, or has a size that does not fit.
    """
    _log.warning("%s: support for HugeCTR is experimental; compare scores with the trainer's", path)
    step, prefix, dense = _newest_dense(path)
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
            hint="copy everything that save_params_to_files wrote",
        )
    return FlatCheckpoint(
        source=path,
        format="hugectr",
        tensors=tuple(tensors),
        ordered=True,
        files=(graph_path, *(piece.path for info in tensors for piece in info.pieces)),
        documents={_GRAPH: graph},
    )


def _dense_models(path: Path) -> list[tuple[int, str, Path]]:
    """Return step, prefix and file of all dense models."""
    return [
        (int(match["step"]), match["prefix"], file)
        for file in sorted(path.iterdir())
        if (match := _DENSE.fullmatch(file.name)) and file.is_file()
    ]


def _graphs(path: Path) -> Iterator[Path]:
    """Yield what may be the graph, in the order of the names."""
    for file in sorted(path.glob("*.json")):
        if file.is_file() and not file.name.endswith(".ntp.json"):
            yield file


def _newest_dense(path: Path) -> tuple[int, str, Path]:
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
    for file in _graphs(path):
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
            hint="copy it again; the single file of older versions is not supported",
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


def is_nvidia(path: Path) -> bool:
    """Tell a directory of DLRM checkpoint parts by the names of the files."""
    return path.is_dir() and (
        (path / "bottom_model.mlp.pt").is_file()
        or any(_TABLE.fullmatch(file.name) for file in path.glob("bottom_model.embeddings.*"))
    )


def read_nvidia(path: Path) -> FlatCheckpoint:
    """Read the headers of all files; tables come in the order in which the model takes them.

    Raises:
        CheckpointError: A file is missing, damaged, or does not have its stated size.
    """
    scalars = dict(read_torch(_existing(path / _METADATA)).scalars)
    order, reason = _table_order(path, scalars)
    tensors = [_table(path, number) for number in order]
    files = [path / _METADATA]
    for stem in ("bottom_model.mlp", "top_model.mlp", "top_model.out", "top_model"):
        if stem in _other_layout(path):
            continue
        file = _existing(path / f"{stem}.pt")
        tensors += _part(file, stem)
        files.append(file)
    return FlatCheckpoint(
        source=path,
        format="nvidia-dlrm",
        tensors=tuple(tensors),
        ordered=True,
        files=(*files, *sorted(_table_files(path))),
        scalars=scalars | ({} if reason is None else {NVIDIA_TABLE_ORDER: reason}),
    )


def _other_layout(path: Path) -> tuple[str, ...]:
    """Parts that this directory's layout lacks: the first releases had a single top model."""
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


def _table_order(path: Path, scalars: Mapping[str, Scalar]) -> tuple[list[int], str | None]:
    """Return the tables' numbers in the order of the model, and what says so; None if nothing."""
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
    return (mapped, "device_mapping") if mapped else (sorted(found), None)


def _table(path: Path, number: int) -> TensorInfo:
    name = f"bottom_model.embeddings.{number}.weight"
    file = path / f"bottom_model.embeddings.{number}.bin"
    if not file.is_file():
        return replace(_only_tensor(file.with_suffix(".pt")), name=name, container=())
    scalars = read_torch(_existing(path / f"embeddings.{number}.meta.pt")).scalars
    rows, dim = scalars.get("shape.0"), scalars.get("shape.1")
    size = file.stat().st_size
    if type(rows) is not int or type(dim) is not int or "shape.2" in scalars:
        raise CheckpointError(
            f"{path / f'embeddings.{number}.meta.pt'} does not hold the shape of a table",
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
    tensors = read_torch(_existing(file)).tensors
    if len(tensors) != 1:
        raise CheckpointError(
            f"{file} holds {len(tensors)} tensors",
            expected="one table: {'weight': ...}",
            hint="the file is damaged; copy it again",
        )
    return tensors[0]


def _part(file: Path, stem: str) -> Iterator[TensorInfo]:
    """Yield the tensors of one file, layers under one name whatever wrote them."""
    for info in read_torch(file).tensors:
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
