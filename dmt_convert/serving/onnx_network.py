"""Networks in a graph: torch's own exporter writes the nodes, which join the graph by hand.

Weights stay in the export's `.safetensors` file wherever the exporter left them whole, or only
turned them round; what it computed from weights, as a folded batch norm, is kept in the graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dmt_convert.checkpoint import read_safetensors, read_tensor
from dmt_convert.errors import DmtError, ExportError
from dmt_convert.model import as_state
from dmt_convert.model.networks import build_network
from dmt_convert.serving.graph_writer import ExportJob
from dmt_convert.serving.onnx_graph import OPSET, GraphBuilder
from dmt_convert.spec import NetworkSpec

_PREFIX: Final = "network."
_ROWS: Final = 3
"""Rows of the traced example: none that is treated apart, as 0 and 1 are."""
_MAX_BYTES: Final = 1 << 30
"""Of weights that the exporter changed: a graph's file may hold 2 GiB in all."""


def emit_network(
    b: GraphBuilder, job: ExportJob, dense: str, vectors: Sequence[str], output: str
) -> None:
    """Add a model's network: logits, (B, 1).

    Args:
        b: The graph.
        job: What is exported.
        dense: The dense inputs, (B, number of them).
        vectors: The features' vectors in the flat model's order, each (B, N_f).
        output: Name of the logits.

    Raises:
        ExportError: torch cannot write the network as a graph.
    """
    spec, file = job.spec.flat, job.weights.over_arch
    assert spec.interaction.network is not None
    model = _write_nodes(
        _Weights(
            path=job.folder / file.path,
            digests=tuple(file.digests[n] for n in sorted(file.digests) if n.startswith(_PREFIX)),
        ),
        spec.interaction.network,
        spec.feature_dims,
        spec.num_dense,
    )
    state = {
        name: np.asarray(read_tensor(info))
        for name, info in file.tensors.items()
        if name.startswith(_PREFIX)
    }
    with b.scope("network"):
        names = dict(
            zip((value.name for value in model.graph.input), (dense, *vectors), strict=True)
        )
        added = 0
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            known = _find(tensor.name, array, state)
            if known is None:
                added += array.nbytes
                names[tensor.name] = b.constant(tensor.name, array)
                continue
            name, turned = known
            names[tensor.name] = b.weight(file, name)
            if turned:
                names[tensor.name] = b.node(
                    "Transpose", names[tensor.name], name=f"{name}.turned", perm=[1, 0]
                )
        if added > _MAX_BYTES:
            raise ExportError(
                f"torch's exporter folds {added} bytes of the network's weights into new ones",
                expected=f"at most {_MAX_BYTES}",
                hint="export to pt2, or serve the bundle's own model",
            )
        b.merge(model.graph.node, names)
        logits = names[model.graph.output[0].name]
        b.node("Unsqueeze", logits, b.ints("last", [1]), name="logit", output=output)


def no_dense(b: GraphBuilder, rows: str) -> str:
    """Return the dense inputs of a model without any, (B, 0).

    Args:
        b: The graph.
        rows: B, as a tensor of one element.
    """
    shape = b.node("Concat", rows, b.ints("no_columns", [0]), name="no_dense_shape", axis=0)
    return b.node("ConstantOfShape", shape, name="no_dense")


def _find(
    name: str, array: npt.NDArray[Any], state: Mapping[str, npt.NDArray[Any]]
) -> tuple[str, bool] | None:
    """Find a weight in the file by its values: its name, and whether it is turned round."""
    if array.dtype != np.float32:
        return None
    if name in state and np.array_equal(state[name], array):
        return name, False
    for other, values in state.items():
        if values.ndim == array.ndim == 2 and np.array_equal(values.T, array):
            return other, True
    return None


class _Traced(nn.Module):
    """A network under the name that its weights have in the file."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, dense_BD: Tensor, *pooled: Tensor) -> Tensor:
        logits: Tensor = self.network(dense_BD, list(pooled))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """Where a network's weights are; the same weights in another file are the same."""

    path: Path = field(compare=False)
    digests: tuple[str, ...]


@lru_cache(maxsize=1)
def _write_nodes(
    weights: _Weights, spec: NetworkSpec, dims: tuple[int, ...], num_dense: int
) -> onnx.ModelProto:
    """Write a network as a graph of its own, with its weights in it."""
    network = build_network(spec, dims, num_dense).eval().requires_grad_(False)
    own = network.state_dict()
    network.load_state_dict(
        {
            tensor.name.removeprefix(_PREFIX): as_state(
                np.asarray(read_tensor(tensor)), own.get(tensor.name.removeprefix(_PREFIX))
            )
            for tensor in read_safetensors(weights.path).tensors
            if tensor.name.startswith(_PREFIX)
        }
    )
    shapes = (num_dense, *dims)
    example = tuple(torch.zeros(_ROWS, width) for width in shapes)
    free = {0: torch.export.Dim("batch")}
    try:
        with torch.no_grad(), _hushed():
            program = torch.export.export(
                _Traced(network),
                example,
                dynamic_shapes=(free, (free,) * len(dims)),
                strict=False,
            )
            written = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, verbose=False
            )
        assert written is not None
        model: onnx.ModelProto = written.model_proto
    except DmtError:
        raise
    except ImportError as error:
        raise ExportError(
            f"networks cannot be exported to ONNX without {error.name}",
            expected="onnxscript, by which torch writes graphs",
            hint="pip install onnxscript",
        ) from None
    except Exception as error:  # torch gives no narrower class
        text = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"torch cannot write the network {spec.file or spec.name} as a graph "
            f"({type(error).__name__}: {text})",
            expected="a forward() without branches on values, for any number of rows",
            hint="mend forward(): shapes may only depend on dense.shape[0]",
        ) from error
    return _check(onnx.inliner.inline_local_functions(model) if model.functions else model, spec)


def _check(model: onnx.ModelProto, spec: NetworkSpec) -> onnx.ModelProto:
    domains = {entry.domain: entry.version for entry in model.opset_import}
    used = {node.domain for node in model.graph.node}
    if domains.get("") != OPSET or used - {"", "ai.onnx"}:
        raise ExportError(
            f"torch wrote the network {spec.file or spec.name} with operators of "
            + ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in domains.items()),
            expected=f"ai.onnx {OPSET}",
            hint="use plainer operators in forward(), or export to pt2",
        )
    return model


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep from the terminal what torch's exporter says to its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
