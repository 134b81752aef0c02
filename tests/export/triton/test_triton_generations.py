"""A real Triton server goes on to a new generation while it answers, and back."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmt_convert.bundle import Bundle
from dmt_convert.serving import ExportedModel

pytestmark = pytest.mark.exhaustive

CLIENTS = 4


@contextmanager
def asking(served: Any, feeds: dict[str, Any]) -> Iterator[list[list[bytes]]]:
    """Ask the same over and over, by several clients; gives what each was answered, in turn."""
    answers: list[list[bytes]] = [[] for _ in range(CLIENTS)]
    failures: list[Exception] = []
    done = threading.Event()

    def ask(own: list[bytes]) -> None:
        try:
            with served.server.client("http") as client:
                while not done.is_set():
                    logits = served.server.ask("http", feeds, client=client)
                    assert client.is_model_ready("dmt")
                    if not own or own[-1] != logits.tobytes():
                        own.append(logits.tobytes())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(own,)) for own in answers]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def switch(script: Path, *arguments: object) -> None:
    done = subprocess.run(
        ["sh", script / "switch.sh", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_answer_mixes_two_generations(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Callable[..., ExportedModel],
    serve_export: Callable[..., Any],
) -> None:
    new = export_unchecked(make_bundle("passthrough"), format="triton")
    options = ("--model-control-mode=explicit", "--load-model=dmt")
    with serve_export(*options) as served:
        live, url = served.exported.path, served.server.http
        batch = served.batch(7)
        feeds = served.feeds(batch)
        old = served.exported.manifest.details["generation"]
        with asking(served, feeds) as answers:
            switch(new.path, live, url)
            switch(live, live, url, old)
            switch(new.path, live, url)
        first = served.server.ask("http", feeds)
        np.testing.assert_allclose(first[:, 0], new.score(batch), rtol=0, atol=1e-5)
        found = {answer for own in answers for answer in own}
        assert len(found) == 2, "an answer of neither generation"
        assert all(2 <= len(own) <= 4 for own in answers)  # there, back, and there


def test_a_generation_that_cannot_be_loaded_changes_nothing(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Callable[..., ExportedModel],
    serve_export: Callable[..., Any],
) -> None:
    new = export_unchecked(make_bundle("passthrough"), format="triton")
    graph = next(new.path.glob("dmt_*_over_arch/1/model.onnx"))
    graph.write_bytes(graph.read_bytes()[:-50])
    options = ("--model-control-mode=explicit", "--load-model=dmt")
    with serve_export(*options) as served:
        live = served.exported.path
        config = (live / "dmt/config.pbtxt").read_bytes()
        with asking(served, served.feeds(served.batch(7))) as answers:
            done = subprocess.run(
                ["sh", new.path / "switch.sh", live, served.server.http],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 3 and "_over_arch and goes on" in done.stderr
        assert {len(own) for own in answers} == {1}
        assert (live / "dmt/config.pbtxt").read_bytes() == config
        served.answers_still()
