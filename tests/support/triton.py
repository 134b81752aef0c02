"""A real Triton server, in a virtual environment of its own, that has loaded an export."""

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tritonclient.grpc
import tritonclient.http

from dmt_convert.data import Batch
from dmt_convert.model import DmtModel
from dmt_convert.serving import ExportedModel
from dmt_convert.serving.checks import ATOL, RTOL, generate_batch
from support.paths import REPOSITORY

Feeds = dict[str, npt.NDArray[Any]]
PROTOCOLS = ("http", "grpc")
TYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "float64": "FP64"}
SCRIPT = REPOSITORY / "scripts/triton-server"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that is ready."""

    http: str
    grpc: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, protocol: str) -> Any:
        """A client; it belongs to one thread."""
        if protocol == "http":
            return tritonclient.http.InferenceServerClient(self.http)
        return tritonclient.grpc.InferenceServerClient(self.grpc)

    def ask(
        self,
        protocol: str,
        feeds: Mapping[str, Any],
        model: str = "dmt",
        *,
        as_json: bool = False,
        client: Any = None,
    ) -> Any:
        """Return the one output of a model, asked by a client of its own or by the given one."""
        module = getattr(tritonclient, protocol)
        inputs = []
        for name, value in feeds.items():
            inputs.append(module.InferInput(name, value.shape, TYPES[str(value.dtype)]))
            inputs[-1].set_data_from_numpy(value, **({"binary_data": False} if as_json else {}))
        with self.client(protocol) if client is None else nullcontext(client) as asking:
            answer = asking.infer(model, inputs)
        outputs = answer.get_response()
        outputs = outputs["outputs"] if protocol == "http" else outputs.outputs
        name = outputs[0]["name"] if protocol == "http" else outputs[0].name
        return answer.as_numpy(name)


@contextmanager
def serve(repository: Path, log: Path, *options: str) -> Iterator[Server]:
    """Start a server on free ports; nothing of it is left when the block ends."""
    region = f"dmt_test_{uuid.uuid4().hex[:8]}_"
    ports = _free_ports(2)
    command = [
        SCRIPT, repository, "--http-address=127.0.0.1", f"--http-port={ports[0]}",
        "--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}", "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={region}", *options,
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, preexec_fn=_end_with_parent
        )
    try:
        _wait_until_ready(process, ports[0], log)
        yield Server(
            http=f"127.0.0.1:{ports[0]}", grpc=f"127.0.0.1:{ports[1]}", process=process, log=log
        )
        assert process.poll() is None, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of the Python backend
        process.wait()
        for path in Path("/dev/shm").glob(f"{region}*"):
            path.unlink(missing_ok=True)
    deadline = time.monotonic() + 60
    while left := _processes_with(region):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _end_with_parent() -> None:
    """Also where this process is killed, the server ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def _processes_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An export, the model that it was made of, and a server that has loaded it."""

    exported: ExportedModel
    model: DmtModel
    server: Server

    def part(self, name: str, ensemble: str = "dmt") -> str:
        """Name of the model of a part."""
        return f"{ensemble}_{self.exported.manifest.details['generation']}_{name}"

    def batch(self, rows: int, seed: int = 0) -> Batch:
        """Rows with empty bags, first and last ids."""
        return generate_batch(
            self.model.spec.flat, self.exported.manifest.inputs, rows, seed=1000 * rows + seed
        )

    def feeds(self, batch: Batch) -> Feeds:
        return self.exported.manifest.inputs.feeds(batch)

    def check(self, batch: Batch, logits: Any, *, limit: float | None = None) -> None:
        """The answers are the model's, up to rounding or a given limit."""
        with torch.inference_mode():
            expected = dict(self.model.stages(batch))["logit"].numpy()
        assert logits.shape == (batch.num_rows, 1) and logits.dtype == np.float32
        limit = limit or ATOL + RTOL * np.abs(expected).max()
        np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=limit)

    def answers_still(self, model: str = "dmt", *, limit: float | None = None) -> None:
        """Ask something right over both protocols."""
        batch = self.batch(5, seed=9)
        for protocol in PROTOCOLS:
            self.check(batch, self.server.ask(protocol, self.feeds(batch), model), limit=limit)
