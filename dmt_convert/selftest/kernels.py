"""fbgemm's fused look-up and optimizers against plain torch, as training over ranks uses them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from dmt_convert.cluster import fused_parameters
from dmt_convert.config import TableOptimizerKind
from dmt_convert.placement import padded_dim
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.report import Outcome

DIMS: Final = (4, 6, 8, 128)
"""Rows are padded to multiples of 4, with columns that get no gradient."""
_ROWS: Final = (50, 7, 300, 11)
_STEPS, _BATCH, _LR, _EPS = 3, 16, 0.1, 1e-8
LIMIT: Final = 1e-5
"""Largest difference of weights that are about 1: kernels add the gradients of a row in another
order than plain torch, which changes the last of 24 bits a few times over."""
Bags = list[tuple[Tensor, Tensor, Tensor]]
"""Per table: ids, offsets, weights."""


def check_kernels(context: Context) -> Outcome:
    """Train tables for a few steps with every optimizer, with and without weights."""
    kinds: list[TableOptimizerKind] = ["rowwise-adagrad", "adagrad", "sgd"]
    if context.device == "cuda":  # fbgemm has it there alone
        kinds.append("adam")
    worst, moved, wrong = 0.0, {}, []
    for kind in kinds:
        for weighted in (False, True):
            found, move = compare(kind, weighted=weighted, device=context.device)
            worst, moved[kind] = max(worst, found), move
            if not found <= LIMIT:
                wrong.append(f"{kind}{', weighted' * weighted}: differs by {found:.2g}")
    empty = _empty_batch(context.device)
    if not empty:
        wrong.append("a batch without ids did not give zeros")
    wrong += [f"{kind}: moved nothing" for kind, move in moved.items() if move < 100 * LIMIT]
    details = {"largest_difference": worst, "limit": LIMIT, "moved": moved, "wrong": wrong}
    if wrong:
        return Outcome(status="differs", line="; ".join(wrong), details=details)
    line = f"{', '.join(kinds)}; dims {', '.join(map(str, DIMS))}: largest difference {worst:.1g}"
    return Outcome(status="ok", line=line, details=details)


def compare(kind: TableOptimizerKind, *, weighted: bool, device: str) -> tuple[float, float]:
    """Return the largest difference after a few steps, and how far weights moved."""
    generator = torch.Generator().manual_seed(0)
    start = [
        functional.pad(torch.randn(rows, dim, generator=generator), (0, padded_dim(dim) - dim))
        for rows, dim in zip(_ROWS, DIMS, strict=True)
    ]
    used = torch.cat([(torch.arange(padded_dim(dim)) < dim).float() for dim in DIMS])
    fused = make_fused(start, kind, device)
    plain = [table.clone() for table in start]
    state: list[dict[str, Tensor]] = [{} for _ in plain]
    worst = 0.0
    for step in range(_STEPS):
        bags = [_bags(generator, len(table), weighted=weighted) for table in plain]
        target = torch.randn(_BATCH, len(used), generator=generator) * used
        pooled = _look_up(fused, bags, device, weighted=weighted)
        (pooled * target.to(device)).sum().backward()  # type: ignore[no-untyped-call]
        expected = _step_plain(plain, bags, target, kind, state, step + 1)
        worst = max(worst, float((pooled.detach().cpu() - expected).abs().max()))
    for mine, theirs in zip(fused.split_embedding_weights(), plain, strict=True):
        worst = max(worst, float((mine.detach().cpu() - theirs).abs().max()))
    moves = [float((a - b).abs().max()) for a, b in zip(plain, start, strict=True)]
    return worst, min(moves)


def make_fused(tables: list[Tensor], kind: TableOptimizerKind, device: str) -> Any:
    """Return fbgemm's look-up over tables."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    cuda = device == "cuda"
    place = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
    fused = SplitTableBatchedEmbeddingBagsCodegen(
        [(len(table), table.shape[1], place, compute) for table in tables],
        pooling_mode=PoolingMode.SUM,
        device=torch.device(device, 0) if cuda else torch.device(device),
        **fused_parameters(kind, lr=_LR),
    )
    for mine, table in zip(fused.split_embedding_weights(), tables, strict=True):
        mine.data.copy_(table)
    return fused


def _bags(
    generator: torch.Generator, rows: int, *, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(0, 4, (_BATCH,), generator=generator)
    ids = torch.randint(0, rows, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(len(ids), generator=generator) if weighted else torch.ones(len(ids))
    return ids, functional.pad(lengths.cumsum(0), (1, 0)), weights


def _look_up(fused: Any, bags: Bags, device: str, *, weighted: bool) -> Tensor:
    """Return pooled rows of all tables side by side."""
    starts, offsets = 0, [torch.zeros(1, dtype=torch.int64)]
    for ids, each, _ in bags:
        offsets.append(each[1:] + starts)
        starts += len(ids)
    weights = torch.cat([w for _, _, w in bags]).to(device) if weighted else None
    pooled: Tensor = fused(
        torch.cat([ids for ids, _, _ in bags]).to(device),
        torch.cat(offsets).to(device),
        per_sample_weights=weights,
    )
    return pooled


def _empty_batch(device: str) -> bool:
    """Whether a rank whose batch has no ids gets zeros, and can go backward."""
    tables = [torch.ones(rows, 8) for rows in _ROWS]
    fused = make_fused(tables, "rowwise-adagrad", device)
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(_BATCH + 1, dtype=torch.int64)
    pooled = _look_up(fused, [(*none, torch.zeros(0))] * len(tables), device, weighted=False)
    pooled.sum().backward()  # type: ignore[no-untyped-call]
    still = all(bool((table == 1).all()) for table in fused.split_embedding_weights())
    return still and not pooled.any()


def _step_plain(
    tables: list[Tensor],
    bags: Bags,
    target: Tensor,
    kind: TableOptimizerKind,
    state: list[dict[str, Tensor]],
    step: int,
) -> Tensor:
    """Take the step in plain torch; returns the pooled rows before it."""
    leaves = [table.clone().requires_grad_() for table in tables]
    pooled = torch.cat(
        [
            functional.embedding_bag(
                ids, leaf, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
            )
            for leaf, (ids, offsets, weights) in zip(leaves, bags, strict=True)
        ],
        dim=1,
    )
    (pooled * target).sum().backward()  # type: ignore[no-untyped-call]
    for table, leaf, kept, (ids, _, _) in zip(tables, leaves, state, bags, strict=True):
        assert leaf.grad is not None
        rows = torch.tensor(
            sorted(set(ids.tolist())), dtype=torch.int64
        )  # fused optimizers leave other rows alone
        table[rows] -= _LR * _direction(leaf.grad, rows, kind, kept, step)
    return pooled.detach()


def _direction(
    grad: Tensor, rows: Tensor, kind: TableOptimizerKind, kept: dict[str, Tensor], step: int
) -> Tensor:
    g = grad[rows]
    if kind == "sgd":
        return g
    if kind == "adam":
        first = kept.setdefault("first", torch.zeros_like(grad))
        second = kept.setdefault("second", torch.zeros_like(grad))
        first[rows] = 0.9 * first[rows] + 0.1 * g
        second[rows] = 0.999 * second[rows] + 0.001 * g.square()
        mean, size = first[rows] / (1 - 0.9**step), second[rows] / (1 - 0.999**step)
        return mean / (size.sqrt() + _EPS)
    square = g.square()
    if kind == "rowwise-adagrad":
        square = square.mean(dim=1, keepdim=True)
    sums = kept.setdefault("sums", torch.zeros(len(grad), square.shape[1]))
    sums[rows] += square
    return g / (sums[rows].sqrt() + _EPS)
