"""From turns to rows: medians, ratios, and a small model of the step time. No torch.

The model is T = modelled compute + A + k * x, where x is the time that the busiest host's bytes,
sent or received per step, need at the payload rate of its link. A (processor and latency) and k
are fitted to all rows of a topology, relative errors squared: it is a fit, not a forecast.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .network import GOODPUT
from .settings import FLATS, Settings, parse_variant

_LOSS_TOLERANCE: Final = 1e-4
"""Of first losses near 0.7: exchanges of 16, 8 and 4 bits round differently (up to 1e-5 was seen).
Models with other tower modules start at least 4e-4 apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant at one link rate on one topology, over all its turns."""

    topology: str
    """Such as `4x2`: hosts x ranks per host."""
    rate_mbit: float
    """Nominal rate of every host's link, Mbit/s."""
    variant: str
    """Its name."""
    steps: int
    """Measured steps."""
    step_ms: float
    """Median time of a step, modelled compute included."""
    step_ms_q1: float
    """First quartile."""
    step_ms_q3: float
    """Third quartile."""
    cpu_ms: float
    """Processor time of a step, of all ranks together."""
    link_mb: float
    """Bytes that the busiest host sends or receives over its link in a step, in 10^6 bytes."""
    link_ms: float
    """Time that its link needs for them: x of the model."""
    cpu_bound: bool
    """Whether that is less than twice the time that the processors need."""
    over_flat: float | None
    """Step time of the flat variant of the same precision, divided by this one's."""
    over_torchrec_towers: float | None
    """Step time of TorchRec's towers with as many bytes, divided by this one's."""
    model_ms: float | None
    """What the fitted model gives."""
    tower_mb: float | None = None
    """Part of link_mb that is tower outputs and their gradients, as counted (and
    as planned); None for variants of TorchRec."""
    over_flats: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For every flat variant that was measured, its step time divided by this one's, and its
    link_ms divided by this one's: what links alone would allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The model of one topology."""

    a_ms: float
    """A, in ms."""
    k: float
    """k: 1 where the links are all that counts, less where they overlap with other work."""
    mean_error: float
    """Mean of |model / measured - 1| over all rows."""
    max_error: float
    """The largest of them."""

    def predict(self, link_ms: float, compute_ms: float) -> float:
        """Step time in ms."""
        return compute_ms + self.a_ms + self.k * link_ms


def fit_model(points: Sequence[tuple[float, float]], compute_ms: float) -> Fit | None:
    """Fit A and k.

    Args:
        points: (link_ms, step_ms) of every row.
        compute_ms: Modelled compute, part of every step.

    Returns:
        None where the points do not determine both: fewer than three, or all of one link_ms.
    """
    if len(points) < 3 or len({x for x, _ in points}) < 2:
        return None
    # minimises sum(((A + k x - y) / T)^2) by the normal equations
    s, sx, sxx, sy, sxy = (0.0,) * 5
    for x, total in points:
        weight, y = 1 / total**2, total - compute_ms
        s, sx, sxx = s + weight, sx + weight * x, sxx + weight * x * x
        sy, sxy = sy + weight * y, sxy + weight * x * y
    k = (s * sxy - sx * sy) / (s * sxx - sx * sx)
    a = (sy - k * sx) / s
    errors = [abs((compute_ms + a + k * x) / total - 1) for x, total in points]
    return Fit(a_ms=a, k=k, mean_error=statistics.fmean(errors), max_error=max(errors))


def summarise(
    turns: Sequence[Mapping[str, Any]],
    settings: Settings,
    *,
    cores: int,
    crossing: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[Row], Fit | None]:
    """Make rows of one topology's turns, in the order of rates, then variants.

    Args:
        turns: Events of the stage.
        settings: With one topology.
        cores: Processors that all ranks share.
        crossing: Per variant of ours the bytes of tower outputs and gradients, see `stage`.
    """
    grouped: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for turn in turns:
        grouped.setdefault((turn["rate_mbit"], turn["variant"]), []).append(turn)
    steps = {key: [s * 1000 for t in mine for s in t["step_s"]] for key, mine in grouped.items()}
    medians = {key: statistics.median(times) for key, times in steps.items()}
    link_mb = {key: _busiest_link(mine) for key, mine in grouped.items()}
    link_ms = {key: mb * 8 / (GOODPUT * key[0]) * 1000 for key, mb in link_mb.items()}
    fit = fit_model([(link_ms[key], medians[key]) for key in medians], settings.compute_ms)
    rows = []
    busy = min(cores, settings.topology.world_size)
    for rate in settings.rates:
        for name in settings.variants:
            key = (rate, name)
            if key not in grouped:
                continue  # the run was ended before
            parsed = parse_variant(name, dim=settings.dim)
            times, cpu_ms = steps[key], _cpu_ms(grouped[key])
            rows.append(
                Row(
                    topology=settings.topology.name,
                    rate_mbit=rate,
                    variant=name,
                    steps=len(times),
                    step_ms=medians[key],
                    step_ms_q1=_quantile(times, 0.25),
                    step_ms_q3=_quantile(times, 0.75),
                    cpu_ms=cpu_ms,
                    link_mb=link_mb[key],
                    tower_mb=busiest_host(crossing or {}, name),
                    link_ms=link_ms[key],
                    cpu_bound=link_ms[key] < 2 * cpu_ms / busy,
                    over_flat=_ratio(medians, (rate, parsed.baseline), key),
                    over_flats={
                        flat: (medians[rate, flat] / medians[key], _over(link_ms, rate, flat, key))
                        for flat in FLATS
                        if (rate, flat) in grouped
                    },
                    over_torchrec_towers=_ratio(medians, (rate, parsed.torchrec_rival), key),
                    model_ms=fit.predict(link_ms[key], settings.compute_ms) if fit else None,
                )
            )
    return rows, fit


def loss_faults(first_losses: Mapping[str, float], settings: Settings) -> list[str]:
    """Say which variants start with another loss than the first one of the same model."""
    faults = []
    first: dict[str, str] = {}
    for name, loss in first_losses.items():
        other = first.setdefault(parse_variant(name, dim=settings.dim).model, name)
        if not abs(loss - first_losses[other]) <= _LOSS_TOLERANCE:
            faults.append(
                f"{name} starts with loss {loss:.7f}, {other} with {first_losses[other]:.7f}"
            )
    return faults


def byte_faults(crossing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which variants hand over other bytes of tower outputs and gradients than are planned."""
    faults = []
    for name, found in crossing.items():
        sent, received = (sum(ways) for ways in zip(*found["hosts"], strict=True))
        if not sent == received == found["planned"]:
            faults.append(
                f"{name} sends {sent} bytes of tower outputs and gradients to other hosts in a "
                f"step, its plan says {found['planned']}"
            )
    return faults


def busiest_host(crossing: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """Bytes of tower outputs and gradients per step that one host sends or receives, in 10^6."""
    if name not in crossing:
        return None
    return float(max(max(ways) for ways in crossing[name]["hosts"]) / 1e6)


def _busiest_link(turns: Iterable[Mapping[str, Any]]) -> float:
    """Most megabytes per step over one host's link in one direction, the mean of the turns."""
    return statistics.fmean(
        max(max(h["link_rx_bytes"], h["link_tx_bytes"]) for h in turn["hosts"])
        / len(turn["step_s"])
        / 1e6
        for turn in turns
    )


def _cpu_ms(turns: Iterable[Mapping[str, Any]]) -> float:
    return statistics.fmean(sum(turn["cpu_s"]) / len(turn["step_s"]) * 1000 for turn in turns)


def _ratio(
    medians: Mapping[tuple[float, str], float], other: tuple[float, str | None], own: Any
) -> float | None:
    rate, name = other
    return medians[rate, name] / medians[own] if name and (rate, name) in medians else None


def _over(
    values: Mapping[tuple[float, str], float], rate: float, other: str, own: tuple[float, str]
) -> float:
    """Ratio of two values; 0 on links that carry nothing."""
    return values[rate, other] / values[own] if values[own] else 0.0


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
