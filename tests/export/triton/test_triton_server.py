"""A real Triton server loads an export unmodified, answers like the model, and stays up."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException, HTTPResponse
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tritonclient.utils import InferenceServerException

from dmt_convert.data import Bag, Batch
from dmt_convert.serving.checks import ATOL, RTOL
from support.triton import PROTOCOLS, Feeds, Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def padded(serve_export: Callable[..., Any]) -> Iterator[Served]:
    """A server with the default: padded ids, and requests merged."""
    with serve_export() as served:
        yield served


def test_every_model_is_ready_and_plain_files_are_ignored(padded: Served) -> None:
    models = {"dmt", *map(padded.part, ("tower_000", "tower_001", "over_arch"))}
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
    found = padded.server.ask(protocol, feeds, padded.part("tower_001"))
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
        answers = [pair for pairs in pool.map(ask, range(12)) for pair in pairs]
    for batch, logits in answers:
        padded.check(batch, logits)
    assert _merged(padded) > merged


def _merged(served: Served) -> int:
    """Requests that the first tower answered together with others."""
    with served.server.client("http") as client:
        (stats,) = client.get_inference_statistics(served.part("tower_000"))["model_stats"]
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
    """As in the real backend, they get its error; nobody gets another's answer."""

    def ask(worker: int) -> tuple[int, int]:
        right = refused = 0
        with padded.server.client("http") as client:
            for i in range(10):
                batch = padded.batch(3, seed=100 * worker + i)
                feeds = padded.feeds(batch)
                if worker % 4 == 0:
                    feeds = _with("cat_0", _put(7))(feeds)
                try:
                    logits = padded.server.ask("http", feeds, client=client)
                except InferenceServerException as error:
                    refused += "out of data bounds" in str(error)
                else:
                    assert worker % 4
                    padded.check(batch, logits)
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
        answer = HTTPResponse(connection)
        try:
            answer.begin()
        except (HTTPException, ConnectionError):
            assert case == "garbage"  # may be cut off at any byte
        else:
            assert 400 <= answer.status < 600
            assert case == "garbage" or json.loads(answer.read())["error"]
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
