"""What fewer bytes between hosts cost: the closed form at many compressions, on held-out rows.

Every point is the linear closed form, or no module at all and a code, as `--compression` starts
with. A tower's eigenproblem does not depend on the budget, so it is solved once and cut for each.
Beside them stands the flat model, its pooled embeddings rounded as flat training sends them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.config import ConvertConfig
from dmt_convert.conversion.initialisation.restored import widest_block
from dmt_convert.conversion.module_choice import choose_modules, how_to_choose
from dmt_convert.documents import Frontier, FrontierPoint
from dmt_convert.errors import CheckpointError, ConfigError, DataError
from dmt_convert.families import FlatModelInfo
from dmt_convert.metrics import compare_auc, measure_agreement
from dmt_convert.model import ELEMENT_BYTES, DmtSpec, TowerModuleSpec, describe_modules, one_tower
from dmt_convert.placement.predict import count_work

if TYPE_CHECKING:
    from dmt_convert.conversion.sample import Sample
    from dmt_convert.conversion.start import Choice, Starter

COMPRESSIONS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""float32 as it is, bf16, int8, then fewer elements and fewer bits."""
_MAX_WORK: Final = 5e10
"""FLOPs that a conversion spends unasked: a few seconds of one core."""
_SOLVES, _SOLVE_FLOPS = 4, 30.0
"""Eigenproblems per block of columns, and FLOPs of one over the cube of its columns."""
_CONFIDENCE_95: Final = 1.645
"""Standard errors above an estimate, of a one-sided bound."""
_MAX_JUDGED: Final = 1 << 20
_MAX_JUDGING: Final = 5e11
"""FLOPs to compare AUC on further rows with."""
_LOOKUP_FLOPS: Final = 100
"""FLOPs that take as long as to look up, check and pool one number of an embedding."""
_SCALE_BYTES: Final = 4
"""int8 of the flat model: the scale of a feature vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A point to measure."""

    compression: float
    """Bytes as float32, over bytes."""
    spec: DmtSpec
    """Towers that may send so much; the closed form allots it to them."""
    choice: Choice
    """How."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierRequest:
    """What to measure, and which point to take."""

    candidates: tuple[Candidate, ...]
    """Points, most bytes first; the first one is exact."""
    max_auc_loss: float | None = None
    """AUC that the chosen point may lose."""
    min_r2: float | None = None
    """R^2 that the chosen point must have."""
    further: Callable[[int], Iterator[Sample]] = lambda rows: iter(())
    """Gives at most so many labelled rows, beside the sample, to compare AUC on; by blocks."""

    @property
    def chooses(self) -> bool:
        """Whether a point is to be chosen."""
        return (self.max_auc_loss, self.min_r2) != (None, None)


def plan_frontier(
    info: FlatModelInfo,
    config: ConvertConfig,
    num_towers: int,
    make_spec: Callable[[TowerModuleSpec], DmtSpec],
    further: Callable[[int], Iterator[Sample]] = lambda rows: iter(()),
) -> FrontierRequest:
    """Say which points to measure: those of `COMPRESSIONS` that towers can send.

    Args:
        info: The flat model.
        config: What is asked for.
        num_towers: Number of towers.
        make_spec: Puts a module over the towers.
        further: Gives rows beside the sample.
    """
    candidates = []
    for compression in COMPRESSIONS:
        wanted = ConvertConfig(
            towers=config.towers or num_towers, compression=compression, prefer="bytes"
        )
        try:
            module = choose_modules(info, wanted, num_towers)[0]
            spec = make_spec(module)
        except ConfigError:  # towers cannot send so little
            break
        candidates.append(
            Candidate(compression=compression, spec=spec, choice=how_to_choose(wanted, [module]))
        )
    return FrontierRequest(
        candidates=tuple(candidates),
        max_auc_loss=config.max_auc_loss,
        min_r2=config.min_r2,
        further=further,
    )


def is_cheap(request: FrontierRequest, rows: int) -> bool:
    """Whether a conversion measures its frontier unasked, by the work that it takes.

    Args:
        request: The points.
        rows: Rows of the sample.
    """
    spec = request.candidates[0].spec
    width = sum(spec.flat.feature_dims)
    forward = count_work(one_tower(spec.flat)).flops + 2.0 * width**2 / len(spec.towers)
    work = forward * rows * (len(request.candidates) / 2 + 3)
    for tower, dims in zip(spec.towers, spec.dims_by_tower, strict=True):
        held = 0 if tower.everywhere else sum(dims)
        block = min(held, widest_block(width))
        work += _SOLVES * (_SOLVE_FLOPS * held * block**2 + 4.0 * rows * held * block)
    return work <= _MAX_WORK


def measure_frontier(starter: Starter, request: FrontierRequest) -> Frontier:
    """Solve and measure every point on the held-out rows.

    Args:
        starter: The flat model, rows to fit on and rows to judge by.
        request: The points; and which is to be chosen.

    Raises:
        DataError: A point is to be chosen by AUC, and the rows to judge by cannot tell it.
    """
    held, further = starter.held, 0
    if request.max_auc_loss is not None:
        _check_labels(starter)
        further = rows_to_judge(request)
    judge = _Judge(starter, lambda: request.further(further) if further else iter(()))
    points: list[FrontierPoint] = []
    flat = _flat_points(judge)
    for candidate in request.candidates:
        point = _measure(judge, candidate)
        if point is not None and (not points or point.bytes < points[-1].bytes):
            points.append(point)
    found = Frontier(
        points=tuple(points),
        flat=flat,
        data=held.description,
        count=held.batch.num_rows,
        judged=judge.rows if judge.rows > held.batch.num_rows else None,
        labelled=any(point.auc_lost is not None for point in flat),
    )
    return _choose(found, request) if request.chooses else found


def _check_labels(starter: Starter) -> None:
    labels, held = starter.held.batch.labels, starter.held
    positive = 0 if labels is None else int((labels > 0.5).sum())
    if labels is not None and min(positive, len(labels) - positive) >= 2:
        return
    found = (
        "has no labels" if labels is None else f"has {positive} positive labels in {len(labels)}"
    )
    raise DataError(
        f"--max-auc-loss, but what towers are judged by {found}: {held.description}",
        expected="--calibration rows with labels of both classes",
        hint="--min-r2 0.999 chooses by the agreement of logits, which needs no labels",
    )


Scorer = Callable[["Sample"], Float32Array]
"""Gives logits of rows, shape (n,)."""


class _Judge:
    """Compares logits with the flat model's: R^2 on the held-out rows, AUC on all there are.

    Args:
        starter: The flat model, and held-out rows.
        further: Gives further rows to compare AUC on, by blocks; the same ones every time.
    """

    def __init__(self, starter: Starter, further: Callable[[], Iterator[Sample]]) -> None:
        self.starter, self._further = starter, further
        target, labels = [starter.target], [starter.held.batch.labels]
        for block in further():
            target.append(starter.logits(block))
            labels.append(block.batch.labels)
        known = [each for each in labels if each is not None]
        self._target = np.concatenate(target)
        self._labels = np.concatenate(known) if len(known) == len(labels) else None

    @property
    def rows(self) -> int:
        """Rows on which AUC is compared."""
        return len(self._target)

    def compare(self, score: Scorer | None, point: FrontierPoint) -> FrontierPoint:
        """Say how well a point agrees with the flat model.

        Args:
            score: Gives its logits; None: they are the flat model's.
            point: What it is.
        """
        if score is None:
            logits = self._target
        else:
            blocks = itertools.chain((self.starter.held,), self._further())
            logits = np.concatenate([score(block) for block in blocks])
        held = slice(self.starter.held.batch.num_rows)
        r2, labels = measure_agreement(self._target[held], logits[held]).r2, self._labels
        lost = None if labels is None else compare_auc(self._target, logits, labels)
        if not math.isfinite(r2) or lost is None:
            return replace(point, r2=r2 if math.isfinite(r2) else None)
        bound = lost[0] + _CONFIDENCE_95 * lost[1]
        return replace(point, r2=r2, auc_lost=lost[0], auc_bound=bound)


def rows_to_judge(request: FrontierRequest) -> int:
    """Return on how many further rows AUC may be compared: as many as cost about a minute."""
    spec = request.candidates[0].spec.flat
    per_row = count_work(one_tower(spec)).flops + _LOOKUP_FLOPS * sum(spec.feature_dims)
    return int(min(_MAX_JUDGED, _MAX_JUDGING / (per_row * len(request.candidates))))


def _measure(judge: _Judge, candidate: Candidate) -> FrontierPoint | None:
    """Measure a point; None: towers cannot send so little, or nothing can be fitted."""
    starter = judge.starter
    if candidate.spec.is_passthrough:
        return _point(judge, candidate.compression, candidate.spec, None)
    try:
        model, _ = starter.solve([candidate.spec], candidate.choice)
    except CheckpointError:
        return None
    budget = candidate.choice.budget(model.spec)
    if budget is not None and sum(model.spec.tower_bytes) > budget:
        return None
    return _point(
        judge, candidate.compression, model.spec, lambda rows: starter.logits(rows, model)
    )


def _point(judge: _Judge, compression: float, spec: DmtSpec, score: Scorer | None) -> FrontierPoint:
    return judge.compare(
        score,
        FrontierPoint(
            name=describe_modules(spec),
            compression=compression,
            bytes=sum(spec.tower_bytes),
            r2=None,
            flops=count_work(spec).flops,
        ),
    )


def _flat_points(judge: _Judge) -> tuple[FrontierPoint, ...]:
    """Measure the flat model, its embeddings in fp32, bf16 and int8."""
    spec = judge.starter.spec

    def rounded(how: Callable[[Float32Array], Float32Array]) -> Scorer:
        return lambda rows: judge.starter.logits(replace(rows, pooled=how(rows.pooled)))

    elements, flops = sum(spec.feature_dims), count_work(one_tower(spec)).flops
    scales = _SCALE_BYTES * len(spec.feature_dims)
    sent: dict[str, tuple[int, Scorer | None]] = {
        "fp32": (ELEMENT_BYTES["fp32"] * elements, None),
        "bf16": (ELEMENT_BYTES["bf16"] * elements, rounded(round_bf16)),
        "int8": (
            ELEMENT_BYTES["int8"] * elements + scales,
            rounded(lambda rows: round_int8(rows, spec.feature_dims)),
        ),
    }
    return tuple(
        judge.compare(
            score,
            FrontierPoint(
                name=f"flat, {precision}",
                compression=ELEMENT_BYTES["fp32"] * elements / nbytes,
                bytes=nbytes,
                r2=None,
                flops=flops,
            ),
        )
        for precision, (nbytes, score) in sent.items()
    )


def round_bf16(pooled_nM: Float32Array) -> Float32Array:
    """Return what arrives of embeddings sent as bfloat16: nearest, ties to even."""
    bits = pooled_nM.view(np.uint32)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    rounded: Float32Array = kept.astype(np.uint32).view(np.float32)
    return rounded


def round_int8(pooled_nM: Float32Array, dims: Sequence[int]) -> Float32Array:
    """Return what arrives of embeddings sent as int8, one scale per feature vector and sample.

    Args:
        pooled_nM: Pooled embeddings, shape (n, M).
        dims: Width of every feature.
    """
    out, begin = np.empty_like(pooled_nM), 0
    for dim in dims:
        vectors = pooled_nM[:, begin : begin + dim]
        scale = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-30) / 127
        out[:, begin : begin + dim] = np.round(vectors / scale) * scale
        begin += dim
    return out


def _choose(frontier: Frontier, request: FrontierRequest) -> Frontier:
    """Take the fewest bytes that are good enough, and all points with more bytes as well.

    The points are tested one after the other from the most bytes on, up to the first that fails:
    so all of them together are wrong as rarely as one of them.
    """
    passed: list[FrontierPoint] = []
    failed: FrontierPoint | None = None
    for point in frontier.points:
        if any(_faults(point, request)):
            failed = point
            break
        passed.append(point)
    # the first point is exact, so something has passed unless nothing varies
    taken = passed[-1] if passed else frontier.points[0]
    return replace(
        frontier, chosen=taken.compression, reason=_reason(frontier, request, taken, failed)
    )


def _faults(point: FrontierPoint, request: FrontierRequest) -> Iterator[str]:
    bound, limit = point.auc_bound, request.max_auc_loss
    if limit is not None and bound is not None and not bound <= limit:
        yield (f"loses up to {bound:.5f} AUC with 95 % confidence (measured: {point.auc_lost:.5f})")
    if request.min_r2 is not None and (point.r2 is None or not point.r2 >= request.min_r2):
        yield f"has R^2 {'unknown' if point.r2 is None else f'{point.r2:.6f}'}"


def _reason(
    frontier: Frontier,
    request: FrontierRequest,
    taken: FrontierPoint,
    failed: FrontierPoint | None,
) -> str:
    asked = []
    if request.max_auc_loss is not None:
        asked.append(f"--max-auc-loss {request.max_auc_loss:g}")
    if request.min_r2 is not None:
        asked.append(f"--min-r2 {request.min_r2:g}")
    text = f"{' and '.join(asked)} chose --compression {taken.compression:g} ({taken.name})"
    if taken.auc_bound is not None and request.max_auc_loss is not None:
        text += f", which loses at most {max(taken.auc_bound, 0.0):.5f} AUC with 95 % confidence"
    elif taken.r2 is not None:
        text += f", R^2 {taken.r2:.6f}"
    text += f" on {frontier.judged or frontier.count:,} held-out rows"
    if failed is None:
        return f"{text}; that is the fewest bytes that were tried"
    text += f"; --compression {failed.compression:g} {' and '.join(_faults(failed, request))}"
    lost = failed.auc_lost
    if request.max_auc_loss is not None and lost is not None and lost <= request.max_auc_loss:
        text += ", which more rows of --calibration may narrow down"
    return text
