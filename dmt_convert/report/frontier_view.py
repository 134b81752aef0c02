"""What the report says of other compressions: the table and the picture of the frontier."""

from __future__ import annotations

from dataclasses import dataclass

from dmt_convert.documents import Frontier, FrontierPoint
from dmt_convert.report.frontier_figure import frontier_svg


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierView:
    """The frontier of a bundle."""

    frontier: Frontier
    """What was measured."""
    own: FrontierPoint | None
    """The model of the bundle, as it was converted."""

    @property
    def labelled(self) -> bool:
        """Whether AUC is known."""
        return self.frontier.labelled

    @property
    def figure(self) -> str:
        """The frontier as an `<svg>` element."""
        return frontier_svg(self.frontier, self.own)

    @property
    def text(self) -> str:
        """Say what the frontier shows."""
        drawn = "AUC lost" if self.labelled else "1 − R² of the logits"
        text = (
            f"{drawn} against the bytes that cross hosts per sample, measured on "
            f"{self.frontier.rows} of: {self.frontier.data}. Every "
            "point is the closed form that --compression starts with, before distillation and "
            "fine-tuning. Beside them stands the flat model, its embeddings sent in fp32, in bf16, "
            "and in int8 with a scale per vector."
        )
        return f"{text} {self.frontier.reason}." if self.frontier.reason else text

    @property
    def lines(self) -> tuple[tuple[FrontierPoint, str], ...]:
        """The rows of the table, most bytes first: points, and what they are."""
        lines = [(point, "yardstick") for point in self.frontier.flat]
        lines += [(point, "") for point in self.frontier.points]
        if self.own is not None:
            lines.append((self.own, "this bundle"))
        return tuple(sorted(lines, key=lambda line: -line[0].bytes))
