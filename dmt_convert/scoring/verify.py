"""Do two models give the same logits, and if not, where do they part?

Both models run on the same batches; every intermediate result that both have, in the same
meaning, is compared in the order in which it comes to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dmt_convert.bundle import check_digests
from dmt_convert.data import Batch, adapt_batches, merge_records, open_inputs
from dmt_convert.errors import ConfigError
from dmt_convert.model import Code
from dmt_convert.progress import Progress, no_progress
from dmt_convert.scoring.scored_model import ScoredModel
from dmt_convert.serving import ExportedModel, GraphInputs, generate_batch, join_inputs
from dmt_convert.spec import ModelSpec

DEFAULT_RTOL: Final = 1e-5
"""Of the largest value of a stage: fp32 sums in another order differ by a few 1e-7 of it, and
the factor leaves room for long sums; a wrong table or a swapped column differs by about 1."""
DEFAULT_ATOL: Final = 1e-6
"""Absolute slack, for stages that are zero throughout."""
GENERATED_ROWS: Final = 4096
"""Rows of the batch that is generated where no data is given."""
_MOST_AT_EDGES: Final = 0.01
"""Of a tower's elements. Sums in another order differ by a few 1e-7 of the largest value and
levels of 8 bits are 4e-3 of it apart, so that about one element in 10,000 is that near an edge."""
_NEXT_LEVEL: Final = 1.5
"""Steps up to which two levels are the next ones, and not the ones after next."""
_BEFORE_EXCHANGE: Final = ("pooled", "output of tower")
"""How stages in front of the exchange are called."""
_BATCH_ROWS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One stage, compared over all rows."""

    stage: str
    """Name of the stage."""
    max_abs_diff: float
    """Largest absolute difference; NaN where one of the two is not finite."""
    scale: float
    """Largest absolute value of the first model."""
    rows: int
    """Rows compared."""
    equal: bool
    """Within tolerance."""
    identical: bool
    """To the bit."""
    at_edges: int = 0
    """Elements at the edge between two levels of their tower's code, which arrive at the one in A
    and at the other in B. They are left out, and so are their rows in the stages behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `dmt verify` reports."""

    checks: tuple[Check, ...]
    """All stages that both models have."""
    skipped: tuple[str, ...]
    """Stages that only one has, or that mean something else in the other."""
    data: str
    """What the models ran on."""
    atol: float
    """Absolute tolerance."""
    rtol: float
    """Tolerance relative to a stage's largest value."""
    remark: str | None = None
    """Why the models may well differ, if that is known."""

    def __repr__(self) -> str:
        """Say the verdict in one line."""
        first = self.first_difference
        verdict = "same" if first is None else f"different, first at {first.stage}"
        return f"<VerifyReport: {verdict}, on {self.data}>"

    @property
    def same(self) -> bool:
        """Whether every stage is within tolerance."""
        return all(check.equal for check in self.checks)

    @property
    def first_difference(self) -> Check | None:
        """The first stage out of tolerance."""
        return next((check for check in self.checks if not check.equal), None)


class _Running:
    """Differences of one stage, over batches."""

    def __init__(self) -> None:
        self.diff = self.scale = 0.0
        self.rows = self.elements = self.at_edges = 0
        self.identical = True

    def update(self, a: Tensor, b: Tensor, at_edge: Tensor | None = None) -> None:
        x, y = a.numpy(), b.numpy()
        self.identical &= bool(np.array_equal(x, y))
        if at_edge is not None:
            self.at_edges += int(at_edge.sum())
            y = np.where(at_edge.numpy(), x, y)
        with np.errstate(invalid="ignore"):
            # np.maximum keeps NaN; max() of Python would not
            self.diff = float(np.maximum(self.diff, np.abs(x - y).max(initial=0.0)))
            self.scale = float(np.maximum(self.scale, np.abs(x).max(initial=0.0)))
        self.rows += len(x)
        self.elements += x.size

    def check(self, stage: str, atol: float, rtol: float) -> Check:
        """Return the verdict on the stage."""
        # an infinite difference from an infinite value is none that a tolerance covers
        equal = bool(np.isfinite(self.diff)) and self.diff <= atol + rtol * self.scale
        return Check(
            stage=stage,
            max_abs_diff=self.diff,
            scale=self.scale,
            rows=self.rows,
            equal=equal and self.rows > 0 and self.at_edges <= _MOST_AT_EDGES * self.elements,
            identical=self.identical,
            at_edges=self.at_edges,
        )


def verify_models(
    a: ScoredModel,
    b: ScoredModel,
    *,
    data: Path | None = None,
    atol: float = DEFAULT_ATOL,
    rtol: float = DEFAULT_RTOL,
    max_rows: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Run both models on the same rows and compare stage by stage.

    Args:
        a: The reference.
        b: The other model.
        data: Rows to run on; without, rows are generated: ids over every table's whole range
            (first and last row included), normal dense inputs, and bags in the forms that exports
            take: 0 to 4 ids, unless an export asks for one, or for equally many.
        atol: Absolute tolerance.
        rtol: Tolerance relative to the stage's largest absolute value in `a`.
        max_rows: Use only so many rows of the data.
        seed: Seed of generated rows.
        progress: Told of the rows that are compared.

    Raises:
        ConfigError: The models do not take the same inputs.
        DataError: The data does not fit the models.
    """
    _check_comparable(a, b)
    running: dict[str, _Running] = {}
    skipped: dict[str, None] = {}
    batches, total, label = _batches(a, b, data, max_rows, seed)
    done = 0
    for batch in batches:
        _compare(a, b, batch, running, skipped, tolerance=(atol, rtol))
        done += batch.num_rows
        progress("scoring", done, total)
    checks = tuple(run.check(stage, atol, rtol) for stage, run in running.items())
    return VerifyReport(
        checks=checks,
        skipped=tuple(skipped),
        data=label,
        atol=atol,
        rtol=rtol,
        remark=_remark(a, b),
    )


def check_bytes(model: ScoredModel) -> None:
    """Read every byte of a bundle or an export, and compare it with its digests.

    Raises:
        DmtError: Bytes have changed since it was written.
    """
    if model.bundle is not None:
        check_digests(model.bundle)
    elif isinstance(model.module, ExportedModel):
        model.module.check_files()


def _check_comparable(a: ScoredModel, b: ScoredModel) -> None:
    problems = []
    if a.spec.num_dense != b.spec.num_dense:
        problems.append(f"dense inputs: {a.spec.num_dense} and {b.spec.num_dense}")
    if a.spec.feature_names != b.spec.feature_names:
        only_a = [n for n in a.spec.feature_names if n not in b.spec.feature_names]
        only_b = [n for n in b.spec.feature_names if n not in a.spec.feature_names]
        problems.append(
            f"features: only in A {only_a[:5]}, only in B {only_b[:5]}"
            if only_a or only_b
            else "the same features in another order"
        )
    else:
        for name in a.spec.feature_names:
            rows = (a.spec.table_of(name).rows, b.spec.table_of(name).rows)
            if rows[0] != rows[1]:
                problems.append(f"rows of the table of {name}: {rows[0]} and {rows[1]}")
    if problems:
        raise ConfigError(
            f"{a.path} and {b.path} do not take the same inputs",
            expected="two models of the same features",
            hint="compare a checkpoint with the bundle that was made of it",
            details=problems,
        )


def _batches(
    a: ScoredModel, b: ScoredModel, data: Path | None, max_rows: int | None, seed: int
) -> tuple[Iterator[Batch], int, str]:
    if data is None:
        rows = GENERATED_ROWS if max_rows is None else max_rows
        models = [m.module for m in (a, b) if isinstance(m.module, ExportedModel)]
        exports = [exported.manifest.inputs for exported in models]
        return _generated(a.spec, rows, seed, exports), rows, f"{rows} generated rows"
    dataset = open_inputs(data, a.spec, merge_records(a.inputs, b.inputs))
    total = dataset.num_rows if max_rows is None else min(max_rows, dataset.num_rows)
    batches = dataset.batches(_BATCH_ROWS, max_rows=max_rows)
    return adapt_batches(dataset, a.spec, batches), total, f"{total} rows of {data}"


def _generated(
    spec: ModelSpec, rows: int, seed: int, exports: Sequence[GraphInputs] = ()
) -> Iterator[Batch]:
    inputs = join_inputs(spec, exports)
    for begin in range(0, rows, _BATCH_ROWS):
        count = min(_BATCH_ROWS, rows - begin)
        yield generate_batch(spec, inputs, count, seed=seed + begin)


def _compare(
    a: ScoredModel,
    b: ScoredModel,
    batch: Batch,
    running: dict[str, _Running],
    skipped: dict[str, None],
    *,
    tolerance: tuple[float, float],
) -> None:
    codes = _shared_codes(a, b)
    agree = torch.ones(batch.num_rows, dtype=torch.bool)
    ours = dict(a.stages(batch))
    theirs = dict(b.stages(batch))
    changed = _changed_meaning(a) | _changed_meaning(b)
    order = [*ours, *(stage for stage in theirs if stage not in ours)]
    # the logit comes last, whichever model has more stages
    for stage in sorted(order, key=lambda name: name == "logit"):
        x, y = ours.get(stage), theirs.get(stage)
        if x is None or y is None or stage in changed or x.shape != y.shape:
            skipped[stage] = None
            continue
        at_edge = None
        if stage in codes:
            at_edge = _at_edges(codes[stage], x, y, *tolerance)
            agree &= ~at_edge.any(dim=1)
        elif not stage.startswith(_BEFORE_EXCHANGE):
            x, y = x[agree], y[agree]
        running.setdefault(stage, _Running()).update(x, y, at_edge)
    if batch.logits is not None:
        truth = torch.from_numpy(np.array(batch.logits))
        name = "logit of the original model (from the data), against A"
        running.setdefault(name, _Running()).update(truth, ours["logit"])


def _shared_codes(a: ScoredModel, b: ScoredModel) -> dict[str, Code]:
    """Return the codes of the stages at which two models round alike."""
    if a.towers is None or b.towers is None or a.towers.towers != b.towers.towers:
        return {}
    codes = (a.code(t) for t in range(len(a.towers.towers)))
    return {f"output of tower {t}": code for t, code in enumerate(codes) if code is not None}


def _at_edges(code: Code, x: Tensor, y: Tensor, atol: float, rtol: float) -> Tensor:
    """Tell which elements arrive at two levels side by side."""
    apart = (x - y).abs()
    differ = apart > atol + rtol * float(x.abs().max() if x.numel() else 0.0)
    return differ & (apart < _NEXT_LEVEL * code.spacing(x))


def _changed_meaning(model: ScoredModel) -> set[str]:
    """Stages of a converted model that hold other things than the flat model's."""
    if model.towers is None or model.towers.is_passthrough:
        return set()
    return {"interaction"}


def _remark(reference: ScoredModel, other: ScoredModel) -> str | None:
    """Say why the models may well differ, if that is known."""
    if other.quantised:
        return (
            f"the tables of {other.path.name} are quantised ({other.quantised}), so logits agree "
            "but are not the same; its export.json says what that costs"
        )
    towers = other.towers
    if towers is None or towers.is_passthrough or reference.towers is not None:
        return None
    return (
        f"the towers of {other.path.name} send {towers.compression:.2f}x fewer bytes than their "
        "embeddings have, so logits agree but are not the same; passthrough towers that send "
        "float32 are exact"
    )
