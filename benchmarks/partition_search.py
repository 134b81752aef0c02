"""Compare the partitioner's search with the paper's method, by the affinity that towers hold.

    python benchmarks/partition_search.py --features 26x4 26x13 300x16 5000x64 \
        --checkpoints CHECKPOINT_OR_FOLDER ... --towers 4

Affinities: planted groups (cosines of noisy samples), uniform random numbers, and those of real
checkpoints by both kinds of affinity; each for coherent and for diverse. Three ways:

- search: what `partition_features` does.
- plane + swaps: the paper's embedding in the plane and balanced k-means, of several runs of which
  the best after improvement by the same swaps is kept.
- plane: the paper's method alone, the best of the same runs.

Prints the sum of distances inside towers (coherent: 1 - affinity; diverse: affinity) of both plane
ways, divided by the search's (above 1: worse than the search), and CPU seconds of all three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from partition_speed import make_spec
from plane_kmeans import cluster_in_plane

from dmt_convert.arrays import Float32Array, Float64Array, IntArray
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.config import PartitionConfig
from dmt_convert.conversion import draw_sample
from dmt_convert.conversion.partition import (
    cosine_affinity,
    measure_affinity,
    partition_features,
)
from dmt_convert.conversion.partition.search import TowerState, find_start, pair_costs
from dmt_convert.conversion.partition.units import build_units
from dmt_convert.errors import DmtError
from dmt_convert.families import infer_model
from dmt_convert.spec import ModelSpec

Case = tuple[str, ModelSpec, Float32Array, int]
"""Name, model, affinity, towers."""


def generate_cases(size: str, seed: int) -> Iterator[Case]:
    """Yield planted groups under two strengths of noise, and random affinities."""
    features, towers = (int(number) for number in size.split("x"))
    spec = make_spec(features, 24)
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(features) % towers)
    centres = rng.standard_normal((towers, 64, 24), dtype=np.float32)
    for noise in (1.2, 2.5):
        pooled = [
            centres[t] + np.float32(noise) * rng.standard_normal((64, 24), dtype=np.float32)
            for t in truth
        ]
        yield f"planted, noise {noise}", spec, cosine_affinity(pooled), towers
    uniform = rng.random((features, features), dtype=np.float32)
    yield "random", spec, (uniform + uniform.T) / 2, towers


def read_cases(name: str, path: Path, towers: int, seed: int) -> Iterator[Case]:
    """Yield the affinities of a checkpoint, and name those that cannot be measured.

    Features that share a table may be separated here: the paper's method does not know units.
    """
    try:
        info = infer_model(open_checkpoint(path))
        sample = draw_sample(info, seed=seed)
    except DmtError as error:
        print(f"skipped {name}: {_first_line(error)}")
        return
    for kind in ("cosine", "weights"):
        try:
            affinity = measure_affinity(info, sample, kind)  # type: ignore[arg-type]
        except DmtError as error:
            print(f"skipped {name}, {kind}: {_first_line(error)}")
            continue
        yield f"{name}, {kind}", make_spec(len(affinity), 24), affinity, towers


def find_checkpoints(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield name and path of checkpoints; a folder with `meta.json` has one beside that file."""
    for path in paths:
        folders = sorted(p.parent for p in path.glob("**/meta.json")) if path.is_dir() else []
        if not folders:
            yield path.name, path
        for folder in folders:
            inside = [p for p in folder.iterdir() if p.name not in ("meta.json", "probe.npz")]
            yield folder.name, inside[0] if len(inside) == 1 else folder


def _first_line(error: DmtError) -> str:
    return str(error).splitlines()[0]


def compare(case: Case, strategy: str, *, starts: int, seed: int) -> tuple[float, ...]:
    """Return relative sums of plane + swaps and plane; CPU seconds of search and of both."""
    _, spec, affinity, towers = case
    config = PartitionConfig(towers=towers, partition=strategy, seed=seed)
    began = time.process_time()
    tower_of = partition_features(spec, config, affinity).assignment.tower_of
    search_seconds = time.process_time() - began
    searched = np.array([tower_of[name] for name in spec.feature_names])
    distance = np.asarray(1 - affinity if strategy == "coherent" else affinity, dtype=np.float64)
    np.fill_diagonal(distance, 0)
    rng = np.random.default_rng(seed)
    began = time.process_time()
    runs = cluster_in_plane(distance, towers, starts=starts, rng=rng)
    plane_seconds = time.process_time() - began
    units = build_units(spec, config)
    start = find_start(units, towers, config, rng=rng)
    pair_UU = pair_costs(units, affinity, coherent=strategy == "coherent")
    improved = []
    for run in runs:
        state = TowerState(start.bounds, run)
        state.improve(pair_UU, rng=rng)
        improved.append(state.assignment)
    both_seconds = time.process_time() - began
    found, plane, both = (
        min(_sum_inside(assignment, distance) for assignment in assignments)
        for assignments in ([searched], runs, improved)
    )
    tiny = 1e-12  # towers without any affinity inside exist
    ratios = [(value + tiny) / (found + tiny) for value in (both, plane)]
    return *ratios, search_seconds, both_seconds, plane_seconds


def _sum_inside(assignment: IntArray, distance: Float64Array) -> float:
    towers = [np.flatnonzero(assignment == t) for t in np.unique(assignment)]
    return float(sum(distance[np.ix_(tower, tower)].sum() for tower in towers))


def main() -> None:
    """Run and print one row per case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", nargs="*", default=["26x4", "26x13", "64x8", "300x16"])
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[])
    parser.add_argument("--towers", type=int, default=4, help="towers for checkpoints")
    parser.add_argument("--starts", type=int, default=8, help="runs of k-means, up to 400 features")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| affinity | F | T | objective | plane + swaps | plane | search s | p + s s | plane s |")
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [
        case
        for name, path in find_checkpoints(args.checkpoints)
        for case in read_cases(name, path, args.towers, args.seed)
    ]
    cases += [case for size in args.features for case in generate_cases(size, args.seed)]
    for case in cases:
        name, _, affinity, towers = case
        starts = args.starts if len(affinity) <= 400 else 1
        for strategy in ("coherent", "diverse"):
            values = compare(case, strategy, starts=starts, seed=args.seed)
            cells = [name, f"{len(affinity)}", f"{towers}", strategy]
            cells += [f"{value:.4f}" for value in values[:2]] + [f"{v:.2f}" for v in values[2:]]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
