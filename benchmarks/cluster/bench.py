"""Flat TorchRec, TorchRec's towers and ours, on a cluster emulated on this machine.

    python -m benchmarks.cluster --out cluster-bench
    python -m benchmarks.cluster --topologies 4x2 --rates 200 --compute-ms 150
    python -m benchmarks.cluster --quick

Hosts are Linux network namespaces on a bridge, each behind a link of limited rate; ranks are
processes in them. It needs root or user namespaces, and leaves nothing behind however it ends. In
one launch per topology, all variants take turns at every link rate. OUT gets `report.md`,
`speedup.svg`, `speedup.png`, `results.json` and the ranks' logs.

results.json, written anew after every link rate:

    schema_version   1
    machine          mode (root or rootless), cores, cpu, kernel, python, torch, torchrec
    settings         as `settings.Settings`, whose fields are documented there
    topologies       one per launch that has begun:
      topology       such as "4x2", hosts x ranks per host
      first_losses   loss of the first step of every variant; null until they are built
      loss_faults    variants whose first loss is not that of others of their model, as texts
      crossing       per variant of ours, bytes of tower outputs and gradients of one step: planned
                     (over all hosts), and hosts (what each sends and receives, as counted)
      byte_faults    variants of which the two differ, as texts
      turns          one per variant, round and rate, in the order in which they ran:
        rate_mbit, round, variant
        step_s       duration of every measured step, s: from when the last rank ended the step
                     before to when the last rank ended this one
        cpu_s        per rank: processor time of all these steps together, s
        hosts        per host, all these steps together: link_rx_bytes, link_tx_bytes (the limited
                     link), loopback_bytes (between its own ranks)
      fit            a_ms, k, mean_error, max_error of the model, or null
      rows           as `results.Row`, whose fields are documented there

Exit codes: 0 done, 1 bug, 2 usage, 3 something you can mend, 130 interrupted (what was measured
until then is written).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final, NoReturn

from dmt_convert.errors import ConfigError, DmtError

from .launch import run_topology
from .namespaces import Mode, find_mode
from .plot import plot_speedup
from .results import Fit, Row, byte_faults, loss_faults, summarise
from .settings import DEFAULT_VARIANTS, Settings, parse_topology
from .table import LIMITS, render_fit, render_legend, render_table

SCHEMA_VERSION: Final = 1
_INTERRUPT_CODE: Final = 130

QUICK: Final = {
    "topologies": "2x1",
    "rates": "200",
    "variants": "flat,torchrec-towers-c4,dmt-c4",
    "rounds": 1,
    "steps": 2,
    "batch": 32,
    "rows": 200,
}
"""What `--quick` takes where nothing else is said."""


class Benchmark:
    """What was measured so far.

    Args:
        settings: Of the run.
        mode: How hosts are built.
        out: Folder to write into.
        quiet: Whether progress is kept silent.
    """

    def __init__(self, settings: Settings, mode: Mode, out: Path, *, quiet: bool) -> None:
        self.settings = settings
        self.out = out
        self.quiet = quiet
        self.machine = describe_machine(mode)
        self.launches: list[dict[str, Any]] = []

    def run(self, mode: Mode) -> None:
        """Launch every topology in turn."""
        for topology in self.settings.topologies:
            settings = self.settings.for_topology(topology)
            launch: dict[str, Any] = {"topology": topology.name, "first_losses": None}
            launch |= {"loss_faults": [], "crossing": {}, "byte_faults": [], "turns": []}
            self.launches.append(launch)
            self.say(f"{topology.name}: building {len(settings.variants)} variants")
            rate = None
            logs = self.out / "logs" / topology.name
            with closing(run_topology(settings, mode, logs)) as events:
                for event in events:
                    if event.pop("event") == "built":
                        launch |= event
                        launch["loss_faults"] = loss_faults(event["first_losses"], settings)
                        launch["byte_faults"] = byte_faults(event["crossing"])
                        continue
                    if event["rate_mbit"] != rate:
                        self.save()
                    rate = event["rate_mbit"]
                    launch["turns"].append(event)
                    where = f"{rate:g} Mbit, round {event['round'] + 1}, {event['variant']}"
                    self.say(f"{topology.name}: {where}: {median(event['step_s']):.3f} s a step")
            self.save()

    def say(self, text: str) -> None:
        """Show progress."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def summary(self) -> list[tuple[dict[str, Any], list[Row], Fit | None]]:
        """Every launch with its rows and its fit."""
        by_name = {topology.name: topology for topology in self.settings.topologies}
        found = []
        for launch in self.launches:
            settings = self.settings.for_topology(by_name[launch["topology"]])
            rows, fit = summarise(
                launch["turns"],
                settings,
                cores=self.machine["cores"],
                crossing=launch["crossing"],
            )
            found.append((launch, rows, fit))
        return found

    def document(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": self.machine,
            "settings": self.settings.to_json(),
            "topologies": [
                launch | {"fit": fit and asdict(fit), "rows": [asdict(row) for row in rows]}
                for launch, rows, fit in self.summary()
            ],
        }

    def save(self) -> None:
        """Write results.json whole, or not at all."""
        path = self.out / "results.json"
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n")
        beside.replace(path)

    def report(self) -> str:
        """What report.md holds."""
        machine, cores = self.machine, self.machine["cores"]
        parts = ["# Emulated cluster", render_legend(self.settings, cores=cores)]
        for launch, rows, fit in self.summary():
            if not rows:
                continue
            parts += [f"## {launch['topology']}", render_table(rows)]
            parts += [render_fit(fit, self.settings.compute_ms)]
            faults = [*launch["loss_faults"], *launch["byte_faults"]]
            parts += [f"**Wrong:** {fault}" for fault in faults]
        parts += ["\n".join(LIMITS)]
        parts += [f"{machine['cpu']}, {cores} cores, Linux {machine['kernel']}, {machine['mode']}"]
        parts[-1] += f" namespaces, torch {machine['torch']}, torchrec {machine['torchrec']}"
        return "\n\n".join(parts) + "\n"

    def finish(self) -> None:
        """Write everything that there is something for."""
        self.save()
        (self.out / "report.md").write_text(self.report(), "utf-8")
        rows = [row for _, mine, _ in self.summary() for row in mine]
        if rows:
            plot_speedup(rows, self.settings, [self.out / "speedup.svg", self.out / "speedup.png"])


def describe_machine(mode: Mode) -> dict[str, Any]:
    """What the numbers depend on.

    Raises:
        DmtError: torchrec is not installed.
    """
    info = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    try:
        torchrec = version("torchrec")
    except PackageNotFoundError:
        raise DmtError(
            "torchrec is not installed",
            expected="torchrec, which the variants run on",
            hint="install dmt-convert with its extra `cpu` or `cuda`",
        ) from None
    models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return {
        "mode": mode,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchrec": torchrec,
    }


def make_parser() -> argparse.ArgumentParser:
    """Options; those that are left out take QUICK's value or the default of `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--topologies", help="hosts x ranks each (4x2,8x1,2x4,8x2)")
    parser.add_argument("--rates", help="link rates in Mbit/s (50,100,200,500,1000)")
    parser.add_argument("--variants", help=f"what to compare ({DEFAULT_VARIANTS})")
    parser.add_argument("--rounds", type=int, help="turns of every variant at every rate (3)")
    parser.add_argument("--steps", type=int, help="measured steps of a turn (5)")
    parser.add_argument("--compute-ms", type=float, help="modelled compute: a sleep per step (0)")
    parser.add_argument("--batch", type=int, help="samples per rank (256)")
    parser.add_argument("--pooling", type=int, help="ids per bag (1)")
    parser.add_argument("--rows", type=int, help="rows per table (10000)")
    parser.add_argument("--seed", type=int, help="of weights, ids, and the order of turns (0)")
    parser.add_argument("--timeout", type=float, dest="timeout_s", help="s for one turn (300)")
    parser.add_argument("--out", type=Path, default=Path("cluster-bench"), help="folder to write")
    parser.add_argument("--json", action="store_true", help="print results.json, nothing else")
    parser.add_argument("--quick", action="store_true", help="one tiny case, in under a minute")
    return parser


def read_settings(options: argparse.Namespace) -> Settings:
    """Settings that the options give.

    Raises:
        ConfigError: One of them is wrong.
    """
    given = {
        name: value
        for name, value in vars(options).items()
        if name not in ("out", "json", "quick") and value is not None
    }
    defaults = {
        "topologies": "4x2,8x1,2x4,8x2",
        "rates": "50,100,200,500,1000",
        "variants": DEFAULT_VARIANTS,
    }
    parts: dict[str, Any] = defaults | (QUICK if options.quick else {}) | given
    try:
        rates = tuple(float(rate) for rate in parts["rates"].split(","))
    except ValueError:
        raise ConfigError(
            f"--rates {parts['rates']}",
            expected="numbers of Mbit/s between commas",
            hint="the default is 50,100,200,500,1000",
        ) from None
    topologies = tuple(parse_topology(text) for text in parts["topologies"].split(","))
    variants = tuple(parts["variants"].split(","))
    return Settings(**parts | {"topologies": topologies, "rates": rates, "variants": variants})


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, print."""
    options = make_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    benchmark = None
    try:
        settings = read_settings(options)
        mode = find_mode()
        options.out.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(settings, mode, options.out, quiet=options.json)
        benchmark.run(mode)
    except DmtError as error:
        fail(options, error, code=3)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        unwritable = DmtError(
            f"{where}{error.strerror or error}",
            expected="a folder --out that can be written",
            hint="check the path, its owner and its permissions",
        )
        fail(options, unwritable, code=3)
    except KeyboardInterrupt:
        stopped = DmtError("interrupted", expected="to run to the end", hint="run it again")
        fail(options, stopped, code=_INTERRUPT_CODE)
    finally:
        if benchmark is not None and benchmark.launches:
            benchmark.finish()
    print(json.dumps(benchmark.document(), indent=1) if options.json else benchmark.report())
    if not options.json:
        print(f"wrote report.md, speedup.svg, speedup.png and results.json into {options.out}")


def fail(options: argparse.Namespace, error: DmtError, *, code: int) -> NoReturn:
    """Say what went wrong, with `--json` also as a document, and end."""
    if options.json:
        print(json.dumps(error.to_json(), indent=1, ensure_ascii=False))
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
