"""What a person reads: tables in Markdown, and what they do and do not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .network import GOODPUT
from .results import Fit, Row
from .settings import FLATS, Settings

_FLAT_TITLES: Final = {
    "flat": "x flat fp32",
    "flat-bf16": "x flat bf16",
    "flat-int8": "x flat int8",
}
LIMITS: Final = (
    "**What this emulation cannot show.**",
    "- All ranks share this machine's processors: where a row is flagged CPU-bound, ratios say "
    "more about them than about the links, and steps are longer than on hosts of their own.",
    "- Latency: a packet crosses the bridge in microseconds, and there are at most dozens of "
    "ranks. What smaller collectives save at hundreds or thousands of ranks (the alpha terms) does "
    "not appear here.",
    "- Gloo over TCP, not NCCL over RDMA: protocol work is done by the processors, there is no "
    "offload to a network card and no GPUDirect; ranks of a host talk over loopback, not NVLink.",
    "- No GPUs: lookups and dense layers run on processor cores. Modelled compute is a sleep; "
    "nothing contends with it.",
    "- One switch that never blocks, one link per host with one rate in both directions, no other "
    "traffic, no loss: real fabrics are oversubscribed and shared.",
    "- Any ratio between 1 and about the compression can be had by choosing the link rate. Read "
    "the whole sweep, not one number.",
)


def render_table(rows: Sequence[Row]) -> str:
    """One Markdown table of one topology."""
    flats = [name for name in FLATS if any(name in row.over_flats for row in rows)]
    over = [f" {_FLAT_TITLES[name]} (links) |" for name in flats]
    lines = [
        "| link Mbit | variant | step ms [q1, q3] | x flat | x TorchRec towers | CPU ms "
        f"| link MB | tower MB | link ms |{''.join(over)} model ms (error) | |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|" + "---:|" * len(flats) + "---:|---|",
    ]
    for row in rows:
        model = "-"
        if row.model_ms is not None:
            model = f"{row.model_ms:.0f} ({row.model_ms / row.step_ms - 1:+.0%})"
        cells = (
            f"{row.rate_mbit:g}",
            row.variant,
            f"{row.step_ms:.0f} [{row.step_ms_q1:.0f}, {row.step_ms_q3:.0f}]",
            _times(row.over_flat),
            _times(row.over_torchrec_towers),
            f"{row.cpu_ms:.0f}",
            f"{row.link_mb:.2f}",
            "-" if row.tower_mb is None else f"{row.tower_mb:.3f}",
            f"{row.link_ms:.0f}",
            *(_over_flat(row, name) for name in flats),
            model,
            "CPU-bound here" if row.cpu_bound else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_fit(fit: Fit | None, compute_ms: float) -> str:
    """One line about the model of one topology."""
    if fit is None:
        return "No model: it takes at least three rows of different bytes per link rate."
    modelled = f"{compute_ms:g} ms modelled compute + " if compute_ms else ""
    return (
        f"Model (fitted to these rows): step = {modelled}{fit.a_ms:.0f} ms + {fit.k:.2f} x link "
        f"ms; error {fit.mean_error:.1%} on average, {fit.max_error:.1%} at most."
    )


def render_legend(settings: Settings, *, cores: int) -> str:
    """What the columns mean."""
    lines = [
        f"{settings.features} features of dim {settings.dim}, {settings.pooling} id(s) per bag, "
        f"batch {settings.batch} per rank, tables of {settings.rows} rows; forward, backward, "
        "all-reduce of dense gradients, optimizers. Topologies are hosts x ranks per host.",
        "",
        f"- step ms: median and quartiles of {settings.rounds} turns of {settings.steps} steps, "
        "variants interleaved",
        "- x flat: step of flat TorchRec at the same precision / this step; above 1 is faster "
        "(coded: against fp32)",
        "- x flat fp32, bf16, int8: the same against each; in brackets the ratio of their link ms, "
        "which is what the links alone would allow",
        "- x TorchRec towers: the same against TorchRec's own towers at equal compression and "
        "precision",
        f"- CPU ms: processor time of a step, all ranks together ({cores} cores here)",
        "- link MB: what the busiest host sends or receives over its link in a step; link ms: the "
        f"time that this takes at {GOODPUT:.1%} of the nominal rate",
        "- tower MB: tower outputs and their gradients among them, counted where ranks hand them "
        "over; a difference from the plan is reported as wrong",
        "- coded-cX: linear towers of int8 elements (passthrough at 4) whose outputs are 1/X of "
        "the embeddings' bytes in fp32; -mixed: half of the elements in 4 bits; -fixed: the maps "
        "that restore embeddings are not trained",
        "- CPU-bound here: link ms is less than twice CPU ms / cores",
        "- bf16 stands for 16-bit exchanges; TorchRec's codecs use fp16 on a CPU. Its int8 takes "
        "1.25 bytes per element, with a scale and a bias for every 32",
        "- TorchRec sends ids as int64, our engine as int32; flat and torchrec-towers are not "
        "pipelined, -prefetch sends the next batch's ids during the step",
    ]
    if settings.compute_ms:
        lines.append(
            f"- **modelled**: every step contains a sleep of {settings.compute_ms:g} ms that "
            "stands for an accelerator's compute; it is part of step ms"
        )
    return "\n".join(lines)


def _over_flat(row: Row, flat: str) -> str:
    if flat not in row.over_flats:
        return "-"
    step, links = row.over_flats[flat]
    return f"{step:.2f} ({links:.2f})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
