"""Data sets with a fault: columns in another order, strays, leftovers, wrong types and values."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, difference, fault
from .commands import TOLERANCE, score
from .files import flip_bit
from .models import Model, plain_model, write_clicks

AREA = "data"
Columns = dict[str, Any]


def try_data(case: Case, model: Model, path: Path, *, labels: bool = True) -> None:
    """Score and evaluate a checkpoint and its bundle on faulty rows."""
    import dmt_convert as dmt
    from dmt_convert.metrics import measure_accuracy

    bundle = model.clean_bundle()

    def same(scored: Path, **settings: Any) -> Callable[[], str | None]:
        return lambda: difference(score(scored, path, **settings), model.logits, TOLERANCE)

    def evaluate() -> str | None:
        got = dmt.evaluate(bundle, path)
        want = measure_accuracy(model.logits, model.labels)
        off = abs(got.log_loss - want.log_loss)
        return f"log loss {got.log_loss:.5f}, not {want.log_loss:.5f}" if off > 1e-4 else None

    def calibrate() -> str | None:
        out = case.folder / "calibrated"
        made = dmt.convert(
            model.source,
            out,
            towers=2,
            tower_module="passthrough",
            distill_steps=0,
            calibration=path,
            **model.settings,
        )
        if model.is_never:
            return "rows that cannot be right were taken"
        return difference(score(made.path, model.rows), score(bundle, model.rows), TOLERANCE)

    case.run("score", same(model.source, **model.settings))
    case.run("score bundle", same(bundle))
    if labels:
        case.run("evaluate", evaluate)
    case.run("convert --calibration", calibrate)


def wide_model(case: Case) -> Model:
    """Twelve features and twelve dense inputs: enough for text order to differ from numbers."""
    rows = (7, 50, 11, 6, 20, 9, 13, 30, 8, 12, 25, 10)
    return plain_model(case, model=("torchrec", "dcn"), dim=4, rows=rows, num_dense=12)


def columns_of(model: Model, *, dense: str = "I{}", first: int = 1) -> Columns:
    """Columns of the rows by name: label, dense inputs, ids."""
    batch = model.batch
    columns: Columns = {"label": batch.labels.astype(np.int64)}
    for i in range(batch.dense.shape[1]):
        columns[dense.format(i + first)] = batch.dense[:, i]
    for name, bag in zip(batch.feature_names, batch.bags, strict=True):
        columns[name] = bag.values
    return columns


def write_parquet(path: Path, columns: Columns) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [pa.array(values) for values in columns.values()]
    pq.write_table(pa.table(arrays, names=list(columns)), path)
    return path


def in_text_order(columns: Columns) -> Columns:
    return {name: columns[name] for name in sorted(columns)}


@fault(AREA, "columns in another order")
def permuted(case: Case) -> None:
    """Columns bear the features' names; where they stand does not matter."""
    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    names = [n for n in columns if n.startswith("cat")]
    case.rng.shuffle(names)
    others = [n for n in columns if n not in names]
    path = write_parquet(case.folder / "rows.parquet", {n: columns[n] for n in [*names, *others]})
    try_data(case, model, path)


@fault(AREA, "counted columns in text order", share=3)
def counted(case: Case) -> None:
    """C1, C10, C11, C12, C2, ...: none bears a feature's name, their place says nothing."""
    model = wide_model(case)
    columns = columns_of(model)
    stem, first = case.turn(("C{}", 1), ("f{}", 0), ("feature_{}", 1), ("c{}", 0), ("slot{}", 100))
    renamed = {n: columns[n] for n in columns if not n.startswith("cat")}
    for i, name in enumerate(model.features):
        renamed[stem.format(i + first)] = columns[name]
    try_data(case, model, write_parquet(case.folder / "rows.parquet", in_text_order(renamed)))


@fault(AREA, "dense columns in text order", share=3)
def dense_text_order(case: Case) -> None:
    model = wide_model(case)
    columns = in_text_order(columns_of(model, dense=case.turn("I{}", "int_{}", "dense{}")))
    path = write_parquet(case.folder / "rows.parquet", columns)
    try_data(case, model, path)


STRAYS = ("rating", "weight", "timestamp", "score", "ctr_7d", "sample_weight", "label_raw")


@fault(AREA, "a stray float column", share=3)
def stray_float(case: Case) -> None:
    """As many dense columns as the model takes come first or last; one is no input."""
    model = plain_model(case, model=("torchrec", case.turn("dot", "dcn")))
    columns = columns_of(model)
    stray = np.random.default_rng(1).standard_normal(len(model.labels)).astype(np.float32)
    name = case.turn(*STRAYS)
    if case.rng.random() < 0.4:  # instead of the last input, which the file lacks
        del columns["I5"]
    columns = {name: stray} | columns if case.rng.random() < 0.5 else columns | {name: stray}
    path = write_parquet(case.folder / "rows.parquet", columns)
    if "I5" in columns and case.rng.random() < 0.5:
        names = [f"I{i}" for i in range(1, 6)]
        (case.folder / "schema.json").write_text(json.dumps({"dense_features": names}))
    wrong = model if "I5" in columns else model.never()
    wrong.__dict__["batch"] = model.batch
    try_data(case, wrong, path)


@fault(AREA, "a stray float column instead of the constant", share=2)
def stray_constant(case: Case) -> None:
    """The model takes one dense input, fed 1.0 as the data has none; the data has a float."""
    model = plain_model(case, model=("torchrec", "dcn"), num_dense=1)
    model.__dict__["batch"] = replace(model.batch, dense=np.ones_like(model.batch.dense))
    columns = columns_of(model)
    del columns["I1"]
    columns[case.turn(*STRAYS)] = np.linspace(1, 5, len(model.labels)).astype(np.float32)
    if case.number % 2:
        (case.folder / "schema.json").write_text(json.dumps({"dense_features": []}))
    try_data(case, model, write_parquet(case.folder / "rows.parquet", columns))


@fault(AREA, "a column missing or renamed", share=3)
def column_missing(case: Case) -> None:
    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    name = case.choose(*[n for n in columns if n != "label"])
    if case.rng.random() < 0.6:  # renamed, where it stood: dense inputs have no names
        new = case.choose(f"{name}_x", name.upper() + "_", "other", f"{name}__weights")
        columns = {new if n == name else n: values for n, values in columns.items()}
    else:
        del columns[name]
    try_data(case, model, write_parquet(case.folder / "rows.parquet", columns))


@fault(AREA, "dense columns unlike those of the bundle", share=3)
def dense_unlike_bundle(case: Case) -> None:
    """The bundle was made with named columns; now two are swapped, or one is another."""
    import dmt_convert as dmt

    model = plain_model(case, model=("torchrec", case.turn("dot", "dcn")))
    names = ["age", "price", "clicks", "views", "height"]
    columns = columns_of(model)
    columns = {names[int(n[1:]) - 1] if n[0] == "I" else n: values for n, values in columns.items()}
    good = write_parquet(case.folder / "good" / "rows.parquet", columns)
    schema = good.with_name("schema.json")
    schema.write_text(json.dumps({"dense_features": names}))
    bundle = dmt.convert(
        model.source,
        case.folder / "bundle",
        towers=2,
        tower_module="passthrough",
        distill_steps=0,
        calibration=good,
    ).path
    how = case.turn("swapped", "sorted", "replaced")
    changed = list(columns)
    if how == "swapped":
        a, b = changed.index("age"), changed.index("views")
        changed[a], changed[b] = changed[b], changed[a]
    elif how == "sorted":
        changed.sort()
    faulty = {n: columns[n] for n in changed}
    if how == "replaced":  # the price is gone, the rating came
        rating = np.linspace(1, 5, len(model.labels)).astype(np.float32)
        faulty = {("rating" if n == "price" else n): v for n, v in faulty.items()}
        faulty["rating"] = rating
    path = write_parquet(case.folder / "faulty" / "rows.parquet", faulty)
    if case.number // 3 % 2:  # a schema that goes with the file, too
        text = json.dumps({"dense_features": [n for n in faulty if n in {*names, "rating"}]})
        path.with_name("schema.json").write_text(text)

    def same() -> str | None:
        return difference(score(bundle, path), model.logits, TOLERANCE)

    case.run("score bundle", same)
    case.run("evaluate", lambda: same() if dmt.evaluate(bundle, path) else None)


@fault(AREA, "a column of another type", share=4)
def column_type(case: Case) -> None:
    """Ids as doubles, strings or dates; dense inputs as integers or decimals."""
    import pyarrow as pa

    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    name = case.choose(*[n for n in columns if n != "label"])
    values = columns[name]
    if name[0] == "I":
        whole = np.rint(values * 10)
        columns[name] = case.choose(
            pa.array(whole.astype(np.int64)), pa.array([str(v) for v in values]), values > 0
        )
        model = model.never()
    else:
        columns[name] = case.turn(
            values.astype(np.float64),
            pa.array([f"{v:x}" for v in values]),
            pa.array(values, pa.timestamp("us")),
            values.astype(np.float64) + 0.5,
            pa.array([[v] for v in values], pa.list_(pa.float32())),
            pa.array([[v] for v in values], pa.large_list(pa.int64())),
            pa.array([f"{v}" for v in values]).dictionary_encode(),
            pa.array(values).dictionary_encode(),
            values.astype(np.uint64),
        )
    try_data(case, model, write_parquet(case.folder / "rows.parquet", columns))


@fault(AREA, "ids that are no rows", share=4)
def wrong_ids(case: Case) -> None:
    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    name = case.choose("cat_0", "cat_1", "cat_2", "cat_3")
    values = columns[name].astype(np.int64).copy()
    at = case.rng.randrange(len(values))
    values[at] = case.turn(
        -1, model.sizes[name], 1 << 40, -(1 << 62), 1 << 32, model.sizes[name] + 7
    )
    if case.number % 2:
        columns[name] = values
        path = write_parquet(case.folder / "rows.parquet", columns)
    else:
        batch = model.batch
        at_feature = model.features.index(name)
        bags = list(batch.bags)
        bags[at_feature] = replace(bags[at_feature], values=values)
        path = case.folder / "data" / "rows.npz"
        path.parent.mkdir()
        sparse = np.stack([bag.values for bag in bags], axis=1)
        np.savez(path, dense=batch.dense, sparse=sparse, label=batch.labels)
        write_schema(path.parent, model.features)
    try_data(case, model.never(), path)


def write_schema(folder: Path, names: Any) -> None:
    schema = {"sparse_features": [{"name": name} for name in names]}
    (folder / "schema.json").write_text(json.dumps(schema))


@fault(AREA, "values that are no numbers", share=3)
def wrong_values(case: Case) -> None:
    """NaN or null in a dense input; a label that is neither 0 nor 1."""
    import pyarrow as pa

    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    how = case.turn("nan", "inf", "null", "label 2", "label -1", "label nan", "label null", "big")
    at = case.rng.randrange(len(model.labels))
    if how.startswith("label"):
        values: list[Any] = [float(v) for v in columns["label"]]
        values[at] = {"2": 2.0, "-1": -1.0, "nan": float("nan"), "null": None}[how.split()[1]]
        columns["label"] = pa.array(values)
    elif how == "big":
        columns["label"] = pa.array([(1 << 60) + int(v) for v in columns["label"]])
    else:
        dense: list[Any] = [float(v) for v in columns["I2"]]
        dense[at] = {"nan": float("nan"), "inf": float("inf"), "null": None}[how]
        columns["I2"] = pa.array(dense, pa.float32())
    path = write_parquet(case.folder / "rows.parquet", columns)
    if "label" in how or how == "big":  # scores are not touched by labels
        import dmt_convert as dmt

        def evaluate() -> str:
            return f"a log loss of {dmt.evaluate(model.clean_bundle(), path).log_loss}"

        case.run("evaluate", evaluate)
    else:
        try_data(case, model.never(), path)


def write_parts(case: Case, model: Model, parts: int = 3) -> Path:
    """Write the rows as several parquet files in a folder."""
    columns, folder = columns_of(model), case.folder / "parts"
    for number, rows in enumerate(np.array_split(np.arange(len(model.labels)), parts)):
        part = {name: values[rows] for name, values in columns.items()}
        write_parquet(folder / f"part-{number:05d}.parquet", part)
    return folder


@fault(AREA, "leftovers among parquet files", share=3)
def leftovers(case: Case) -> None:
    """Staging, hidden and marker files, which Spark, macOS and editors leave."""
    model = plain_model(case, model=("torchrec", "dot"))
    folder = write_parts(case, model)
    first = folder / "part-00000.parquet"
    name = case.turn(
        "_staging.parquet", "._part-00000.parquet", ".part-00000.parquet.crc", "_SUCCESS",
        "_temporary/0/part-00000.parquet", ".tmp/part-00000.parquet", "_metadata",
        ".ipynb_checkpoints/part-00000-checkpoint.parquet", "part-00000.parquet.tmp",
    )  # fmt: skip
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if case.rng.random() < 0.4:
        target.write_bytes(b"\x00\x05\x16\x07" + b"\0" * 100)
    else:
        shutil.copy(first, target)
    try_data(case, model, folder)


@fault(AREA, "removed files of a table format", share=3)
def table_formats(case: Case) -> None:
    """A Delta, Iceberg or Hudi table: files on disk are not the rows of the table."""
    model = plain_model(case, model=("torchrec", "dot"))
    folder = write_parts(case, model)
    shutil.copy(folder / "part-00001.parquet", folder / "part-00003.parquet")
    how = case.turn("delta", "iceberg", "hudi", "delta without the file")
    if how.startswith("delta"):
        log = folder / "_delta_log"
        log.mkdir()
        adds = [{"add": {"path": f"part-0000{i}.parquet", "dataChange": True}} for i in range(4)]
        gone = {"remove": {"path": "part-00001.parquet", "dataChange": True}}
        if "without" in how:
            (folder / "part-00001.parquet").unlink()
        for version, actions in enumerate((adds[:3], [gone, adds[3]])):
            text = "\n".join(json.dumps(action) for action in actions)
            (log / f"{version:020d}.json").write_text(text)
        model = reordered(model, [0, 2, 1])
    elif how == "iceberg":
        (folder / "data").mkdir()
        for file in folder.glob("*.parquet"):
            file.rename(folder / "data" / file.name)
        (folder / "metadata").mkdir()
        (folder / "metadata" / "v2.metadata.json").write_text('{"format-version": 2}')
        model = model.never()
    else:
        (folder / ".hoodie").mkdir()
        (folder / ".hoodie" / "hoodie.properties").write_text("hoodie.table.name=clicks\n")
        model = model.never()
    try_data(case, model, folder)


def reordered(model: Model, parts: list[int]) -> Model:
    """The model with its logits in the order of other parts."""
    pieces = np.array_split(np.arange(len(model.labels)), len(parts))
    order = np.concatenate([pieces[i] for i in parts])
    other = Model(model.family, model.folder, model.state, model.source, model.facts)
    batch = replace(model.batch, labels=model.labels[order])
    other.__dict__.update({"spec": model.spec, "logits": model.logits[order], "batch": batch})
    other.__dict__["rows"] = write_reordered(model, order)
    return other


def write_reordered(model: Model, order: Any) -> Path:
    path = model.folder / "reordered.npz"
    arrays: dict[str, Any] = {"feature_names": np.array(model.features)}
    for i, bag in enumerate(model.batch.bags):
        arrays |= {f"values_{i}": bag.values[order], f"offsets_{i}": bag.offsets}
    np.savez(path, dense=model.batch.dense[order], **arrays)
    return path


@fault(AREA, "parts that differ from each other", share=3)
def unlike_parts(case: Case) -> None:
    """Columns in another order, one more, one less, another type, no rows, cut short."""
    model = plain_model(case, model=("torchrec", "dot"))
    folder = write_parts(case, model)
    file = folder / "part-00001.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    how = case.turn("order", "less", "more", "type", "cut", "empty", "dense order", "sparse twice")
    if how == "order":
        pq.write_table(table.select(table.column_names[::-1]), file)
    elif how == "less":
        pq.write_table(table.drop_columns([case.choose("cat_1", "I2", "label")]), file)
    elif how == "more":
        more = pa.array(np.ones(len(table), np.float32))
        pq.write_table(table.append_column("rating", more), file)
    elif how == "type":
        at = table.column_names.index("cat_1")
        pq.write_table(table.set_column(at, "cat_1", table["cat_1"].cast(pa.int16())), file)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 10)
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "dense order":
        names = table.column_names
        names[1], names[3] = names[3], names[1]
        pq.write_table(table.select(names), file)
    else:
        names = [n for n in table.column_names if n != "cat_2"]
        twice = table.select([*names, "cat_1"]).rename_columns([*names, "cat_2"])
        doubled = twice.append_column("cat_2", table["cat_2"])
        pq.write_table(doubled, file)
    try_data(case, model, folder)


@fault(AREA, "two columns of one name")
def column_twice(case: Case) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    name = case.turn("cat_1", "I2", "label", "cat_3")
    arrays = [pa.array(v) for v in columns.values()]
    extra = pa.array(np.asarray(columns[name])[::-1].copy())
    path = case.folder / "rows.parquet"
    pq.write_table(pa.table([*arrays, extra], names=[*columns, name]), path)
    try_data(case, model.never(), path)


@fault(AREA, "splits of one data set in a folder")
def splits(case: Case) -> None:
    model = plain_model(case, model=("torchrec", "dot"))
    folder = case.folder / "both"
    ending = case.turn("parquet", "npz")
    names = case.choose(("train", "valid"), ("train", "test"))
    for name in names:
        if ending == "npz":
            write_clicks(folder, model.batch, name)
        else:
            write_parquet(folder / f"{name}.parquet", columns_of(model))
    try_data(case, model, folder)


@fault(AREA, "schema.json that does not fit", share=4)
def wrong_schema(case: Case) -> None:
    """It names a column twice, one that is not there, the label, an id; or is no schema."""
    model = plain_model(case, model=("torchrec", "dot"))
    good = [f"I{i}" for i in range(1, 6)]
    parquet = case.number % 2 == 0
    names = case.turn(
        ["I1", "I2", "I3", "I4", "label"],
        ["I1", "I2", "I3", "I4", "I4"],
        ["I1", "I2", "I3", "I4", "I6"],
        ["I1", "I2", "I3", "I4", "cat_0"],
        [*good, "label"],
        good[:4],
        "I1",
        [1, 2],
        {"I1": 0},
    )
    schema: dict[str, Any] = {"dense_features": names}
    if case.rng.random() < 0.2:
        schema = case.choose(
            {"dense_feature": good[::-1]}, {"sparse_features": ["cat_0"]}, {"x": 1}
        )
    folder = case.folder / "data"
    if parquet:
        path = write_parquet(folder / "rows.parquet", columns_of(model))
    else:
        path = write_clicks(folder, model.batch)
        sparse = [{"name": n} for n in model.features]
        case.rng.shuffle(sparse) if case.rng.random() < 0.3 else None
        kept = schema.setdefault("sparse_features", sparse[: case.choose(4, 4, 3)])
        if kept != [{"name": n} for n in model.features]:
            model = model.never()  # the columns would be other features
    (folder / "schema.json").write_text(json.dumps(schema))
    try_data(case, model, path)


@fault(AREA, "an npz whose arrays do not fit", share=6)
def wrong_npz(case: Case) -> None:
    model = plain_model(case, model=("torchrec", "dot"))
    batch = model.batch
    sparse = np.stack([bag.values for bag in batch.bags], axis=1)
    arrays: dict[str, Any] = {"dense": batch.dense, "sparse": sparse, "label": batch.labels}
    how = case.turn(
        "short label", "short dense", "transposed", "fraction", "object", "big endian", "fortran",
        "fp64", "no dense", "more dense", "less sparse", "more sparse", "text", "label shape",
        "complex", "bool",
    )  # fmt: skip
    changes: dict[str, Any] = {
        "short label": {"label": batch.labels[:-1]},
        "short dense": {"dense": batch.dense[:-3]},
        "transposed": {"dense": batch.dense.T},
        "fraction": {"sparse": sparse + 0.5},
        "object": {"sparse": sparse.astype(object)},
        "big endian": {"sparse": sparse.astype(">i4"), "dense": batch.dense.astype(">f4")},
        "fortran": {"sparse": np.asfortranarray(sparse), "dense": np.asfortranarray(batch.dense)},
        "fp64": {"dense": batch.dense.astype(np.float64), "sparse": sparse.astype(np.float64)},
        "no dense": {"dense": None},
        "more dense": {"dense": np.concatenate([batch.dense, batch.dense[:, :1]], axis=1)},
        "less sparse": {"sparse": sparse[:, :3]},
        "more sparse": {"sparse": np.concatenate([sparse[:, :1], sparse], axis=1)},
        "text": {"sparse": sparse.astype(str)},
        "label shape": {"label": np.stack([batch.labels, 1 - batch.labels], axis=1)},
        "complex": {"dense": batch.dense.astype(np.complex64)},
        "bool": {"dense": batch.dense > 0},
    }
    arrays |= changes[how]
    folder = case.folder / "data"
    folder.mkdir()
    if case.rng.random() < 0.7:
        write_schema(folder, model.features)
    path = folder / "rows.npz"
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    try_data(case, model.never() if how in ("complex", "bool") else model, path)


@fault(AREA, "an npz cut short or flipped", share=3)
def broken_npz(case: Case) -> None:
    model = plain_model(case, model=("torchrec", "dot"))
    path = write_clicks(case.folder / "data", model.batch)
    if case.number % 2:
        os.truncate(path, path.stat().st_size - case.choose(1, 30, 300))
    else:
        flip_bit(path, case.rng.randrange(path.stat().st_size), case.rng.randrange(8))
    try_data(case, model, path)


@fault(AREA, "a probe that does not fit", share=4)
def wrong_probe(case: Case) -> None:
    """Offsets that leave ids out, names twice or permuted, weights of another length."""
    model = plain_model(case, model=("torchrec", "dot"))
    with np.load(model.rows) as stored:
        arrays = dict(stored)
    how = case.turn("start", "falling", "end", "twice", "permuted", "weights", "logits", "short",
                    "float", "gap")  # fmt: skip
    offsets = arrays["offsets_1"].copy()
    never = True
    if how == "start":
        offsets[0] = 1
    elif how == "falling":
        offsets[5] = 3
    elif how == "end":
        offsets[-1] += case.choose(1, -1)
    elif how == "twice":
        arrays["feature_names"] = arrays["feature_names"][[0, 1, 1, 3]]
    elif how == "permuted":  # values go with their names
        order, never = [2, 0, 3, 1], False
        old = dict(arrays)
        arrays["feature_names"] = arrays["feature_names"][order]
        for i, j in enumerate(order):
            arrays[f"values_{i}"], arrays[f"offsets_{i}"] = old[f"values_{j}"], old[f"offsets_{j}"]
        offsets = arrays["offsets_1"]
    elif how == "weights":
        arrays["weights_1"] = np.ones(len(arrays["values_1"]) - 1, np.float32)
    elif how == "logits":
        arrays["logits"] = model.logits[:-1]
    elif how == "short":
        offsets = offsets[:-1]
    elif how == "float":
        arrays["values_1"] = arrays["values_1"] + 0.25
    else:
        del arrays["values_2"]
    arrays["offsets_1"] = offsets
    path = case.folder / "rows.npz"
    np.savez(path, **arrays)
    try_data(case, model.never() if never else model, path, labels=False)


def criteo_model(case: Case) -> Model:
    """26 features and 13 dense inputs."""
    rows = tuple(5 + i for i in range(26))
    return plain_model(case, model=("torchrec", "dcn"), dim=4, rows=rows, num_dense=13)


def write_days(folder: Path, model: Model) -> Path:
    """Write the rows as TorchRec's npy files of days 2 and 10."""
    folder.mkdir()
    batch = model.batch
    sparse = np.stack([bag.values for bag in batch.bags], axis=1).astype(np.int32)
    for day, rows in ((2, slice(0, 20)), (10, slice(20, None))):
        np.save(folder / f"day_{day}_dense.npy", batch.dense[rows])
        np.save(folder / f"day_{day}_sparse.npy", sparse[rows])
        np.save(folder / f"day_{day}_labels.npy", batch.labels[rows, None].astype(np.int32))
    return folder


@fault(AREA, "days whose files do not fit", share=5)
def wrong_days(case: Case) -> None:
    """A day lacks a file, has fewer rows in one, or two kinds of ids."""
    model = criteo_model(case)
    folder = write_days(case.folder / "days", model)
    how = case.turn("dense lost", "labels lost", "sparse lost", "rows", "swapped", "both", "cut",
                    "transposed", "old", "columns")  # fmt: skip
    day = case.choose(2, 10)
    if how.endswith("lost"):
        (folder / f"day_{day}_{how.split()[0]}.npy").unlink()
    elif how == "rows":
        file = folder / f"day_{day}_{case.choose('dense', 'sparse', 'labels')}.npy"
        np.save(file, np.load(file)[:-1])
    elif how == "swapped":  # days 2 and 10 have 20 and 28 rows
        a, b = folder / "day_2_sparse.npy", folder / "day_10_sparse.npy"
        a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)
    elif how == "both":
        shutil.copy(folder / f"day_{day}_sparse.npy", folder / f"day_{day}_sparse_contig_freq.npy")
    elif how == "cut":
        file = folder / f"day_{day}_{case.choose('dense', 'sparse', 'labels')}.npy"
        os.truncate(file, file.stat().st_size - case.choose(1, 52, 104))
    elif how == "transposed":
        file = folder / f"day_{day}_dense.npy"
        np.save(file, np.load(file).T)
    elif how == "old":
        shutil.copy(folder / f"day_{day}_dense.npy", folder / f"day_{day}_dense_old.npy")
    else:
        file = folder / f"day_{day}_{case.choose('dense', 'sparse')}.npy"
        np.save(file, np.load(file)[:, :-1])
    try_data(case, model, folder)


def tsv_lines(model: Model) -> list[str]:
    """The rows as Criteo's lines; dense inputs become integers."""
    rng = np.random.default_rng(3)
    numbers = rng.integers(0, 50, (len(model.labels), 13))
    lines = []
    for i, label in enumerate(model.labels):
        ids = [f"{bag.values[i]:08x}" for bag in model.batch.bags]
        lines.append("\t".join([str(int(label)), *map(str, numbers[i]), *ids]))
    return lines


@fault(AREA, "a TSV with a fault", share=6)
def wrong_tsv(case: Case) -> None:
    """A header, a column more or less, another separator, columns moved, half a line, a mark."""
    model = criteo_model(case)
    lines = tsv_lines(model)
    clean = case.folder / "day_0"
    clean.write_text("\n".join(lines) + "\n")
    model.__dict__["logits"] = score(model.source, clean)
    how = case.turn("header", "more", "less", "comma", "half", "mark", "crlf", "decimal", "swapped",
                    "label", "gzip cut", "blank", "upper", "spaces", "letters", "last")  # fmt: skip
    at = case.rng.randrange(len(lines))
    fields = lines[at].split("\t")
    text = ""
    if how == "header":
        names = ["label", *(f"I{i}" for i in range(13)), *(f"C{i}" for i in range(26))]
        lines.insert(0, "\t".join(names))
    elif how == "more":
        lines = [f"{line}\t0" for line in lines]
    elif how == "less":
        lines[at] = "\t".join(fields[:-1])
    elif how == "comma":
        lines = [line.replace("\t", ",") for line in lines]
    elif how == "half":
        text = "\n".join(lines)[: -case.rng.randrange(3, 200)]
    elif how == "mark":
        lines[0] = "\ufeff" + lines[0]
    elif how == "crlf":
        text = "\r\n".join(lines) + "\r\n"
    elif how == "decimal":
        fields[3] = "1.5"
    elif how == "swapped":  # ids first, then numbers
        lines = ["\t".join([f[0], *f[14:], *f[1:14]]) for f in (x.split("\t") for x in lines)]
    elif how == "label":
        fields[0] = case.choose("2", "-1", "", "0.5")
    elif how == "blank":
        lines.insert(at, "")
    elif how == "upper":
        lines = [line.upper() for line in lines]
    elif how == "spaces":
        lines = [line.replace("\t", " ") for line in lines]
    elif how == "letters":
        fields[20] = "xyz"
    elif how == "last":  # the label comes last
        lines = ["\t".join([*f[1:], f[0]]) for f in (x.split("\t") for x in lines)]
    if how in ("decimal", "label", "letters"):
        lines[at] = "\t".join(fields)
        model = model.never()
    path = case.folder / "faulty" / "day_1"
    path.parent.mkdir()
    raw = (text or "\n".join(lines) + "\n").encode()
    if how == "gzip cut":
        path = path.with_suffix(".gz")
        raw = gzip.compress(raw)[: -case.choose(1, 4, 8, 100)]
    path.write_bytes(raw)
    if how == "label":  # only evaluations read labels
        import dmt_convert as dmt

        case.run("evaluate", lambda: f"{dmt.evaluate(model.clean_bundle(), path).log_loss}")
    else:
        try_data(case, model, path)


@fault(AREA, "rows of another type of file", share=2)
def other_rows(case: Case) -> None:
    """CSV, JSON lines, a table of another trainer, a checkpoint, an empty file or folder."""
    model = plain_model(case, model=("torchrec", "dot"))
    columns = columns_of(model)
    path = case.folder / case.turn("rows.csv", "rows.jsonl", "rows.npz", "rows.parquet", "rows.pt")
    text = io.StringIO()
    text.write(",".join(columns) + "\n")
    for row in zip(*columns.values(), strict=True):
        text.write(",".join(map(str, row)) + "\n")
    if path.suffix == ".jsonl":
        names = list(columns)
        rows = [
            dict(zip(names, map(float, r), strict=True))
            for r in zip(*columns.values(), strict=True)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".pt":
        shutil.copy(model.source, path)
    else:
        path.write_text(text.getvalue() if case.rng.random() < 0.7 else "")
    try_data(case, model, path)
