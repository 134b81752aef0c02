"""Print modelled speed-ups of reference models over sizes of cluster; nothing is measured.

    python benchmarks/modelled_scaling.py
    python benchmarks/modelled_scaling.py --batch 1024 --comm-dtype fp32 --compression 4

Prints, per model and accelerator: flat step in ms (and what share of it is exposed
communication), speed-up of SPTT, of DMT, at 16 to 16,384 accelerators, 8 per host.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from dmt_convert.placement import Cluster
from dmt_convert.placement.predict import GPUS, Assumptions, Machine, Network, predict_scaling
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


def make_model(
    features: int,
    dim: int,
    interaction: InteractionSpec,
    *,
    dense: tuple[int, ...],
    over: tuple[int, ...],
) -> ModelSpec:
    """Return a model with a table per feature."""
    names = [f"f{i}" for i in range(features)]
    width = interaction.output_width([dim] * (features + 1))
    return ModelSpec(
        family="reference",
        tables=tuple(TableSpec(name=name, rows=1_000_000, dim=dim) for name in names),
        features=tuple(FeatureSpec(name=name, table=name) for name in names),
        dense_arch=MlpSpec(widths=(*dense, dim), final_relu=True),
        interaction=interaction,
        over_arch=MlpSpec(widths=(width, *over), final_relu=False),
    )


def reference_models() -> dict[str, ModelSpec]:
    """Return MLPerf's two DLRMs, and one with as many features as 1,024 hosts can take."""
    mlps = {"dense": (13, 512, 256), "over": (1024, 1024, 512, 256, 1)}
    dcn = InteractionSpec(kind="dcn", cross_layers=3, cross_rank=512)
    branch = MlpSpec(widths=(1025 * 64, 256, 512), final_relu=True)
    projection = InteractionSpec(kind="projection", branch1=branch, branch2=branch)
    return {
        "DLRM, 26 features x 128": make_model(26, 128, InteractionSpec(kind="dot"), **mlps),
        "DLRM-DCNv2, 26 features x 128": make_model(26, 128, dcn, **mlps),
        "DLRM with projection, 1,024 features x 64": make_model(
            1024, 64, projection, dense=(512, 512), over=(2048, 1024, 1)
        ),
    }


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--comm-dtype", default="bf16", choices=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument("--compression", type=float, default=8)
    args = parser.parse_args()
    for name, model in reference_models().items():
        print(f"\n{name}: modelled, compression {args.compression:g}, batch {args.batch}\n")
        for i, preset in enumerate(GPUS[:3]):  # those of the paper, in TF32
            gpu = replace(preset, matmul_precision="high")
            cluster = Cluster(
                hosts=2,
                ranks_per_host=8,
                hbm_bytes=gpu.hbm_bytes,
                intra_gbps=gpu.intra_gbps,
                inter_gbps=gpu.inter_gbps,
            )
            machine = Machine(
                gpu=gpu,
                network=Network(cluster=cluster, assumptions=Assumptions()),
                batch=args.batch,
                comm_dtype=args.comm_dtype,
            )
            points = predict_scaling(model, machine, compression=args.compression)
            if i == 0:
                print("| | " + " | ".join(str(point.ranks) for point in points) + " |")
                print("|---|" + "---:|" * len(points))
            cells = []
            for point in points:
                flat = point.prediction.flat.step
                gains = [f"{step.speedup:.2f}" for step in point.prediction.steps[1:]]
                cells.append(
                    f"{flat.total * 1e3:.1f} ({flat.exposed / flat.total:.0%}), {', '.join(gains)}"
                )
            print(f"| {gpu.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
