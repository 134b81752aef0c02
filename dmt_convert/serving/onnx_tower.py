"""Tower modules in a graph.

Letters: B batch, F features, N embedding dim, M widths' sum, D output dim, W = c * D.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmt_convert.model import TowerModuleSpec
from dmt_convert.serving.graph_writer import ExportJob
from dmt_convert.serving.onnx_dense import cross, linear
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_lookup import Piece, join
from dmt_convert.serving.placed_weights import PlacedFile


def emit_tower(
    b: GraphBuilder, job: ExportJob, tower: int, pieces: Sequence[Piece], output: str
) -> None:
    """Apply the module of a tower to its pooled embeddings: (B, O).

    Args:
        b: The graph.
        job: What is exported.
        tower: Which tower.
        pieces: Its pooled embeddings, in its order.
        output: Name of what it emits.
    """
    file = job.weights.towers[tower]
    module = job.spec.towers[tower].module
    if module.kind == "passthrough":
        join(b, pieces, output)
    elif module.kind == "linear":
        linear(b, file, "tower_module", join(b, pieces), bias="", output=output)
    elif module.kind == "dcn":
        crossed = cross(b, file, "tower_module.cross", join(b, pieces), module.cross_layers)
        linear(b, file, "tower_module", crossed, output=output)
    else:
        _emit_dlrm(b, file, module, pieces, output)


def _emit_dlrm(
    b: GraphBuilder,
    file: PlacedFile,
    module: TowerModuleSpec,
    pieces: Sequence[Piece],
    output: str,
) -> None:
    parts = [("feature", _per_feature)] * (module.c > 0) + [("tower", _per_tower)] * (module.p > 0)
    if len(parts) == 1:
        parts[0][1](b, file, pieces, output)
        return
    joined = join(b, pieces)
    whole = Piece(
        tensor=joined,
        features=tuple(name for piece in pieces for name in piece.features),
        dims=tuple(dim for piece in pieces for dim in piece.dims),
    )
    emitted = [part(b, file, (whole,), None) for _, part in parts]
    b.node("Concat", *emitted, name="emitted", output=output, axis=1)


def _per_tower(
    b: GraphBuilder, file: PlacedFile, pieces: Sequence[Piece], output: str | None
) -> str:
    """Map the whole tower to p vectors: (B, p * D)."""
    return linear(
        b,
        file,
        "tower_module",
        join(b, pieces),
        weight="tower_weight",
        bias="tower_bias",
        output=output,
    )


def _per_feature(
    b: GraphBuilder, file: PlacedFile, pieces: Sequence[Piece], output: str | None
) -> str:
    """Map every feature by itself to c vectors: (B, F * W)."""
    dims = [dim for piece in pieces for dim in piece.dims]
    width = file.weight("tower_module.feature_bias").shape[1]
    if len(pieces) == 1 and len(set(dims)) == 1:
        return _per_feature_batched(b, file, pieces[0], width, output)
    emitted, begin = [], 0
    for i, (tensor, dim) in enumerate(zip(_features(b, pieces), dims, strict=True)):
        name = "tower_module.feature_weight"
        weight = b.weight(file, name, shape=(dim, width), begin=begin * width)
        bias = b.weight(file, "tower_module.feature_bias", shape=(width,), begin=i * width)
        emitted.append(b.node("Gemm", tensor, weight, bias, name="feature"))
        begin += dim
    if len(emitted) == 1:
        return b.node("Identity", emitted[0], name="features", output=output)
    return b.node("Concat", *emitted, name="features", output=output, axis=1)


def _per_feature_batched(
    b: GraphBuilder, file: PlacedFile, piece: Piece, width: int, output: str | None
) -> str:
    count, dim = len(piece.dims), piece.dims[0]
    shape = b.ints("per_feature", [-1, count, dim])
    x_BFN = b.node("Reshape", piece.tensor, shape, name="per_feature")
    x_FBN = b.node("Transpose", x_BFN, name="features_first", perm=[1, 0, 2])
    weight = b.weight(file, "tower_module.feature_weight", shape=(count, dim, width))
    bias = b.weight(file, "tower_module.feature_bias", shape=(count, 1, width))
    product = b.node("MatMul", x_FBN, weight, name="features_without_bias")
    y_FBW = b.node("Add", product, bias, name="features_with_bias")
    y_BFW = b.node("Transpose", y_FBW, name="rows_first", perm=[1, 0, 2])
    flat = b.ints("flat", [-1, count * width])
    return b.node("Reshape", y_BFW, flat, name="features", output=output)


def _features(b: GraphBuilder, pieces: Sequence[Piece]) -> list[str]:
    """Return every feature's pooled embedding by itself, (B, N)."""
    features: list[str] = []
    for piece in pieces:
        if len(piece.dims) == 1:
            features.append(piece.tensor)
            continue
        sizes = b.ints("dims", piece.dims)
        features += b.nodes(
            "Split", piece.tensor, sizes, name="split", outputs=[None] * len(piece.dims), axis=1
        )
    return features
