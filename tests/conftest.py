"""What all tests share."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer

pytest.register_assert_rewrite("support")  # before any of it is imported

from support.commands import Run  # noqa: E402
from support.paths import REPOSITORY  # noqa: E402
from support.schedule import GroupScheduling, put_long_groups_first  # noqa: E402

# A machine with GPUs runs the same tests: ranks would choose NCCL, or refuse a build for CPUs.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="run also the further cases of long tests"
    )
    parser.addoption("--fast", action="store_true", help="leave out tests that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for."""
    left_out = {
        "exhaustive": not config.getoption("--exhaustive"),
        "slow": config.getoption("--fast"),
    }
    unwanted = [mark for mark, leave in left_out.items() if leave]
    others = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    config.hook.pytest_deselected(items=others)
    left = set(others)
    items[:] = [item for item in items if item not in left]
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        put_long_groups_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> GroupScheduling | None:
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(autouse=True)
def plain_logging() -> None:
    """A command or recipe that ran in this process left logging as it wants it."""
    logger = logging.getLogger("dmt_convert")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


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


@pytest.fixture(autouse=True)
def one_table_of_operators() -> None:
    """Keep torch, where a test has its ONNX exporter, from building this table for every export."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is not None and not hasattr(registration, "kept_by_tests"):
        registry = registration.ONNXRegistry
        registry.from_torchlib = staticmethod(cache(registry.from_torchlib))
        registration.kept_by_tests = True  # type: ignore[attr-defined]


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
    """See `sample_few`."""
    from support.shortcuts import sample_few

    sample_few(monkeypatch)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `skip_report`."""
    from support.shortcuts import skip_report

    skip_report(monkeypatch)


@pytest.fixture(scope="session")
def scored_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `support.scored.write_model`."""
    from support.scored import write_model

    return write_model(tmp_path_factory.mktemp("flat") / "model.pt")


@pytest.fixture(scope="session")
def scored_bundles(
    scored_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bundles of `scored_checkpoint`, one per kind of module."""
    from support.scored import convert_model

    folder = tmp_path_factory.mktemp("bundles")
    return {
        module: convert_model(scored_checkpoint, folder / module, module)
        for module in ("passthrough", "dlrm")
    }
