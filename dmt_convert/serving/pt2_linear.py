"""Linear layers of a graph for a CPU, by oneDNN.

Compiled graphs hand their matrix products to the BLAS that torch was built with. On processors
with AVX-512 that are not Intel's, MKL takes half as long again or twice as long as oneDNN, which
is in the same torch and needs no weights packed beforehand (`benchmarks/serving_latency.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dmt_convert.serving.columns import Columns


class OneDnnLinear(TorchFunctionMode):
    """While active, `torch.nn.functional.linear` is traced as oneDNN's operator.

    Args:
        device: cpu or cuda; nothing changes for graphs of a GPU, nor where torch has no oneDNN.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._active = device == "cpu" and torch._C._has_mkldnn

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace linear layers; all else is called as it is."""
        if func is functional.linear and self._active:
            if isinstance(args[0], Columns):
                with self:  # for the products of its parts
                    return args[0].linear(*args[1:], **(kwargs or {}))
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
