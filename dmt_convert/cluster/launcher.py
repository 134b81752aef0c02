"""Start the ranks of a training on this host by torchrun, and bring back what came of it. No torch.

torchrun runs in a process of its own (`agent.py`), in a session of its own: a signal from the
terminal reaches this process only, which hands it on once.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
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

from dmt_convert.child import python_command, python_environment
from dmt_convert.cluster.gpus import has_gpus
from dmt_convert.cluster.rank_process import (
    ERROR_FILE,
    GRACE,
    INTERRUPT_CODE,
    LAUNCHED,
    InterruptError,
    read_error,
)
from dmt_convert.config import LaunchConfig, RunConfig
from dmt_convert.errors import ConfigError, DmtError

logger = logging.getLogger(__name__)

RECIPE: Final = "dmt_convert.recipes.finetune_dmt"
"""The recipe that is run unless another is given; torchrun takes modules, too."""
_AGENT: Final = "dmt_convert.cluster.agent"
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOOPBACK: Final = "127.0.0.1"
_NUMA_NODES: Final = Path("/sys/devices/system/node")
_TORCHRUN_PREFIX: Final = "PET_"
"""torchrun reads every option that it is not given from a variable with this prefix."""


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
            "--rdzv-backend=c10d",
            "--rdzv-id=dmt",
            f"--rdzv-endpoint={config.rdzv_endpoint}",
            f"--rdzv-conf={waits},is_host={config.node_rank == 0}",
        ]
    # ranks of one host need no name of it, which may not resolve
    address = config.local_addr or (_LOOPBACK if config.nnodes == 1 else None)
    return (
        f"--nnodes={config.nnodes}",
        *rendezvous,
        *(() if address is None else (f"--local-addr={address}",)),
        f"--nproc-per-node={config.nproc}",
        f"--max-restarts={config.max_restarts}",
        f"--shutdown-timeout={config.shutdown_timeout}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        *_numa_arguments(config),
        *shlex.split(config.torchrun_args or ""),
        *(("-m", RECIPE) if recipe is None else (str(recipe),)),
        *arguments,
    )


def _numa_arguments(config: LaunchConfig) -> tuple[str, ...]:
    """Return what binds ranks to the cores near their GPUs.

    Raises:
        ConfigError: That is asked for, and cannot be done here.
    """
    kind = config.numa_binding
    on_cpus = isinstance(config, RunConfig) and config.backend == "gloo"
    faults = ["numactl is not installed"] if shutil.which("numactl") is None else []
    faults += [] if has_gpus() and not on_cpus else ["ranks have no GPUs here"]
    if kind is None:
        kind = "node" if not faults and len(list(_NUMA_NODES.glob("node[0-9]*"))) > 1 else "none"
    if kind == "none":
        return ()
    if faults:
        raise ConfigError(
            f"--numa-binding {kind}, but {' and '.join(faults)}",
            expected="GPUs, and the program numactl, which torchrun binds with",
            hint="install the package numactl, or leave the option out",
        )
    return (f"--numa-binding={kind}",)


def torchrun_command(
    config: LaunchConfig, arguments: Sequence[str], recipe: Path | None = None
) -> tuple[str, ...]:
    """Return the command that a launch amounts to, for people and other launchers.

    It begins with `env`: ranks, too, are to import nothing from the current folder.
    """
    given = torchrun_arguments(config, arguments, recipe)
    safe = () if recipe is not None else ("env", "PYTHONSAFEPATH=1")
    return (*safe, sys.executable, "-m", "torch.distributed.run", *given)


def launch(
    config: LaunchConfig,
    arguments: Sequence[str],
    *,
    recipe: Path | None = None,
    capture: bool = False,
) -> Launched:
    """Run a recipe on the ranks of this host, and wait for its end.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are handed to torchrun, which hands them to the ranks. These
    have `config.shutdown_timeout` seconds to write a checkpoint and to end before they are killed.

    Args:
        config: How ranks are started.
        arguments: Of the recipe.
        recipe: Its file; None: the fine-tuning recipe.
        capture: Keep what ranks print to stdout off the terminal, and take the JSON document that
            it ends with for the result.
    """
    if config.nnodes == 1 and config.rdzv_endpoint is not None:
        logger.warning("--rdzv-endpoint is not used: --nnodes is 1, so this host trains alone")
    command = python_command("-m", _AGENT, *torchrun_arguments(config, arguments, recipe))
    with tempfile.TemporaryDirectory(prefix="dmt-launch-") as name:
        error_file = Path(name) / "error.json"
        process = subprocess.Popen(
            command,
            env=_environment(config, error_file, recipe),
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
    if signals and (error is None or isinstance(error, InterruptError)):
        return Launched(code=INTERRUPT_CODE, error=error, result=None)
    if error is not None:
        return Launched(code=code, error=error, result=None)
    if code < 0:
        return Launched(code=3, error=_lost_agent(-code, config), result=None)
    return Launched(code=code, error=None, result=None)


def _environment(config: LaunchConfig, error_file: Path, recipe: Path | None) -> dict[str, str]:
    environ = python_environment(
        {
            ERROR_FILE: str(error_file),
            LAUNCHED: "1",
            GRACE: str(config.shutdown_timeout),
        }
    )
    if recipe is not None:  # a file that was named may import what lies beside it
        environ.pop("PYTHONSAFEPATH")
    given = sorted(name for name in environ if name.startswith(_TORCHRUN_PREFIX))
    for name in given:
        del environ[name]
    if given:
        logger.info(
            "ignored from the environment: %s; the options of this command say how ranks start",
            ", ".join(given),
        )
    # a store of its own for every attempt: in a shared one, ranks that are started again read
    # where those before them listened (pytorch#135712)
    environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if config.nnodes == 1 and config.local_addr is None:
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # listen to this host only
    # ranks share the host's cores; torchrun would warn, and set 1
    cores = len(os.sched_getaffinity(0))
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.nproc)))
    return environ


@contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """End a process when this one gets a signal; yields the signals that came.

    The first signal is handed on, always as SIGTERM: while modules are imported, SIGINT would
    give a traceback. More of them change nothing, it is ending.
    """
    seen: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1 and process.poll() is None:
            process.terminate()

    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}  # nohup ignores SIGHUP
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
