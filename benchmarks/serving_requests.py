"""Request batching: one user, many candidates, against the plain graph on the same rows.

Two of four towers are the user's, and so are the dense inputs. The plain graph gets the user's
bags once per candidate. Both run in ONNX Runtime, interleaved, in one process; scores are compared
first. Bags of the user may be long (`--user-ids`): histories are what makes user sides dear.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from serving_case import FEATURES, NUM_DENSE, TOWERS, Case
from serving_ours import build_job, write_onnx
from serving_weights import WEIGHTS, write_weights

USER_TOWERS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of every table")
    parser.add_argument("--candidates", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--user-ids", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print("| model | ids per user bag | candidates | plain ms | once per request ms | ratio |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / WEIGHTS
        write_weights(weights, options.rows, 0)
        for model, function in (("dlrm", "flat"), ("dlrm", "c4"), ("dcn", "flat"), ("dcn", "c4")):
            for user_ids in options.user_ids:
                graphs = _graphs(Path(folder), weights, model, function, options, user_ids)
                for count in options.candidates:
                    _measure(graphs, f"{model} {function}", user_ids, count, options)


def _graphs(folder, weights, model, function, options, user_ids):
    form = "single" if user_ids == 1 else "fixed"
    case = Case(model=model, form=form, rows=options.rows)
    opened = {}
    for kind in ("plain", "once"):
        out = folder / f"{model}-{function}-{user_ids}-{kind}"
        out.mkdir()
        job = build_job(out, case, weights, export_format="onnx", function=function, towers=TOWERS)
        user = [f for t in USER_TOWERS for f in job.spec.towers[t].features]
        features = tuple(
            replace(f, form=form if f.feature in user else "single") for f in job.inputs.features
        )
        inputs = replace(job.inputs, features=features)
        if kind == "once":
            inputs = replace(inputs, per_request=tuple(user), dense_per_request=True)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        path = write_onnx(replace(job, inputs=inputs), "model")
        opened[kind] = (ort.InferenceSession(str(path), settings), inputs)
    return opened, user


def _measure(graphs, name, user_ids, count, options):
    opened, user = graphs
    rng = np.random.default_rng(count)
    feeds = {"plain": [], "once": []}
    for _ in range(options.repeats):
        dense = rng.standard_normal((1, NUM_DENSE)).astype(np.float32)
        once, plain = {"dense": dense}, {"dense": np.repeat(dense, count, axis=0)}
        for i in range(FEATURES):
            feature = f"f{i:02d}"
            mine = feature in user
            shape = (1, user_ids) if mine else (count, 1)
            ids = rng.integers(0, options.rows, size=shape)
            once[feature] = ids
            plain[feature] = np.repeat(ids, count, axis=0) if mine else ids
        feeds["plain"].append(plain)
        feeds["once"].append(once)
    times = {"plain": [], "once": []}
    for repeat in range(options.repeats):
        answers = {}
        for kind, (session, _) in opened.items():
            begin = time.perf_counter()
            (answers[kind],) = session.run(None, feeds[kind][repeat])
            times[kind].append(1e3 * (time.perf_counter() - begin))
        scale = float(np.abs(answers["plain"]).max())
        difference = float(np.abs(answers["plain"] - answers["once"]).max())
        assert difference <= 2e-5 * scale + 1e-6, (difference, scale)
    plain, once = (np.quantile(times[k][2:], [0.25, 0.5, 0.75]) for k in ("plain", "once"))
    cells = [f"{v[1]:.2f} ({v[0]:.2f}-{v[2]:.2f})" for v in (plain, once)]
    print(f"| {name} | {user_ids} | {count} | {' | '.join(cells)} | {plain[1] / once[1]:.2f} |")


if __name__ == "__main__":
    main()
