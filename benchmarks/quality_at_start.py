"""What a converted model is worth before any fine-tuning: one flat model, all conversions of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from flat_models import Flat, FlatJob, open_flat, split_rows
from quality_tables import Record
from shared_projection import convert_shared

from dmt_convert.config import PartitionConfig, Strategy
from dmt_convert.conversion import Sample, find_towers
from dmt_convert.conversion.initialisation import initialise
from dmt_convert.conversion.module_choice import alternative_modules
from dmt_convert.conversion.start import Choice, Starter
from dmt_convert.model import (
    DmtModel,
    DmtSpec,
    TowerModuleSpec,
    TowerSpec,
    module_spec,
)
from dmt_convert.spec import ModelSpec

Towers = tuple[tuple[str, ...], ...]

START_NAMES: Final = {
    "no data": ("closed form", "closed form, distilled"),
    "calibrated": ("calibrated", "calibrated, distilled"),
}
"""Sample -> what tables call the closed form that is fitted on it, and that distilled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartJob:
    """All conversions of one flat model that are to be measured."""

    flat: FlatJob
    towers: tuple[int, ...]
    compressions: tuple[float, ...]
    modules: tuple[str, ...]
    distill_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """What conversions of a flat model are fitted on; found once for all of them."""

    flat: Flat
    sample: Sample
    """All sampled rows: the partitioner looks at these."""
    starter: Starter

    def partition(self, towers: int, module: str) -> Towers:
        """Towers as `dmt convert` forms them where it is not told how."""
        combines = module != "default" and self.flat.info.spec.interaction.kind == "dot"
        strategy: Strategy = "diverse" if combines else "coherent"
        config = PartitionConfig(towers=towers, partition=strategy)
        return find_towers(self.flat.info, self.sample, config).assignment.towers

    def convert(self, towers: Towers, module: str, compression: float) -> DmtModel:
        """The converted model as `dmt convert --compression` makes it, D allotted over towers."""
        flat = self.flat.info.spec
        found = choose_module(flat, towers, module, compression)
        modules = [found]
        if module == "best":
            count = len(towers)
            modules += alternative_modules(flat, found, num_towers=count, compression=compression)
        specs = [make_spec(flat, towers, each) for each in modules]
        return self.starter.solve(specs, Choice(allot=True))[0]

    def distill(self, model: DmtModel, steps: int) -> DmtModel:
        better, _ = self.starter.distill(model, steps, seed=self.flat.job.seed)
        return model if better is None else better


def prepare_fittings(flat: Flat) -> dict[str, Fitting]:
    """Sample and trace a flat model, without data and with."""
    return {
        name: Fitting(flat=flat, sample=sample, starter=Starter(flat.model, *split_rows(sample)))
        for name, sample in flat.samples().items()
    }


def choose_module(
    spec: ModelSpec, towers: Towers, module: str, compression: float
) -> TowerModuleSpec:
    """default: a vector per feature. c0 (dot): p vectors per tower alone.

    p is the number with which D comes near N / 2, unless a tower has fewer features.
    """
    count = len(towers)
    if module != "c0":
        return module_spec(spec, "auto", num_towers=count, compression=compression)
    wanted = math.ceil(2 * len(spec.features) / (compression * count) - 1e-9)
    p = min(min(map(len, towers)), wanted)
    return module_spec(spec, "auto", num_towers=count, c=0, p=p, compression=compression)


def make_spec(spec: ModelSpec, towers: Towers, module: TowerModuleSpec) -> DmtSpec:
    specs = tuple(TowerSpec(features=features, module=module) for features in towers)
    return DmtSpec(flat=spec, towers=specs)


def module_name(spec: DmtSpec) -> str:
    """A module in words; D is the range over towers."""
    module = spec.towers[0].module
    dims = [tower.module.dim for tower in spec.towers]
    low, high = min(dims), max(dims)
    shape = f"c = {module.c}, p = {module.p}, " if module.kind == "dlrm" else ""
    return f"{module.kind}, {shape}D = {low}" + (f" to {high}" if high > low else "")


def measure_start(job: StartJob) -> list[Record]:
    """Measure every conversion of one flat model on its test rows."""
    flat = open_flat(job.flat)
    test = flat.rows("test")
    fittings = prepare_fittings(flat)
    of_flat: Record = {"arch": job.flat.arch, "seed": job.flat.seed}
    none = {"module": "-", "towers": "-", "compression": "-", "start": "flat"}
    records = [of_flat | none | test.compare(flat.model)]
    spec = flat.info.spec
    for count in job.towers:
        if count > len(spec.features):
            continue
        towers = fittings["no data"].partition(count, "default")
        exact = make_spec(spec, towers, TowerModuleSpec(kind="passthrough"))
        model, _ = initialise(flat.model, exact, None, method="exact")
        keys: Record = of_flat | {"module": "passthrough", "towers": count, "compression": "-"}
        records.append(keys | {"start": "passthrough"} | test.compare(model))
        for module, compression in itertools.product(job.modules, job.compressions):
            if module != "default" and spec.interaction.kind != "dot":
                continue
            keys = of_flat | {"module": module, "towers": count, "compression": compression}
            for start, model in _starts(job, fittings, count, module, compression):
                shape = {"shape": module_name(model.spec), "emits": sum(model.spec.tower_widths)}
                records.append(keys | {"start": start} | shape | test.compare(model))
    return records


def _starts(
    job: StartJob,
    fittings: Mapping[str, Fitting],
    count: int,
    module: str,
    compression: float,
) -> Iterator[tuple[str, DmtModel]]:
    """Convert in every way: name of the start, model."""
    drawn = fittings["no data"]
    partitions = {name: fitting.partition(count, module) for name, fitting in fittings.items()}
    towers = partitions["no data"]
    flat = drawn.flat
    found = choose_module(flat.info.spec, towers, module, compression)
    plain = make_spec(flat.info.spec, towers, found)
    if module == "default" and found.kind == "dlrm":
        yield "shared projection", convert_shared(flat.model, plain, split_rows(drawn.sample)[0])
    for name, fitting in fittings.items():
        closed, distilled = START_NAMES[name]
        model = fitting.convert(partitions[name], module, compression)
        yield closed, model
        if job.distill_steps:
            yield distilled, fitting.distill(model, job.distill_steps)
    model, _ = initialise(flat.model, plain, None, method="random", seed=job.flat.seed)
    yield "random", model
