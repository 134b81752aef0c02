"""One user against many candidates: what depends on the user alone is computed once per request.

Towers of the user's features run with batch 1, and what they emit, one row, meets the B rows of
the candidates here. Of the interaction, every term of user vectors alone has one row; a linear
layer over a mixture is split by columns, so that the user's columns are multiplied once.

Letters: B candidates, D width of the vectors that meet, K vectors, u of the user, i of the
candidates, M width of the concatenation, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmt_convert.errors import ExportError
from dmt_convert.model import DmtSpec
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.graph_writer import ExportJob
from dmt_convert.serving.onnx_dense import cross, mlp, mlp_tail
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_network import emit_network, no_dense
from dmt_convert.serving.onnx_over_arch import (
    LOGITS,
    in_order,
    pair_positions,
    pick_cells,
    project,
    project_dense,
    restore,
    widen_vectors,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Which towers run once per request."""

    once: tuple[bool, ...]
    """Per tower."""
    dense_once: bool
    """Whether nothing dense comes per candidate."""


def request_sides(spec: DmtSpec, inputs: GraphInputs) -> Sides:
    """Tell which towers run once per request.

    Raises:
        ExportError: A tower mixes features of both sides, or nothing comes per candidate.
    """
    user = set(inputs.per_request)
    mixed = [
        f"tower {t}: {', '.join(sorted(user & set(tower.features)))} with "
        f"{', '.join(sorted(set(tower.features) - user))}"
        for t, tower in enumerate(spec.towers)
        if user & set(tower.features) and not user >= set(tower.features)
    ]
    if mixed:
        raise ExportError(
            f"{len(mixed)} towers mix features that come once per request with others",
            expected="towers of one side each",
            hint="convert with --group user=f1,f2 --group item=f3,f4, every feature in a group",
            details=mixed,
        )
    once = tuple(user >= set(tower.features) for tower in spec.towers)
    dense_once = inputs.dense_per_request or not inputs.num_dense
    if all(once) and dense_once:
        raise ExportError(
            "every input comes once per request",
            expected="some inputs per candidate",
            hint="name fewer features, or leave out --dense-per-request",
        )
    return Sides(once=once, dense_once=dense_once)


def emit_request_logits(
    b: GraphBuilder, job: ExportJob, dense: str | None, emitted: Sequence[str]
) -> None:
    """Add everything behind the towers: logits, (B, 1).

    Args:
        b: The graph.
        job: What is exported.
        dense: The dense inputs, (B or 1, number of them); None where a network takes none.
        emitted: What every tower emits, (B or 1, O).
    """
    spec, file = job.spec, job.weights.over_arch
    sides = request_sides(spec, job.inputs)
    emitted = restore(b, job, emitted)
    if spec.interaction.network is not None:
        count = _candidates(b, sides, dense, emitted)
        if dense is None:
            dense, sides = no_dense(b, count), replace(sides, dense_once=False)
        dense, *repeated = _repeat_once(b, sides, (dense, *emitted), count)
        emit_network(b, job, dense, in_order(b, job, repeated), LOGITS)
        return
    assert dense is not None
    passed = mlp(b, file, "dense_arch", dense, spec.flat.dense_arch)
    part = project_dense(b, job, passed)
    if spec.interaction.kind == "dot":
        x = _paired_first_layer(b, job, sides, passed, part, emitted)
        if spec.over_arch.num_layers == 1:
            b.node("Identity", x, name="logits", output=LOGITS)
        mlp_tail(b, file, "over_arch", x, spec.over_arch, LOGITS)
        return
    count = _candidates(b, sides, dense, emitted)
    tensors = _repeat_once(b, sides, (part, *emitted), count)
    if sides.dense_once and spec.interaction.kind == "projection":
        passed = _repeat(b, passed, count)
    x = b.node("Concat", tensors[0], *in_order(b, job, tensors[1:]), name="side_by_side", axis=1)
    if spec.interaction.kind == "dcn":
        z = _split_product(b, job, sides, part, emitted)
        x = cross(b, file, "cross", x, spec.interaction.cross_layers, first=z)
    elif spec.interaction.kind == "projection":
        x = project(b, job, passed, x)
    mlp(b, file, "over_arch", x, spec.over_arch, LOGITS)


def _candidates(b: GraphBuilder, sides: Sides, dense: str | None, emitted: Sequence[str]) -> str:
    """Return B, as a tensor of one element, from an input that comes per candidate."""
    flags = zip((dense, *emitted), (sides.dense_once, *sides.once), strict=True)
    tensor = next(tensor for tensor, once in flags if tensor is not None and not once)
    return b.node("Shape", tensor, name="candidates", start=0, end=1)


def _repeat_once(b: GraphBuilder, sides: Sides, tensors: Sequence[str], count: str) -> list[str]:
    """Give every candidate what comes once per request: the dense inputs', then the towers'."""
    flags = (sides.dense_once, *sides.once)
    return [
        _repeat(b, tensor, count) if once else tensor
        for tensor, once in zip(tensors, flags, strict=True)
    ]


def _repeat(b: GraphBuilder, tensor: str, count: str) -> str:
    shape = b.node("Concat", count, b.ints("one", [1]), name="repeated_shape", axis=0)
    return b.node("Expand", tensor, shape, name="repeated")


def _columns(b: GraphBuilder, weight: str, columns: Sequence[int], name: str) -> str:
    """Return some columns of a weight: constant, so runtimes take them once, when they load."""
    return b.node("Gather", weight, b.ints("columns", columns), name=name, axis=1)


def _split_product(
    b: GraphBuilder, job: ExportJob, sides: Sides, part: str, emitted: Sequence[str]
) -> str:
    """Multiply the first cross layer's V side by side: (B, R), the user's columns once."""
    weight = b.weight(job.weights.over_arch, "cross.0.v")
    position, columns = 0, {}
    dims = job.spec.interaction_dims
    if job.spec.keeps_network:
        flat = job.spec.flat.feature_names
        for name, dim in zip(("", *flat), dims, strict=True):
            columns[name] = range(position, position + dim)
            position += dim
        groups = [("",), *(tower.features for tower in job.spec.towers)]
        taken = [[c for name in group for c in columns[name]] for group in groups]
    else:
        taken = []
        for width in (job.spec.dense_dim, *job.spec.tower_widths):
            taken.append(list(range(position, position + width)))
            position += width
    flags = (sides.dense_once, *sides.once)
    products = []
    for side in (True, False):
        members = [k for k, once in enumerate(flags) if once == side]
        if not members:
            continue
        tensors = [(part, *emitted)[k] for k in members]
        x = b.node("Concat", *tensors, name="one_side", axis=1)
        own = _columns(b, weight, [c for k in members for c in taken[k]], "v_of_side")
        products.append(b.node("Gemm", x, own, name="v_times_side", transB=1))
    return products[0] if len(products) == 1 else b.node("Add", *products, name="v_times_both")


def _paired_first_layer(
    b: GraphBuilder,
    job: ExportJob,
    sides: Sides,
    passed: str,
    part: str,
    emitted: Sequence[str],
) -> str:
    """Return the first over_arch layer before its ReLU, (B, out): user pairs multiplied once."""
    flags = np.asarray(_vector_flags(job.spec, sides))
    tensors = [part, *widen_vectors(b, job, emitted)]
    sources = zip(tensors, (sides.dense_once, *sides.once), strict=True)
    vectors: dict[bool, list[str]] = {True: [], False: []}
    for tensor, once in sources:
        vectors[once].append(tensor)
    dim, file = job.spec.dense_dim, job.weights.over_arch
    sets = {
        side: _vectors(b, names, int((flags == side).sum()), dim)
        for side, names in vectors.items()
        if names
    }
    left, right = pair_positions(job)
    weight, passed_width = b.weight(file, "over_arch.0.weight"), job.spec.flat.input_dims[0]
    both_user = flags[left] & flags[right]
    products = []
    for once, chosen in ((True, both_user), (False, ~both_user)):
        pairs = np.flatnonzero(chosen)
        x = []
        columns: list[int] = []
        if sides.dense_once == once:
            x.append(passed)
            columns += range(passed_width)
        if len(pairs):
            place = np.where(flags, np.cumsum(flags) - 1, np.cumsum(~flags) - 1)
            x.append(_pairs(b, sets, flags, place, left[pairs], right[pairs], once=once))
            columns += (passed_width + pairs).tolist()
        if x:
            joined = b.node("Concat", *x, name="one_side", axis=1)
            own = _columns(b, weight, columns, "weight_of_side")
            bias = [] if once else [b.weight(file, "over_arch.0.bias")]
            products.append(b.node("Gemm", joined, own, *bias, name="over_arch.0", transB=1))
    return products[0] if len(products) == 1 else b.node("Add", *products, name="over_arch.0.sum")


def _vector_flags(spec: DmtSpec, sides: Sides) -> list[bool]:
    """Whether the dense vector, and every vector in the order of the towers, is the user's."""
    flags = [sides.dense_once]
    for tower, once in zip(spec.towers, sides.once, strict=True):
        count = len(tower.features)
        flags += [once] * (count if spec.keeps_network else tower.module.num_vectors(count))
    return flags


def _vectors(b: GraphBuilder, tensors: Sequence[str], count: int, dim: int) -> str:
    """Return vectors side by side as (B or 1, K, D)."""
    joined = b.node("Concat", *tensors, name="one_side", axis=1)
    return b.node("Reshape", joined, b.ints("vectors", [-1, count, dim]), name="vectors")


def _pairs(
    b: GraphBuilder,
    sets: dict[bool, str],
    flags: np.ndarray,
    place: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    *,
    once: bool,
) -> str:
    """Return dot products: of user vectors with each other, (1, P), or of all others, (B, P)."""
    users, items = int(flags.sum()), int((~flags).sum())
    if once:
        turned = b.node("Transpose", sets[True], name="users_turned", perm=[0, 2, 1])
        gram = b.node("MatMul", sets[True], turned, name="user_dots")
        cells, width = place[left] * users + place[right], users * users
    else:
        against = b.node("Transpose", sets[False], name="items_turned", perm=[0, 2, 1])
        blocks = [b.node("MatMul", sets[False], against, name="item_dots")]
        if users:
            turned = b.node("Transpose", sets[True], name="users_turned", perm=[0, 2, 1])
            one = b.node("Squeeze", turned, b.ints("first", [0]), name="users_flat")
            blocks.append(b.node("MatMul", sets[False], one, name="item_user_dots"))
        gram = blocks[0]
        if len(blocks) == 2:
            gram = b.node("Concat", *blocks, name="dots", axis=2)
        row = np.where(flags[left], place[right], place[left])
        other = np.where(flags[left], left, right)
        column = np.where(flags[other], items + place[other], place[other])
        width = items * (items + users)
        cells = row * (items + users) + column
    return pick_cells(b, gram, width, cells)
