"""The converted model as it starts, and how well it agrees with the flat model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
import torch

from dmt_convert.arrays import Float32Array
from dmt_convert.bundle import SmallWeights, split_state
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.conversion.frontier import FrontierRequest, is_cheap, measure_frontier
from dmt_convert.conversion.initialisation import (
    FlatTrace,
    allot_dims,
    default_steps,
    distill,
    initialise,
    trace_flat,
)
from dmt_convert.conversion.quality import compare_models, describe_weakness
from dmt_convert.conversion.sample import Sample
from dmt_convert.documents import Frontier, Quality
from dmt_convert.errors import CheckpointError
from dmt_convert.families import FlatModelInfo
from dmt_convert.model import (
    ELEMENT_BYTES,
    DmtModel,
    DmtSpec,
    FlatModel,
    MappedTables,
    describe_modules,
    open_flat_model,
    to_tensor,
)
from dmt_convert.placement.predict import count_work
from dmt_convert.spec import Dtype, ModelSpec

HELD_OUT: Final = 0.25
_AS_GOOD: Final = 5e-4
"""1 - R^2 of a closed form that distillation is not needed after, unless it is asked for."""
_ALIKE: Final = 1e-4
"""Difference in R^2 below which starts are as good as each other: some 1e-5 of AUC."""
_AS_CHEAP: Final = 0.1
"""Share by which what starts compute may differ, if the least is asked for."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedModel:
    """A converted model before any fine-tuning."""

    spec: DmtSpec
    """Its spec: the one that was asked for, or a better one that emits no more."""
    weights: SmallWeights
    """All its weights except the tables."""
    method: str
    """How they were found."""
    notes: tuple[str, ...]
    """What was fitted, one line each."""
    quality: Quality
    """How well it agrees with the flat model, and how well its yardsticks do."""
    frontier: Frontier | None = None
    """What other compressions would have cost; None if that was not measured."""


def start_model(
    info: FlatModelInfo,
    spec: DmtSpec,
    sample: Sample,
    *,
    alternatives: Sequence[DmtSpec] = (),
    choice: Choice | None = None,
    frontier: FrontierRequest | None = None,
    distill_steps: int | None = None,
    stored_as: Dtype | None = None,
    seed: int = 0,
    on_step: OnStep = lambda done, total: None,
) -> StartedModel:
    """Initialise a converted model, and measure it on rows that no fit has seen.

    Args:
        info: The flat checkpoint.
        spec: The converted model.
        sample: Rows; the last quarter is held out.
        alternatives: Further specs, of which one is taken by `choice`.
        choice: How output dims are allotted, and one of several specs is taken.
        frontier: Compressions to measure, if that is cheap or one of them is to be chosen: then it
            takes the place of `spec`.
        distill_steps: Steps of distillation after the closed form. None: up to 500, if the closed
            form leaves something to gain and the model is not large.
        stored_as: Type in which the tables will be stored.
        seed: Seed of everything random.
        on_step: Called with the steps of distillation that are done, and all steps.

    Raises:
        CheckpointError: A weight is NaN or Inf; or the numbers are so large that the flat model's
            logits are not finite, or that no closed form can be solved.
    """
    flat = open_flat_model(info)
    fit, held = sample.split(HELD_OUT)
    infos = {table.name: info.table_info(table.name) for table in info.spec.tables}
    tables = MappedTables(info.spec, infos, stored_as=stored_as)
    found, specs, starter = None, [spec, *alternatives], None
    if not spec.is_passthrough:
        check_logits(flat, held)
        starter = Starter(flat, fit, held, tables)
        if frontier is not None and (frontier.chooses or is_cheap(frontier, len(sample.pooled))):
            found = measure_frontier(starter, frontier)
            for taken in frontier.candidates:
                if taken.compression == found.chosen:
                    specs, choice = [taken.spec], taken.choice
    if starter is None or specs[0].is_passthrough:
        model, notes = initialise(flat, specs[0], None, method="exact", tables=tables)
        method, candidates = "exact", {"passthrough": lambda: model}
    else:
        closed, notes = starter.solve(specs, choice or Choice())
        better, note = starter.distill(closed, distill_steps, seed, on_step)
        del starter
        name = "rounded" if closed.spec.rules.exact else "closed form"
        model, method, notes = closed, name, (*notes, note)
        candidates = {name: lambda: closed}
        if better is not None:
            model, method = better, "closed form, then distilled"
            candidates["distilled"] = lambda: model
        if not model.spec.rules.exact:
            candidates["random initialisation"] = lambda: initialise(
                flat, model.spec, fit, method="random", tables=tables, seed=seed
            )[0]
    quality = compare_models(flat, candidates, held)
    weak = describe_weakness(quality, found)
    said = () if found is None or not found.reason else (found.reason,)
    return StartedModel(
        spec=model.spec,
        weights=split_state(model),
        method=method,
        notes=(*(() if weak is None else (weak,)), *said, *notes),
        quality=quality,
        frontier=found,
    )


@dataclass(slots=True, kw_only=False)
class _Tried:
    """A start that was solved."""

    lost: float
    """1 - R^2 of its logits on held-out rows."""
    flops: float
    """What its dense parts compute per sample."""
    model: DmtModel | None
    """The model; let go once another is better."""
    notes: tuple[str, ...]
    """What was fitted."""
    name: str = ""
    """What it is."""

    def __post_init__(self) -> None:
        assert self.model is not None
        self.name = describe_modules(self.model.spec)

    def describe(self) -> str:
        """Say what it costs, and how good it is."""
        return f"{self.name}: R^2 {1 - self.lost:.6f}, {self.flops / 1e6:.3g} MFLOP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How one of several starts is chosen."""

    compression: float | None = None
    """Bytes as float32 over bytes that may be sent; None: what the specs send."""
    allot: bool = False
    """Whether towers may have output dims of their own."""
    mix: bool = True
    """Whether elements of an int8 code may take 4 bits."""
    prefer: Literal["bytes", "compute"] = "bytes"
    """bytes: what agrees best with the flat model, all sending as little. compute: what computes
    least."""

    def budget(self, spec: DmtSpec) -> int | None:
        """Bytes that all towers may send per sample; None: as many as they do."""
        if self.compression is None:
            return None
        return int(ELEMENT_BYTES["fp32"] * sum(spec.flat.feature_dims) / self.compression + 1e-9)

    @property
    def reason(self) -> str:
        """Which of those that were tried is taken."""
        return "the best one" if self.prefer == "bytes" else "the one that computes least"

    def keep(self, tried: Sequence[_Tried]) -> list[_Tried]:
        """Put the best first; the models of all others are let go."""
        finite = [each for each in tried if math.isfinite(each.lost)] or [*tried]
        if self.prefer == "bytes":
            least = min(each.lost for each in finite)
            fair = [each for each in finite if not each.lost > least + _ALIKE]
            best = min(fair, key=lambda each: each.flops)
        else:
            least = min(each.flops for each in finite)
            fair = [each for each in finite if each.flops <= least * (1 + _AS_CHEAP)]
            best = min(fair, key=lambda each: each.lost)
        for each in tried:
            if each is not best:
                each.model = None
        return [best, *(each for each in tried if each is not best)]


class Starter:
    """The ways to a start, judged by the flat model's logits on rows that no fit has seen.

    Args:
        flat: The flat model.
        fit: Rows to fit on.
        held: Rows to judge by.
        tables: Lookups of the converted models; by default the flat model's.
    """

    def __init__(
        self, flat: FlatModel, fit: Sample, held: Sample, tables: MappedTables | None = None
    ) -> None:
        self._flat, self._fit, self._tables = flat, fit, tables
        self.held = held
        self._target = _logits(flat, held)

    @property
    def spec(self) -> ModelSpec:
        """The flat model's spec."""
        return self._flat.spec

    @property
    def target(self) -> Float32Array:
        """Logits of the flat model on the rows to judge by, shape (n,)."""
        return self._target.float().numpy()

    def logits(self, rows: Sample, model: DmtModel | None = None) -> Float32Array:
        """Logits of a converted model, or of the flat one, shape (n,)."""
        return _logits(self._flat if model is None else model, rows).float().numpy()

    @cached_property
    def _trace(self) -> FlatTrace:
        with torch.no_grad():
            return trace_flat(self._flat, self._fit)

    def solve(self, specs: Sequence[DmtSpec], choice: Choice) -> tuple[DmtModel, tuple[str, ...]]:
        """Solve the closed form of every spec, and keep one.

        Args:
            specs: Models to try.
            choice: How output dims are allotted, and the one that is kept is chosen.

        Returns:
            The model, and one line per thing that was tried or fitted.

        Raises:
            CheckpointError: None can be solved.
        """
        try:
            model, notes = self._solve(specs, choice)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise self._unsolvable(str(error).splitlines()[0]) from None
        if not math.isfinite(self._lost(model)):
            raise self._unsolvable("its logits are not finite")
        return model, notes

    def _solve(self, specs: Sequence[DmtSpec], choice: Choice) -> tuple[DmtModel, tuple[str, ...]]:
        tried: list[_Tried] = []
        sized = (each for spec in specs for each in self._sizes(spec, choice))
        for spec in dict.fromkeys(sized):
            model, notes = initialise(
                self._flat,
                spec,
                self._fit,
                method="exact" if spec.rules.exact else "closed-form",
                tables=self._tables,
                trace=None if spec.rules.exact else self._trace,
            )
            found = _Tried(self._lost(model), count_work(spec).flops, model, notes)
            tried = choice.keep([*tried, found])
        best = tried[0]
        notes = best.notes
        if len(tried) > 1:
            said = "; ".join(each.describe() for each in tried)
            notes = (f"tower modules tried, {choice.reason} taken: {said}", *notes)
        assert best.model is not None
        return best.model, notes

    def _sizes(self, spec: DmtSpec, choice: Choice) -> Iterator[DmtSpec]:
        """Yield a spec with output dims per tower, and as it is unless those are never worse."""
        if not choice.allot or spec.rules.exact:
            yield spec
            return
        if not spec.rules.restores:
            yield spec
        yield allot_dims(self._trace, spec, choice.budget(spec), mix=choice.mix)

    def distill(
        self,
        model: DmtModel,
        steps: int | None,
        seed: int = 0,
        on_step: OnStep = lambda done, total: None,
    ) -> tuple[DmtModel | None, str]:
        """Distil a closed form.

        Args:
            model: The closed form.
            steps: Steps to take; None: up to 500, if there is something to gain.
            seed: Seed of the order of rows.
            on_step: Called with the steps that are done, and all steps.

        Returns:
            The distilled model, or None if it is not needed or not better on the rows to judge by;
            and one line about the result.
        """
        before = self._lost(model)
        if model.spec.rules.exact:
            return None, "not distilled: every weight is the flat model's"
        if steps is None:
            if before <= _AS_GOOD:
                return None, f"not distilled: the closed form has R^2 {1 - before:.6f} already"
            steps = default_steps(model.spec)
            if not steps:
                return None, "not distilled: the model is large; ask for it with --distill-steps"
        if steps == 0:
            return None, "not distilled: not asked for"
        better, note = distill(
            self._flat, model, self._fit, steps=steps, seed=seed, on_step=on_step
        )
        after = self._lost(better)
        if better is model or not after < before:
            return None, f"distillation ({steps} steps) did not beat the closed form, which stays"
        return better, note

    def _unsolvable(self, reason: str) -> CheckpointError:
        """Say that towers cannot be fitted, and which tensors span the widest range."""
        trace = self._trace
        tensors: dict[str, Float32Array] = dict(trace.weights)
        for feature, vectors in zip(trace.spec.features, [*trace.vectors()][1:], strict=True):
            tensors[f"table {feature.table!r} (sampled rows)"] = vectors
        spans = {
            name: (
                float(np.abs(array).max(initial=0.0)),
                float(np.sqrt(np.square(array, dtype=np.float64).mean())),
            )
            for name, array in tensors.items()
            if array.size
        }
        widest = sorted(spans, key=lambda name: -spans[name][0] / (spans[name][1] or 1.0))[:3]
        largest = sorted(spans, key=lambda name: -spans[name][0])[:3]
        return CheckpointError(
            f"towers cannot be fitted to this model: {reason}",
            expected="weights and embeddings of moderate size",
            hint="check the tensors named above; --tower-module passthrough fits nothing and "
            "computes what the flat model computes",
            details=[
                f"{name}: largest value {spans[name][0]:.3g}, RMS {spans[name][1]:.3g}"
                for name in dict.fromkeys([*largest, *widest])
            ],
        )

    def _lost(self, model: DmtModel) -> float:
        """1 - R^2 of the logits on held-out rows."""
        spread = float((self._target - self._target.mean()).square().sum())
        error = float((_logits(model, self.held) - self._target).square().sum())
        return error / spread if spread > 0 else error


def open_starter(info: FlatModelInfo, sample: Sample) -> Starter:
    """Return the ways to a start from a checkpoint; the last quarter of the rows judges them.

    Raises:
        CheckpointError: A weight is NaN or Inf, or the flat model's logits are not finite.
    """
    flat = open_flat_model(info)
    fit, held = sample.split(HELD_OUT)
    check_logits(flat, held)
    return Starter(flat, fit, held)


def check_logits(flat: FlatModel, sample: Sample) -> None:
    """Refuse a flat model whose logits are not finite: nothing can be fitted to them.

    Raises:
        CheckpointError: They are not.
    """
    bad = int((~torch.isfinite(_logits(flat, sample))).sum())
    if bad:
        raise CheckpointError(
            f"the flat model's logits are NaN or Inf for {bad} of {sample.batch.num_rows} rows of "
            f"{sample.description}",
            expected="finite logits",
            hint="weights or inputs are too large for float32: check them, or give the model's own "
            "data with --calibration",
        )


def _logits(model: FlatModel | DmtModel, sample: Sample) -> torch.Tensor:
    dense, pooled = to_tensor(sample.batch.dense), to_tensor(sample.pooled)
    spec = model.spec if isinstance(model, FlatModel) else model.spec.flat
    with torch.inference_mode():
        parts = [
            model.forward_pooled(dense[rows], pooled[rows]) for rows in row_blocks(spec, len(dense))
        ]
    return torch.cat(parts).double()
