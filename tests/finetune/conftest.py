"""Tiny models, a tiny bundle, and rows whose labels can be learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.checkpoint import read_tensor
from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.convert import convert_checkpoint
from dmt_convert.convert_config import ConvertConfig
from dmt_convert.data import Bag, Batch
from dmt_convert.documents import to_json
from dmt_convert.model import DmtModel, DmtSpec, TowerSpec, module_spec
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec

ROWS = (7, 50, 11, 6)
NUM_DENSE = 5
WIDE_TABLES = (7, 400, 9, 6)
# the last batch of a pass has 10 rows: four ranks get 3, 3, 3 and 1
COMMON = ("--batch-size", 74, "--eval-every", 4, "--checkpoint-every", 3, "--max-steps", 16)


def write_rows(
    folder: Path,
    name: str,
    count: int,
    *,
    seed: int,
    tables: tuple[int, ...] = ROWS,
    **changes: Any,
) -> Path:
    """Rows whose label depends on ids and dense inputs; `changes` replace arrays."""
    folder.mkdir(exist_ok=True)
    truth = np.random.default_rng(7)
    effects = [truth.standard_normal(rows) * 1.5 for rows in tables]
    rng = np.random.default_rng(seed)
    sparse = np.stack([rng.integers(0, rows, count) for rows in tables], axis=1).astype(np.int32)
    dense = rng.standard_normal((count, NUM_DENSE)).astype(np.float32)
    logits = sum(effect[sparse[:, f]] for f, effect in enumerate(effects)) + dense[:, 0]
    label = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    arrays = {"dense": dense, "sparse": sparse, "label": label, **changes}
    path = folder / f"{name}.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    schema = {"sparse_features": [{"name": f"cat_{i}"} for i in range(len(ROWS))]}
    (folder / "schema.json").write_text(json.dumps(schema))
    return path


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """Models are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., Path]:
    return write_rows


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.npz and valid.npz."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, "train", 2000, seed=0)
    write_rows(folder, "valid", 500, seed=1)
    return folder


@pytest.fixture(scope="session")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_flat: Callable[..., Path]
) -> Callable[..., Path]:
    """Convert a tiny checkpoint: `make_bundle(dtype=..., tower_module=...)`."""

    def make(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("bundle")
        source = make_flat(folder / "ckpt.pt")
        config = ConvertConfig(
            partition=PartitionConfig(num_towers=2, strategy="round-robin"), **options
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 1024)
            return convert_checkpoint(source, folder / "ckpt-dmt2", config=config).bundle.path

    return make


@pytest.fixture(scope="session")
def bundle_path(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


def build_spec(*, rows: tuple[int, ...] = ROWS, **features: Any) -> ModelSpec:
    """A cat model of four features; `features` are fields of all of them."""
    dims = (8, 8, 4, 8) if len(rows) == 4 else (8,) * len(rows)
    return ModelSpec(
        family="torchrec-dlrm",
        tables=tuple(TableSpec(name=f"t{i}", rows=n, dim=dims[i]) for i, n in enumerate(rows)),
        features=tuple(
            FeatureSpec(name=f"cat_{i}", table=f"t{i}", **features) for i in range(len(rows))
        ),
        dense_arch=MlpSpec(widths=(NUM_DENSE, 8), final_relu=True),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=(8 + sum(dims), 8, 1), final_relu=False),
    )


def build_model(spec: ModelSpec | None = None, *, seed: int = 0) -> DmtModel:
    """A random model in two towers, its tables in memory."""
    spec = spec or build_spec()
    module = module_spec(spec, "passthrough", num_towers=2)
    names = spec.feature_names
    torch.manual_seed(seed)
    return DmtModel(
        DmtSpec(
            flat=spec,
            towers=tuple(TowerSpec(features=names[t::2], module=module) for t in range(2)),
        )
    )


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpec]:
    return build_spec


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DmtModel]:
    return build_model


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """A random batch: one id per bag, or `multi` 0 to 3 ids, perhaps weighted."""

    def make(
        spec: ModelSpec,
        *,
        size: int = 16,
        seed: int = 0,
        multi: bool = False,
        weighted: bool = False,
    ) -> Batch:
        rng = np.random.default_rng(seed)
        bags = []
        for feature in spec.features:
            lengths = rng.integers(0, 4, size) if multi else np.ones(size, dtype=np.int64)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            count = int(offsets[-1])
            weights = rng.random(count).astype(np.float32) if weighted else None
            values = rng.integers(0, spec.table(feature.table).rows, count)
            bags.append(Bag(values=values, offsets=offsets, weights=weights))
        return Batch(
            dense=rng.standard_normal((size, spec.num_dense)).astype(np.float32),
            feature_names=spec.feature_names,
            bags=tuple(bags),
            labels=rng.integers(0, 2, size).astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def cluster_jobs() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run the recipe over ranks, see `cluster_server`: `cluster_jobs(hosts=2, ranks=1, ...)`."""
    here = Path(__file__).parent
    paths = [str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, str(here / "cluster_server.py")],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        | {"GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(**job: Any) -> dict[str, Any]:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            found: dict[str, Any] = json.loads(server.stdout.readline())
            return found

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def run_ranks(
    rank_server: Callable[..., Any],
) -> Iterator[Callable[[str], Callable[..., list[dict[str, Any]]]]]:
    """Run scenarios of a module beside this one over gloo ranks: `run_ranks(module)(4, "save")`.

    Without `ends=False`, all ranks have to end well.
    """
    with ExitStack() as servers:

        def start(module: str) -> Callable[..., list[dict[str, Any]]]:
            server = servers.enter_context(rank_server(Path(__file__).with_name(f"{module}.py")))

            def run(size: int, name: str, *, ends: bool = True, **arguments: Any) -> Any:
                arguments["folder"] = str(arguments["folder"])
                return server(size, name, ends=ends, **arguments)

            return run

        yield start


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of a run."""

    out: Path
    attempts: list[list[dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.out)

    @property
    def record(self) -> dict[str, Any]:
        return to_json(self.bundle.manifest.initialisation.finetune)

    @property
    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file()
        }

    @property
    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        bundle = self.bundle
        groups = [bundle.dense, *bundle.towers, *bundle.accumulator_files.values()]
        return {
            f"{t} {name}": read_tensor(info).astype(np.float32)
            for t, tensors in enumerate(groups)
            for name, info in tensors.items()
        }

    @property
    def printed(self) -> str:
        return "".join(rank["stdout"] for ranks in self.attempts for rank in ranks)


@pytest.fixture(scope="session")
def cluster_rows(tmp_path_factory: pytest.TempPathFactory, make_rows: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    make_rows(folder, "train", 602, seed=0, tables=WIDE_TABLES)
    make_rows(folder, "valid", 203, seed=1, tables=WIDE_TABLES)
    return folder


@pytest.fixture(scope="session")
def make_wide(
    tmp_path_factory: pytest.TempPathFactory, make_flat: Callable[..., Path]
) -> Callable[..., Path]:
    """A bundle of two towers, tables wide enough to be cut into columns."""

    def make(
        *, edit: Callable[[dict[str, Any]], object] | None = None, dim: int = 64, **options: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("wide")
        source = make_flat(folder / "ckpt.pt", rows=WIDE_TABLES, dim=dim, edit=edit)
        config = ConvertConfig(
            partition=PartitionConfig(num_towers=2, strategy="round-robin"), **options
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt_convert.conversion.sample.sample_size", lambda spec: 1024)
            return convert_checkpoint(source, folder / "wide", config=config).bundle.path

    return make


@pytest.fixture(scope="session")
def wide(make_wide: Callable[..., Path]) -> Path:
    return make_wide(compression=4)


@pytest.fixture(scope="session")
def tune_in(
    wide: Path, cluster_rows: Path, cluster_jobs: Callable[..., Any]
) -> Callable[..., Tuned]:
    """Run the recipe in a folder on HOSTS x RANKS."""

    def run(
        folder: Path,
        cluster: str,
        *options: object,
        name: str = "a",
        bundle: Path = wide,
        data: Path = cluster_rows,
        ends: bool = True,
        notes: str = "",
        **job: Any,
    ) -> Tuned:
        hosts, ranks = map(int, cluster.split("x"))
        out = folder / name / "new"
        out.parent.mkdir(exist_ok=True)
        common = ("--bundle", bundle, "--data", data, "--out", out, *COMMON)
        arguments = [str(argument) for argument in (*common, *options)]
        done = cluster_jobs(hosts=hosts, ranks=ranks, arguments=arguments, **job)
        last = done["attempts"][-1]
        if ends:
            assert [rank["code"] for rank in last] == [0] * (hosts * ranks), last
            assert {rank["stderr"] for rank in last} <= {"", notes}
        return Tuned(out=out, attempts=done["attempts"], seconds=done["seconds"])

    return run


@pytest.fixture
def tune(tmp_path: Path, tune_in: Callable[..., Tuned]) -> Callable[..., Tuned]:
    return partial(tune_in, tmp_path)


@pytest.fixture(scope="session")
def common() -> tuple[object, ...]:
    """Options that `tune` always gives."""
    return COMMON


@pytest.fixture(scope="session")
def tuned() -> type[Tuned]:
    return Tuned
