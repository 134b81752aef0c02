"""Partition files, plans, model configs and exports with a fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundles import make_bundle, towers_of
from .case import Case, difference, fault
from .commands import TOLERANCE, score
from .files import flip_bit
from .models import Model, plain_model
from .tensors import nudged

AREA = "documents"


@fault(AREA, "a partition file of another model", share=4)
def wrong_partition(case: Case) -> None:
    """A feature is missing, twice, unknown; the towers are empty, nested, of another model."""
    import dmt_convert as dmt

    model = plain_model(case, model=("torchrec", "dot"))
    names = list(model.features)
    towers: Any = [names[:2], names[2:]]
    content: Any = case.turn(
        {"towers": [names[:2], names[2:3]]},
        {"towers": [names[:2], [*names[2:], names[0]]]},
        {"towers": [names[:2], [*names[2:], "cat_9"]]},
        {"towers": [names, []]},
        {"towers": [towers, []]},
        {"towers": [[0, 1], [2, 3]]},
        {"towers": {"a": names[:2], "b": names[2:]}},
        {"tower": towers},
        {"towers": [[n.upper() for n in t] for t in towers]},
        {"towers": [["t_" + n for n in t] for t in towers]},
        {"towers": [[n + " " for n in t] for t in towers]},
        towers,
        {"towers": [names[::2], names[1::2]], "features": names[::-1]},
        None,
    )
    path = case.folder / "towers.json"
    text = json.dumps(content) if content is not None else '{"towers": [], "towers": [["cat_0"]]}'
    if case.rng.random() < 0.1:
        text = text[:-2]
    path.write_text(text)

    def convert() -> str | None:
        bundle = dmt.convert(
            model.source,
            case.folder / "bundle",
            partition=path,
            tower_module="passthrough",
            distill_steps=0,
        )
        made = json.loads((bundle.path / "dmt.json").read_text())["model"]["towers"]
        want = content.get("towers") if isinstance(content, dict) else None
        if [t["features"] for t in made] != want:
            return f"towers {[t['features'] for t in made]}, not {want}"
        return difference(score(bundle.path, model.rows), model.logits, TOLERANCE)

    case.run("convert", convert)


@fault(AREA, "a model config that does not fit", share=6)
def wrong_facts(case: Case) -> None:
    """Features twice, missing, of another table; a fact of another model; a type that YAML made."""
    from .commands import try_checkpoint

    model = plain_model(case, model=("torchrec", "dot"))
    names = list(model.features)
    facts: Any = case.turn(
        {"features": names[:3]},
        {"features": [*names, names[0]]},
        {"features": [*names[:3], "cat_7"]},
        {"features": [{"name": n, "table": "t_cat_0"} for n in names]},
        {"features": [{"name": n, "table": f"t_cat_{i}"} for i, n in enumerate(names[:3])]},
        {"interaction": "cat"},
        {"interaction": "dcn"},
        {"self_pairs": True},
        {"family": "facebook-dlrm"},
        {"container": "model"},
        {"prefix": "model."},
        {"pooling": {"cat_9": "mean"}},
        {"pooling": {"cat_0": "max"}},
        {"pooling": "median"},
        {"qr_operation": "add"},
        {"fm": True},
        {"features": "cat_0"},
        {"feature": names},
        {"ignore": "*"},
        {"ignore": ["*embedding_bags*"]},
        {"ignore": ["over_arch*bias"]},
        {"final_sigmoid": "no"},
    )
    # what was said of one feature too few, or of another table, cannot be right
    rightly = set(facts) <= {"qr_operation", "fm"}
    told = model if rightly else model.never()
    try_checkpoint(case, model.source, told, unshard=False, model_config=facts)


@fault(AREA, "a plan that does not fit the bundle", share=4)
def wrong_plan(case: Case) -> None:
    """Of another bundle, of other hosts, with a shard moved or lost."""
    import dmt_convert as dmt
    from dmt_convert.placement import read_plan

    _model, bundle, _ = make_bundle(case, model=("torchrec", "dot"))
    path = case.folder / "plan.json"
    dmt.plan(bundle, hosts=2, ranks_per_host=2, out=path)
    content = json.loads(path.read_text())
    tables = content["tables"]
    edits: list[Callable[[], object]] = [
        lambda: tables.pop(),
        lambda: tables[0]["shards"].clear(),
        lambda: tables[0]["shards"][0].update(rows=tables[0]["shards"][0]["rows"] - 1),
        lambda: tables[0]["shards"][0].update(rank=99),
        lambda: tables[0]["shards"][0].update(row_offset=1),
        lambda: tables[0].update(table="t_cat_9"),
        lambda: tables[0].update(tower=1 - tables[0]["tower"]),
        lambda: tables.append(dict(tables[0])),
        lambda: content["tower_hosts"].pop(),
        lambda: content["tower_hosts"][0].append(5),
        lambda: content["cluster"].update(hosts=3),
        lambda: content.update(tower_order=[0, 0]),
        lambda: tables[0].update(sharding_type="data_parallel"),
        lambda: content.update(schema_version=9),
    ]
    edits[case.number % len(edits)]()
    faulty = case.folder / "faulty.json"
    faulty.write_text(json.dumps(content))

    def finetune() -> str:
        from dmt_convert.bundle import open_bundle
        from dmt_convert.cluster import RankLayout, choose_plan

        plan = read_plan(faulty)
        layout = RankLayout(rank=0, world_size=4, local_rank=0, ranks_per_host=2, backend="gloo")
        return f"taken: {choose_plan(open_bundle(bundle), layout, plan)}"

    case.run("finetune --plan", finetune)


EXPORTED = (("torchrec", "dot"), ("facebook", "dot"), ("torchrec", "projection"))


def prepare_exports(shared: Path) -> None:
    """Export the bundles of some models, and of the same models after more training; once."""
    import torch

    import dmt_convert as dmt

    for number, kind in enumerate(EXPORTED):
        folder = shared / f"exported{number}"
        folder.mkdir()
        case = Case(kind="export", number=number, seed=0, folder=folder, shared=shared)
        model = plain_model(case, model=kind, dim=8, scale=0.3)
        bundle = model.clean_bundle(tower_module="auto", compression=2)
        dmt.export(bundle, "onnx", folder / "export")
        newer = folder / "newer.pt"
        torch.save(nudged(model.state, 0.05), newer)
        options: dict[str, Any] = {"partition": towers_of(bundle, folder), "compression": 2}
        made = dmt.convert(newer, folder / "newer", distill_steps=0, **options, **model.settings)
        dmt.export(made, "onnx", folder / "newer-export")


def make_export(case: Case) -> tuple[Model, Path, Any]:
    """Copy an export, to be damaged; returns its model and logits, too."""
    folder = case.shared / f"exported{case.number % len(EXPORTED)}"
    inner = Case(kind="export", number=case.number, seed=0, folder=case.folder, shared=folder)
    model = plain_model(inner, model=EXPORTED[case.number % len(EXPORTED)], dim=8, scale=0.3)
    shutil.copytree(folder / "clean" / "clean-bundle", model.folder / "clean-bundle")
    truth = score(model.clean_bundle(), model.rows)
    return model, Path(shutil.copytree(folder / "export", case.folder / "faulty-export")), truth


def try_export(case: Case, folder: Path, model: Model, truth: Any) -> None:
    """Run the commands that take an export."""
    import dmt_convert as dmt

    def same() -> str | None:
        return difference(score(folder, model.rows), truth, TOLERANCE)

    def inspect() -> None:
        dmt.inspect(folder)

    def verify() -> str | None:
        bundle = model.clean_bundle()
        report = dmt.verify(bundle, folder, data=model.rows)
        differs = same()
        return f"`same`, but {differs}" if report.same and differs else None

    case.run("inspect", inspect)
    case.run("score", same)
    case.run("verify", verify)


@fault(AREA, "a bit flipped in an export", share=5)
def bit_in_export(case: Case) -> None:
    model, folder, truth = make_export(case)
    kind = case.turn("*.onnx", "*.safetensors", "export.json")
    file = case.choose(*sorted(folder.rglob(kind)))
    flip_bit(file, case.rng.randrange(file.stat().st_size), case.rng.randrange(8))
    try_export(case, folder, model, truth)


@fault(AREA, "an export's files missing, cut or mixed", share=5)
def export_files(case: Case) -> None:
    """A graph or its weights are missing, cut, or those of another tower or export."""
    model, folder, truth = make_export(case)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    file = case.choose(*[f for f in files if f.name != "export.json"])
    how = case.turn("missing", "cut", "swapped", "edited", "other")
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size - case.choose(1, 8, 64))
    elif how == "swapped":
        ending = case.choose("onnx", "safetensors")
        a, b = folder / f"tower_000/tower.{ending}", folder / f"tower_001/tower.{ending}"
        a.rename(a.with_suffix(".x")), b.rename(a), a.with_suffix(".x").rename(b)
    elif how == "edited":
        path = folder / "export.json"
        content = json.loads(path.read_text())
        edits: list[Callable[[], object]] = [
            lambda: content["inputs"].update(num_dense=4),
            lambda: content["inputs"]["features"].reverse(),
            lambda: content["inputs"]["features"].pop(),
            lambda: content["inputs"]["features"][0].update(form="single"),
            lambda: content["parts"].update(whole="over_arch/over_arch.onnx"),
            lambda: content.update(quantize="int8"),
            lambda: content.pop("inputs"),
        ]
        case.choose(*edits)()
        path.write_text(json.dumps(content))
    else:
        mix_exports(case, folder)
    try_export(case, folder, model, truth)


def mix_exports(case: Case, folder: Path) -> None:
    """Take some files from the export of a newer bundle with the same towers."""
    other = case.shared / f"exported{case.number % len(EXPORTED)}" / "newer-export"
    names = [f.relative_to(other) for f in sorted(other.rglob("*")) if f.is_file()]
    for name in case.rng.sample(names, case.choose(1, 2, 3)):
        shutil.copy(other / name, folder / name)
