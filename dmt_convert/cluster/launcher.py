"""Start the ranks of a training on this host by torchrun, and bring back what came of it. No torch.

torchrun runs in a process of its own (`agent.py`), in a session of its own: a signal from the
terminal reaches this process only, which hands it on once.
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

from dmt_convert.cluster.rank_process import ERROR_FILE, INTERRUPT_CODE, LAUNCHED, read_error
from dmt_convert.errors import ConfigError, DmtError

RECIPE: Final = "dmt_convert.recipes.finetune_dmt"
"""The recipe that is run unless another is given; torchrun takes modules, too."""
_AGENT: Final = "dmt_convert.cluster.agent"
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


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
    """HOST:PORT of host 0, where hosts meet; needed if there are several."""
    local_addr: str | None = None
    """Address of this host for the others; None: its name."""
    rdzv_timeout: int = 300
    """Seconds that hosts wait for each other."""
    max_restarts: int = 0
    """How often the ranks are started again when one is lost."""
    shutdown_timeout: int = 30
    """Seconds that ranks have to end on a signal; then they are killed."""

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
    """What went wrong; None if nothing did, or a rank has printed it."""
    result: Mapping[str, Any] | None
    """The document that rank 0 printed, if stdout was captured; None on hosts without rank 0."""


def default_out(bundle: Path) -> Path:
    """Return where the tuned bundle goes by default: beside the old one."""
    folder = bundle.resolve() if bundle.name in ("", "..") else bundle
    return folder.parent / f"{folder.name}-tuned"


def torchrun_arguments(
    config: LaunchConfig, arguments: Sequence[str], recipe: Path | None = None
) -> tuple[str, ...]:
    """Return what torchrun is given, ending with the recipe and its own arguments."""
    if config.nnodes == 1:
        rendezvous = ["--standalone"]
    else:
        assert config.rdzv_endpoint is not None
        waits = f"join_timeout={config.rdzv_timeout},read_timeout={config.rdzv_timeout}"
        rendezvous = [
            f"--nnodes={config.nnodes}",
            "--rdzv-backend=c10d",
            "--rdzv-id=dmt",
            f"--rdzv-endpoint={config.rdzv_endpoint}",
            f"--rdzv-conf={waits},is_host={config.node_rank == 0}",
        ]
        if config.local_addr is not None:
            rendezvous.append(f"--local-addr={config.local_addr}")
    return (
        *rendezvous,
        f"--nproc-per-node={config.nproc}",
        f"--max-restarts={config.max_restarts}",
        f"--shutdown-timeout={config.shutdown_timeout}",
        *(("-m", RECIPE) if recipe is None else (str(recipe),)),
        *arguments,
    )


def torchrun_command(
    config: LaunchConfig, arguments: Sequence[str], recipe: Path | None = None
) -> tuple[str, ...]:
    """Return the command that a launch amounts to, for people and other launchers."""
    given = torchrun_arguments(config, arguments, recipe)
    return (sys.executable, "-m", "torch.distributed.run", *given)


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
        capture: Keep what ranks print to stdout off the terminal, and take the JSON document that
            it ends with for the result.
    """
    command = [sys.executable, "-m", _AGENT, *torchrun_arguments(config, arguments, recipe)]
    with tempfile.TemporaryDirectory(prefix="dmt-launch-") as name:
        error_file = Path(name) / "error.json"
        process = subprocess.Popen(
            command,
            env=_environment(config, error_file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            start_new_session=True,
        )
        with process, _forward_signals(process) as signals:
            printed = process.stdout.read() if process.stdout is not None else b""
            code = process.wait()
        error = _read_error_file(error_file)
    if code == 0:
        return Launched(code=0, error=None, result=_read_result(printed))
    if error is not None:
        return Launched(code=code, error=error, result=None)
    if signals:
        return Launched(code=INTERRUPT_CODE, error=None, result=None)
    if code < 0:
        return Launched(code=3, error=_lost_agent(-code, config), result=None)
    return Launched(code=code, error=None, result=None)


def _environment(config: LaunchConfig, error_file: Path) -> dict[str, str]:
    environ = {**os.environ, ERROR_FILE: str(error_file), LAUNCHED: "1"}
    # a store of its own for every attempt: in a shared one, ranks that are started again read
    # where those before them listened (pytorch#135712)
    environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # ranks share the host's cores; torchrun would warn, and set 1
    cores = len(os.sched_getaffinity(0))
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.nproc)))
    return environ


@contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """End a process when this one gets SIGINT or SIGTERM; yields the signals that came.

    The first signal is handed on, always as SIGTERM: while modules are imported, SIGINT would
    give a traceback. More of them change nothing, it is ending.
    """
    seen: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1 and process.poll() is None:
            process.terminate()

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_error_file(path: Path) -> DmtError | None:
    try:
        return read_error(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _read_result(printed: bytes) -> Mapping[str, Any] | None:
    """Read the JSON object that ends what ranks printed; libraries may have printed before it."""
    text = printed.decode("utf-8", errors="replace")
    for start in (0, text.rfind("\n{") + 1):
        try:
            value = json.loads(text[start:])
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


def _lost_agent(number: int, config: LaunchConfig) -> DmtError:
    return DmtError(
        f"torchrun was killed ({signal.Signals(number).name})",
        expected=f"it to watch {config.nproc} ranks until they are done",
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
    return ConfigError(f"{option} {value}", expected=expected)
