"""Start the ranks of a training on this host by torchrun, and bring back what came of it. No torch.

torchrun runs in a process of its own (`torchrun_agent.py`), in a session of its own: a signal
from the terminal reaches this process only, which hands it on once.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import dmt_convert
from dmt_convert.cluster.outcome import FOLDER_VARIABLE, Outcome, read_outcomes, rebuild_error
from dmt_convert.errors import ConfigError, DmtError

RECIPE: Final = "finetune_dmt.py"
"""The recipe's file."""
_AGENT: Final = "dmt_convert.cluster.torchrun_agent"
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_INTERRUPT_CODE: Final = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How ranks are started."""

    nproc: int = 1
    """Ranks on this host."""
    nnodes: int = 1
    """Hosts, each of which launches its own ranks."""
    node_rank: int = 0
    """Which of the hosts this is, from 0; the others meet at host 0."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of host 0, where hosts meet; needed where there are several."""
    local_addr: str | None = None
    """Address of this host for the others; None: its name."""
    rdzv_timeout: int = 300
    """Seconds that hosts wait for each other."""
    max_restarts: int = 0
    """How often the ranks are started again when one is lost."""
    shutdown_timeout: int = 30
    """Seconds that ranks have to end when they are told to; then they are killed."""

    def __post_init__(self) -> None:
        for name in ("nproc", "nnodes", "rdzv_timeout", "shutdown_timeout"):
            if getattr(self, name) < 1:
                raise _refuse(name, getattr(self, name), "1 or more")
        if self.max_restarts < 0:
            raise _refuse("max_restarts", self.max_restarts, "0 or more")
        if not 0 <= self.node_rank < self.nnodes:
            raise _refuse(
                "node_rank", self.node_rank, f"0 to {self.nnodes - 1}, as --nnodes is {self.nnodes}"
            )
        if self.rdzv_endpoint is None:
            if self.nnodes > 1:
                raise ConfigError(
                    f"--nnodes {self.nnodes} without --rdzv-endpoint",
                    expected="HOST:PORT of host 0, the same on every host",
                    hint="pick a free port of host 0: --rdzv-endpoint host0.cluster:29400",
                )
        elif not _is_endpoint(self.rdzv_endpoint):
            raise _refuse("rdzv_endpoint", self.rdzv_endpoint, "HOST:PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What came of a launch, for the user."""

    code: int
    """Exit code, as `dmt` has them."""
    error: DmtError | None
    """What went wrong; None where a rank said so itself, or nothing did."""
    result: Mapping[str, Any] | None
    """What the first rank did; None on hosts that it does not run on."""


def recipe_path() -> Path:
    """Find the recipe: in the installed package, or beside it in a checkout.

    Raises:
        ConfigError: It is in neither place.
    """
    package = Path(dmt_convert.__file__).resolve().parent
    places = [package / "recipes" / RECIPE, package.parent / "recipes" / RECIPE]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"the recipe {RECIPE} is not installed",
        expected=f"it at {places[0]}",
        hint="install dmt-convert again, as README.md says",
    )


def default_out(bundle: Path) -> Path:
    """Return where the tuned bundle goes when nothing else is said: beside the old one."""
    folder = bundle.resolve() if bundle.name in ("", "..") else bundle
    return folder.parent / f"{folder.name}-tuned"


def torchrun_arguments(
    config: LaunchConfig, recipe: Path, arguments: Sequence[str]
) -> tuple[str, ...]:
    """Return what torchrun is given, ending with the recipe and its own arguments."""
    if config.nnodes == 1:
        meeting = ["--standalone"]
    else:
        assert config.rdzv_endpoint is not None
        waits = f"join_timeout={config.rdzv_timeout},read_timeout={config.rdzv_timeout}"
        meeting = [
            f"--nnodes={config.nnodes}",
            "--rdzv-backend=c10d",
            "--rdzv-id=dmt",
            f"--rdzv-endpoint={config.rdzv_endpoint}",
            f"--rdzv-conf={waits},is_host={config.node_rank == 0}",
        ]
        if config.local_addr is not None:
            meeting.append(f"--local-addr={config.local_addr}")
    return (
        *meeting,
        f"--nproc-per-node={config.nproc}",
        f"--max-restarts={config.max_restarts}",
        f"--shutdown-timeout={config.shutdown_timeout}",
        str(recipe),
        *arguments,
    )


def torchrun_command(
    config: LaunchConfig, recipe: Path, arguments: Sequence[str]
) -> tuple[str, ...]:
    """Return the command that a launch amounts to, for people and other launchers."""
    return (
        sys.executable,
        "-m",
        "torch.distributed.run",
        *torchrun_arguments(config, recipe, arguments),
    )


def launch(
    config: LaunchConfig,
    arguments: Sequence[str],
    *,
    recipe: Path | None = None,
    capture: bool = False,
) -> Launched:
    """Run a recipe on the ranks of this host, and wait for its end.

    SIGINT and SIGTERM are handed to torchrun, which ends the ranks; they have
    `config.shutdown_timeout` seconds before they are killed.

    Args:
        config: How ranks are started.
        arguments: Of the recipe.
        recipe: Its file; None: the fine-tuning recipe.
        capture: Keep what ranks print to stdout from the terminal; a JSON document there is taken
            for the result where no outcome was written.
    """
    command = [sys.executable, "-m", _AGENT]
    command += torchrun_arguments(config, recipe or recipe_path(), arguments)
    with tempfile.TemporaryDirectory(prefix="dmt-launch-") as name:
        folder = Path(name)
        process = subprocess.Popen(
            command,
            env=_environment(config, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            start_new_session=True,
        )
        with process, _handed_on(process) as signals:
            printed = process.stdout.read() if process.stdout is not None else b""
            code = process.wait()
        outcomes = read_outcomes(folder)
    return _conclude(code, outcomes, printed, interrupted=bool(signals), config=config)


def _environment(config: LaunchConfig, folder: Path) -> dict[str, str]:
    environ = {**os.environ, FOLDER_VARIABLE: str(folder)}
    # a store of its own for every attempt: in a shared one, ranks that are started again read
    # where those before them listened (pytorch#135712)
    environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # ranks share the host's cores; torchrun would warn, and set 1
    cores = len(os.sched_getaffinity(0))
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.nproc)))
    return environ


@contextmanager
def _handed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """End a process when this one is told to end; gives the signals that came.

    The first signal is handed on, always as SIGTERM: while modules are imported, SIGINT would
    give a traceback. More of them change nothing, it is ending.
    """
    seen: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1 and process.poll() is None:
            process.terminate()

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(
    code: int,
    outcomes: Sequence[Outcome],
    printed: bytes,
    *,
    interrupted: bool,
    config: LaunchConfig,
) -> Launched:
    """Make one thing of what the ranks left and how torchrun ended."""
    if code == 0:
        results = [outcome.result for outcome in outcomes if outcome.result is not None]
        result = results[0] if results else _read_document(printed)
        return Launched(code=0, error=None, result=result)
    for outcome in outcomes:
        if outcome.error is not None and outcome.code != _INTERRUPT_CODE:
            return Launched(code=outcome.code, error=rebuild_error(outcome.error), result=None)
    if interrupted:
        return Launched(code=_INTERRUPT_CODE, error=None, result=None)
    document = _read_document(printed)
    if document is not None and {"found", "expected", "hint"} <= set(document):
        return Launched(code=code, error=rebuild_error({"details": [], **document}), result=None)
    if code < 0:
        return Launched(code=3, error=_lost_agent(-code, config), result=None)
    return Launched(code=code, error=None, result=None)


def _read_document(printed: bytes) -> Mapping[str, Any] | None:
    try:
        value = json.loads(printed)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _lost_agent(number: int, config: LaunchConfig) -> DmtError:
    return DmtError(
        f"torchrun was killed ({signal.Signals(number).name})",
        expected=f"it to watch over {config.nproc} ranks until they are done",
        hint="look into the system's log (out of memory?), and run it again with --resume",
    )


def show_command(command: Sequence[str]) -> str:
    """Write a command as a shell takes it."""
    return shlex.join(command)


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16


def _refuse(name: str, value: object, expected: str) -> ConfigError:
    option = f"--{name.replace('_', '-')}"
    return ConfigError(f"{option} {value}", expected=expected, hint=f"mend {option}")
