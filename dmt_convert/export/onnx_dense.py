"""Dense layers in a graph. Letters: B batch, M width of the concatenation, R rank."""

from __future__ import annotations

from dmt_convert.export.onnx_graph import GraphBuilder
from dmt_convert.export.placed_weights import PlacedFile
from dmt_convert.spec import MlpSpec


def linear(
    b: GraphBuilder,
    file: PlacedFile,
    prefix: str,
    x: str,
    *,
    weight: str = "weight",
    bias: str = "bias",
    output: str | None = None,
) -> str:
    """Add a linear layer: (B, in) to (B, out).

    Args:
        b: The graph.
        file: Where its weights are, as `prefix.weight` (out, in) and `prefix.bias` (out,).
        prefix: What their names begin with.
        x: Its input.
        weight: What the weight is called behind the prefix.
        bias: What the bias is called; empty for none.
        output: Name of the output.
    """
    tensors = [b.weight(file, f"{prefix}.{name}") for name in (weight, bias) if name]
    name = f"{prefix}.{weight}".removesuffix(".weight")
    return b.node("Gemm", x, *tensors, name=name, output=output, transB=1)


def mlp(
    b: GraphBuilder, file: PlacedFile, prefix: str, x: str, spec: MlpSpec, output: str | None = None
) -> str:
    """Add linear layers with ReLU between them: (B, in) to (B, out)."""
    for i in range(spec.num_layers):
        last = i == spec.num_layers - 1
        relu = spec.final_relu or not last
        named = output if last else None
        x = linear(b, file, f"{prefix}.{i}", x, output=None if relu else named)
        if relu:
            x = b.node("Relu", x, name=f"{prefix}.{i}.relu", output=named)
    return x


def cross(b: GraphBuilder, file: PlacedFile, prefix: str, x0: str, layers: int) -> str:
    """Add a low-rank cross network: (B, M) to (B, M)."""
    x = x0
    for i in range(layers):
        layer = f"{prefix}.{i}"
        z = linear(b, file, layer, x, weight="v", bias="")
        y = linear(b, file, layer, z, weight="w")
        product = b.node("Mul", x0, y, name=f"{layer}.product")
        x = b.node("Add", product, x, name=f"{layer}.sum")
    return x
