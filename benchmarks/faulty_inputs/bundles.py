"""Bundles with a fault: bits, files of another bundle, documents that were edited by hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, Logits, difference, fault
from .commands import TOLERANCE, score
from .files import flip_bit, read_safetensors, write_safetensors
from .models import Model, plain_model
from .tensors import nudged

AREA = "bundles"


def make_bundle(case: Case, **options: Any) -> tuple[Model, Path, Logits]:
    """Convert a model into two towers; returns it, a copy to be damaged, and its logits."""
    model = plain_model(case, **options)
    clean = model.clean_bundle(tower_module="auto", compression=2)
    truth = score(clean, model.rows)
    return model, Path(shutil.copytree(clean, case.folder / "faulty")), truth


def weights_of(bundle: Path) -> list[Path]:
    return sorted((bundle / "weights").glob("*.safetensors"))


def try_bundle(
    case: Case, bundle: Path, model: Model, truth: Logits, *, reads_weights: bool = True
) -> None:
    """Run the commands that take a bundle."""
    import dmt_convert as dmt

    def same(path: Path, tolerance: float = 0.0) -> str | None:
        return difference(score(path, model.rows), truth, tolerance)

    def finetune() -> str | None:
        return changed_tensors(train_nothing(bundle, model, case.folder / "tuned"), model)

    def inspect() -> None:
        dmt.inspect(bundle)

    def plan() -> None:
        dmt.plan(bundle, hosts=2, ranks_per_host=1)

    def verify() -> str | None:
        report = dmt.verify(bundle, bundle, data=model.rows)
        differs = same(bundle)
        return f"`same`, but {differs}" if report.same and differs else None

    case.run("inspect", inspect)
    case.run("score", lambda: same(bundle))
    case.run("plan", plan)
    case.run("verify", verify)
    if reads_weights:
        case.run("finetune", finetune)
        case.run("export", lambda: same(export(bundle, case.folder / "export"), TOLERANCE))


def changed_tensors(bundle: Path, model: Model) -> str | None:
    """Say which tensors differ from those of the clean bundle: every bit of them counts."""
    from safetensors.numpy import load_file

    names = []
    for clean in weights_of(model.clean_bundle()):
        want, got = load_file(clean), load_file(bundle / "weights" / clean.name)
        names += [n for n in want if want[n].tobytes() != got[n].tobytes()]
    return f"changed: {', '.join(names)}" if names else None


def train_nothing(bundle: Path, model: Model, out: Path, **settings: Any) -> Path:
    """Fine-tune with learning rates of zero: what is written has the weights that were read."""
    import argparse

    from dmt_convert.config import RunConfig
    from dmt_convert.recipes import finetune_dmt

    options = {"dense_lr": 0.0, "table_lr": 0.0, "max_steps": 1, "batch_size": 16, **settings}
    config = RunConfig(data=model.labelled, out=out, log=out.with_name("log"), **options)
    given = argparse.Namespace(bundle=bundle, quiet=True, json=False)
    finetune_dmt.finetune_alone(given, config)
    return out


def export(bundle: Path, out: Path) -> Path:
    import dmt_convert as dmt

    dmt.export(bundle, "onnx", out)
    return out


@fault(AREA, "a bit flipped in weights", share=6)
def bit_in_weights(case: Case) -> None:
    model, bundle, truth = make_bundle(case)
    file = case.choose(*weights_of(bundle))
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    at = case.rng.randrange(begin, len(raw))
    if case.rng.random() < 0.5:  # the exponent of a float
        flip_bit(file, begin + (at - begin) // 4 * 4 + 3, case.choose(0, 6))
    else:
        flip_bit(file, at, case.rng.randrange(8))
    try_bundle(case, bundle, model, truth)


@fault(AREA, "a bit flipped in a header", share=3)
def bit_in_header(case: Case) -> None:
    model, bundle, truth = make_bundle(case)
    file = case.choose(*weights_of(bundle))
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip_bit(file, case.rng.randrange(length), case.rng.randrange(8))
    try_bundle(case, bundle, model, truth)


@fault(AREA, "a bit flipped in dmt.json", share=4)
def bit_in_manifest(case: Case) -> None:
    """Where the text stays a document, a number or a name is another one."""
    model, bundle, truth = make_bundle(case)
    file = bundle / case.turn("dmt.json", "dmt.json", "plan.json")
    flip_bit(file, case.rng.randrange(file.stat().st_size), case.rng.randrange(6))
    try_bundle(case, bundle, model, truth, reads_weights=False)


@fault(AREA, "a weights file missing, cut or padded", share=3)
def weights_cut(case: Case) -> None:
    model, bundle, truth = make_bundle(case)
    file = case.choose(*weights_of(bundle))
    how = case.turn("missing", "cut", "padded", "zeros", "empty")
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size - case.choose(1, 4, 64))
    elif how == "padded":
        os.truncate(file, file.stat().st_size + case.choose(1, 4, 64))
    elif how == "zeros":
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
        file.write_bytes(raw)
    else:
        os.truncate(file, 0)
    try_bundle(case, bundle, model, truth)


@fault(AREA, "files of another bundle", share=5)
def mixed(case: Case) -> None:
    """The same model after more training, converted alike: all shapes are equal."""
    import torch

    import dmt_convert as dmt

    model, bundle, truth = make_bundle(case)
    newer = case.folder / "newer.pt"
    torch.save(nudged(model.state), newer)
    other = dmt.convert(
        newer,
        case.folder / "newer",
        towers=2,
        compression=2,
        distill_steps=0,
        partition=towers_of(bundle, case.folder),
        **model.settings,
    ).path
    name = case.turn("dense.safetensors", "tower_000.safetensors", "tower_001.safetensors", "all")
    if name == "all":
        shutil.rmtree(bundle / "weights")
        shutil.copytree(other / "weights", bundle / "weights")
    else:
        shutil.copy(other / "weights" / name, bundle / "weights" / name)
    if case.number % 5 == 4:  # the manifest is the newer one, all else is older
        shutil.copytree(model.clean_bundle() / "weights", bundle / "weights", dirs_exist_ok=True)
        shutil.copy(other / "dmt.json", bundle / "dmt.json")
    try_bundle(case, bundle, model, truth)


def towers_of(bundle: Path, folder: Path) -> Path:
    content = json.loads((bundle / "dmt.json").read_text())
    path = folder / "towers.json"
    path.write_text(json.dumps({"towers": [t["features"] for t in content["model"]["towers"]]}))
    return path


@fault(AREA, "two towers' files swapped")
def towers_swapped(case: Case) -> None:
    model, bundle, truth = make_bundle(case)
    a, b = (bundle / "weights" / f"tower_00{t}.safetensors" for t in range(2))
    a.rename(a.with_suffix(".x")), b.rename(a), a.with_suffix(".x").rename(b)
    try_bundle(case, bundle, model, truth)


@fault(AREA, "dmt.json edited by hand", share=6)
def edited(case: Case) -> None:
    """A fact changed so that it no longer fits the weights, or is no fact at all."""
    model, bundle, truth = make_bundle(case)
    path = bundle / "dmt.json"
    content = json.loads(path.read_text())
    flat, towers = content["model"]["flat"], content["model"]["towers"]
    edits: list[Callable[[], object]] = [
        lambda: flat["tables"][0].update(rows=flat["tables"][0]["rows"] + 1),
        lambda: flat["tables"][1].update(dim=1 << 33),
        lambda: flat["tables"][1].update(dtype="fp16"),
        lambda: flat["features"][0].update(pooling="max"),
        lambda: flat["features"][0].update(table="nowhere"),
        lambda: flat["features"].pop(),
        lambda: towers.pop(),
        lambda: towers[0]["features"].append(towers[1]["features"][0]),
        lambda: towers[0]["features"].pop(),
        lambda: towers[0]["module"].update(dim=towers[0]["module"]["dim"] + 1),
        lambda: towers[0]["module"].update(c=7),
        lambda: flat["interaction"].update(kind="projection"),
        lambda: flat["dense_arch"]["widths"].insert(1, 9),
        lambda: flat.update(final_sigmoid="perhaps"),
        lambda: content.update(schema_version=99),
        lambda: content.pop("weights", None) or content.pop("model"),
    ]
    edits[case.number % len(edits)]()
    path.write_text(json.dumps(content))
    try_bundle(case, bundle, model, truth, reads_weights=False)


@fault(AREA, "tensor of a weights file renamed or of another type", share=3)
def tensor_in_bundle(case: Case) -> None:
    model, bundle, truth = make_bundle(case)
    file = case.choose(*weights_of(bundle))
    header, data = read_safetensors(file)
    names = [n for n in header if n != "__metadata__"]
    name = case.choose(*names)
    how = case.turn("renamed", "dtype", "swapped", "shape")
    if how == "renamed":
        header[name + "_"] = header.pop(name)
    elif how == "dtype":
        header[name]["dtype"] = "I32"
    elif how == "shape":
        header[name]["shape"] = [int(np.prod(header[name]["shape"]))]
        if header[name]["shape"] == read_safetensors(file)[0][name]["shape"]:
            header[name]["shape"] = [1, *header[name]["shape"]]
    else:
        alike = [n for n in names if n != name and header[n]["shape"] == header[name]["shape"]]
        if alike:
            header[name], header[alike[0]] = header[alike[0]], header[name]
        else:
            header[name + "_"] = header.pop(name)
    write_safetensors(file, header, data)
    try_bundle(case, bundle, model, truth)


@fault(AREA, "replaced while it is open", share=3)
def replaced(case: Case) -> None:
    """A reader has the bundle open while `--force` puts another in its place."""
    import torch

    import dmt_convert as dmt
    from dmt_convert.config import ScoreConfig
    from dmt_convert.scoring import open_scored, score_data

    model, bundle, truth = make_bundle(case)
    rows = (7, 50, 11, 6) if case.number % 3 else (7, 40, 11, 6)
    state = nudged(model.state)
    if rows[1] == 40:
        tables = [n for n in state if len(state[n]) == 50]
        state |= {n: state[n][:40].clone() for n in tables}
    newer = case.folder / "newer.pt"
    torch.save(state, newer)
    options: dict[str, Any] = {
        "towers": 2,
        "compression": 2,
        "distill_steps": 0,
        "partition": towers_of(bundle, case.folder),
    }
    new = dmt.convert(newer, case.folder / "new", **options, **model.settings).path
    in_range = rows[1] == 50
    new_truth = score(new, model.rows) if in_range else truth

    def replace_it() -> None:
        dmt.convert(newer, bundle, force=True, **options, **model.settings)

    def check(got: Logits) -> str | None:
        wrong = difference(got, truth, TOLERANCE)
        return wrong if difference(got, new_truth, TOLERANCE) else None

    def score_open() -> str | None:
        opened = open_scored(bundle, ScoreConfig(data=model.rows))
        replace_it()
        return check(score_data(opened, model.rows).logits)

    def read_model() -> str | None:
        opened = dmt.open_bundle(bundle)
        replace_it()
        return check(
            score_data(open_scored(opened, ScoreConfig(data=model.rows)), model.rows).logits
        )

    def restore() -> None:
        shutil.rmtree(bundle)
        shutil.copytree(model.folder / "clean-bundle", bundle)

    case.run("score", score_open)
    restore()
    case.run("open_bundle", read_model)
    restore()

    def export_open() -> str | None:
        opened = dmt.open_bundle(bundle)
        replace_it()
        out = case.folder / "export"
        dmt.export(opened, "onnx", out)
        return check(score(out, model.rows))

    case.run("export", export_open)


@fault(AREA, "accumulators damaged", share=2)
def accumulators(case: Case) -> None:
    """Adagrad's sums go into training: a flipped one changes how far a row moves."""
    import torch

    import dmt_convert as dmt

    model = plain_model(case, model=("torchrec", "dot"))
    sums = {i: {"sum": torch.rand(t.shape) + 0.1} for i, t in enumerate(model.state.values())}
    source = case.folder / "with.pt"
    groups = [{"params": list(range(len(sums)))}]
    torch.save({"model": model.state, "optimizer": {"state": sums, "param_groups": groups}}, source)
    bundle = dmt.convert(source, case.folder / "faulty", towers=2, distill_steps=0).path
    files = sorted((bundle / "weights").glob("accumulators*"))
    if not files:
        raise AssertionError("the bundle has no accumulators")
    file = case.choose(*files)
    clean = Path(shutil.copytree(bundle, case.folder / "good"))
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    how = case.turn("bit", "exponent", "missing", "zeros")
    if how == "missing":
        file.unlink()
    elif how == "zeros":
        file.write_bytes(raw[:begin] + bytes(len(raw) - begin))
    else:
        at = begin + case.rng.randrange((len(raw) - begin) // 4) * 4
        flip_bit(file, at + 3 if how == "exponent" else at + 2, case.choose(0, 6))

    def finetune() -> str | None:
        options = {"table_lr": 0.5, "dense_lr": 0.0}
        want = score(train_nothing(clean, model, case.folder / "t1", **options), model.rows)
        got = score(train_nothing(bundle, model, case.folder / "t2", **options), model.rows)
        return difference(got, want, 1e-6)

    case.run("finetune", finetune)
