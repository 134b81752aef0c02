"""What fewer bytes between hosts cost: AUC lost against bytes, by the product's own conversion.

    python benchmarks/frontier.py --data data/frappe --flat-cache flat --results frontier
    python benchmarks/frontier_tables.py frontier --picture frontier.png

converts flat models (benchmarks/flat_models.py; cached) with `dmt_convert.convert`, scores the
bundles on the test rows, and appends one JSON line per bundle to `RESULTS/LABEL.jsonl`. A line that
is there is not measured again, and says of which commit it is. `--compression` counts bytes against
float32.

- `--samples`: calibrated fits on the training rows, without labels; "no data" on rows drawn.
- `--variants`: sets of options by name, see `VARIANTS`; `--set partition=loss` adds to each.
- `--finetune` trains every bundle for a tenth of the flat model's steps, with the defaults of
  `dmt finetune`, and measures it again.

The flat model stands beside them with its embeddings as float32, as bfloat16, and as int8 with a
float32 scale per feature vector.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from flat_models import Flat, FlatJob, FloatArray, Rows, open_flat

import dmt_convert as dmt
from dmt_convert.errors import DmtError
from dmt_convert.metrics import measure_accuracy, measure_agreement
from dmt_convert.model import DmtSpec

Record = dict[str, Any]

TENTH: Final = 10
"""The flat model's steps over those of fine-tuning."""
_LINEAR: Final = {
    "tower_module": "linear",
    "partition": "coherent",
    "precision": "fp32",
    "replicate": "none",
}
VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "default": {},
    "linear module": {"tower_module": "linear"},
    "linear": _LINEAR,
    "linear, loss": _LINEAR | {"partition": "loss"},
    "linear, int8": _LINEAR | {"precision": "int8"},
    "linear, mixed": _LINEAR | {"precision": "mixed"},
    "linear, replicate": _LINEAR | {"replicate": "auto"},
    "linear, loss, int8": _LINEAR | {"partition": "loss", "precision": "int8"},
    "linear, loss, mixed": _LINEAR | {"partition": "loss", "precision": "mixed"},
    "all": _LINEAR | {"partition": "loss", "precision": "mixed", "replicate": "auto"},
}
"""Name -> options of `dmt convert` beside those that every conversion has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One conversion of a flat model."""

    towers: int
    compression: float | None
    """None: the option is not given."""
    sample: str
    variant: str

    def keys(self) -> Record:
        return {
            "towers": self.towers,
            "compression": self.compression,
            "sample": self.sample,
            "variant": self.variant,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A flat model, its test rows, and what is added to every conversion."""

    flat: Flat
    rows: Rows
    extra: Mapping[str, Any]
    finetune: bool

    def keys(self) -> Record:
        return flat_keys(self.flat.job)

    def measure(self, cell: Cell, folder: Path) -> Record:
        """Convert, score, and fine-tune if that is asked for."""
        job = self.flat.job
        options = {**VARIANTS[cell.variant], **self.extra}
        if cell.compression is not None:
            options["compression"] = cell.compression
        if cell.sample == "calibrated":
            options["calibration"] = job.data / "train.npz"
        record = self.keys() | cell.keys()
        begin = time.perf_counter()
        try:
            bundle = dmt.convert(
                job.path, folder / "bundle", towers=cell.towers, seed=job.seed, **options
            )
        except DmtError as error:
            return record | {"refused": str(error).splitlines()[0]}
        record |= {"seconds": round(time.perf_counter() - begin, 1)}
        record |= describe(bundle.manifest.model) | self.compare(bundle)
        if self.finetune:
            begin = time.perf_counter()
            tuned = self._finetune(bundle, folder / "tuned")
            record |= {f"tuned_{name}": value for name, value in self.compare(tuned).items()}
            record["tuned_seconds"] = round(time.perf_counter() - begin, 1)
        return record

    def _finetune(self, bundle: dmt.Bundle, out: Path) -> dmt.Bundle:
        job = self.flat.job
        tuned = dmt.finetune(
            bundle,
            job.data / "train.npz",
            valid=job.data / "valid.npz",
            teacher=job.path,  # the bundle does not lie beside it
            out=out,
            max_steps=round(job.steps / TENTH),
            batch_size=job.config.batch_size,
            seed=job.seed,
        )
        assert tuned is not None
        return tuned

    def compare(self, bundle: dmt.Bundle) -> Record:
        return self.judge(dmt.score(bundle, self.flat.job.data / "test.npz").logits)

    def judge(self, logits: FloatArray) -> Record:
        before, after = (
            measure_accuracy(z, self.rows.labels) for z in (self.rows.reference, logits)
        )
        assert before.auc is not None and after.auc is not None
        return {
            "auc": after.auc,
            "auc_lost": before.auc - after.auc,
            "r2": measure_agreement(self.rows.reference, logits).r2,
        }

    def rivals(self) -> Iterator[Record]:
        """Yield the flat model with its embeddings rounded."""
        pooled, dims = self.rows.pooled, self.flat.info.spec.feature_dims
        values, elements = torch.from_numpy(pooled), sum(dims)
        scaled = torch.cat([round_int8(vector) for vector in values.split(list(dims), 1)], 1)
        rounded = {
            "fp32": (values, 4 * elements),
            "bf16": (values.bfloat16().float(), 2 * elements),
            "int8": (scaled, elements + 4 * len(dims)),
        }
        for precision, (sent, count) in rounded.items():
            with torch.inference_mode():
                logits = self.flat.model.forward_pooled(torch.from_numpy(self.rows.dense), sent)
            yield {
                **self.keys(),
                "variant": f"flat {precision}",
                "bytes": count,
                "achieved": 4 * elements / count,
                **self.judge(logits.numpy()),
            }


def flat_keys(job: FlatJob) -> Record:
    return {"data": job.data.name, "arch": job.arch, "dim": job.dim, "seed": job.seed}


def round_int8(vectors: torch.Tensor) -> torch.Tensor:
    """Round each row to 255 levels between minus and plus its largest magnitude."""
    scale = vectors.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (vectors / scale).round() * scale


def describe(spec: DmtSpec) -> Record:
    """What was chosen: module, widths, precision, and the bytes that it sends."""
    codes = [tower.module.code for tower in spec.sending_towers]
    module = spec.sending_towers[0].module
    return {
        "module": module.kind + (f" c={module.c} p={module.p}" if module.kind == "dlrm" else ""),
        "widths": list(spec.tower_widths),
        "precision": sorted({"fp32" if code is None else code.precision for code in codes}),
        "int4": sum(0 if code is None else code.int4 for code in codes),
        "everywhere": [f for tower in spec.towers if tower.everywhere for f in tower.features],
        "towers_of": [list(tower.features) for tower in spec.towers],
        "bytes": sum(spec.tower_bytes),
        "achieved": spec.compression,
    }


class Results:
    """JSON lines under a folder, one file per label."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commit = read_commit()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.records = [json.loads(line) for line in lines]

    def find(self, keys: Mapping[str, Any], needed: str = "variant") -> bool:
        """Whether a record has these keys and, unless it was refused, what is needed."""
        return any(
            all(record.get(key) == value for key, value in keys.items())
            and (needed in record or "refused" in record)
            for record in self.records
        )

    def add(self, record: Record) -> None:
        """Keep a record, with the commit of the code that it measured."""
        record = {**record, "commit": self.commit}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(summary(record), flush=True)


def read_commit(tree: Path = Path(__file__).parent) -> str:
    """The commit of a tree, with "+dirty" if tracked files differ from it."""
    git = ("git", "-C", str(tree))
    commit, changed = (
        subprocess.run([*git, *command], check=True, capture_output=True, text=True).stdout.strip()
        for command in (
            ("rev-parse", "--short", "HEAD"),
            ("status", "--porcelain", "--untracked-files=no"),
        )
    )
    return commit + "+dirty" * bool(changed)


def summary(record: Record) -> str:
    head = "{data} {arch} N={dim} seed {seed}".format_map(record)
    names = ("towers", "compression", "sample", "variant", "module", "precision", "refused")
    figures = ("achieved", "auc_lost", "r2", "tuned_auc_lost", "seconds")
    parts = [f"{name} {record[name]}" for name in names if name in record]
    parts += [f"{name} {record[name]:.5g}" for name in figures if name in record]
    return ", ".join([head, *parts])


def main() -> None:
    options = read_options()
    torch.set_num_threads(1)
    results = Results(options.results / f"{options.label}.jsonl")
    cells = [
        Cell(towers=towers, compression=compression or None, sample=sample, variant=variant)
        for sample, towers, variant, compression in itertools.product(
            options.samples, options.towers, options.variants, options.compressions
        )
    ]
    jobs = [
        FlatJob(data=data, arch=arch, seed=seed, cache=options.flat_cache, dim=dim)
        for seed, dim, arch, data in itertools.product(
            options.seeds, options.dims, options.archs, options.data
        )
    ]
    needed = "tuned_auc" if options.finetune else "variant"
    for job in jobs:
        known = flat_keys(job)
        todo = [cell for cell in cells if not results.find(known | cell.keys(), needed)]
        rivals = not results.find(known | {"variant": "flat int8"})
        if not todo and not rivals:
            continue
        flat = open_flat(job)
        bench = Bench(
            flat=flat, rows=flat.rows("test"), extra=dict(options.set), finetune=options.finetune
        )
        for record in bench.rivals() if rivals else ():
            results.add(record)
        for cell in todo:
            folder = Path(tempfile.mkdtemp())
            try:
                results.add(bench.measure(cell, folder))
            finally:
                shutil.rmtree(folder)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of data sets")
    parser.add_argument("--flat-cache", type=Path, required=True, help="where flat models lie")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON lines")
    parser.add_argument("--label", default="frontier", help="name of the file in it")
    parser.add_argument("--archs", nargs="+", choices=("dlrm", "dcn"), default=["dlrm"])
    parser.add_argument("--dims", type=int, nargs="+", default=[16], help="embedding dims N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--towers", type=int, nargs="+", default=[4])
    parser.add_argument(
        "--compressions",
        type=float,
        nargs="+",
        default=[2, 4, 8, 16, 32, 64],
        help="0 leaves the option out",
    )
    parser.add_argument("--samples", nargs="+", default=["calibrated"])
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["default"])
    parser.add_argument("--set", type=read_setting, action="append", default=[], metavar="NAME=X")
    parser.add_argument("--finetune", action="store_true")
    return parser.parse_args()


def read_setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    main()
