"""Time the tower partitioner on planted groups of features.

    python benchmarks/partition_speed.py --features 26 5000 --towers 4 64

Prints, per size, seconds for the affinity and for the partition, and how many pairs that
belong together were put together.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from dmt_convert.config import PartitionConfig
from dmt_convert.conversion.partition import cosine_affinity, partition_features
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


def make_spec(features: int, dim: int) -> ModelSpec:
    """Return a DLRM with `cat` interaction, whose widths cost nothing at any size."""
    names = [f"f{i}" for i in range(features)]
    return ModelSpec(
        family="benchmark",
        tables=tuple(TableSpec(name=f"t_{n}", rows=1000, dim=dim) for n in names),
        features=tuple(FeatureSpec(name=n, table=f"t_{n}") for n in names),
        dense_arch=MlpSpec(widths=(13, dim), final_relu=True),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=((features + 1) * dim, 1), final_relu=False),
    )


def main() -> None:
    """Run and print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[26, 500, 5000])
    parser.add_argument("--towers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--noise", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    for features, towers in zip(args.features, args.towers, strict=True):
        spec = make_spec(features, args.dim)
        truth = rng.integers(towers, size=features)
        shared = rng.standard_normal((towers, args.rows, args.dim))
        pooled = [
            (shared[t] + args.noise * rng.standard_normal(shared[t].shape)).astype(np.float32)
            for t in truth
        ]
        began = time.perf_counter()
        affinity = cosine_affinity(pooled)
        middle = time.perf_counter()
        config = PartitionConfig(towers=towers, seed=args.seed, size_ratio=1.0)
        partition = partition_features(spec, config, affinity)
        ended = time.perf_counter()
        found = partition.assignment.tower_of
        mine = np.array([found[name] for name in spec.feature_names])
        same = truth[:, None] == truth[None, :]
        np.fill_diagonal(same, False)
        kept = (mine[:, None] == mine[None, :])[same].mean()
        print(
            f"F={features} T={towers}: affinity {middle - began:.2f} s, partition "
            f"{ended - middle:.2f} s, planted pairs kept {kept:.3f} (chance {1 / towers:.3f})"
        )


if __name__ == "__main__":
    main()
