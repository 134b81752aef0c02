"""The flat model that teaches a bundle, opened on all ranks or on none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dmt_convert.bundle import Bundle
from dmt_convert.cluster.ranks import Ranks
from dmt_convert.config import RunConfig
from dmt_convert.errors import ConfigError
from dmt_convert.training import Teacher, TeacherChoice, choose_teacher, open_teacher


def open_teacher_together(
    ranks: Ranks, bundle: Bundle, config: RunConfig, device: str
) -> tuple[TeacherChoice, Teacher | None]:
    """Choose the teacher on the first rank, which reads its tables through; open it on all.

    Args:
        ranks: All ranks.
        bundle: What is trained.
        config: Which teacher is asked for, and its weight.
        device: Where this rank computes.

    Returns:
        What was chosen, the same on all ranks; and this rank's teacher.

    Raises:
        DmtError: The teacher that was asked for is not the bundle's flat model, cannot be read, or
            is not there for every rank.
    """
    choice = ranks.on_first_slowly(
        lambda: choose_teacher(bundle, config.teacher, config.teacher_weight, config.model)
    )
    path = choice.path
    if path is None:
        return choice, None
    without = [rank for rank, found in enumerate(ranks.on_all(path.exists)) if not found]
    if not without:
        made: list[Teacher | None] = []  # stays on its rank
        ranks.on_all(lambda: made.append(open_teacher(choice, bundle, config.model, device)))
        return choice, made[0]
    if isinstance(config.teacher, Path):
        raise ConfigError(
            f"--teacher {path} is not there for {len(without)} of {ranks.size} ranks, the first "
            f"of which is {without[0]}",
            expected="a path that all hosts reach",
            hint="copy the checkpoint to the same place on every host, or use --teacher none",
        )
    line = f"learning from the labels alone: not every host reaches the flat model {path}"
    return replace(choice, path=None, line=line), None
