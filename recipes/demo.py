"""The main job from end to end, on generated data: train flat, convert, verify, evaluate.

    scripts/demo [--out demo-out] [--arch dlrm|dcn] [--towers 4]

Every step is a command that a user would type; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from .generate_clicks import ClickConfig, generate_clicks
from .train_flat import main as train_main


def main(arguments: list[str] | None = None) -> None:
    """Run the demo, as the module's docstring shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write into")
    parser.add_argument("--arch", choices=("dlrm", "dcn"), default="dlrm")
    parser.add_argument("--towers", type=int, default=4)
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    data, flat = out / "clicks", out / f"flat-{options.arch}.pt"
    bundle = out / f"flat-{options.arch}-dmt{options.towers}"
    exact = out / f"flat-{options.arch}-exact"

    print("# 1. Generated clicks, and a flat model trained on them")
    clicks = generate_clicks(ClickConfig(), data)
    print(f"{len(clicks.feature_names)} features in {len(clicks.groups)} planted groups: {data}")
    train_main(["--data", str(data), "--arch", options.arch, "--out", str(flat)])

    print("\n# 2. Into towers: a quarter of the bytes between hosts, no data needed")
    _run("convert", flat, "--towers", options.towers, "--out", bundle, "--force")
    print("\n# 3. The exact model in towers gives the flat model's logits")
    _run(
        *("convert", flat, "--towers", options.towers, "--tower-module", "passthrough"),
        *("--out", exact, "--force", "--quiet"),
    )
    _run("verify", flat, exact, "--data", data / "test.npz")

    print("\n# 4. All three on test rows that none has seen")
    results = {path.name: _evaluate(path, data / "test.npz") for path in (flat, exact, bundle)}
    for name, result in results.items():
        print(f"{name:<24} AUC {result['auc']:.5f}   NE {result['ne']:.5f}")
    planted = _planted_share(bundle, data)
    print(f"\npairs of features in one tower that were planted in one group: {planted:.0%}")
    print(f"\nbundle: {bundle}\nreport: {bundle / 'report.html'} (open it in a browser)")


def _run(*words: object) -> None:
    arguments = [str(word) for word in words]
    print("$ dmt " + shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "dmt_convert.cli.main", *arguments], check=True)


def _evaluate(model: Path, data: Path) -> dict[str, float]:
    arguments = ["evaluate", str(model), "--data", str(data), "--json"]
    print("$ dmt " + shlex.join(arguments), flush=True)
    command = [sys.executable, "-m", "dmt_convert.cli.main", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _planted_share(bundle: Path, data: Path) -> float:
    """Share of the pairs that share a tower which share a planted group."""
    groups = json.loads((data / "schema.json").read_text())["groups"]
    group_of = {name: g for g, group in enumerate(groups) for name in group}
    towers = json.loads((bundle / "dmt.json").read_text())["model"]["towers"]
    pairs = [
        group_of[a] == group_of[b]
        for tower in towers
        for i, a in enumerate(tower["features"])
        for b in tower["features"][:i]
    ]
    return sum(pairs) / max(1, len(pairs))


if __name__ == "__main__":
    main(sys.argv[1:])
