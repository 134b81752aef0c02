"""Fine-tune a bundle over ranks that torchrun starts: what `dmt finetune` does. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmt_convert.adapter import load_adapter, user_file
from dmt_convert.bundle import Bundle, is_bundle, open_bundle
from dmt_convert.cluster.launcher import default_out, launch, show_command, torchrun_command
from dmt_convert.cluster.rank_process import (
    INTERRUPT_CODE,
    InterruptError,
)
from dmt_convert.cluster.requirements import check_requirements
from dmt_convert.config import FinetuneConfig, RunConfig, to_arguments
from dmt_convert.errors import DmtError


class RanksFailedError(DmtError):
    """The ranks of a training ended without a result."""

    def __init__(self, found: str, *, code: int, said: bool) -> None:
        super().__init__(found, hint="what the ranks printed above says why")
        self.code = code
        """Exit code of the ranks."""
        self.said = said
        """Whether they have printed what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuning:
    """What came of a training."""

    bundle: Bundle | None
    """The new bundle; None on a host that does not see it."""
    summary: Mapping[str, Any] | None
    """What rank 0 reported, if what it printed was captured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneJob:
    """A training to start."""

    bundle: Bundle
    """The bundle to start from."""
    config: FinetuneConfig
    """What is asked for."""
    capture: bool = True
    """Keep what the ranks print to stdout off this process's, and take it for the result."""
    quiet: bool = False
    """Let the ranks print no progress."""
    extra: Sequence[str] = ()
    """Further arguments of the recipe."""

    @property
    def out(self) -> Path:
        """Where the new bundle goes."""
        return self.config.out or default_out(self.bundle.path)

    @property
    def arguments(self) -> list[str]:
        """The arguments of the recipe."""
        settings = to_arguments(self.config.replace(out=None), RunConfig)
        switches = ["--json"] * self.capture + ["--quiet"] * self.quiet
        paths = ["--bundle", str(self.bundle.path), "--out", str(self.out)]
        return [*settings, *switches, *paths, *self.extra]

    @property
    def command(self) -> list[str]:
        """The torchrun command that this amounts to, for people and other launchers."""
        return list(torchrun_command(self.config, self.arguments))

    @property
    def resume_command(self) -> list[str]:
        """The `dmt` command that goes on with this training from its checkpoints."""
        settings = to_arguments(self.config.replace(resume=True), FinetuneConfig)
        extra = ["--", *self.extra] if self.extra else []
        return ["dmt", "finetune", str(self.bundle.path), *settings, *extra]


def run_finetune(job: FinetuneJob) -> Finetuning:
    """Train a bundle further, and wait for the end.

    Raises:
        DmtError: A rank refused, with its own message; or the ranks failed.
        InterruptError: The training was stopped by a signal; it says where its checkpoint is.
        KeyboardInterrupt: It was stopped before it could say anything.
    """
    check_requirements()
    # headers only: a bundle that needs a file which was not given is refused at once
    if job.config.model is not None:
        load_adapter(job.config.model)
    user_file(job.bundle.manifest.model.flat)
    done = launch(job.config, job.arguments, capture=job.capture)
    if done.code == INTERRUPT_CODE:
        if done.error is None:
            raise KeyboardInterrupt
        raise InterruptError(
            done.error.found,
            expected=done.error.expected,
            hint=f"go on with: {show_command(job.resume_command)}",
        )
    if done.error is not None and done.code == done.error.exit_code:
        raise done.error
    if done.code:
        found = f"the ranks ended with exit code {done.code}" if done.error is None else ""
        said = done.error is None and done.code in (2, 3)
        raise RanksFailedError(found or str(done.error), code=done.code, said=said)
    bundle = open_bundle(job.out) if is_bundle(job.out) else None
    return Finetuning(bundle=bundle, summary=done.result)
