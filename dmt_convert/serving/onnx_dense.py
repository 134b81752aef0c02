"""Dense layers in a graph. Letters: B batch, M width of the concatenation, R rank."""

from __future__ import annotations

from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.placed_weights import PlacedFile
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
    x = linear(b, file, f"{prefix}.0", x, output=_named(spec, 0, output))
    return mlp_tail(b, file, prefix, x, spec, output)


def mlp_tail(
    b: GraphBuilder, file: PlacedFile, prefix: str, x: str, spec: MlpSpec, output: str | None = None
) -> str:
    """Add what follows the first linear layer of an MLP."""
    for i in range(spec.num_layers):
        if i:
            x = linear(b, file, f"{prefix}.{i}", x, output=_named(spec, i, output))
        last = i == spec.num_layers - 1
        if spec.final_relu or not last:
            named = output if last else None
            x = b.node("Relu", x, name=f"{prefix}.{i}.relu", output=named)
    return x


def _named(spec: MlpSpec, layer: int, output: str | None) -> str | None:
    """Name of a linear layer's output: that of the whole MLP where no ReLU follows the last."""
    return output if layer == spec.num_layers - 1 and not spec.final_relu else None


def cross(
    b: GraphBuilder,
    file: PlacedFile,
    prefix: str,
    x0: str,
    layers: int,
    *,
    first: str | None = None,
) -> str:
    """Add a low-rank cross network: (B, M) to (B, M).

    Args:
        b: The graph.
        file: Where its weights are.
        prefix: What their names begin with.
        x0: Its input.
        layers: How many.
        first: The first layer's V x, (B, R), where that is known.
    """
    x = x0
    for i in range(layers):
        layer = f"{prefix}.{i}"
        known = first if i == 0 else None
        z = linear(b, file, layer, x, weight="v", bias="") if known is None else known
        y = linear(b, file, layer, z, weight="w")
        product = b.node("Mul", x0, y, name=f"{layer}.product")
        x = b.node("Add", product, x, name=f"{layer}.sum")
    return x
