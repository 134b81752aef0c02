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
from dmt_convert.config import LaunchConfig
from dmt_convert.errors import DmtError

RECIPE: Final = "dmt_convert.recipes.finetune_dmt"
"""The recipe that is run unless another is given; torchrun takes modules, too."""
_AGENT: Final = "dmt_convert.cluster.agent"
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


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
