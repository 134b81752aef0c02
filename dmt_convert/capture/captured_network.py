"""Runs a captured graph: an `nn.Module` that is made of data alone.

Letters: B batch, D dense inputs, N embedding dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from dmt_convert.capture.graph import (
    DENSE,
    FEATURE,
    CapturedGraph,
    WeightSpec,
    list_references,
    read_graph,
)
from dmt_convert.capture.operators import MAKES
from dmt_convert.errors import ArchitectureError

_MAX_PER_ROW: Final = 1 << 24
"""Elements that a node may give for each row of a batch."""
_SPECIAL: Final[Mapping[str, Callable[..., Any]]] = {
    "size": lambda tensor, dim: tensor.shape[dim],
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "getitem": operator.getitem,
    # strides are not kept, and the shape is all that a view is about
    "aten.view.default": torch.reshape,
}


class CapturedNetwork(nn.Module):
    """The dense part of a model as it was captured; its weights have the module's own names.

    Args:
        config: The graph, see `read_graph`.
        dims: Embedding dims N_f of the features.
        num_dense: D.

    Raises:
        ArchitectureError: The graph may not be run, or its shapes do not fit together.
    """

    def __init__(self, config: Mapping[str, Any], dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        graph = read_graph(config, len(dims))
        self._captured = graph
        self._steps = [(node, _function(node.op)) for node in graph.nodes]
        self._spent = _last_uses(graph)
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        try:
            for name, spec in graph.weights.items():
                self._owners[name] = _register(self, name, spec)
            for rows in (2, 3):
                self._check_shapes(rows, dims, num_dense)
        except ArchitectureError:
            raise
        except Exception as error:  # torch gives no narrower class
            text = (str(error).strip().splitlines() or [""])[0]
            raise _misfit(f"{type(error).__name__}: {text}") from None

    def forward(self, dense_BD: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return the logit, shape (B,), of dense inputs and one tensor (B, N_f) per feature."""
        values: dict[str, Any] = {DENSE: dense_BD}
        values |= {f"{FEATURE}{i}": tensor for i, tensor in enumerate(pooled)}
        for _ in self._run(values):
            pass
        logits: Tensor = values[self._captured.output]
        return logits.reshape(-1).to(torch.float32)

    def _run(self, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield what every node gives; `values` has it until it is not needed any more."""
        weights = {name: getattr(*where) for name, where in self._owners.items()}
        device = values[DENSE].device
        for (node, function), spent in zip(self._steps, self._spent, strict=True):
            args = [_decode(arg, values, weights) for arg in node.args]
            kwargs = {key: _decode(arg, values, weights) for key, arg in node.kwargs.items()}
            if node.op in MAKES:
                kwargs["device"] = device
            values[node.name] = function(*args, **kwargs)
            yield node.name, values[node.name]
            for name in spent:
                del values[name]

    def _check_shapes(self, rows: int, dims: Sequence[int], num_dense: int) -> None:
        """Compute all shapes without any element, and refuse what does not fit or is too large."""
        values: dict[str, Any] = {DENSE: torch.empty(rows, num_dense, device="meta")}
        for i, dim in enumerate(dims):
            values[f"{FEATURE}{i}"] = torch.empty(rows, dim, device="meta")
        kept = self._owners
        self._owners = {name: _on_meta(*where) for name, where in kept.items()}
        try:
            for name, value in self._run(values):
                parts = value if isinstance(value, list | tuple) else [value]
                for part in parts:
                    if isinstance(part, Tensor) and part.numel() > rows * _MAX_PER_ROW:
                        raise _misfit(f"node {name!r} would have shape {list(part.shape)}")
        finally:
            self._owners = kept
        output = values[self._captured.output]
        is_logit = isinstance(output, Tensor) and output.is_floating_point()
        if not is_logit or tuple(output.shape) not in {(rows,), (rows, 1)}:
            raise _misfit(f"the output of {rows} rows is {_describe(output)}")


def _last_uses(graph: CapturedGraph) -> list[list[str]]:
    """Return for every node the nodes that nothing behind it reads."""
    spent: list[list[str]] = []
    needed = {graph.output}
    for node in reversed(graph.nodes):
        read = {name for kind, name in list_references(node) if kind == "node"} | {node.name}
        spent.append(sorted(read - needed))
        needed |= read
    return spent[::-1]


def _function(op: str) -> Callable[..., Any]:
    """Return what computes an operator of the fixed list; the name has been checked."""
    if op in _SPECIAL:
        return _SPECIAL[op]
    _, name, overload = op.split(".")
    function: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), overload)
    return function


def _register(module: nn.Module, name: str, spec: WeightSpec) -> tuple[nn.Module, str]:
    """Add a weight below containers that are named as the modules it came from."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    value = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
    if spec.trained:
        module.register_parameter(last, nn.Parameter(value))
    else:
        module.register_buffer(last, value)
    return module, last


def _on_meta(module: nn.Module, name: str) -> tuple[Any, str]:
    holder = nn.Module()
    holder.register_buffer("value", getattr(module, name).detach().to("meta"))
    return holder, "value"


def _decode(value: Any, values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Return an argument for a function; all forms have been checked."""
    if isinstance(value, list | tuple):
        return [_decode(entry, values, weights) for entry in value]
    if isinstance(value, Mapping):
        ((kind, name),) = value.items()
        if kind == "node":
            return values[name]
        if kind == "weight":
            return weights[name]
        return getattr(torch, name) if kind == "dtype" else float(name)
    return value


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    return f"a {type(value).__name__}"


def _misfit(what: str) -> ArchitectureError:
    return ArchitectureError(
        f"the shapes of the model's captured dense part do not fit together: {what}",
        expected="a graph that gives one logit per row",
        hint="use the version of dmt-convert that wrote the bundle, or convert the model again",
    )
