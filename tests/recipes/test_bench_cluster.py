"""The benchmark on an emulated cluster: its options, its arithmetic, what it shows."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cluster import bench
from benchmarks.cluster.case_model import dmt_spec, set_code_ranges, whole_table
from benchmarks.cluster.network import GOODPUT, parse_counters
from benchmarks.cluster.plot import plot_speedup
from benchmarks.cluster.results import byte_faults, fit_model, loss_faults, summarise
from benchmarks.cluster.settings import (
    CODED_VARIANTS,
    DEFAULT_VARIANTS,
    Settings,
    Topology,
    VariantName,
    parse_topology,
    parse_variant,
)
from benchmarks.cluster.stage import merge_answers, sum_by_host
from benchmarks.cluster.table import LIMITS, render_fit, render_legend, render_table
from dmt_convert.errors import ConfigError
from dmt_convert.model import DmtModel


def make_settings(**changes: Any) -> Settings:
    parts: dict[str, Any] = {
        "topologies": (Topology(hosts=2, ranks_per_host=2),),
        "rates": (100.0,),
        "variants": ("flat", "flat-bf16", "torchrec-towers-c4", "dmt-c4", "dmt-c4-bf16"),
        "rounds": 1,
        "steps": 2,
    }
    return Settings(**parts | changes)


def make_turn(variant: str, step_s: list[float], megabytes: float, **changes: Any) -> Any:
    """One turn; the second host sends `megabytes` per step, more than the first, than it gets."""
    total = round(megabytes * 1e6 * len(step_s))
    hosts = [
        {"link_rx_bytes": total // 3, "link_tx_bytes": total // 2, "loopback_bytes": 0},
        {"link_rx_bytes": total // 4, "link_tx_bytes": total, "loopback_bytes": 10**12},
    ]
    turn = {"rate_mbit": 100.0, "round": 0, "variant": variant, "step_s": step_s, "hosts": hosts}
    return turn | {"cpu_s": [0.01 * len(step_s)] * 4} | changes


# Names and options


@pytest.mark.parametrize(
    ("text", "family", "compression", "precision", "prefetch"),
    [
        ("flat", "flat", 1, "fp32", False),
        ("flat-bf16", "flat", 1, "bf16", False),
        ("flat-int8", "flat", 1, "int8", False),
        ("coded-c4-prefetch", "coded", 4, "int8", True),
        ("coded-c16-mixed", "coded", 16, "mixed", False),
        ("torchrec-towers-c8", "torchrec-towers", 8, "fp32", False),
        ("sptt-bf16", "sptt", 1, "bf16", False),
        ("sptt-prefetch", "sptt", 1, "fp32", True),
        ("dmt-c16-prefetch-bf16", "dmt", 16, "bf16", True),
        ("dmt-c4-int8", "dmt", 4, "int8", False),
    ],
)
def test_variant_names(
    text: str, family: Any, compression: int, precision: Any, prefetch: bool
) -> None:
    assert parse_variant(text, dim=128) == VariantName(
        family=family, compression=compression, precision=precision, prefetch=prefetch
    )


def test_names_of_coded_variants() -> None:
    name = parse_variant("coded-c8-mixed-uncoded-fixed-prefetch", dim=128)
    assert (name.uncoded, name.fixed, name.prefetch, name.is_linear) == (True,) * 4
    assert not parse_variant("coded-c4-uncoded", dim=128).is_linear


@pytest.mark.parametrize(
    "text",
    [
        *("", "Flat", "flat-c2", "dmt", "dmt-c0", "dmt-c3", "flat-prefetch", "sptt-fp8"),
        *("coded", "coded-c2", "coded-c12", "coded-c4-mixed", "coded-c4-fixed", "coded-c8-bf16"),
        *("sptt-int8", "dmt-c4-fixed"),
    ],
)
def test_unknown_variants_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--variants has"):
        parse_variant(text, dim=128)


def test_what_variants_are_compared_with() -> None:
    rivals = {name: parse_variant(name, dim=128) for name in DEFAULT_VARIANTS.split(",")}
    assert {name.baseline for name in rivals.values()} == {"flat", "flat-bf16"}
    assert rivals["dmt-c4-bf16"].baseline == "flat-bf16"
    assert rivals["dmt-c4"].torchrec_rival == "torchrec-towers-c4"
    assert rivals["sptt"].torchrec_rival == "torchrec-towers-c1"
    assert rivals["flat"].torchrec_rival is None
    assert rivals["torchrec-towers-c4"].torchrec_rival is None


def test_which_variants_train_one_model() -> None:
    def model(text: str) -> str:
        return parse_variant(text, dim=128).model

    alike = ("flat", "flat-bf16", "flat-int8", "sptt", "torchrec-towers-c1", "coded-c4-prefetch")
    assert {model(text) for text in alike} == {"flat"}
    assert (
        model("dmt-c8")
        == model("dmt-c8-int8")
        == model("dmt-c8-prefetch-bf16")
        == model("torchrec-towers-c8")
    )
    assert model("coded-c8") == model("coded-c8-uncoded") == model("coded-c8-fixed-prefetch")
    assert len({model(text) for text in ("flat", "dmt-c8", "coded-c8", "coded-c8-mixed")}) == 4
    coded = [parse_variant(text, dim=128) for text in CODED_VARIANTS.split(",")]
    assert {name.baseline for name in coded if name.family == "coded"} == {"flat"}


@pytest.mark.parametrize("compression", [4, 8, 16, 32])
@pytest.mark.parametrize("mixed", ["", "-mixed"])
def test_towers_with_codes_send_what_their_name_says(compression: int, mixed: str) -> None:
    if compression == 4 and mixed:
        return
    spec = dmt_spec(make_settings(), parse_variant(f"coded-c{compression}{mixed}", dim=128))
    assert spec.compression == compression
    codes = [tower.module.code for tower in spec.towers]
    widths = spec.tower_widths
    for code, width in zip(codes, widths, strict=True):
        assert code is not None
        assert abs(2 * code.int4 - width) <= 2 if mixed else not code.int4


@pytest.mark.parametrize("text", ["coded-c8-mixed", "coded-c4", "dmt-c4-int8"])
def test_codes_reach_what_towers_emit(text: str) -> None:
    """Levels are fine: what arrives differs from what is sent by the noise of 8 and 4 bits."""
    settings = make_settings(rows=64, dim=16, features=8)
    spec = dmt_spec(settings, parse_variant(text, dim=16))
    torch.manual_seed(0)
    model = DmtModel(spec)
    rows = torch.cat([whole_table(settings, f"t_f{i}") for i in range(4)], dim=1)

    def noise() -> tuple[float, float]:
        module = model.tower_list[0].tower_module
        with torch.no_grad():
            emitted = module.emit(rows)
            lost = (module(rows) - emitted).pow(2).mean(dim=0) / emitted.pow(2).mean(dim=0)
        whole = module.code.width - module.code.spec.int4
        return float(lost[:whole].max()), float(lost[whole:].max()) if whole < len(lost) else 0.0

    assert noise()[0] > 0.5  # nothing is set yet
    set_code_ranges(settings, model)
    eight, four = noise()
    assert eight < 1e-3  # the noise of rounding, (12 / 254)^2 / 12 = 1.9e-4
    assert four < 0.05  # (5.4 / 15)^2 / 12 = 0.011, and what is cut off


def test_topologies() -> None:
    found = parse_topology("4x2")
    assert (found.hosts, found.ranks_per_host, found.world_size, found.name) == (4, 2, 8, "4x2")


@pytest.mark.parametrize("text", ["", "4", "1x4", "4x0", "65x1", "4 x 2", "-4x2", "4x2x1"])
def test_impossible_topologies_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--topologies has"):
        parse_topology(text)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rates": (0.5,)}, "rate 0.5"),
        ({"rates": (float("nan"),)}, "rate nan"),
        ({"rates": ()}, "no rates"),
        ({"compute_ms": -1.0}, "compute_ms is -1"),
        ({"compute_ms": float("inf")}, "compute_ms is inf"),
        ({"timeout_s": 0.0}, "timeout_s is 0"),
        ({"variants": ("flat", "flat")}, "variants lists one twice"),
        ({"features": 3}, "2x2 has more ranks"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(found)):
        make_settings(**changes)


def test_settings_survive_json() -> None:
    settings = make_settings(compute_ms=1.5, dense_layers=(8, 4))
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_options_win_over_quick() -> None:
    options = bench.make_parser().parse_args(["--quick", "--rates", "50,75.5"])
    settings = bench.read_settings(options)
    assert settings.rates == (50.0, 75.5)
    assert [topology.name for topology in settings.topologies] == ["2x1"]
    assert settings.steps == bench.QUICK["steps"]


def test_defaults() -> None:
    settings = bench.read_settings(bench.make_parser().parse_args([]))
    assert [topology.name for topology in settings.topologies] == ["4x2", "8x1", "2x4", "8x2"]
    assert settings.rates == (50, 100, 200, 500, 1000)
    assert (settings.batch, settings.pooling, settings.features, settings.dim) == (256, 1, 26, 128)


@pytest.mark.parametrize("words", [["--rates", "fast"], ["--variants", "best"], ["--steps", "0"]])
def test_wrong_options_end_with_code_3(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            bench.main([*words, "--json", "--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, terminate)
    assert ended.value.code == 3
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"
    assert not (tmp_path / "out").exists()


# Arithmetic


def test_the_model_finds_a_line() -> None:
    points = [(x, 50 + 30 + 1.1 * x) for x in (10.0, 100.0, 800.0)]
    fit = fit_model(points, compute_ms=50)
    assert fit is not None
    assert (fit.a_ms, fit.k) == (pytest.approx(30), pytest.approx(1.1))
    assert fit.max_error == pytest.approx(0, abs=1e-9)
    assert fit.predict(200, 50) == pytest.approx(300)


def test_the_model_states_its_error() -> None:
    fit = fit_model([(0.0, 100.0), (100.0, 200.0), (100.0, 220.0)], compute_ms=0)
    assert fit is not None
    assert 0.02 < fit.max_error < 0.06
    assert fit.mean_error < fit.max_error


@pytest.mark.parametrize("points", [[], [(1.0, 2.0), (2.0, 3.0)], [(1.0, 2.0)] * 3])
def test_no_model_where_nothing_determines_it(points: list[tuple[float, float]]) -> None:
    assert fit_model(points, compute_ms=0) is None
    assert "No model" in render_fit(None, 0)


def test_rows() -> None:
    turns = [
        make_turn("flat", [1.0, 1.2], 10.0),
        make_turn("flat", [1.1, 9.0], 12.0, round=1),
        make_turn("flat-bf16", [0.6, 0.6], 5.0),
        make_turn("torchrec-towers-c4", [0.5, 0.5], 2.5),
        make_turn("dmt-c4", [0.4, 0.4], 2.5),
        make_turn("dmt-c4-bf16", [0.3, 0.3], 0.4),
    ]
    rows, fit = summarise(turns, make_settings(), cores=2)
    flat, _, rival, own, half = rows
    assert fit is not None
    assert (flat.topology, flat.steps, flat.step_ms) == ("2x2", 4, pytest.approx(1150))
    assert (flat.step_ms_q1, flat.step_ms_q3) == (pytest.approx(1075), pytest.approx(3150))
    assert flat.link_mb == pytest.approx(11)
    assert flat.link_ms == pytest.approx(11 * 8 / (GOODPUT * 100) * 1000)
    assert flat.cpu_ms == pytest.approx(40)
    assert (flat.over_flat, flat.over_torchrec_towers) == (1.0, None)
    assert own.over_flat == pytest.approx(1150 / 400)
    assert own.over_torchrec_towers == pytest.approx(500 / 400)
    assert rival.over_torchrec_towers is None
    assert half.over_flat == pytest.approx(600 / 300)
    assert half.over_torchrec_towers is None
    # 33 ms on the link against 40 ms of two cores
    assert [row.cpu_bound for row in rows] == [False, False, False, False, True]
    assert own.over_flats == {
        "flat": (pytest.approx(1150 / 400), pytest.approx(11 / 2.5)),
        "flat-bf16": (pytest.approx(600 / 400), pytest.approx(5 / 2.5)),
    }
    assert own.tower_mb is None


def test_bytes_are_compared_with_the_plan() -> None:
    sent = [[5, 7, 10, 20], [9, 9, 30, 40], [1, 2, 0, 0], [3, 4, 0, 0]]
    assert sum_by_host(sent, 2) == [[100, 10], [10, 100]]
    crossing = {"dmt-c4": {"planned": 110, "hosts": sum_by_host(sent, 2)}}
    assert byte_faults(crossing) == []
    turns = [make_turn("dmt-c4", [0.4], 2.0)]
    (row,), _ = summarise(turns, make_settings(), cores=2, crossing=crossing)
    assert row.tower_mb == pytest.approx(1e-4)
    crossing["dmt-c4"]["planned"] = 111
    assert len(byte_faults(crossing)) == 1 and "its plan says 111" in byte_faults(crossing)[0]


def test_rows_of_a_run_that_was_cut_short() -> None:
    rows, fit = summarise([make_turn("dmt-c4", [0.4], 2.0)], make_settings(), cores=2)
    assert [(row.variant, row.over_flat, row.model_ms) for row in rows] == [("dmt-c4", None, None)]
    assert fit is None


def test_a_step_ends_with_its_last_rank() -> None:
    counts = {"eth0": [1, 2], "lo": [3, 4]}
    answers = [
        {"start": 10.0, "ends": [11.0, 12.5], "cpu_s": 0.1, "bytes": counts},
        {"start": 10.5, "ends": [11.5, 12.0], "cpu_s": 0.2, "bytes": {}},
        {"start": 10.1, "ends": [11.2, 12.1], "cpu_s": 0.3, "bytes": counts},
        {"start": 10.2, "ends": [11.3, 12.2], "cpu_s": 0.4, "bytes": {}},
    ]
    merged = merge_answers(answers, make_settings())
    assert merged["step_s"] == [1.0, 1.0]
    assert merged["cpu_s"] == [0.1, 0.2, 0.3, 0.4]
    host = {"link_rx_bytes": 1, "link_tx_bytes": 2, "loopback_bytes": 4}
    assert merged["hosts"] == [host, host]


def test_variants_of_one_model_start_with_one_loss() -> None:
    losses = {"flat": 0.7, "dmt-c4": 0.69, "flat-bf16": 0.70005, "torchrec-towers-c4": 0.69}
    losses |= {"coded-c4": 0.69996, "coded-c8": 0.6, "coded-c8-uncoded": 0.60005}
    assert loss_faults(losses, make_settings()) == []
    assert loss_faults(losses | {"sptt": 0.7003}, make_settings()) == [
        "sptt starts with loss 0.7003000, flat with 0.7000000"
    ]
    assert len(loss_faults(losses | {"sptt": float("nan")}, make_settings())) == 1
    assert len(loss_faults(losses | {"coded-c8-uncoded": 0.6002}, make_settings())) == 1


def test_counters_are_read_by_column() -> None:
    text = (
        "Inter-| ...\n face |bytes\n    lo: 7 1 0 0 0 0 0 0 8 1 0\n  eth0:90 2 0 0 0 0 0 0 91 2 0\n"
    )
    assert parse_counters(text, ["eth0", "lo"]) == {"eth0": (90, 91), "lo": (7, 8)}


# What is shown


def test_the_table_flags_and_compares() -> None:
    turns = [
        make_turn("flat", [1.0], 10.0),
        make_turn("torchrec-towers-c4", [0.5], 2.5),
        make_turn("dmt-c4", [0.1], 0.4),
    ]
    lines = render_table(summarise(turns, make_settings(), cores=2)[0]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert re.match(r"\| 100 \| flat \| 1000 \[1000, 1000\] \| 1.00 \| - \| 40 \| 10.00 ", lines[2])
    assert "CPU-bound here" in lines[4] and "CPU-bound here" not in lines[2]
    assert "| 10.00 | 5.00 | 40 | 0.40 | - | 33 | 10.00 (25.00) |" in lines[4]


def test_modelled_compute_is_labelled() -> None:
    settings = make_settings(compute_ms=150.0)
    assert "**modelled**: every step contains a sleep of 150 ms" in render_legend(settings, cores=2)
    assert "modelled" not in render_legend(make_settings(), cores=2)
    fit = fit_model([(1.0, 200.0), (2.0, 201.0), (3.0, 202.0)], 150)
    assert "150 ms modelled compute + 49 ms + 1.00 x link ms" in render_fit(fit, 150)


def test_limits_are_named() -> None:
    text = "\n".join(LIMITS)
    assert all(word in text for word in ("alpha", "offload", "GPU", "processors"))


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    settings = make_settings(rates=(100.0, 200.0), compute_ms=5.0)
    turns = [
        make_turn(name, [0.5], 1.0, rate_mbit=rate)
        for name in settings.variants
        for rate in settings.rates
    ]
    paths = [tmp_path / "a.svg", tmp_path / "a.png"]
    plot_speedup(summarise(turns, settings, cores=2)[0], settings, paths)
    assert "modelled compute" in paths[0].read_text("utf-8")
    assert "dmt-c4-bf16" in paths[0].read_text("utf-8")
    assert paths[1].read_bytes().startswith(b"\x89PNG")
