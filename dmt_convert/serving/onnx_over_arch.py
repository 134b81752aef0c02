"""From the dense inputs and what the towers emit to the logits, in a graph.

Letters: B batch, D width of the vectors that meet, K vectors, P pairs, O output of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmt_convert.serving.graph_writer import ExportJob
from dmt_convert.serving.onnx_dense import cross, linear, mlp
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_network import emit_network, no_dense
from dmt_convert.spec import InteractionSpec

LOGITS = "logits"


def emit_logits(b: GraphBuilder, job: ExportJob, dense: str | None, emitted: Sequence[str]) -> None:
    """Add everything behind the towers: logits, (B, 1).

    Args:
        b: The graph.
        job: What is exported.
        dense: The dense inputs, (B, number of them); None where a network takes none.
        emitted: What every tower emits, each (B, O).
    """
    spec, file = job.spec, job.weights.over_arch
    emitted = restore(b, job, emitted)
    if spec.interaction.network is not None:
        if dense is None:
            dense = no_dense(b, b.node("Shape", emitted[0], name="rows", start=0, end=1))
        emit_network(b, job, dense, in_order(b, job, emitted), LOGITS)
        return
    assert dense is not None
    passed = mlp(b, file, "dense_arch", dense, spec.flat.dense_arch)
    part = project_dense(b, job, passed)
    kind = spec.interaction.kind
    if kind == "dot":
        pairs = _dot_pairs(b, job, part, emitted)
        x = b.node("Concat", passed, pairs, name="interaction", axis=1)
    else:
        x = b.node("Concat", part, *in_order(b, job, emitted), name="side_by_side", axis=1)
        if kind == "dcn":
            x = cross(b, file, "cross", x, spec.interaction.cross_layers)
        elif kind == "projection":
            x = project(b, job, passed, x)
    mlp(b, file, "over_arch", x, spec.over_arch, LOGITS)


def restore(b: GraphBuilder, job: ExportJob, emitted: Sequence[str]) -> list[str]:
    """Undo linear tower modules: what towers emit, each (B, D_t), to their embeddings, (B, M_t)."""
    if job.spec.kind != "linear":
        return list(emitted)
    file = job.weights.over_arch
    return [linear(b, file, f"restore.{t}", tensor) for t, tensor in enumerate(emitted)]


def project_dense(b: GraphBuilder, job: ExportJob, passed: str) -> str:
    """Return the dense vector as it takes part in the interaction: (B, D)."""
    if job.spec.dense_dim == job.spec.flat.input_dims[0]:
        return passed
    return linear(b, job.weights.over_arch, "dense_projection", passed)


def in_order(b: GraphBuilder, job: ExportJob, emitted: Sequence[str]) -> list[str]:
    """Return what enters the interaction, in its order: embeddings in the flat model's order."""
    if not job.spec.keeps_network:
        return list(emitted)
    vectors = {}
    for t, tensor in enumerate(emitted):
        features, dims = job.spec.towers[t].features, job.spec.tower_dims(t)
        if len(features) == 1:
            vectors[features[0]] = tensor
            continue
        split = b.nodes(
            "Split",
            tensor,
            b.ints("dims", dims),
            name=f"vectors_of_{t}",
            outputs=[None] * len(dims),
            axis=1,
        )
        vectors.update(zip(features, split, strict=True))
    return [vectors[name] for name in job.spec.flat.feature_names]


def _dot_pairs(b: GraphBuilder, job: ExportJob, dense: str, emitted: Sequence[str]) -> str:
    """Pair all vectors by dot products: (B, P). Narrower vectors are filled up with zeros."""
    dim, count = job.spec.dense_dim, len(job.spec.interaction_dims)
    wide = widen_vectors(b, job, emitted)
    joined = b.node("Concat", dense, *wide, name="side_by_side", axis=1)
    shape = b.ints("vectors", [-1, count, dim])
    vectors = b.node("Reshape", joined, shape, name="vectors")
    turned = b.node("Transpose", vectors, name="vectors_turned", perm=[0, 2, 1])
    gram = b.node("MatMul", vectors, turned, name="dots")
    left, right = pair_positions(job)
    return pick_cells(b, gram, count * count, left * count + right)


def pick_cells(b: GraphBuilder, dots: str, width: int, cells: np.ndarray) -> str:
    """Pick some of every row's dot products: (B, ...) with `width` of them to (B, P)."""
    flat = b.node("Reshape", dots, b.ints("cells", [-1, width]), name="dots_flat")
    # GatherElements has a loop of its own for the last axis; Gather copies number by number, and
    # turning the matrix round for it costs more than repeating the indices
    rows = b.node("Shape", flat, name="rows", start=0, end=1)
    size = b.node("Concat", rows, b.ints("num_pairs", [len(cells)]), name="size", axis=0)
    repeated = b.node("Expand", b.ints("pairs", cells[None]), size, name="pairs_of_rows")
    return b.node("GatherElements", flat, repeated, name="pairs", axis=1)


def widen_vectors(b: GraphBuilder, job: ExportJob, emitted: Sequence[str]) -> list[str]:
    """Fill the vectors of all towers up to one width: each (B, K * D)."""
    if job.spec.keeps_network:
        return list(emitted)
    dims = [tower.module.dim for tower in job.spec.towers]
    wide = job.spec.dense_dim
    return [_widen(b, tensor, own, wide) for tensor, own in zip(emitted, dims, strict=True)]


def _widen(b: GraphBuilder, tensor: str, own: int, dim: int) -> str:
    """Fill vectors (B, K * own) up with zeros: (B, K * dim)."""
    if own == dim:
        return tensor
    count_own = b.ints("narrow", [0, -1, own])
    vectors = b.node("Reshape", tensor, count_own, name="narrow_vectors")
    pads = b.ints("filling", [0, 0, 0, 0, 0, dim - own])
    filled = b.node("Pad", vectors, pads, name="filled_vectors")
    return b.node("Flatten", filled, name="wide_vectors", axis=1)


def pair_positions(job: ExportJob) -> tuple[np.ndarray, np.ndarray]:
    """Positions, among the dense vector and all vectors as the towers emit them, of every pair.

    The order is the interaction's, over the flat model's order where that is what it takes: a dot
    product is the same whichever of the two is named first, so no embedding has to be moved.
    """
    count = len(job.spec.interaction_dims)
    left, right = _triangle(count, job.spec.interaction)
    if not job.spec.keeps_network:
        return left, right
    emitted = [name for tower in job.spec.towers for name in tower.features]
    place = [0, *(1 + emitted.index(name) for name in job.spec.flat.feature_names)]
    places = np.asarray(place)
    return places[left], places[right]


def _triangle(count: int, spec: InteractionSpec) -> tuple[np.ndarray, np.ndarray]:
    if spec.pair_order == "tril":
        return np.tril_indices(count, 0 if spec.self_pairs else -1)
    return np.triu_indices(count, 0 if spec.self_pairs else 1)


def project(b: GraphBuilder, job: ExportJob, passed: str, x: str) -> str:
    """Let the two branches of a projection meet: (B, width)."""
    spec, file = job.spec.interaction, job.weights.over_arch
    assert spec.branch1 is not None and spec.branch2 is not None
    dim = job.spec.flat.input_dims[0]
    left = mlp(b, file, "branch1", x, spec.branch1)
    right = mlp(b, file, "branch2", x, spec.branch2)
    rows, columns = spec.branch1.widths[-1] // dim, spec.branch2.widths[-1] // dim
    left = b.node("Reshape", left, b.ints("left", [-1, rows, dim]), name="left")
    right = b.node("Reshape", right, b.ints("right", [-1, dim, columns]), name="right")
    product = b.node("MatMul", left, right, name="branches")
    flat = b.node("Flatten", product, name="branches_flat", axis=1)
    return b.node("Concat", passed, flat, name="interaction", axis=1)
