"""What all tests share."""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).parents[1]

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="run also the further cases of long tests"
    )


OF_MANY_PROCESSES = ("engine", "finetune", "recipes", "export/triton", "convert/test_interruptions")
"""Below tests/: they start ranks or servers, or kill what they start, and take their turns."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the further cases of long tests, unless asked for; say which tests stay together.

    A file's tests share what they build, so that one worker runs them all.
    """
    for item in items:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        group = "of many processes" if name.startswith(OF_MANY_PROCESSES) else name
        item.add_marker(pytest.mark.xdist_group(group))
    if config.getoption("--exhaustive"):
        return
    further = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=further)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture(autouse=True)
def plain_logging() -> None:
    """A command or recipe that ran in this process left logging as it wants it."""
    logger = logging.getLogger("dmt_convert")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Checkpoints and data that may not be distributed with the project."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the repository: its data may not be distributed")
    return folder


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """Keep torch, where a test has it, from starting a thread per core."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(2)


TORCHREC_TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"


def flat_state(
    *,
    names: str = "torchrec",
    interaction: str = "dot",
    rows: Sequence[int] = (7, 50, 11, 6),
    dim: int = 8,
    num_dense: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Weights of a tiny flat model under its trainer's names.

    names: torchrec (interactions dot, dcn, projection) or facebook (dot, self-pairs, cat).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {}

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = draw(outputs, inputs) / inputs**0.5
        state[f"{name}.bias"] = draw(outputs) * 0.1

    torchrec = names == "torchrec"
    table = TORCHREC_TABLE if torchrec else "emb_l.{}.weight"
    dense = ["dense_arch.model._mlp.0._linear", "dense_arch.model._mlp.1._linear"]
    over = ["over_arch.model.0._mlp.0._linear", "over_arch.model.1"]
    dense, over = (dense, over) if torchrec else (["bot_l.0", "bot_l.2"], ["top_l.0", "top_l.2"])
    for i, count in enumerate(rows):
        state[table.format(i)] = draw(count, dim)
    linear(dense[0], num_dense, 16)
    linear(dense[1], 16, dim)
    vectors = len(rows) + 1
    width = vectors * dim
    if interaction == "dcn":
        for layer in range(2):
            state[f"inter_arch.crossnet.W_kernels.{layer}"] = draw(width, 4) / width**0.5
            state[f"inter_arch.crossnet.V_kernels.{layer}"] = draw(4, width) / width**0.5
            state[f"inter_arch.crossnet.bias.{layer}"] = draw(width) * 0.1
    elif interaction == "projection":
        for branch in (1, 2):
            linear(f"inter_arch.interaction_branch{branch}.model._mlp.0._linear", width, 2 * dim)
        width = dim + 4
    elif interaction != "cat":
        own = vectors if interaction == "self-pairs" else 0
        width = dim + vectors * (vectors - 1) // 2 + own
    linear(over[0], width, 16)
    linear(over[1], 16, 1)
    return state


def save_flat(path: Path, state: Mapping[str, Any]) -> Path:
    """Write weights as the suffix says: .pt, .safetensors, or without one a DCP directory."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(state), path)
    elif path.suffix:
        torch.save(dict(state), path)
    else:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    return path


FlatMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_flat() -> FlatMaker:
    """Write a tiny flat checkpoint: `make_flat(path, names=..., interaction=..., edit=...)`."""

    def make(
        path: Path, *, edit: Callable[[dict[str, Any]], object] | None = None, **options: Any
    ) -> Path:
        state = flat_state(**options)
        if edit is not None:
            edit(state)
        return save_flat(path, state)

    return make


@pytest.fixture(scope="session")
def make_sparse_flat() -> FlatMaker:
    """Write a .safetensors checkpoint whose tables are holes of a sparse file."""

    def make(path: Path, *, rows: Sequence[int], dim: int = 64) -> Path:
        small = flat_state(rows=[1] * len(rows), dim=dim)
        header: dict[str, Any] = {}
        tables, dense, position = {}, {}, 0
        for name, tensor in small.items():
            (tables if "embedding_bags" in name else dense)[name] = tensor
        for name, tensor in dense.items():
            end = position + tensor.numel() * 4
            header[name] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        for name, count in zip(tables, rows, strict=True):
            end = position + count * dim * 4
            header[name] = {"dtype": "F32", "shape": [count, dim], "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in dense.values():
                file.write(tensor.numpy().tobytes())
            file.truncate(8 + len(text) + position)
        return path

    return make


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a run of `dmt` ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def dmt() -> Callable[..., Run]:
    """Run `dmt` in a process of its own."""

    def run(*args: object, **options: Any) -> Run:
        command = [sys.executable, "-m", "dmt_convert.cli.main", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
        return Run(code=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return run


@pytest.fixture
def call_dmt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Run]]:
    """Run `dmt` in this process, which already has torch."""
    from dmt_convert.cli.main import main

    terminate = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("dmt_convert")
    handlers, level = logger.handlers, logger.level

    def call(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["dmt", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return Run(code=code, stdout=printed.out, stderr=printed.err)

    yield call
    signal.signal(signal.SIGTERM, terminate)
    logger.handlers = handlers
    logger.setLevel(level)


@contextmanager
def serve_ranks(scenarios: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Keep a process that has torch, and forks ranks for the scenarios of a file.

    Yields:
        `run(size, name, *, ends=True, job={}, **arguments)`: what `rank_server.py` says of every
        rank. Where the scenario `ends`, all ranks have to end well.
    """
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_server.py")), str(scenarios)],
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    asked, answers = server.stdin, server.stdout

    def run(
        size: int,
        name: str,
        *,
        ends: bool = True,
        job: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        asked.write(
            json.dumps({"size": size, "name": name, "arguments": options, **(job or {})}) + "\n"
        )
        asked.flush()
        reports: list[dict[str, Any]] = json.loads(answers.readline())
        if ends:
            for report in reports:
                assert report["code"] == 0, report["errors"]
        return reports

    yield run
    with server:
        asked.close()


@pytest.fixture(scope="session")
def rank_server() -> Callable[..., Any]:
    """A context manager: `with rank_server(file_of_scenarios) as run: run(size, name, ...)`."""
    return serve_ranks


@pytest.fixture(scope="session")
def click_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows that fit the tiny checkpoints under TorchRec's names."""
    import numpy as np

    folder = tmp_path_factory.mktemp("clicks")
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, rows, size=300) for rows in (7, 50, 11, 6)]
    np.savez(
        folder / "test.npz",
        dense=rng.standard_normal((300, 5)).astype(np.float32),
        sparse=np.stack(ids, axis=1).astype(np.int32),
        label=rng.integers(0, 2, size=300, dtype=np.uint8),
    )
    schema = {"sparse_features": [{"name": f"cat_{i}"} for i in range(4)]}
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder / "test.npz"


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample fewer inputs when converting, to be quick."""
    monkeypatch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 1024)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert without drawing and writing the report, which takes longest for tiny models."""
    monkeypatch.setattr("dmt_convert.report.documents.describe_conversion", lambda *_: {})
