"""A real Triton server loads an export unmodified, answers like the model, and stays up."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.data import Bag, Batch
from dmt_convert.export import ExportConfig, export_bundle
from dmt_convert.export.check_batches import generate_batch
from dmt_convert.export.check_process import ATOL, RTOL
from dmt_convert.serving import ExportedModel
from dmt_convert.towers import DmtModel

Feeds = dict[str, npt.NDArray[Any]]
PROTOCOLS = ("http", "grpc")
TYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "float64": "FP64"}
SCRIPT = Path(__file__).parents[2] / "scripts/triton-server"
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


@pytest.fixture(scope="session")
def triton() -> None:
    """The server's own virtual environment."""
    done = subprocess.run([SCRIPT, "--setup"], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"Triton cannot be had here: {done.stderr}")
    assert done.returncode == 0, done.stderr


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
        os.killpg(process.pid, signal.SIGKILL)  # with the processes of the Python backend
        process.wait()
        for path in Path("/dev/shm").glob(f"{region}*"):
            path.unlink(missing_ok=True)
    deadline = time.monotonic() + 5
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

    def batch(self, rows: int, seed: int = 0) -> Batch:
        """Rows with empty bags, first and last ids."""
        return generate_batch(
            self.model.spec.flat, self.exported.manifest.inputs, rows, seed=1000 * rows + seed
        )

    def feeds(self, batch: Batch) -> Feeds:
        return self.exported.manifest.inputs.feeds(batch)

    def check(self, batch: Batch, logits: npt.NDArray[np.float32]) -> None:
        """The answers are the model's."""
        with torch.inference_mode():
            expected = dict(self.model.stages(batch))["logit"].numpy()
        assert logits.shape == (batch.num_rows, 1) and logits.dtype == np.float32
        limit = ATOL + RTOL * np.abs(expected).max()
        np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=limit)

    def answers_still(self) -> None:
        batch = self.batch(5, seed=9)
        for protocol in PROTOCOLS:
            self.check(batch, self.server.ask(protocol, self.feeds(batch)))


@pytest.fixture(scope="module")
def export_to(
    tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., Bundle]
) -> Callable[..., tuple[ExportedModel, DmtModel]]:
    """Export a bundle for Triton, its check left to the server."""

    def export(**options: Any) -> tuple[ExportedModel, DmtModel]:
        bundle = make_bundle("dlrm")
        out = tmp_path_factory.mktemp("triton") / "repository"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt_convert.export.exporter.check_graphs", lambda *_: ())
            export_bundle(bundle, out, ExportConfig(format="triton", **options))
        return ExportedModel(out), open_bundle_model(bundle)

    return export


@pytest.fixture(scope="module")
def padded(triton: None, export_to: Any, tmp_path_factory: Any) -> Iterator[Served]:
    """A server with the default: padded ids, and requests merged."""
    exported, model = export_to()
    log = tmp_path_factory.mktemp("log") / "log"
    with serve(exported.path, log) as server:
        yield Served(exported=exported, model=model, server=server)


def test_every_model_is_ready_and_plain_files_are_ignored(padded: Served) -> None:
    models = {"dmt", "dmt_tower_000", "dmt_tower_001", "dmt_over_arch"}
    for protocol in PROTOCOLS:
        with padded.server.client(protocol) as client:
            assert client.is_server_ready()
            assert all(client.is_model_ready(model) for model in models)
    with padded.server.client("http") as client:
        index = client.get_model_repository_index()
        assert {(m["name"], m["state"]) for m in index} == {(name, "READY") for name in models}
    assert "export.json" not in padded.server.log.read_text()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_are_the_models(padded: Served, protocol: str) -> None:
    for batch in map(padded.batch, (1, 2, 7, 130, 4096)):
        padded.check(batch, padded.server.ask(protocol, padded.feeds(batch)))
    feeds = padded.exported.manifest.inputs.feeds(batch, padded.model.spec.towers[1].features)
    with torch.inference_mode():
        tower = dict(padded.model.stages(batch))["output of tower 1"].numpy()
    found = padded.server.ask(protocol, feeds, "dmt_tower_001")
    np.testing.assert_allclose(found, tower, rtol=0, atol=ATOL + RTOL * np.abs(tower).max())


def test_bags_may_all_be_empty(padded: Served) -> None:
    batch = padded.batch(2)
    none = Bag(values=np.zeros(0, np.int64), offsets=np.zeros(3, np.int64))
    batch = replace(batch, bags=(none,) * len(batch.bags))
    feeds = padded.feeds(batch)
    padded.check(batch, padded.server.ask("http", feeds))
    no_columns = {k: v if k == "dense" else v[:, :0] for k, v in feeds.items()}
    padded.check(batch, padded.server.ask("grpc", no_columns))


def test_json_without_binary_tensors_is_answered(padded: Served) -> None:
    batch = padded.batch(3)
    padded.check(batch, padded.server.ask("http", padded.feeds(batch), as_json=True))


def test_the_example_of_the_readme_runs(padded: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = (padded.exported.path / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    ran: dict[str, Any] = {}
    exec(code.replace("localhost:8000", padded.server.http), ran)  # noqa: S102
    assert ran["logits"].shape == (2, 1) and np.isfinite(ran["logits"]).all()
    assert "[[" in capsys.readouterr().out


def test_requests_at_the_same_time_are_merged_and_answered_right(padded: Served) -> None:
    merged = _merged(padded)

    def ask(worker: int) -> list[tuple[Batch, Any]]:
        batches = [padded.batch(1 + (worker * 7 + i) % 40, seed=worker) for i in range(12)]
        protocol = PROTOCOLS[worker % 2]
        with padded.server.client(protocol) as client:
            return [
                (batch, padded.server.ask(protocol, padded.feeds(batch), client=client))
                for batch in batches
            ]

    with ThreadPoolExecutor(12) as pool:
        for answers in pool.map(ask, range(12)):
            for batch, logits in answers:
                padded.check(batch, logits)
    assert _merged(padded) > merged


def _merged(served: Served) -> int:
    """Requests that the first tower answered together with others."""
    with served.server.client("http") as client:
        (stats,) = client.get_inference_statistics("dmt_tower_000")["model_stats"]
    requests = stats["inference_stats"]["success"]["count"]
    return int(requests) - int(stats["execution_count"])


def _without(name: str) -> Callable[[Feeds], Feeds]:
    return lambda feeds: {key: value for key, value in feeds.items() if key != name}


def _with(name: str, change: Callable[[Any], Any]) -> Callable[[Feeds], Feeds]:
    return lambda feeds: {**feeds, name: change(feeds.get(name))}


def _put(value: int) -> Callable[[Any], Any]:
    def put(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        ids = ids.copy()
        ids[-1, -1] = value
        return ids

    return put


Change = Callable[[Feeds], Feeds]
WRONG: dict[str, tuple[Change, str]] = {
    "missing input": (_without("cat_1"), r"missing required input\(s\) \['cat_1'\]"),
    "unknown input": (_with("more", lambda _: np.zeros((3, 1), np.float32)), "got 6 inputs"),
    "ids of another type": (_with("cat_0", lambda v: v.astype(np.int32)), "expects 'INT64'"),
    "dense of another type": (_with("dense", lambda v: v.astype(np.float64)), "expects 'FP32'"),
    "too many axes": (_with("cat_0", lambda v: v[..., None]), "Expected \\[-1,-1\\], got"),
    "too many columns": (_with("dense", lambda v: np.tile(v, 2)), "Expected \\[-1,5\\], got"),
    "rows that differ": (_with("dense", lambda v: v[:2]), "batch size does not match"),
    "no rows": (lambda feeds: {k: v[:0] for k, v in feeds.items()}, "for model 'dmt'"),
    "too many rows": (lambda feeds: {k: np.repeat(v, 1366, 0) for k, v in feeds.items()}, "4096"),
    "an id past its table": (_with("cat_0", _put(7)), "cat_0.* out of data bounds, idx=7 "),
    "an id far past it": (_with("cat_3", _put(2**40)), "cat_3.* out of data bounds"),
    "an id below the padding": (_with("cat_2", _put(-2)), "cat_2.* out of data bounds"),
    "the least id": (_with("cat_2", _put(-(2**63))), "cat_2.* out of data bounds"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused(padded: Served, protocol: str, case: str) -> None:
    change, message = WRONG[case]
    feeds = change(padded.feeds(padded.batch(3)))
    with pytest.raises(InferenceServerException, match=message):
        padded.server.ask(protocol, feeds)
    padded.answers_still()


def test_a_wrong_request_harms_at_most_those_merged_with_it(padded: Served) -> None:
    """As in the real backend, they get its error; nobody gets another's answer.

    A tower is asked, not the ensemble: before 26.05 Triton may crash where a step of an ensemble
    fails while others are being started (triton-inference-server/core, pull request 483).
    """
    features = padded.model.spec.towers[0].features

    def ask(worker: int) -> tuple[int, int]:
        right = refused = 0
        with padded.server.client("http") as client:
            for i in range(10):
                batch = padded.batch(3, seed=100 * worker + i)
                feeds = padded.exported.manifest.inputs.feeds(batch, features)
                if worker % 4 == 0:
                    feeds = _with(features[0], _put(7000))(feeds)
                try:
                    emitted = padded.server.ask("http", feeds, "dmt_tower_000", client=client)
                except InferenceServerException as error:
                    refused += "out of data bounds" in str(error)
                else:
                    assert worker % 4
                    np.testing.assert_allclose(
                        emitted, padded.exported.tower(0, batch), rtol=1e-5, atol=1e-6
                    )
                    right += 1
        return right, refused

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(ask, range(8)))
    assert sum(right for right, _ in counts) > 0 and counts[0] == (0, 10)
    padded.answers_still()


HEAD = "POST /v2/models/dmt/infer HTTP/1.1\r\nHost: x\r\n"


def _json_request(inputs: str, head: str = "") -> bytes:
    body = f'{{"inputs": [{inputs}]}}'
    return f"{HEAD}{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


HOSTILE: dict[str, bytes] = {
    "garbage": bytes(range(256)) * 64,
    "no JSON": f"{HEAD}Content-Length: 4\r\n\r\n{{{{{{{{".encode(),
    "JSON of great depth": f"{HEAD}Content-Length: 50000\r\n\r\n".encode() + b"[" * 50000,
    "a huge shape": _json_request(
        '{"name": "dense", "datatype": "FP32", "shape": [4611686018427387904, 5], "data": []}'
    ),
    "a shape whose size wraps": _json_request(
        '{"name": "dense", "datatype": "FP32", "shape": [3689348814741910324, 5], "data": []}'
    ),
    "a negative shape": _json_request(
        '{"name": "dense", "datatype": "FP32", "shape": [-1, 5], "data": [0, 0, 0, 0, 0]}'
    ),
    "tensors longer than the body": _json_request(
        '{"name": "dense", "datatype": "FP32", "shape": [1, 5], '
        '"parameters": {"binary_data_size": 2000000000}}',
        head="Inference-Header-Content-Length: 60\r\n",
    ),
    "a header longer than the body": _json_request(
        '{"name": "dense"}', head="Inference-Header-Content-Length: 99999999\r\n"
    ),
    "shared memory that there is not": _json_request(
        '{"name": "dense", "datatype": "FP32", "shape": [1, 5], '
        '"parameters": {"shared_memory_region": "x", "shared_memory_byte_size": 20}}'
    ),
}
TRUNCATED = f"{HEAD}Content-Length: 100000\r\n\r\n".encode() + b'{"inputs": [' + b" " * 99


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused(padded: Served, case: str) -> None:
    host, port = padded.server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(HOSTILE[case])
        try:
            answer = connection.recv(4096)
        except ConnectionResetError:  # the server hung up, with bytes of ours unread
            assert case == "garbage"
            answer = b"HTTP/1.1 400 "
    assert re.match(rb"HTTP/1\.[01] [45]\d\d ", answer), answer
    assert case == "garbage" or b'{"error":' in answer, answer
    padded.answers_still()


def test_bodies_that_never_come_do_not_hold_the_server(padded: Served) -> None:
    for address in (padded.server.http, padded.server.grpc):
        host, port = address.split(":")
        waiting = [socket.create_connection((host, int(port)), timeout=10) for _ in range(20)]
        for connection in waiting:
            connection.sendall(TRUNCATED)
        padded.answers_still()
        for connection in waiting:
            connection.close()
    padded.answers_still()
