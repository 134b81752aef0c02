"""A real Triton server that has loaded an export."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.config import ExportConfig
from dmt_convert.serving import ExportedModel, export_bundle
from support.shortcuts import skip_export_checks
from support.triton import SCRIPT, Served, Server, serve


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """The server has need of the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def triton_server() -> Callable[..., AbstractContextManager[Server]]:
    """Start a server: `with triton_server(repository, log, *options) as server`."""
    done = subprocess.run([SCRIPT, "--setup"], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"Triton cannot be had here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return serve


@pytest.fixture(scope="session")
def serve_export(
    triton_server: Callable[..., AbstractContextManager[Server]],
    tmp_path_factory: pytest.TempPathFactory,
    make_bundle: Callable[..., Bundle],
) -> Callable[..., AbstractContextManager[Served]]:
    """Export a bundle and serve it: `with serve_export(pooling_input="single") as served`."""

    @contextmanager
    def run(*server_options: str, bundle: Bundle | None = None, **options: Any) -> Iterator[Served]:
        bundle = bundle or make_bundle("dlrm", convert={"c": 1, "p": 2, "dim": 4})
        folder = tmp_path_factory.mktemp("triton")
        with pytest.MonkeyPatch.context() as patch:  # the server itself is the check
            skip_export_checks(patch)
            export_bundle(bundle, folder / "models", ExportConfig(format="triton", **options))
        exported = ExportedModel(folder / "models")
        with triton_server(exported.path, folder / "log", *server_options) as server:
            yield Served(exported=exported, model=open_bundle_model(bundle), server=server)

    return run
