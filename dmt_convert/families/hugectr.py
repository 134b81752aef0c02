"""HugeCTR: any model whose graph consists of the layers below.

The weights of the dense model file stand in the order of the layers: a fully connected layer's as
(in, out) and then its bias, a cross layer's weight and bias by turns. Slots are features. Where
the graph has a `slot_size_array`, each slot becomes a table, and its ids begin at 0; else all slots
share one table.
Source: HugeCTR's documentation and `onnx_converter/hugectr2onnx`; not tried on files of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dmt_convert.checkpoint import TensorInfo, derived
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.hugectr_tables import read_tables
from dmt_convert.families.trainer_tensors import Described, TrainerTensors
from dmt_convert.spec import FeatureSpec, TableSpec

_EMBEDDINGS: Final = (
    "DistributedSlotSparseEmbeddingHash",
    "LocalizedSlotSparseEmbeddingHash",
    "LocalizedSlotSparseEmbeddingOneHot",
)
_SAME: Final = ("ReLU", "Sigmoid", "Tanh", "ELU", "Dropout", "Add", "Sub", "ElementwiseMultiply")
"""Layers whose output is as wide as their first input."""

_MAX_SLOTS: Final = 5000

Json = Mapping[str, Any]


@dataclass(slots=True)
class _Reading:
    """What is known of a graph while its layers are read."""

    source: TrainerTensors
    weights: TensorInfo
    """All of the dense model file, shape (elements,)."""
    offset: int = 0
    """How many of its elements have been taken."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> shape without the batch: (M,), or (S, N) of an embedding."""
    tables: list[TableSpec] = field(default_factory=list)
    features: list[FeatureSpec] = field(default_factory=list)
    embeddings: list[list[Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    sparse: dict[str, int] = field(default_factory=dict)
    """Name of a sparse input -> its number of slots."""

    def take(self, name: str, *shape: int) -> TensorInfo:
        """Take the next elements of the dense model file."""
        _expect(min(shape) > 0, f"{name} of shape {list(shape)}")
        count = 1
        for size in shape:
            count *= size
        begin, self.offset = self.offset, self.offset + count
        if self.offset > self.weights.shape[0]:
            self.source.missing.append(f"{name} {list(shape)} in the dense model file")
            return derived.fill(name, shape)
        return derived.reshape(derived.slice_rows(self.weights, begin, self.offset), shape)


def describe_hugectr(source: TrainerTensors) -> Described:
    """Describe a model of HugeCTR by its graph.

    Raises:
        ArchitectureError: A layer is not known, or the weights do not fit the graph.
    """
    graph = source.checkpoint.documents.get("graph.json", {})
    reading = _Reading(source=source, weights=source.take("dense", None))
    dense, output = "", ""
    for number, layer in enumerate(graph.get("layers", [])):
        try:
            kind = str(layer["type"])
            if kind == "Data":
                dense = _read_data(reading, layer)
            elif kind in _EMBEDDINGS:
                _read_embedding(reading, layer)
            elif kind == "BinaryCrossEntropyLoss":
                output = str(_names(layer["bottom"])[0])
            else:
                _read_layer(reading, kind, layer)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
        ) as error:
            raise source.refuse(
                f"layer {number} of the graph cannot be read ({type(error).__name__}: {error})",
                expected="the JSON that Model.graph_to_json writes",
                hint="the file is damaged, or of a version that is not known yet",
            ) from None
    if not output or reading.shapes.get(output) != (1,):
        raise source.refuse(
            "a graph without one logit and BinaryCrossEntropyLoss",
            expected="a model that is trained on binary labels",
            hint="other losses cannot be converted yet",
        )
    left = reading.weights.shape[0] - reading.offset
    if left > 0 and not source.missing:
        source.wrong.append(f"the dense model file holds {left} elements more than the graph has")
    source.check()
    source.fact("format", "HugeCTR's documented one", "assumed", "not tried on files of its own")
    return source.describe_network(
        tables=reading.tables,
        features=reading.features,
        num_dense=reading.shapes[dense][0],
        name="layer-graph",
        config={
            "dense": dense,
            "output": output,
            "embeddings": reading.embeddings,
            "layers": reading.layers,
        },
        final_sigmoid=True,
    )


def _names(value: Any) -> list[str]:
    return [str(name) for name in (value if isinstance(value, list) else [value])]


def _read_data(reading: _Reading, layer: Json) -> str:
    dense = str(layer["dense"]["top"])
    width = int(layer["dense"]["dense_dim"])
    _expect(width >= 0, f"{width} dense inputs")
    reading.shapes[dense] = (reading.source.believed_width(width),)
    for entry in layer["sparse"]:
        slots = int(entry["slot_num"])
        _expect(0 < slots <= _MAX_SLOTS, f"{slots} slots")
        reading.sparse[str(entry["top"])] = slots
    return dense


def _read_embedding(reading: _Reading, layer: Json) -> None:
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
    tables = read_tables(reading.source, index, name, dim, sizes or None)
    reading.embeddings.append([name, len(reading.features), slots])
    reading.tables += tables
    for slot in range(slots):
        feature = name if slots == 1 else f"{name}_{slot}"
        table = tables[slot if len(tables) == slots else 0].name if tables else name
        own = pooling if isinstance(pooling, str) else pooling.get(feature, "sum")
        reading.features.append(FeatureSpec(name=feature, table=table, pooling=own))
    reading.shapes[name] = (slots, dim)
    ids = "ids begin at 0 in every slot" if sizes else "ids are the keys; one table for all slots"
    reading.source.fact(f"slots of {name}", str(slots), "read", ids)


def _read_layer(reading: _Reading, kind: str, layer: Json) -> None:
    """Read a layer without which the network would be another one, and take its weights."""
    bottom, top = _names(layer["bottom"]), _names(layer["top"])
    shapes = [reading.shapes[name] for name in bottom]
    entry: dict[str, Any] = {"type": kind, "bottom": bottom, "top": top}
    stem = f"layers.{len(reading.layers)}"
    width = _width(shapes[0])
    out: tuple[int, ...] = (width,)
    if kind in ("InnerProduct", "FusedInnerProduct"):
        out = (reading.source.believed_width(int(layer["fc_param"]["num_output"])),)
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
    """Read a layer that only puts numbers together; return the shape of its output."""
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
        expected="layers that are known: InnerProduct, MultiCross, Interaction, FmOrder2, ...",
        hint="convert such a model with an adapter of your own",
    )


def _width(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def _expect(holds: bool, found: str) -> None:
    if not holds:
        raise ValueError(found)


HUGECTR: Final = Architecture(
    name="hugectr",
    trainer="HugeCTR",
    anchor=r"(?P<prefix>)sparse\.(?P<table>\d+)\.emb_vector",
    final_sigmoid=True,
    describe=describe_hugectr,
)
