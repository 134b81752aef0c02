"""A tiny checkpoint, and bundles of it that are written without the other stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle import (
    Bundle,
    Manifest,
    StreamedWeights,
    plan_table_files,
    split_state,
    write_bundle,
)
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion.initialisation import initialise
from dmt_convert.documents import Source
from dmt_convert.families import Fact, FlatModelInfo, infer_model
from dmt_convert.model import DmtSpec, MappedTables, TowerModuleSpec, TowerSpec, open_flat_model
from dmt_convert.placement import Cluster, plan_towers
from support.checkpoints.flat import make_flat

TOWERS = (("cat_0", "cat_2"), ("cat_1", "cat_3"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flat(tmp_path_factory.mktemp("flat") / "ckpt.pt")


BundleWriter = Callable[..., Bundle]


@pytest.fixture(scope="session")
def write(source: Path) -> BundleWriter:
    """Write the passthrough bundle of a checkpoint: `write(out, source=..., force=...)`."""

    def write_passthrough(out: Path, *, source: Path = source, **options: Any) -> Bundle:
        info = infer_model(open_checkpoint(source))
        spec = passthrough(info)
        infos = {table.name: info.table_info(table.name) for table in info.spec.tables}
        flat = open_flat_model(info)
        model, _ = initialise(
            flat, spec, None, method="exact", tables=MappedTables(info.spec, infos)
        )
        plan = plan_towers(
            info.spec,
            spec.assignment,
            Cluster(hosts=2, ranks_per_host=1),
            tower_bytes=spec.tower_bytes,
        )
        manifest = Manifest(
            model=spec,
            source=Source(format="torch", name=source.name),
            facts=(Fact(subject="s", value="v", source="read", reason="r"),),
        )
        return write_bundle(
            out,
            StreamedWeights(
                tables=plan_table_files(info, TOWERS),
                accumulators=options.pop("accumulators", {}),
            ),
            small=split_state(model),
            describe=lambda: (
                manifest,
                plan,
                lambda final: {"report.html": final.source.digest},
            ),
            **options,
        )

    return write_passthrough


def passthrough(info: FlatModelInfo) -> DmtSpec:
    module = TowerModuleSpec(kind="passthrough")
    return DmtSpec(
        flat=info.spec,
        towers=tuple(TowerSpec(features=features, module=module) for features in TOWERS),
    )


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory, write: BundleWriter) -> Path:
    """A bundle that tests copy before they damage it."""
    return write(tmp_path_factory.mktemp("bundle") / "ckpt-dmt2").path
