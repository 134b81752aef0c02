"""The first process of the sealed namespaces: builds the hosts, launches the ranks, runs turns.

    python -m benchmarks.cluster.stage SETTINGS_JSON LOG_FOLDER

It prints one JSON document per line: `built` (the first loss of every variant), `turn` (one turn
of one variant at one rate), `error` (a DmtError). It ends when its stdin does, so that nothing
outlives the process that started it, not even after SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import DmtError

from .network import NIC, ClusterNetwork, address
from .ranks import Ranks
from .settings import Settings

_BUILD_MBIT: Final = 10_000.0
"""Links are fast while variants are built: that is not measured."""
_PORT: Final = 29500


def run_stage(settings: Settings, logs: Path) -> Iterator[dict[str, Any]]:
    """Yield what `main` prints."""
    network = ClusterNetwork(settings.topology.hosts)
    network.set_rate(_BUILD_MBIT)
    ranks = Ranks(settings.timeout_s, logs)
    for host, namespace in enumerate(network.hosts):
        with namespace.entered():
            for local in range(settings.topology.ranks_per_host):
                ranks.launch(settings.to_json(), rank_environment(settings, host, local))
    losses, crossing = {}, {}
    for name in settings.variants:
        answers = ranks.ask({"do": "build", "variant": name})
        losses[name] = answers[0]["loss"]
        if answers[0]["planned"] is not None:
            sent = [answer["sent"] for answer in answers]
            moved = sum_by_host(sent, settings.topology.ranks_per_host)
            crossing[name] = {"planned": answers[0]["planned"], "hosts": moved}
    yield {"event": "built", "first_losses": losses, "crossing": crossing}
    draw = random.Random(settings.seed)
    for rate in settings.rates:
        network.set_rate(rate)
        for turn_round in range(settings.rounds):
            for name in draw.sample(settings.variants, len(settings.variants)):
                request = {"do": "turn", "variant": name, "steps": settings.steps}
                turn = merge_answers(ranks.ask(request), settings)
                where = {"rate_mbit": rate, "round": turn_round, "variant": name}
                yield {"event": "turn", **where, **turn}


def rank_environment(settings: Settings, host: int, local: int) -> dict[str, str]:
    """What torchrun would set, and which interface gloo uses."""
    topology = settings.topology
    return {
        "RANK": str(host * topology.ranks_per_host + local),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(topology.ranks_per_host),
        "GROUP_RANK": str(host),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": NIC,
        "OMP_NUM_THREADS": "1",
    }


def sum_by_host(sent: list[list[int]], ranks_per_host: int) -> list[list[int]]:
    """Return what every host sends to others and receives from them.

    Args:
        sent: What every rank sends to every rank.
        ranks_per_host: R.
    """
    hosts = [[0, 0] for _ in range(len(sent) // ranks_per_host)]
    for source, row in enumerate(sent):
        for target, count in enumerate(row):
            here, there = source // ranks_per_host, target // ranks_per_host
            if here != there:
                hosts[here][0] += count
                hosts[there][1] += count
    return hosts


def merge_answers(answers: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Make one record of all ranks' answers to a turn.

    A step ends when the last rank has ended it.
    """
    last = max(answer["start"] for answer in answers)
    step_s = []
    for ends in zip(*(answer["ends"] for answer in answers), strict=True):
        step_s.append(max(ends) - last)
        last = max(ends)
    size = settings.topology.ranks_per_host
    counts = [answer["bytes"] for answer in answers[::size]]
    return {
        "step_s": step_s,
        "cpu_s": [answer["cpu_s"] for answer in answers],
        "hosts": [
            {
                "link_rx_bytes": count[NIC][0],
                "link_tx_bytes": count[NIC][1],
                "loopback_bytes": count["lo"][1],
            }
            for count in counts
        ],
    }


def end_with_stdin() -> None:
    """End at once when stdin does; the kernel then ends everything below."""
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold at the end
        pass
    os._exit(1)


def main() -> None:
    """Run the stage, as the module's docstring shows."""
    threading.Thread(target=end_with_stdin, daemon=True).start()
    settings = Settings.from_json(json.loads(sys.argv[1]))
    try:
        for event in run_stage(settings, Path(sys.argv[2])):
            print(json.dumps(event), flush=True)
    except DmtError as error:
        print(json.dumps({"event": "error", **error.to_json()}), flush=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
