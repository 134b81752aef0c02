"""Tables of the serving benchmark, and its aims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from serving_variants import OURS, find_variant

CASE_KEYS: Final = ("model", "form", "part", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One variant with one size of batch."""

    model: str
    form: str
    part: str
    threads: int
    batch: int
    variant: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    calls: int
    major_faults: int
    """Pages that came from the disk while it was timed; anything but 0 spoils the figure."""

    @property
    def rows_per_s(self) -> float:
        return 1e3 * self.batch / self.median_ms

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows_per_s": self.rows_per_s}


def summarise(seconds: Sequence[float], faults: int, **where: Any) -> Result:
    q1, median, q3 = np.percentile(np.array(seconds) * 1e3, (25, 50, 75))
    return Result(
        median_ms=float(median),
        q1_ms=float(q1),
        q3_ms=float(q3),
        calls=len(seconds),
        major_faults=faults,
        **where,
    )


def show_tables(results: Sequence[Result]) -> Iterator[str]:
    """One table per case: variants down, batches across."""
    cases = dict.fromkeys(tuple(getattr(r, key) for key in CASE_KEYS) for r in results)
    for model, form, part, threads in cases:
        chosen = [
            r
            for r in results
            if (r.model, r.form, r.part, r.threads) == (model, form, part, threads)
        ]
        batches = sorted({r.batch for r in chosen})
        what = model if part == "model" else "lookup alone"
        cores = f"{threads} thread{'s' * (threads > 1)}"
        yield f"\n### {what}, {form}, {cores}: median ms (q1-q3), rows/s\n"
        yield "| variant | of | " + " | ".join(f"batch {b}" for b in batches) + " |"
        yield "|---|---|" + "---:|" * len(batches)
        for name in dict.fromkeys(r.variant for r in chosen):
            row = {r.batch: r for r in chosen if r.variant == name}
            cells = (_show(row[b]) if b in row else "" for b in batches)
            yield f"| {name} | {find_variant(name).group} | " + " | ".join(cells) + " |"


def _show(result: Result) -> str:
    spoiled = " !" if result.major_faults else ""
    return (
        f"{_ms(result.median_ms)} ({_ms(result.q1_ms)}-{_ms(result.q3_ms)}), "
        f"{result.rows_per_s:,.0f}{spoiled}"
    )


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """Some of our variants against some others, in every case that has both."""

    title: str
    factor: float
    """How many times as fast ours has to be."""
    ours: Callable[[str], bool]
    others: Callable[[str], bool]
    applies: Callable[[Result], bool] = lambda result: True


def _is_rival(name: str) -> bool:
    variant = find_variant(name)
    return variant.group in "abc" and variant.function == "flat"


AIMS: Final = (
    Aim(
        title="our whole-model ONNX, never slower than the best rival (fp32 tables)",
        factor=1.0,
        ours=lambda name: name in OURS and name.endswith("onnx"),
        others=lambda name: _is_rival(name) and not find_variant(name).int8,
    ),
    Aim(
        title="our whole-model pt2, never slower than the best rival (fp32 tables)",
        factor=1.0,
        ours=lambda name: name in OURS and name.endswith("pt2"),
        others=lambda name: _is_rival(name) and not find_variant(name).int8,
    ),
    Aim(
        title="the better of our two, never slower than the best rival (fp32 tables)",
        factor=1.0,
        ours=lambda name: name in OURS,
        others=lambda name: _is_rival(name) and not find_variant(name).int8,
    ),
    Aim(
        title="the better of our two (fp32), never slower than rivals with int8 tables",
        factor=1.0,
        ours=lambda name: name in OURS,
        others=lambda name: _is_rival(name) and find_variant(name).int8,
    ),
    Aim(
        title="towers, never slower than the flat model in our own formulation",
        factor=1.0,
        ours=lambda name: name in ("dmt-onnx", "dmt-pt2"),
        others=lambda name: find_variant(name).group == "d",
    ),
    Aim(
        title="DCNv2 at compression 4, against the flat model in our own formulation",
        factor=1.3,
        ours=lambda name: find_variant(name).function == "c4" and name.startswith("dmt"),
        others=lambda name: find_variant(name).group == "d",
        applies=lambda result: result.model == "dcn",
    ),
    Aim(
        title="request batching, 1 user and 1024 candidates, against the plain graph",
        factor=1.5,
        ours=lambda name: name.startswith("dmt-request"),
        others=lambda name: name.startswith("dmt-plain"),
        applies=lambda result: result.batch == 1024,
    ),
)


def judge(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Compare the fastest of ours with the fastest of the others, case by case.

    A verdict is `met`, `within the spread` (our lower quartile reaches the aim against the other's
    upper quartile) or `not met`.
    """
    verdicts = []
    for aim in AIMS:
        chosen = [r for r in results if aim.applies(r)]
        cells: dict[tuple[Any, ...], list[Result]] = {}
        for result in chosen:
            key = (*(getattr(result, k) for k in CASE_KEYS), result.batch)
            cells.setdefault(key, []).append(result)
        for key, cell in cells.items():
            ours = min((r for r in cell if aim.ours(r.variant)), key=_median, default=None)
            best = min((r for r in cell if aim.others(r.variant)), key=_median, default=None)
            if ours is not None and best is not None:
                where = dict(zip((*CASE_KEYS, "batch"), key, strict=True))
                verdicts.append({"aim": aim.title, **where, **_compare(ours, best, aim.factor)})
    return verdicts


def _median(result: Result) -> float:
    return result.median_ms


def _compare(ours: Result, best: Result, factor: float) -> dict[str, Any]:
    ratio = best.median_ms / ours.median_ms
    level = best.q3_ms / ours.q1_ms
    verdict = "met" if ratio >= factor else "within the spread" if level >= factor else "not met"
    return {
        "ours": ours.variant,
        "against": best.variant,
        "ratio": ratio,
        "wanted": factor,
        "verdict": verdict,
    }


def show_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines for every aim: how often it is met, and every case where it is not."""
    yield "\n### Aims\n"
    for aim in AIMS:
        mine = [v for v in verdicts if v["aim"] == aim.title]
        head = f"- {aim.title}, at least {aim.factor:g}x: "
        if not mine:
            yield head + "not measured"
            continue
        counts = {
            word: sum(v["verdict"] == word for v in mine)
            for word in ("met", "within the spread", "not met")
        }
        ratios = [v["ratio"] for v in mine]
        yield (
            head
            + ", ".join(f"{count} {word}" for word, count in counts.items() if count)
            + f"; ratio {min(ratios):.2f} to {max(ratios):.2f}, median {np.median(ratios):.2f}"
        )
        for v in mine:
            if v["verdict"] != "met":
                yield (
                    f"  - {v['model']} {v['form']}{' lookup' * (v['part'] == 'lookup')}, "
                    f"{v['threads']} thread(s), batch {v['batch']}: {v['ours']} {v['ratio']:.2f}x "
                    f"of {v['against']}: {v['verdict']}"
                )
