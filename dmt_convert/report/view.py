"""The view model of the report: everything that the page says, as texts, numbers and rows.

It is made from a bundle's documents alone, so a bundle is described in the same way whether it was
converted or fine-tuned. All texts are plain; the template escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from dmt_convert.documents import (
    EvaluationRecord,
    FinetuneRecord,
    FrontierPoint,
    QualityRow,
    TowerLoadRecord,
)
from dmt_convert.model import ELEMENT_BYTES, describe_modules
from dmt_convert.placement import advise_replication, describe_cached, describe_replication
from dmt_convert.placement.predict import count_work
from dmt_convert.report.figures import tower_colours, tower_loads
from dmt_convert.report.frontier_view import FrontierView
from dmt_convert.report.next_commands import next_commands
from dmt_convert.report.quantities import (
    DASH,
    plural,
    show_agreement,
    show_bytes,
    show_bytes_change,
    show_change,
    show_factor,
    show_metric,
    show_number,
    show_percent_change,
    show_seconds,
    show_share,
    show_small,
)
from dmt_convert.report.verdict import Verdict, judge_close, judge_exact

if TYPE_CHECKING:
    from dmt_convert.bundle import Manifest
    from dmt_convert.families import Fact
    from dmt_convert.model import DmtSpec, TowerModuleSpec
    from dmt_convert.placement import Exchange, TowerPlan

FLAT_ROW: Final = "flat"
"""Name of the quality row of the flat model."""
YARDSTICK_ROWS: Final = ("random initialisation",)
"""Names of quality rows that only serve as a yardstick."""
_STARTS: Final = ("rounded", "closed form", "distilled")
"""Names of quality rows of models as they were converted; the last one is the best."""
FINETUNED_ROW: Final = "fine-tuned"
"""How the names of quality rows of fine-tuned models begin."""

SAMPLES_PER_RANK: Final = 4096
"""Batch of one rank that the modelled times are for."""

_MAX_NAMES: Final = 40
"""A tower with more features shows the first few, and the others on demand."""
_MANY_FEATURES: Final = 400
"""In a model with more features, every tower does so."""
_FIRST_NAMES: Final = 6
_MAX_RANKS: Final = 16
"""More ranks per host are not drawn one by one."""

_STRATEGIES: Final = {
    "loss": "linear codes of the towers lose as little as possible",
    "coherent": "features that interact sit together",
    "diverse": "features that interact sit apart",
    "round-robin": "feature i sits in tower i mod T",
    "file": "the towers were given in a file",
}
_SOURCES: Final = {
    "assumed": "the trainer's documented default; not stored in the checkpoint",
    "given": "by you",
    "inferred": "only this fits the tensors",
    "read": "from the checkpoint",
}
"""Sources of facts; those to check come first."""

Badge = Literal["", "this bundle", "yardstick"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One of the numbers at the top."""

    label: str
    """What it is."""
    value: str
    """The number."""
    note: str
    """What to know about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A number with a bar."""

    text: str
    """The number."""
    share: float
    """How far the bar is filled, in [0, 1]."""
    label: str = ""
    """What it is of, or its share of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """The flat model and the towers, one bar each."""

    caption: str
    """What is compared."""
    bars: tuple[Bar, ...]
    """The flat model, the towers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric of a model on labelled rows."""

    text: str
    """Its value."""
    change: str = ""
    """Its change from the model to compare with, if that is known."""
    kind: Literal["", "same", "better", "worse"] = ""
    """What the change means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLine:
    """A row of the quality table."""

    row: QualityRow
    """The values."""
    badge: Badge
    """What the model is."""
    share: float
    """R², as far as a bar can show it."""
    metrics: tuple[Metric, ...]
    """AUC, log loss and NE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLine:
    """A row of the table of towers."""

    index: int
    """Its index."""
    colour: str
    """Colour of the tower in the figure and the tables, #rrggbb."""
    features: tuple[str, ...]
    """Its features."""
    measures: tuple[Bar, ...]
    """Tables, lookups and bytes sent, as compared with the largest tower."""
    module: str
    """Its module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLine:
    """A row of the table of hosts."""

    index: int
    """Its index."""
    towers: tuple[int, ...]
    """Indices of the towers that it runs."""
    memory: Bar
    """Bytes in use, as a share of its memory."""
    ranks: str
    """Bytes in use on each of its ranks."""
    columns: tuple[str, ...]
    """Bytes of every rank in percent of the fullest; empty if they are too many to draw."""


# Not slotted: `cached_property` needs a dict.
@dataclass(frozen=True, kw_only=True)
class ReportView:
    """Everything that a report says about a bundle."""

    manifest: Manifest
    """What the bundle is, and how it was made."""
    plan: TowerPlan
    """Where the towers go."""
    folder: str
    """Name of the bundle's folder."""
    figure: str
    """The partition as an `<svg>` element."""
    shows_affinity: bool = False
    """Whether the figure shows the affinity of pairs."""

    def __post_init__(self) -> None:
        assert len(self.plan.tower_hosts) == len(self.spec.towers), "plan of another bundle"

    # the model

    @property
    def title(self) -> str:
        """Name of the checkpoint."""
        return self.manifest.source.name or self.folder

    @property
    def spec(self) -> DmtSpec:
        """The converted model."""
        return self.manifest.model

    @property
    def finetune(self) -> FinetuneRecord | None:
        """How the bundle was fine-tuned."""
        return self.manifest.initialisation.finetune

    @property
    def flat(self) -> QualityRow | None:
        """The quality row of the flat model."""
        return next((row for row in self.manifest.quality.rows if row.name == FLAT_ROW), None)

    @property
    def converted(self) -> QualityRow | None:
        """The quality row of the model that was written: the last that is not a yardstick."""
        others = (FLAT_ROW, *YARDSTICK_ROWS)
        rows = reversed(self.manifest.quality.rows)
        return next((row for row in rows if row.name not in others), None)

    @property
    def summary(self) -> str:
        """Describe the flat model in one line."""
        flat = self.spec.flat
        return (
            f"{flat.family}, {flat.interaction.kind} interaction, "
            f"{plural(len(flat.features), 'feature')} in {plural(len(flat.tables), 'table')} of "
            f"{show_bytes(sum(table.nbytes for table in flat.tables))}"
        )

    # the headline

    @cached_property
    def verdict(self) -> Verdict:
        """Say how near the converted model is to the flat one, or what fine-tuning gained."""
        row = self.converted
        if self.finetune is not None:
            return Verdict(
                level="unknown",
                headline="Fine-tuned, so its logits are no longer the flat model's",
                text=self.finetune_summary,
            )
        if self.spec.is_passthrough:
            return judge_exact(None if row is None else row.max_abs_diff)
        config = self.manifest.config or {"calibration": "not recorded"}
        drawn = config.get("calibration") is None
        frontier = self.manifest.frontier
        return judge_close(None if row is None else row.r2, drawn=drawn, frontier=frontier)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The numbers at the top."""
        spec, traffic = self.spec, self.plan.traffic
        crossing = Tile(
            label="Cross hosts per sample",
            value=show_bytes_change(traffic.flat_cross_bytes, traffic.dmt_cross_bytes),
            note="embeddings, one direction; flat → towers",
        )
        if self.plan.cluster.hosts == 1:
            crossing = Tile(label=crossing.label, value="nothing", note="the plan has one host")
        return (
            Tile(
                label="Features → towers",
                value=f"{show_number(len(spec.flat.features))} → {show_number(len(spec.towers))}",
                note=f"{self.manifest.partition.strategy} partition",
            ),
            Tile(
                label="Compression",
                value=show_factor(spec.compression),
                note=f"{show_number(ELEMENT_BYTES['fp32'] * sum(spec.flat.feature_dims))} → "
                f"{show_number(sum(spec.tower_bytes))} bytes per sample",
            ),
            crossing,
            self._quality_tile(),
        )

    def _quality_tile(self) -> Tile:
        row, tuned = self.converted, self.finetune
        if tuned is not None:
            return Tile(
                label="Validation AUC",
                value=show_metric(tuned.after.auc),
                note=f"{show_metric(tuned.before.auc)} before fine-tuning",
            )
        return Tile(
            label="Agreement, R²",
            value=DASH if row is None else show_agreement(row.r2),
            note="not measured" if row is None else row.name,
        )

    @property
    def crossing(self) -> BarChart | None:
        """Bytes that enter a host; None if nothing crosses hosts."""
        traffic = self.plan.traffic
        flat, dmt = traffic.flat_cross_bytes, traffic.dmt_cross_bytes
        if max(flat, dmt) <= 0:
            return None
        hosts = plural(self.plan.cluster.hosts, "host")
        return BarChart(
            caption=f"Embedding bytes that enter a host per sample, on {hosts}",
            bars=_compare(flat, dmt, (show_bytes(flat), show_bytes(dmt))),
        )

    # quality

    @property
    def quality_data(self) -> str:
        """Say what the agreement was measured on."""
        quality = self.manifest.quality
        return f"{quality.count} held-out rows of: {quality.data or DASH}"

    @property
    def quality_meaning(self) -> str:
        """Say what the quality table shows."""
        row = self.converted
        if self.finetune is not None:
            return (
                "The model of this bundle was fine-tuned. Its row was measured on "
                f"{self.validation_rows}, with the change from before: {self.gain}. The other "
                f"rows describe the conversion and were measured on {self.quality_data}. To "
                "compare models, run dmt evaluate on one data set."
            )
        if row is None or row.r2 is None:
            return "The agreement of the converted model with the flat one was not measured."
        measured = f"Measured on {self.quality_data}: "
        if self.spec.is_passthrough:
            return (
                f"{measured}the logits differ from the flat model's by at most "
                f"{show_small(row.max_abs_diff)} (nothing is compressed)."
            )
        return (
            f"{measured}the logits of the converted model ({row.name}) {_explained(row.r2)}; the "
            f"largest difference of a single logit is {show_small(row.max_abs_diff)}. R² = 1 would "
            "be the flat model itself; rank correlation says how well the order of items is kept."
        )

    @property
    def quality_lines(self) -> tuple[QualityLine, ...]:
        """The rows of the quality table."""
        return tuple(self._quality_line(row) for row in self.manifest.quality.rows)

    def _quality_line(self, row: QualityRow) -> QualityLine:
        auc, log_loss, ne = self._compared_with(row)
        badge: Badge = "yardstick" if row.name in YARDSTICK_ROWS else ""
        if row is self.converted:
            badge = "this bundle"
        return QualityLine(
            row=row,
            badge=badge,
            share=row.r2 if row.r2 is not None and math.isfinite(row.r2) else 0.0,
            metrics=(
                _metric(row.auc, auc, better=1),
                _metric(row.log_loss, log_loss, better=-1),
                _metric(row.ne, ne, better=-1),
            ),
        )

    def _compared_with(self, row: QualityRow) -> tuple[float | None, float | None, float | None]:
        """AUC, log loss and NE, on the same rows, of the model that a row is compared with."""
        if not row.name.startswith(FINETUNED_ROW):
            flat = self.flat
            if flat is not None and row is not flat:
                return flat.auc, flat.log_loss, flat.ne
        elif self.finetune is not None and row is self.converted:
            before = self.finetune.before
            return before.auc, before.log_loss, before.ne
        return None, None, None

    @property
    def labels_text(self) -> str:
        """Say what the metrics were measured on, and how they changed; "" without labels."""
        flat, row = self.flat, self.converted
        if not self.manifest.quality.labelled:
            return ""
        text = f"AUC, log loss and NE were measured on {self.quality_data}."
        said = [] if flat is None or row is None else _changes(flat, row)
        return f"{text} From {FLAT_ROW} to converted: {', '.join(said)}." if said else text

    @cached_property
    def frontier(self) -> FrontierView | None:
        """What other compressions would have cost; None: not measured."""
        found = self.manifest.frontier
        return None if found is None else FrontierView(frontier=found, own=self._own_point())

    def _own_point(self) -> FrontierPoint | None:
        """The model as it was converted, among the points of the frontier; None: not known."""
        row, flat = self.converted, self.flat
        if self.finetune is not None:
            starts = [each for each in self.manifest.quality.rows if each.name in _STARTS]
            row = starts[-1] if starts else None
        if row is None or row.r2 is None:
            return None
        auc = None if flat is None else flat.auc
        return FrontierPoint(
            name=describe_modules(self.spec),
            compression=self.spec.compression,
            bytes=sum(self.spec.tower_bytes),
            r2=row.r2,
            auc_lost=None if auc is None or row.auc is None else auc - row.auc,
            flops=count_work(self.spec).flops,
        )

    # fine-tuning

    @property
    def gain(self) -> str:
        """AUC and NE on the validation rows before and after fine-tuning."""
        assert self.finetune is not None
        before, after = self.finetune.before, self.finetune.after
        said = _changes(before, after)
        return ", ".join(said) or (
            f"log loss {show_metric(before.log_loss)} → {show_metric(after.log_loss)}"
        )

    @property
    def validation_rows(self) -> str:
        """The rows that fine-tuning was measured on."""
        assert self.finetune is not None
        data = self.finetune.data
        return f"{show_number(data.valid_rows)} validation rows ({data.valid})"

    @property
    def finetune_summary(self) -> str:
        """What fine-tuning gained, in one sentence."""
        return f"On {self.validation_rows}: {self.gain}."

    @property
    def settings(self) -> str:
        """The settings of fine-tuning."""
        assert self.finetune is not None
        given = self.finetune.settings.items()
        return ", ".join(f"{name} {value}" for name, value in given if value is not None)

    # towers and partition

    @cached_property
    def loads(self) -> tuple[TowerLoadRecord, ...]:
        """What every tower costs."""
        spec = self.spec
        return tower_loads(spec.flat, spec.assignment.towers, self.manifest.partition)

    @property
    def colours(self) -> tuple[str, ...]:
        """The colour of every tower."""
        return tower_colours(len(self.spec.towers))

    @property
    def towers(self) -> tuple[TowerLine, ...]:
        """The rows of the table of towers."""
        table_bytes = [float(load.table_bytes) for load in self.loads]
        lookups = [load.lookups or 0.0 for load in self.loads]
        sent = [float(count) for count in self.spec.tower_bytes]
        held = [ELEMENT_BYTES["fp32"] * sum(dims) for dims in self.spec.dims_by_tower]
        return tuple(
            TowerLine(
                index=t,
                colour=colour,
                features=tower.features,
                measures=(
                    _measure(table_bytes, t, show_bytes(table_bytes[t])),
                    _measure(lookups, t, show_number(lookups[t])),
                    _measure(
                        sent,
                        t,
                        "stays on every rank"
                        if tower.everywhere
                        else f"{show_number(held[t])} → {show_number(sent[t])}",
                    ),
                ),
                module=_describe_module(tower.module, self.spec.tower_widths[t]),
            )
            for t, (tower, colour) in enumerate(zip(self.spec.towers, self.colours, strict=True))
        )

    @property
    def max_names(self) -> int:
        """Number of features up to which all names of a tower are shown."""
        return _MAX_NAMES if len(self.spec.flat.features) <= _MANY_FEATURES else _FIRST_NAMES

    @property
    def first_names(self) -> int:
        """Number of names that are shown of a tower with more features."""
        return _FIRST_NAMES

    @property
    def balance(self) -> str:
        """Say how even the towers are."""
        if len(self.loads) == 1:
            return "One tower holds all features: nothing is divided."
        measures: dict[str, Sequence[float]] = {
            "features": [load.features for load in self.loads],
            "table bytes": [load.table_bytes for load in self.loads],
            "lookups": [load.lookups or 0.0 for load in self.loads],
            "bytes sent": self.spec.tower_bytes,
        }
        said = [
            f"{name} {show_factor(max(values) * len(values) / sum(values))}"
            for name, values in measures.items()
            if sum(values) > 0
        ]
        return f"The largest tower over the mean tower (1.00× is even): {', '.join(said)}."

    @property
    def strategy(self) -> str:
        """Say how the towers were chosen."""
        record = self.manifest.partition
        said = [f"Strategy {record.strategy}", _STRATEGIES.get(record.strategy, "")]
        found = f" Found {record.search}." if record.search else ""
        return ": ".join(part for part in said if part) + "." + found

    @property
    def affinity(self) -> str:
        """Say how strong affinity is inside towers and between them."""
        record = self.manifest.partition
        inside, between = record.within_affinity, record.between_affinity
        if record.affinity is None:
            return (
                "There is no affinity matrix to show: this strategy does not use affinity, and "
                "none was measured."
            )
        if inside is None:
            return "No two features share a tower, so there is no affinity inside towers."
        mean = f"Mean {record.affinity} affinity of two features is {inside:.3f}"
        if between is None:
            towers = plural(len(self.spec.towers), "tower")
            return f"{mean}; with {towers} there are no pairs between towers."
        ratio = f" ({show_factor(inside / between)})" if between > 0 else ""
        return f"{mean} inside a tower and {between:.3f} between towers{ratio}."

    @property
    def figure_caption(self) -> str:
        """Say what the figure shows."""
        costs = "hat every tower costs."
        if not self.shows_affinity:
            return f"W{costs}"
        return f"Affinity of all pairs in model order and ordered by tower (framed), and w{costs}"

    # the plan

    @property
    def cluster(self) -> dict[str, str]:
        """Describe the cluster, by term."""
        cluster, fullest = self.plan.cluster, max(self.plan.bytes_per_rank)
        held, advice = describe_replication(self.plan), advise_replication(self.spec, cluster)
        moved = describe_cached(self.plan)
        return {
            "Cluster": f"{plural(cluster.hosts, 'host')} × "
            f"{plural(cluster.ranks_per_host, 'rank')} = {plural(cluster.world_size, 'rank')}",
            "Memory of a rank": f"{show_bytes(cluster.hbm_bytes)}, of which tables and optimizer "
            f"state may use {show_bytes(cluster.usable_bytes)}",
            "Fullest rank": f"{show_bytes(fullest)} "
            f"({show_share(fullest, cluster.usable_bytes)} of that)",
            "Links of a rank": f"{show_number(cluster.intra_gbps)} Gbit/s inside the host, "
            f"{show_number(cluster.inter_gbps)} Gbit/s to other hosts",
            **({"Tables on every rank": held or advice or ""} if held or advice else {}),
            **({"Tables in host memory": moved} if moved else {}),
        }

    @property
    def hosts(self) -> tuple[HostLine, ...]:
        """The rows of the table of hosts."""
        towers_on: list[list[int]] = [[] for _ in range(self.plan.cluster.hosts)]
        for tower, hosts in enumerate(self.plan.tower_hosts):
            for host in hosts:
                towers_on[host].append(tower)
        return tuple(self._host(host, towers) for host, towers in enumerate(towers_on))

    def _host(self, host: int, towers: Sequence[int]) -> HostLine:
        plan, size = self.plan, self.plan.cluster.ranks_per_host
        used, room = plan.bytes_per_host[host], plan.cluster.usable_bytes * size
        ranks = plan.bytes_per_rank[host * size : (host + 1) * size]
        least, most = min(ranks), max(ranks)
        words = f"{show_bytes(least)} to {show_bytes(most)}" if least < most else show_bytes(most)
        drawn = len(ranks) <= _MAX_RANKS and most > 0
        return HostLine(
            index=host,
            towers=tuple(towers),
            memory=Bar(text=show_bytes(used), share=used / room, label=show_share(used, room)),
            ranks=f"{words} each" if drawn else words,
            columns=tuple(f"{100 * count / most:.0f}%" for count in ranks) if drawn else (),
        )

    @property
    def times(self) -> BarChart | None:
        """The modelled time of all exchanges of a step; None if there are none."""
        estimate = self.plan.estimate(SAMPLES_PER_RANK)
        flat, dmt = estimate.flat_seconds, estimate.dmt_seconds
        if max(flat, dmt) <= 0:
            return None
        faster = f" Towers: {show_factor(flat / dmt)} as fast as flat." if dmt > 0 else ""
        return BarChart(
            caption="Predicted from link speeds, not measured: time of all exchanges of one step, "
            f"forward and backward, at {show_number(SAMPLES_PER_RANK)} samples per rank.{faster} "
            "Bandwidth only: no latency, no congestion, no overlap with computation; dense "
            "gradients are left out.",
            bars=_compare(flat, dmt, (show_seconds(flat), show_seconds(dmt))),
        )

    @property
    def exchanges(self) -> tuple[tuple[str, Exchange], ...]:
        """All exchanges by name; none if nothing is exchanged."""
        traffic = self.plan.traffic
        named = (
            ("flat: ids to the ranks of their tables", traffic.flat_indices),
            ("flat: pooled embeddings back", traffic.flat_embeddings),
            ("towers: ids to the peers", traffic.peer_indices),
            ("towers: ids inside the tower's hosts", traffic.tower_indices),
            ("towers: pooled embeddings inside the tower's hosts", traffic.tower_embeddings),
            ("towers: tower outputs to the peers", traffic.tower_outputs),
            ("towers: gradients of these back", traffic.output_gradients),
        )
        return named if any(e.cross_bytes or e.intra_bytes for _, e in named) else ()

    # what the report rests on

    @property
    def facts(self) -> list[Fact]:
        """What is known about the flat model; what to check comes first."""
        order = list(_SOURCES)
        return sorted(self.manifest.facts, key=lambda fact: order.index(fact.source))

    @property
    def facts_summary(self) -> str:
        """Count the facts by source."""
        found = [fact.source for fact in self.manifest.facts]
        counts = [
            f"{found.count(source)} {source} ({meaning})"
            for source, meaning in _SOURCES.items()
            if source in found
        ]
        if not counts:
            return "Nothing."
        advice = " Check what was assumed; correct it with --model-config."
        return f"{'; '.join(counts)}.{advice if 'assumed' in found else ''}"

    @property
    def ignored_summary(self) -> str:
        """Say how many tensors were passed over; empty if none was."""
        count = len(self.manifest.ignored_tensors)
        if not count:
            return ""
        passed = "tensor of the checkpoint was" if count == 1 else "tensors of the checkpoint were"
        return f"{count} {passed} passed over: no part of the converted model depends on them."

    @property
    def weights_bytes(self) -> int:
        """Size of all weights files."""
        return sum(entry.bytes for entry in self.manifest.weights.values())

    @property
    def commands(self) -> tuple[tuple[str, str], ...]:
        """What to do next: purposes and commands."""
        return next_commands(self.manifest, self.folder)


def _describe_module(module: TowerModuleSpec, width: int) -> str:
    """Describe a tower's module, and how what it emits travels."""
    text = module.describe()
    return text if module.code is None else f"{text}; {module.code.describe(width)}"


def _explained(r2: float) -> str:
    if not math.isfinite(r2):
        return "cannot be compared by R², since the flat model's do not vary"
    if 0 < r2 < 0.995:
        return f"explain {show_share(r2, 1)} of the variance of the flat model's logits"
    return f"agree with the flat model's to R² = {show_agreement(r2)}"


def _compare(flat: float, dmt: float, texts: tuple[str, str]) -> tuple[Bar, ...]:
    most = max(flat, dmt)
    return (
        Bar(label="flat", share=flat / most, text=texts[0]),
        Bar(label="towers", share=dmt / most, text=texts[1]),
    )


def _measure(values: Sequence[float], tower: int, text: str) -> Bar:
    share = values[tower] / max(values) if max(values) else 0.0
    return Bar(text=text, share=share, label=show_share(values[tower], sum(values)))


def _metric(value: float | None, before: float | None, *, better: int) -> Metric:
    """A metric with its change; `better` is the sign of a change for the better."""
    text = show_metric(value)
    if value is None or before is None:
        return Metric(text=text)
    change, gain = show_change(value - before), (value - before) * better
    same = change == "±0" or gain == 0
    return Metric(
        text=text, change=change, kind="same" if same else "better" if gain > 0 else "worse"
    )


def _changes(
    before: QualityRow | EvaluationRecord, after: QualityRow | EvaluationRecord
) -> list[str]:
    said = []
    if before.auc is not None and after.auc is not None:
        said.append(
            f"AUC {show_metric(before.auc)} → {show_metric(after.auc)} "
            f"({show_change(after.auc - before.auc)}; higher is better)"
        )
    if before.ne is not None and after.ne is not None:
        said.append(
            f"NE {show_metric(before.ne)} → {show_metric(after.ne)} "
            f"({show_percent_change(before.ne, after.ne)}; lower is better)"
        )
    return said
