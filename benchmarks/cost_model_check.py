"""Check the cost model's form against measured steps of emulated clusters.

    python benchmarks/cost_model_check.py results.json [more results]
    python benchmarks/cost_model_check.py benchmarks/first_cluster_runs.json

Every topology is left out in turn: the constants are fitted on all others, and predict its steps
and its speed-ups over flat. Prints the relative errors, where they are worst, and what the
constants are on all rows. With --at-most X it ends with status 4 where the median error over
the topologies left out exceeds X.

What this cannot check: the latencies and efficiencies of real clusters, whose links are a
thousand times as fast, and the presets of accelerators.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emulated_model import (
    TERMS,
    Floats,
    count,
    determines,
    fit,
    predict_ms,
    ring_share,
    terms,
)
from emulated_runs import Run, read_runs

from dmt_convert.errors import DataError, DmtError

_GOOD = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A run and what was predicted for it without looking at its topology."""

    run: Run
    predicted_ms: float
    speedup_error: float | None
    """Relative error of the speed-up over flat; None where no flat run is beside it."""
    cpu_bound: bool
    """Whether the links would take less time than twice the CPU."""

    @property
    def error(self) -> float:
        """Relative, positive where the prediction is too slow."""
        return self.predicted_ms / self.run.step_ms - 1


def cross_check(runs: Sequence[Run]) -> list[Guess]:
    """Predict every topology from the others.

    A topology is left out where the others do not tell all constants apart.

    Raises:
        DataError: Nothing can be predicted.
    """
    guesses: list[Guess] = []
    names = sorted({run.topology for run in runs})
    for name in names:
        others = [run for run in runs if run.topology != name]
        if others and determines(others):
            guesses += _guess([run for run in runs if run.topology == name], fit(others))
    if not guesses:
        raise DataError(
            f"rows of {', '.join(names)} alone do not determine {len(TERMS)} constants",
            expected="several topologies, link rates and compressions",
            hint="run the benchmark on more, such as 4x2,8x1,2x4,8x2 at 100,200,500",
        )
    return guesses


def _guess(runs: Sequence[Run], constants: Floats) -> list[Guess]:
    flat = {_setting(run): run for run in runs if run.kind == "flat"}
    found = []
    for run in runs:
        base = flat.get(_setting(run))
        error = None
        if base is not None and base is not run:
            predicted = predict_ms(base, constants) / predict_ms(run, constants)
            error = predicted / (base.step_ms / run.step_ms) - 1
        found.append(
            Guess(
                run=run,
                predicted_ms=predict_ms(run, constants),
                speedup_error=error,
                cpu_bound=_cpu_bound(run, constants),
            )
        )
    return found


def _setting(run: Run) -> tuple[object, ...]:
    """What two runs must share to be compared."""
    return (
        run.topology, run.rate_mbit, run.batch, run.pooling, run.features, run.dim,
        run.element_bytes, run.compute_ms,
    )  # fmt: skip


def _cpu_bound(run: Run, constants: Floats) -> bool:
    """By the measured CPU time, or where there is none, the modelled one."""
    parts = terms(run)
    cpu = (parts * constants)[:3].sum() if run.cpu_ms is None else run.cpu_ms / 1e3 / run.cores
    return bool(parts[3] < 2 * cpu)


def median_error(guesses: Sequence[Guess]) -> float:
    """Median of the relative errors, without their signs."""
    return float(np.median([abs(guess.error) for guess in guesses]))


def report(runs: Sequence[Run], guesses: Sequence[Guess]) -> None:
    """Print everything."""
    print(f"{len(runs)} rows, every topology predicted from the others\n")
    left = sorted({run.topology for run in runs} - {guess.run.topology for guess in guesses})
    if left:
        print(f"not predicted, for the others do not determine the constants: {', '.join(left)}\n")
    _table("topology", guesses, lambda guess: guess.run.topology)
    _table("link", guesses, lambda guess: f"{guess.run.rate_mbit:g} Mbit")
    _table("variant", guesses, lambda guess: guess.run.kind)
    _table("bound", guesses, lambda guess: "CPU" if guess.cpu_bound else "link")
    _table("all", guesses, lambda guess: "")
    constants = fit(runs)
    own = [abs(predict_ms(run, constants) / run.step_ms - 1) for run in runs]
    print(
        f"constants fitted to all rows, whose error then is {np.median(own):.1%} (median), "
        f"{max(own):.1%} (worst)"
    )
    shown = (
        (1e3, "ms CPU per rank"), (1e3, "ms CPU per message"), (1e9, "ns CPU per byte"),
        (1, "times bytes / rate"), (1e-6, "million parameters, times the same"),
    )  # fmt: skip
    for name, value, (factor, unit) in zip(TERMS, constants, shown, strict=True):
        print(f"  {name:16} {value * factor:9.3f} {unit}")
    _check_bytes(runs)
    worst = sorted(guesses, key=lambda guess: -abs(guess.error))[:5]
    print("\nwhere it fails most")
    for guess in worst:
        bound = "CPU" if guess.cpu_bound else "link"
        print(
            f"  {guess.run.label:40} {guess.run.step_ms:9.1f} ms measured, "
            f"{guess.predicted_ms:9.1f} predicted, {guess.error:+.0%} ({bound}-bound)"
        )
    bad = sum(abs(guess.error) > _GOOD for guess in guesses)
    print(f"\n{bad} of {len(guesses)} rows are off by more than {_GOOD:.0%}")


def _table(title: str, guesses: Sequence[Guess], key: Callable[[Guess], str]) -> None:
    names = sorted({key(guess) for guess in guesses})
    print(
        f"{title:18} {'rows':>5} {'step: median':>13} {'worst':>8} {'speed-up: median':>17} worst"
    )
    for name in names:
        part = [guess for guess in guesses if key(guess) == name]
        errors = [abs(guess.error) for guess in part]
        ratios = [abs(g.speedup_error) for g in part if g.speedup_error is not None]
        shown = f"{np.median(ratios):17.1%} {max(ratios):6.1%}" if ratios else f"{'-':>17}"
        print(f"{name:18} {len(part):5} {np.median(errors):13.1%} {max(errors):8.1%} {shown}")
    print()


def _check_bytes(runs: Sequence[Run]) -> None:
    """Compare counted bytes with measured ones, which hold headers and dense gradients as well."""
    measured = [run for run in runs if run.link_mb is not None]
    if not measured:
        print("  no bytes were measured")
        return
    rows = np.array([[count(run).link_bytes, ring_share(run) * 4] for run in measured])
    rows /= np.array([[(run.link_mb or 0) * 1e6] for run in measured])
    (headers, parameters), *_ = np.linalg.lstsq(rows, np.ones(len(measured)), rcond=None)
    errors = np.abs(rows @ [headers, parameters] - 1)
    print(
        f"  bytes per link: {np.median(errors):.1%} off (median), worst {errors.max():.1%}, with "
        f"{headers - 1:.1%} of headers and {parameters / headers:,.0f} dense parameters"
    )


def main() -> int:
    """Return 0, or 4 where the error is above --at-most."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--at-most", type=float, default=None, metavar="X")
    args = parser.parse_args()
    try:
        runs = [run for path in args.results for run in read_runs(path)]
        guesses = cross_check(runs)
    except DmtError as error:
        print(error, file=sys.stderr)
        return 3
    report(runs, guesses)
    found = median_error(guesses)
    if args.at_most is not None and found > args.at_most:
        print(f"median error {found:.1%} is above {args.at_most:.1%}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
