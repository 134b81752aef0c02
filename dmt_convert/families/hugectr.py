"""HugeCTR: any model whose graph consists of the layers below.

The weights of the dense model file are in the order of the layers: of a fully connected layer, the
weight as (in, out) and then the bias; of a cross network, weight and bias by turns. Slots are
features. If the graph has a `slot_size_array`, each slot becomes a table whose ids begin at 0;
otherwise all slots share one table. Rows of an embedding are found by key, and are in any order.
Source: HugeCTR's documentation and `onnx_converter/hugectr2onnx`; not tried on files of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dmt_convert.arrays import IntArray
from dmt_convert.checkpoint import ITEM_BYTES, TensorInfo, derived, gather_bytes, read_tensor
from dmt_convert.families.family import Family
from dmt_convert.families.model_info import FlatModelInfo
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, TableSpec

_EMBEDDINGS: Final = (
    "DistributedSlotSparseEmbeddingHash",
    "LocalizedSlotSparseEmbeddingHash",
    "LocalizedSlotSparseEmbeddingOneHot",
)
_SAME: Final = ("ReLU", "Sigmoid", "Tanh", "ELU", "Dropout", "Add", "Sub", "ElementwiseMultiply")
"""Layers whose output is as wide as their first input."""

_MAX_SLOTS: Final = 5000
_BLOCK: Final = 1 << 20
"""Keys that are in memory at a time."""

Json = Mapping[str, Any]
_MALFORMED: Final = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    OverflowError,
)
"""What reading a damaged graph raises."""


@dataclass(slots=True)
class _Reading:
    """What is known of a graph while its layers are read."""

    source: TrainerTensors
    weights: TensorInfo
    """All of the dense model file, shape (elements,)."""
    dense: str = ""
    """Name of the dense inputs."""
    output: str = ""
    """Name of the logit."""
    offset: int = 0
    """How many of its elements have been taken."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> shape without the batch: (M,), or (S, N) of an embedding."""
    features: list[FeatureSpec] = field(default_factory=list)
    embeddings: list[list[Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    sparse: dict[str, int] = field(default_factory=dict)
    """Name of a sparse input -> its number of slots."""

    def take(self, name: str, *shape: int) -> TensorInfo:
        """Take the next elements of the dense model file."""
        _expect(min(shape) > 0, f"{name} of shape {list(shape)}")
        begin, self.offset = self.offset, self.offset + math.prod(shape)
        if self.offset > self.weights.shape[0]:
            self.source.missing.append(f"{name} {list(shape)} in the dense model file")
            return derived.fill(name, shape)
        return derived.reshape(derived.slice_rows(self.weights, begin, self.offset), shape)


class HugeCtr(Family):
    """The family of HugeCTR's models."""

    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a model by its graph."""
        graph = source.checkpoint.documents.get("graph.json", {})
        reading = _Reading(source=source, weights=source.take("dense", None))
        for number, layer in enumerate(graph.get("layers", [])):
            try:
                _read_any_layer(reading, layer)
            except _MALFORMED as error:
                raise source.refuse(
                    f"layer {number} of the graph cannot be read ({type(error).__name__}: {error})",
                    expected="the JSON that Model.graph_to_json writes",
                    hint="the file is damaged, or of a version that is not known yet",
                ) from None
        if not reading.output or reading.shapes.get(reading.output) != (1,):
            raise source.refuse(
                "a graph without one logit and BinaryCrossEntropyLoss",
                expected="a model that is trained on binary labels",
                hint="other losses cannot be converted yet",
            )
        left = reading.weights.shape[0] - reading.offset
        if left > 0 and not source.missing:
            source.wrong.append(
                f"the dense model file holds {left} elements more than the graph has"
            )
        source.check()
        source.fact(
            "format", "HugeCTR's documented one", "assumed", "not tried on files of its own"
        )
        return source.describe_network(
            features=reading.features,
            num_dense=reading.shapes[reading.dense][0],
            name="layer-graph",
            config={
                "dense": reading.dense,
                "output": reading.output,
                "embeddings": reading.embeddings,
                "layers": reading.layers,
            },
            final_sigmoid=True,
        )


def _read_any_layer(reading: _Reading, layer: Json) -> None:
    kind = str(layer["type"])
    if kind == "Data":
        reading.dense = _read_data(reading, layer)
    elif kind in _EMBEDDINGS:
        _read_embedding(reading, layer)
    elif kind == "BinaryCrossEntropyLoss":
        reading.output = str(_names(layer["bottom"])[0])
    else:
        _read_layer(reading, kind, layer)


def _names(value: Any) -> list[str]:
    return [str(name) for name in (value if isinstance(value, list) else [value])]


def _read_data(reading: _Reading, layer: Json) -> str:
    dense = str(layer["dense"]["top"])
    width = int(layer["dense"]["dense_dim"])
    _expect(width >= 0, f"{width} dense inputs")
    reading.shapes[dense] = (reading.source.check_width(width),)
    for entry in layer["sparse"]:
        slots = int(entry["slot_num"])
        _expect(0 < slots <= _MAX_SLOTS, f"{slots} slots")
        reading.sparse[str(entry["top"])] = slots
    return dense


def _read_embedding(reading: _Reading, layer: Json) -> None:
    """Take the tables of an embedding; each of its slots is a feature."""
    name, settings = str(_names(layer["top"])[0]), layer["sparse_embedding_hparam"]
    slots, dim = reading.sparse[_names(layer["bottom"])[0]], int(settings["embedding_vec_size"])
    _expect(dim > 0, f"vectors of {dim}")
    sizes = [int(size) for size in settings.get("slot_size_array") or []]
    if sizes and (len(sizes) != slots or min(sizes) < 1):
        raise ValueError(f"{len(sizes)} slot sizes for {slots} slots")
    pooling = reading.source.config.pooling
    if pooling is None:
        pooling = "mean" if settings.get("combiner") in ("mean", 1) else "sum"
    index = len(reading.embeddings)
    tables = _read_tables(reading.source, index, name, dim, sizes or None)
    reading.embeddings.append([name, len(reading.features), slots])
    for slot in range(slots):
        feature = name if slots == 1 else f"{name}_{slot}"
        table = tables[slot if len(tables) == slots else 0].name if tables else name
        own = pooling if isinstance(pooling, str) else pooling.get(feature, "sum")
        reading.features.append(FeatureSpec(name=feature, table=table, pooling=own))
    reading.shapes[name] = (slots, dim)
    ids = "ids begin at 0 in every slot" if sizes else "ids are the keys; one table for all slots"
    reading.source.fact(f"slots of {name}", str(slots), "read", ids)


def _read_layer(reading: _Reading, kind: str, layer: Json) -> None:
    """Read a layer of the network itself, and take its weights."""
    bottom, top = _names(layer["bottom"]), _names(layer["top"])
    shapes = [reading.shapes[name] for name in bottom]
    entry: dict[str, Any] = {"type": kind, "bottom": bottom, "top": top}
    stem = f"layers.{len(reading.layers)}"
    width = _width(shapes[0])
    out: tuple[int, ...] = (width,)
    if kind in ("InnerProduct", "FusedInnerProduct"):
        out = (reading.source.check_width(int(layer["fc_param"]["num_output"])),)
        entry |= {"in": width, "out": out[0]}
        weight = reading.take(f"{top[0]} weight", width, out[0])
        reading.source.put(f"{stem}.weight", derived.transpose(weight))
        reading.source.put(f"{stem}.bias", reading.take(f"{top[0]} bias", out[0]))
    elif kind == "MultiCross":
        _read_cross(reading, stem, top[0], layer["mc_param"], entry, width)
    elif kind == "WeightMultiply":
        slots, dim = (int(size) for size in layer["weight_dims"])
        entry |= {"slots": slots, "dim": dim}
        reading.source.put(f"{stem}.weight", reading.take(f"{top[0]} weight", slots, dim))
        out = (slots * dim,)
        _expect(width == slots, f"{width} inputs for {slots} weights")
    elif kind in _SAME:
        out = shapes[0]
        _expect(all(shape == out for shape in shapes), f"inputs of shapes {shapes}")
        if kind == "ELU":
            entry["alpha"] = float(layer["elu_param"]["alpha"])
    else:
        out = _read_shape(reading, kind, layer, entry, shapes)
    reading.layers.append(entry)
    if kind != "Slice":
        _expect(len(top) == 1, f"outputs {top}")
        reading.shapes[top[0]] = out


def _read_cross(
    reading: _Reading, stem: str, name: str, settings: Json, entry: dict[str, Any], width: int
) -> None:
    """Take the weights of a cross network, and complete its entry."""
    layers = int(settings["num_layers"])
    _expect(not settings.get("projection_dim"), "a MultiCross with a projection_dim")
    _expect(0 < layers <= 1000, f"{layers} cross layers")
    entry |= {"in": width, "layers": layers}
    for i in range(layers):
        reading.source.put(f"{stem}.{i}.weight", reading.take(f"{name} weight {i}", width))
        reading.source.put(f"{stem}.{i}.bias", reading.take(f"{name} bias {i}", width))


def _read_shape(
    reading: _Reading, kind: str, layer: Json, entry: dict[str, Any], shapes: list[tuple[int, ...]]
) -> tuple[int, ...]:
    """Read a layer without weights that changes shapes; return the shape of its output."""
    width = _width(shapes[0])
    if kind == "Reshape":
        if layer.get("selected"):
            entry["selected"] = [int(slot) for slot in layer["selected"]]
            inside = all(0 <= slot < shapes[0][0] for slot in entry["selected"])
            _expect(inside, "a selected slot that is not there")
            return (len(entry["selected"]) * shapes[0][1],)
        _expect(not layer.get("time_step"), "a Reshape with a time_step")
        _expect(int(layer["leading_dim"]) == width, f"{width} numbers as {layer['leading_dim']}")
        return (width,)
    if kind == "Concat":
        _expect(all(len(shape) == 1 for shape in shapes), f"inputs of shapes {shapes}")
        return (sum(map(_width, shapes)),)
    if kind == "Slice":
        entry["ranges"] = [[int(begin), int(end)] for begin, end in layer["ranges"]]
        for name, (begin, end) in zip(entry["top"], entry["ranges"], strict=True):
            _expect(0 <= begin < end <= width, f"a slice {begin} to {end} of {width}")
            reading.shapes[name] = (end - begin,)
        return (width,)
    if kind == "Interaction":
        (dense,), (slots, dim) = shapes
        _expect(dense == dim, f"a dense vector of {dense} and embeddings of {dim}")
        return (dense + slots * (slots + 1) // 2 + 1,)
    if kind == "FmOrder2":
        entry["dim"] = int(layer["out_dim"])
        _expect(width % entry["dim"] == 0, f"{width} numbers in vectors of {entry['dim']}")
        return (entry["dim"],)
    if kind == "ReduceSum":
        _expect(int(layer["axis"]) == 1 and len(shapes[0]) == 1, "a ReduceSum of another axis")
        return (1,)
    raise reading.source.refuse(
        f"a layer of type {kind}",
        expected="a known layer: InnerProduct, MultiCross, Interaction, FmOrder2, ...",
        hint="convert such a model with an adapter of your own",
    )


def _width(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def _expect(holds: bool, found: str) -> None:
    if not holds:
        raise ValueError(found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _KeyedRows:
    """Rows of a matrix in the order of their keys; zeros for keys that training never saw."""

    source: TensorInfo
    """The rows, in any order."""
    places: IntArray
    """Row in the source of each row wanted, -1 if there is none; shape (rows,)."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The source alone."""
        return (self.source,)

    def gather(self, rows: IntArray) -> npt.NDArray[np.uint8]:
        """Look the rows up, shape (n, bytes per row)."""
        places = self.places[rows]
        width = self.source.shape[1] * ITEM_BYTES[self.source.dtype]
        out = np.zeros((len(rows), width), dtype=np.uint8)
        known = np.flatnonzero(places >= 0)
        # reads go through the file from front to back, whatever the order of the keys
        known = known[np.argsort(places[known])]
        if len(known):
            out[known] = gather_bytes(self.source, places[known])
        return out


def _key_blocks(info: TensorInfo) -> Iterator[tuple[int, IntArray]]:
    """Yield the keys of a file, block by block, and where each block begins."""
    for begin in range(0, info.shape[0], _BLOCK):
        block = derived.slice_rows(info, begin, min(begin + _BLOCK, info.shape[0]))
        yield begin, read_tensor(block).astype(np.int64, copy=False)


def _key_range(info: TensorInfo) -> tuple[int, int]:
    ends = [(int(keys.min()), int(keys.max())) for _, keys in _key_blocks(info)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _read_tables(
    source: TrainerTensors, index: int, name: str, dim: int, sizes: Sequence[int] | None
) -> list[TableSpec]:
    """Take an embedding, as one table or as one per slot.

    Args:
        source: The tensors.
        index: Number of the embedding in the graph.
        name: Its name.
        dim: Its vectors' length.
        sizes: Rows of each slot, whose keys follow one another; None: one table for all.

    Raises:
        ArchitectureError: The keys are not row numbers.
    """
    vectors = source.take(f"sparse.{index}.emb_vector", None, dim)
    source.mark_used(f"sparse.{index}.key")
    info = source.tensors.get(f"sparse.{index}.key")
    if info is None or source.missing or source.wrong:
        return []
    places = _row_places(source, info, name, sizes)
    bounds = np.cumsum([0, *(sizes if sizes is not None else [len(places)])]).tolist()
    tables = []
    for slot, (begin, end) in enumerate(itertools.pairwise(bounds)):
        derivation = _KeyedRows(source=vectors, places=places[begin:end])
        own = name if len(bounds) == 2 else f"{name}_{slot}"
        shape = (end - begin, dim)
        tables.append(source.table(own, derived.describe(shape, derivation, name=own)))
    return tables


def _row_places(
    source: TrainerTensors, keys: TensorInfo, name: str, sizes: Sequence[int] | None
) -> IntArray:
    """Return where in the file the row of each key is, -1 if training never saw the key."""
    lowest, highest = _key_range(keys)
    count = keys.shape[0]
    limit = int(sum(sizes)) if sizes is not None else highest + 1
    if lowest < 0 or highest >= limit or 2 * count < limit:
        raise source.refuse(
            f"{name} has {count} keys from {lowest} to {highest}",
            expected=f"keys that number the rows, from 0 to {limit - 1}, most of them present"
            if sizes is not None
            else "keys that number the rows from 0, most of them present",
            hint="hashed keys have no row number: map them to 0, 1, 2, ... and train or save anew",
        )
    places = np.full(limit, -1, dtype=np.int64)
    for begin, block in _key_blocks(keys):
        places[block] = np.arange(begin, begin + len(block), dtype=np.int64)
    if int(np.count_nonzero(places >= 0)) < count:
        raise source.refuse(
            f"{name} has keys that occur twice",
            expected="one row per key",
            hint="the files are damaged, or belong to different saves",
        )
    absent = limit - count
    source.fact(
        f"rows of {name}",
        f"{limit}, sorted by key" + (f", {absent} of zeros" if absent else ""),
        "read",
        "keys that training never saw have no vector, which counts as zeros",
    )
    return places


HUGECTR: Final[HugeCtr] = HugeCtr(
    name="hugectr",
    trainer="HugeCTR",
    anchor=r"(?P<prefix>)sparse\.(?P<table>\d+)\.emb_vector",
)
