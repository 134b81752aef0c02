"""Graphs in ONNX, built node by node; weights stay where they are, in `.safetensors` files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from dmt_convert import __version__
from dmt_convert.arrays import AnyArray
from dmt_convert.serving.placed_weights import PlacedFile

OPSET: Final = 20
IR_VERSION: Final = 9
"""The oldest one for this opset, so that runtimes from 1.17 on load the graphs."""

_TYPES: Final[Mapping[str, int]] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
Shape = Sequence[int | str | None]


class GraphBuilder:
    """Collects the nodes, inputs, outputs and weights of one graph.

    Args:
        name: The graph's name.
        folder: The export's folder.
        path: Where the graph's file will be, below it: weights are found relative to that.
    """

    def __init__(self, name: str, folder: Path, path: Path) -> None:
        self._name = name
        self._folder = folder
        self._path = path
        self._parent: GraphBuilder | None = None
        self._scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, str, tuple[int, ...], bytes], str] = {}
        self._names: set[str] = set()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put `name/` before the names of all nodes made meanwhile."""
        before = self._scope
        self._scope = f"{before}{name}/"
        yield
        self._scope = before

    @property
    def prefix(self) -> str:
        """What the names of nodes begin with at present."""
        return self._scope

    def input(self, name: str, dtype: str, shape: Shape | None) -> str:
        """Add an input; strings in the shape are symbolic."""
        self._root._names.add(name)
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Shape | None) -> None:
        """Make a tensor an output."""
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))

    def node(self, op: str, *inputs: str, name: str, output: str | None = None, **at: Any) -> str:
        """Add a node with one output.

        Args:
            op: Its operator.
            inputs: Names of tensors; empty for an input that is left out.
            name: Its name, within the scope.
            output: Name of its output; its own name by default.
            at: Its attributes.

        Returns:
            The output's name.
        """
        return self.nodes(op, *inputs, name=name, outputs=(output,), **at)[0]

    def nodes(
        self, op: str, *inputs: str, name: str, outputs: Sequence[str | None], **at: Any
    ) -> tuple[str, ...]:
        """Add a node with several outputs; those without a name are numbered."""
        full = self._unique(f"{self._scope}{name}")
        alone = len(outputs) == 1
        named = tuple(
            given or (full if alone else f"{full}:{i}") for i, given in enumerate(outputs)
        )
        self._nodes.append(helper.make_node(op, list(inputs), list(named), name=full, **at))
        return named

    def cast(self, tensor: str, dtype: str, *, name: str) -> str:
        """Convert a tensor to another element type."""
        return self.node("Cast", tensor, name=name, to=_TYPES[dtype])

    def ints(self, name: str, values: npt.ArrayLike) -> str:
        """Return an int64 constant that is stored in the graph."""
        return self._constant(name, np.asarray(values, dtype=np.int64))

    def floats(self, name: str, values: npt.ArrayLike) -> str:
        """Return a float32 constant that is stored in the graph."""
        return self._constant(name, np.asarray(values, dtype=np.float32))

    def bytes(self, name: str, values: npt.ArrayLike) -> str:
        """Return a uint8 constant that is stored in the graph."""
        return self._constant(name, np.asarray(values, dtype=np.uint8))

    def constant(self, name: str, values: AnyArray) -> str:
        """Return a constant of its own type that is stored in the graph."""
        return self._constant(f"{self._scope}{name}", values)

    def merge(
        self, nodes: Iterable[onnx.NodeProto], inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> None:
        """Add the nodes of another graph; their other tensors and they themselves join the scope.

        Args:
            nodes: The nodes, sorted; they are copied.
            inputs: What the tensors that they take from outside are called here.
            outputs: What some of the tensors that they give are to be called here.
        """
        names = dict(inputs)
        for node in nodes:
            self._nodes.append(_renamed(node, names, outputs, self._scope))

    def weight(
        self, file: PlacedFile, name: str, *, shape: Sequence[int] | None = None, begin: int = 0
    ) -> str:
        """Return a tensor of a weights file, or a contiguous part of it, which stays there.

        Args:
            file: The file.
            name: The tensor that it begins in.
            shape: Its shape here, by default as stored. It may reach beyond the tensor, into
                those behind it.
            begin: Where in the tensor it begins, in elements.
        """
        root = self._root
        info = file.weight(name)
        shape = info.shape if shape is None else tuple(shape)
        count = int(np.prod(info.shape, dtype=np.int64))
        item = info.nbytes // max(1, count)
        location = os.path.relpath(root._folder / file.path, root._path.parent)
        assert not location.startswith(".."), location
        offset = file.offset(name) + begin * item
        full = f"{location}:{name}"
        if (begin, shape) != (0, info.shape):
            full += f"[{begin}:]{list(shape)}"
        if full not in root._initializers:
            tensor = TensorProto(name=full, data_type=_TYPES[info.dtype], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            length = int(np.prod(shape, dtype=np.int64)) * item
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            root._initializers[full] = tensor
        return full

    @contextmanager
    def branch(self, name: str) -> Iterator[GraphBuilder]:
        """Build a graph inside this one, for `If` and `Loop`; see `to_proto`."""
        inner = GraphBuilder(f"{self._scope}{name}", self._folder, self._path)
        inner._parent = self
        inner._scope = f"{self._scope}{name}/"
        yield inner

    def to_proto(self) -> onnx.GraphProto:
        """Return what was built."""
        return helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
        )

    def save(self, metadata: Mapping[str, str]) -> None:
        """Write the graph to its path, its weights not included.

        Args:
            metadata: Texts to keep in the file.
        """
        model = helper.make_model(
            self.to_proto(),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="dmt-convert",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(metadata))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(model.SerializeToString())

    @property
    def _root(self) -> GraphBuilder:
        return self if self._parent is None else self._parent._root

    def _constant(self, name: str, array: AnyArray) -> str:
        root = self._root
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key not in root._constants:
            full = root._unique(f"constants/{name}")
            root._constants[key] = full
            root._initializers[full] = numpy_helper.from_array(array, full)
        return root._constants[key]

    def _unique(self, name: str) -> str:
        names = self._root._names
        unique, n = name, 1
        while unique in names:
            n += 1
            unique = f"{name}_{n}"
        names.add(unique)
        return unique


def _renamed(
    node: onnx.NodeProto, names: dict[str, str], outputs: Mapping[str, str], scope: str
) -> onnx.NodeProto:
    """Copy a node of another graph, with the names that its tensors have here."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{scope}{node.name}"
    copy.doc_string = ""
    del copy.metadata_props[:]  # where in whose files it was written
    for i, name in enumerate(node.input):
        copy.input[i] = names[name] if name else ""
    for i, name in enumerate(node.output):
        given = outputs.get(name, f"{scope}{name}")
        names[name] = copy.output[i] = given if name else ""
    for attribute in copy.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _rename_inside(attribute.g, dict(names), scope)
    return copy


def _rename_inside(graph: onnx.GraphProto, names: dict[str, str], scope: str) -> None:
    """Rename the tensors of a branch or a loop's body."""
    for value in (*graph.input, *graph.initializer):
        names[value.name] = value.name = f"{scope}{value.name}"
    nodes = [_renamed(node, names, {}, scope) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in graph.output:
        value.name = names[value.name]
