"""Fine-tune a bundle over ranks that torchrun starts: what `dmt finetune` does. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmt_convert.adapter import load_adapter, user_file
from dmt_convert.bundle import Bundle, is_bundle, open_bundle
from dmt_convert.cluster.launcher import default_out, launch, show_command, torchrun_command
from dmt_convert.cluster.rank_process import INTERRUPT_CODE
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


def run_finetune(
    bundle: Bundle, config: FinetuneConfig, *, capture: bool = True, quiet: bool = False
) -> Finetuning:
    """Train a bundle further, and wait for the end.

    Args:
        bundle: The bundle to start from.
        config: What is asked for.
        capture: Keep what the ranks print to stdout off this process's.
        quiet: Let them print no progress.

    Raises:
        DmtError: A rank refused, with its own message; or the ranks failed.
        KeyboardInterrupt: The training was interrupted.
    """
    # headers only: a bundle that needs a file which was not given is refused at once
    if config.model is not None:
        load_adapter(config.model)
    user_file(bundle.manifest.model.flat)
    config = with_target(bundle, config)
    arguments = recipe_arguments(bundle, config)
    arguments += ["--json"] * capture + ["--quiet"] * quiet
    done = launch(config, arguments, capture=capture)
    if done.code == INTERRUPT_CODE:
        raise KeyboardInterrupt
    if done.error is not None and done.code == done.error.exit_code:
        raise done.error
    if done.code:
        found = f"the ranks ended with exit code {done.code}" if done.error is None else ""
        said = done.error is None and done.code in (2, 3)
        raise RanksFailedError(found or str(done.error), code=done.code, said=said)
    out = config.out
    assert out is not None
    return Finetuning(bundle=open_bundle(out) if is_bundle(out) else None, summary=done.result)


def with_target(bundle: Bundle, config: FinetuneConfig) -> FinetuneConfig:
    """Fill in where the new bundle goes."""
    return config if config.out is not None else config.replace(out=default_out(bundle.path))


def recipe_arguments(bundle: Bundle, config: FinetuneConfig) -> list[str]:
    """Return the arguments of the recipe."""
    return ["--bundle", str(bundle.path), *to_arguments(config, RunConfig)]


def show_finetune(bundle: Bundle, config: FinetuneConfig) -> tuple[list[str], str]:
    """Return the torchrun command of a training: its words, and as a shell takes it."""
    config = with_target(bundle, config)
    command = torchrun_command(config, recipe_arguments(bundle, config))
    return list(command), show_command(command)
