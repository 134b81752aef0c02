"""Traffic against the closed formulas, and against counting every byte that moves."""

from __future__ import annotations

import itertools

import pytest

from dmt_convert.placement import Cluster, Exchange, TowerPlan, plan_towers
from dmt_convert.placement.traffic import measure_traffic
from support.specs import spec_of_towers


@pytest.mark.parametrize(("hosts", "ranks"), [(4, 2), (2, 4), (8, 1), (1, 4)])
def test_even_towers_follow_the_closed_formulas(hosts: int, ranks: int) -> None:
    """V (H-1)/H flat, V (H-1)/(H CR) for outputs, V (L-1)/L inside the host."""
    spec, assignment = spec_of_towers([[(100, 64)] * ranks] * hosts)
    cluster = Cluster(hosts=hosts, ranks_per_host=ranks)
    widths = [ranks * 16] * hosts
    traffic = plan_towers(
        spec, assignment, cluster, tower_bytes=[4 * width for width in widths]
    ).traffic
    features = hosts * ranks
    volume, indices, compression = features * 64 * 4, features * 8, 4
    assert traffic.flat_cross_bytes == volume * (hosts - 1) / hosts
    assert traffic.dmt_cross_bytes == volume * (hosts - 1) / hosts / compression
    assert traffic.compression == (compression if hosts > 1 else 1)
    assert traffic.tower_outputs.cross_bytes == traffic.dmt_cross_bytes
    assert traffic.tower_embeddings == Exchange(
        cross_bytes=0, intra_bytes=volume * (ranks - 1) / ranks
    )
    assert traffic.peer_indices.cross_bytes == indices * (hosts - 1) / hosts
    assert traffic.tower_indices.intra_bytes == indices * (ranks - 1) / ranks


def test_a_row_wise_table_sends_partial_sums_to_every_rank() -> None:
    """V (L-1) instead of V (L-1)/L."""
    spec, assignment = spec_of_towers([[(3000, 8)], [(3000, 8)]])
    cluster = Cluster(hosts=2, ranks_per_host=4, hbm_bytes=40_000)
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[32, 32])
    assert {table.sharding_type for table in plan.tables} == {"table_row_wise"}
    assert plan.traffic.tower_embeddings.intra_bytes == 2 * 8 * 4 * 3
    assert plan.lookups_per_rank == (0.25,) * 8


def test_traffic_is_what_a_count_of_every_transfer_gives() -> None:
    """Three groups of two hosts of two ranks, uneven in all respects."""
    cluster = Cluster(hosts=6, ranks_per_host=2)
    rank_widths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    group_bytes, gradient_bytes = [28, 8, 44], [9, 4, 13]
    traffic = measure_traffic(
        cluster,
        group_hosts=2,
        group_bytes=group_bytes,
        gradient_bytes=gradient_bytes,
        rank_widths=rank_widths,
        rank_ids=[float(width) for width in rank_widths],
        flat_width=sum(rank_widths),
        ids=[1.0, 2.0, 3.0],
    )
    sent = dict.fromkeys(itertools.product(range(12), repeat=2), 0)
    outputs, gradients = dict(sent), dict(sent)
    for source, target in sent:
        if source // 4 == target // 4:
            # The target holds a sample of its own, and one of each of its two peers.
            sent[source, target] = 3 * rank_widths[source] * 4
        elif source % 4 == target % 4:
            outputs[source, target] = group_bytes[source // 4]
            gradients[target, source] = gradient_bytes[source // 4]

    def busiest(moved: dict[tuple[int, int], int], *, crossing: bool) -> int:
        chosen = {
            pair: size
            for pair, size in moved.items()
            if pair[0] != pair[1] and (pair[0] // 2 != pair[1] // 2) == crossing
        }
        return max(
            max(sum(v for (s, _), v in chosen.items() if s == rank),
                sum(v for (_, t), v in chosen.items() if t == rank))
            for rank in range(12)
        )  # fmt: skip

    assert traffic.tower_embeddings.cross_bytes == busiest(sent, crossing=True)
    assert traffic.tower_embeddings.intra_bytes == busiest(sent, crossing=False)
    assert traffic.tower_outputs.cross_bytes == busiest(outputs, crossing=True)
    assert traffic.output_gradients.cross_bytes == busiest(gradients, crossing=True)

    def entering(*exchanges: dict[tuple[int, int], int]) -> float:
        return sum(
            size
            for moved in exchanges
            for (source, target), size in moved.items()
            if source // 2 != target // 2
        )

    assert traffic.dmt_cross_bytes == pytest.approx(entering(sent, outputs) / 12, rel=1e-12)
    back = entering(sent, gradients) / 12
    assert traffic.gradient_cross_bytes == pytest.approx(back, rel=1e-12)


def test_seconds_follow_the_slower_link() -> None:
    exchange = Exchange(cross_bytes=1000.0, intra_bytes=4000.0)
    slow_network = Cluster(hosts=2, ranks_per_host=2, intra_gbps=8.0, inter_gbps=1.0)
    slow_inside = Cluster(hosts=2, ranks_per_host=2, intra_gbps=1.0, inter_gbps=8.0)
    assert exchange.seconds(slow_network, 100) == pytest.approx(1000 * 8 * 100 / 1e9)
    assert exchange.seconds(slow_inside, 100) == pytest.approx(4000 * 8 * 100 / 1e9)


def test_an_estimate_counts_embeddings_both_ways_and_ids_once() -> None:
    spec, assignment = spec_of_towers([[(100, 64)]] * 2)
    cluster = Cluster(hosts=2, ranks_per_host=1, inter_gbps=8.0)
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[64, 64])
    estimate = plan.estimate(1000)
    assert estimate.samples_per_rank == 1000
    assert estimate.flat_seconds == pytest.approx((2 * 64 * 4 + 8) * 1000 / 1e9)
    assert estimate.dmt_seconds == pytest.approx((2 * 16 * 4 + 8) * 1000 / 1e9)


def test_gradients_of_other_bytes_are_counted_by_themselves() -> None:
    spec, assignment = spec_of_towers([[(100, 64)]] * 2)
    cluster = Cluster(hosts=2, ranks_per_host=1, inter_gbps=8.0)
    sent = {"tower_bytes": [16, 16], "gradient_bytes": [18, 18]}
    plan = plan_towers(spec, assignment, cluster, **sent)  # type: ignore[arg-type]
    assert plan.traffic.dmt_cross_bytes == 16 and plan.traffic.gradient_cross_bytes == 18
    assert plan.estimate(1000).dmt_seconds == pytest.approx((16 + 18 + 8) * 1000 / 1e9)
    assert TowerPlan.from_json(plan.to_json()) == plan


def test_a_plan_of_equal_bytes_is_written_as_before() -> None:
    """Earlier versions wrote no bytes of gradients: they were those of the outputs."""
    spec, assignment = spec_of_towers([[(100, 64)]] * 2)
    cluster = Cluster(hosts=2, ranks_per_host=1)
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[64, 64])
    assert "gradient" not in str(plan.to_json())
    assert plan.traffic.output_gradients == plan.traffic.tower_outputs
