"""Checkpoints whose files have a fault: missing, stale, surplus, cut, flipped, mixed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, fault
from .commands import score, try_checkpoint
from .containers import is_table, save_any, save_ranks
from .models import TRAINERS, copy_source, plain_model
from .tensors import any_model, nudged

AREA = "files"


def payloads(path: Path) -> list[Path]:
    """Files of a checkpoint that hold tensors."""
    if path.is_file():
        return [path]
    names = (path for path in path.rglob("*") if path.is_file())
    kinds = (".json", ".config", ".metadata", ".snapshot_metadata", ".yaml")
    return sorted(p for p in names if p.stat().st_size > 60 and not p.name.endswith(kinds))


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def folder_of(path: Path) -> Path:
    """The folder of a plain checkpoint's files."""
    return path if path.is_dir() else path.parent


FOLDERS = ("indexed", "dcp", "ranks", "torchsnapshot", "hub-shards", "indexed-bin")
CHECKED = ("torch", "nested", "dcp", "ranks", "indexed-bin")
"""Containers that store checksums."""


@fault(AREA, "a file missing", share=4)
def file_missing(case: Case) -> None:
    model = plain_model(case)
    path = save_any(model.state, case.folder / "faulty", case.turn(*FOLDERS))
    lost = case.choose(*[f for f in files_of(folder_of(path)) if f != path])
    lost.unlink()
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a file cut short", share=4)
def cut_short(case: Case) -> None:
    model, container = any_model(case)
    path = save_any(model.state, case.folder / "faulty", container)
    file = case.choose(*files_of(folder_of(path)))
    size = file.stat().st_size
    os.truncate(file, case.choose(0, size // 2, size - 1, max(0, size - 64)))
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a block of zeros", share=3)
def zero_block(case: Case) -> None:
    """A copy stopped and its file was padded; containers with checksums must notice."""
    model = plain_model(case)
    path = save_any(model.state, case.folder / "faulty", case.turn(*CHECKED))
    file = case.choose(*payloads(folder_of(path)))
    raw = bytearray(file.read_bytes())
    begin = case.rng.randrange(0, len(raw) * 3 // 4)
    raw[begin : begin + 256] = bytes(len(raw[begin : begin + 256]))
    file.write_bytes(raw)
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a bit flipped where a checksum is", share=5)
def bit_flipped(case: Case) -> None:
    model = plain_model(case)
    path = save_any(model.state, case.folder / "faulty", case.turn(*CHECKED))
    file = case.choose(*payloads(folder_of(path)))
    flip_bit(file, case.rng.randrange(file.stat().st_size), case.rng.randrange(8))
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a rank's file of another save", share=3)
def stale_rank(case: Case) -> None:
    model = plain_model(case)
    path = save_ranks_in(case, "faulty", model.state)
    other = save_ranks_in(case, "other", nudged(model.state))
    shutil.copy(other.with_name("dmp_rank1.pt"), path.with_name("dmp_rank1.pt"))
    try_checkpoint(case, path, model, **model.settings)


def save_ranks_in(case: Case, name: str, state: dict[str, Any], **options: Any) -> Path:
    folder = case.folder / name
    folder.mkdir()
    return save_ranks(state, folder, **options)


@fault(AREA, "a rank's file of a save with more ranks", share=2)
def ranks_of_two_worlds(case: Case) -> None:
    """An earlier run with four ranks left dmp_rank2.pt and dmp_rank3.pt behind."""
    model = plain_model(case)
    path = save_ranks_in(case, "faulty", model.state)
    other = save_ranks_in(case, "other", nudged(model.state), ranks=4)
    left = case.turn((2, 3), (1, 2, 3))
    for rank in left:
        shutil.copy(other.with_name(f"dmp_rank{rank}.pt"), path.with_name(f"dmp_rank{rank}.pt"))
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a rank's file twice", share=2)
def rank_twice(case: Case) -> None:
    model = plain_model(case)
    path = save_ranks_in(case, "faulty", model.state)
    target = case.turn("dmp_rank1.pt", "dmp_rank2.pt", "dmp_rank0 (1).pt")
    shutil.copy(path, path.with_name(target))
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "one of the hub's shards", share=2)
def one_hub_shard(case: Case) -> None:
    """One file of torch's HuggingFaceStorageWriter, with or without the others beside it."""
    model = plain_model(case)
    folder = save_any(model.state, case.folder / "faulty", "hub-shards")
    files = sorted(folder.iterdir())
    path = files[0]
    if case.number % 2:
        files[1].unlink()
        path = case.choose(folder, files[0])
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a hub's shard of another save")
def stale_hub_shard(case: Case) -> None:
    """Its rows overlap, leave a gap, or belong to another number of ranks."""
    model = plain_model(case)
    folder = save_any(model.state, case.folder / "faulty", "hub-shards")
    second = sorted(folder.iterdir())[1]
    header, data = read_safetensors(second)
    offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    name = case.choose(*offsets)
    offsets[name]["saved_offsets"][0] += case.turn(-1, 1, -2)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)
    write_safetensors(second, header, data)
    try_checkpoint(case, folder, model, **model.settings)


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any], data: bytes, text: str = "") -> None:
    encoded = (text or json.dumps(header)).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@fault(AREA, "a safetensors header that is wrong", share=4)
def wrong_header(case: Case) -> None:
    """Two tensors over the same bytes, a gap, a key twice, a type of the same width."""
    model = plain_model(case)
    path = save_any(model.state, case.folder / "faulty", "safetensors")
    header, data = read_safetensors(path)
    names = [n for n in header if n != "__metadata__"]
    name = case.choose(*names)
    text = ""
    how = case.turn("overlap", "twice", "dtype", "gap", "shape", "tail")
    if how == "overlap":
        other = next(n for n in names if n != name)
        size = min(np.diff(header[n]["data_offsets"])[0] for n in (name, other))
        begin = header[other]["data_offsets"][0]
        header[name] = {"dtype": "F32", "shape": [int(size) // 4]}
        header[name]["data_offsets"] = [begin, begin + int(size)]
    elif how == "twice":
        entry = dict(header[name])
        other = next(n for n in reversed(names) if n != name)
        entry["data_offsets"] = header[other]["data_offsets"]
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    elif how == "dtype":
        header[name]["dtype"] = case.choose("I32", "U32", "BF16", "F16")
    elif how == "gap":
        data = data + b"\0" * 64
        for n in names:
            if header[n]["data_offsets"][0] > header[name]["data_offsets"][0]:
                header[n]["data_offsets"] = [x + 64 for x in header[n]["data_offsets"]]
    elif how == "shape":
        header[name]["shape"] = [*header[name]["shape"][::-1], 1]
    else:
        data += os.urandom(100)
    write_safetensors(path, header, data, text)
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "an index that does not fit its shards", share=3)
def wrong_index(case: Case) -> None:
    model = plain_model(case)
    folder = save_any(model.state, case.folder / "faulty", "indexed")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = case.choose(*index["weight_map"])
    how = case.turn("moved", "unlisted", "gone", "surplus", "foreign", "part")
    path: Path = folder
    if how == "moved":
        index["weight_map"][name] = next(s for s in shards if s != index["weight_map"][name])
    elif how == "unlisted":
        del index["weight_map"][name]
    elif how == "surplus":
        index["weight_map"]["more.weight"] = shards[0]
    elif how == "foreign":
        from safetensors.torch import save_file

        save_file(nudged(model.state), folder / "model-00003-of-00003.safetensors")
    if how in ("gone", "part"):
        index_path.unlink()
    else:
        index_path.write_text(json.dumps(index))
    if how == "part":
        path = folder / case.choose(*shards)
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "a numbered shard without an optional module", share=2)
def optional_shard(case: Case) -> None:
    """model-00001-of-00002: what is in the other shard is a module of its own (a linear part)."""
    from safetensors.torch import save_file

    model = TRAINERS["deepctr"](case)
    lost = case.turn("linear_model.", "crossnet.", "dnn")
    kept = {n: t for n, t in model.state.items() if not n.startswith(lost)}
    folder = case.folder / "faulty"
    folder.mkdir()
    name = case.turn("model-00001-of-00002", "part_1_of_2", "model-00001-of-00002")
    path = folder / f"{name}.safetensors"
    save_file(kept, path)
    if case.number % 2:
        rest = {n: t for n, t in model.state.items() if n.startswith(lost)}
        if rest:
            save_file(rest, folder / f"{name.replace('1', '2', 1)}.safetensors")
    if len(kept) < len(model.state):
        model = model.never()
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "a snapshot's manifest with a gap", share=3)
def snapshot_gap(case: Case) -> None:
    """A piece of a table is not listed, listed twice, or shifted; or a rank's entries are gone."""
    model = plain_model(case)
    folder = save_any(model.state, case.folder / "faulty", "torchsnapshot")
    path = folder / ".snapshot_metadata"
    content = json.loads(path.read_text())
    manifest = content["manifest"]
    sharded = [k for k, entry in manifest.items() if entry["type"] == "ShardedTensor"]
    entry = manifest[case.choose(*[k for k in sharded if manifest[k]["shards"]])]
    how = case.turn("lost", "shifted", "rank", "swapped", "shape")
    if how == "lost":
        entry["shards"] = []
    elif how == "shifted":
        entry["shards"][0]["offsets"][0] += case.choose(1, -1)
    elif how == "rank":
        content["manifest"] = {k: e for k, e in manifest.items() if not k.startswith("1/")}
    elif how == "swapped":
        a, b = (manifest[k]["shards"][0] for k in case.rng.sample(sharded, 2))
        a["tensor"]["location"], b["tensor"]["location"] = (
            b["tensor"]["location"],
            a["tensor"]["location"],
        )
        if a["tensor"]["shape"] == b["tensor"]["shape"]:  # then nothing shows it
            a["tensor"]["location"] = "sharded/nowhere"
    else:
        entry["shards"][0]["tensor"]["shape"][0] += 1
    path.write_text(json.dumps(content))
    try_checkpoint(case, folder, model, **model.settings)


@fault(AREA, "a folder of two checkpoints", share=2)
def two_checkpoints(case: Case) -> None:
    """Another save lies in the same folder; only the name model.safetensors says which counts."""
    model = plain_model(case)
    first = case.turn("torch", "safetensors", "legacy")
    folder = case.folder / "faulty"
    save_any(model.state, folder, first)
    other = save_any(
        nudged(model.state), case.folder / "other", case.choose("torch", "safetensors")
    )
    shutil.copy(other, folder / f"earlier{other.suffix}")
    expected = model if first == "safetensors" else model.never()
    try_checkpoint(case, folder, expected, **model.settings)


@fault(AREA, "the hidden file lost in a copy")
def hidden_lost(case: Case) -> None:
    model = plain_model(case)
    path = save_any(model.state, case.folder / "faulty", case.turn("dcp", "torchsnapshot"))
    for hidden in path.glob(".*"):
        hidden.unlink()
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "files that are links")
def linked(case: Case) -> None:
    """The layout of the Hugging Face cache: what was saved lies elsewhere, under a digest."""
    model, container = any_model(case)
    path = save_any(model.state, case.folder / "faulty", container)
    blobs = case.folder / "blobs"
    blobs.mkdir()
    for number, file in enumerate(files_of(folder_of(path))):
        blob = blobs / f"{number:04x}"
        file.rename(blob)
        file.symlink_to(blob)
    try_checkpoint(case, path, model, **model.settings)


def pointer(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 8531\n"
    )
    return path


def page(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_text("<!DOCTYPE html>\n<html><body>Sign in to continue</body></html>\n")
    return path


@fault(AREA, "another kind of file", share=2)
def another_file(case: Case) -> None:
    import gzip
    import tarfile
    import zipfile

    model = plain_model(case)
    folder = case.folder / "faulty"
    folder.mkdir()
    source = model.source
    how = case.turn("pointer", "page", "gzip", "tar", "zip", "npz", "empty", "numpy")
    path = folder / "model.pt"
    if how in ("pointer", "page"):
        path = {"pointer": pointer, "page": page}[how](folder)
    elif how == "gzip":
        path.write_bytes(gzip.compress(source.read_bytes()))
    elif how == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(source, "clean.pt")
    elif how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(source, "clean.pt")
    elif how == "npz":
        np.savez(path.with_suffix(".npz"), **{n: t.numpy() for n, t in model.state.items()})
        path = path.with_suffix(".npz")
    elif how == "numpy":
        import torch

        torch.save({n: t.numpy() for n, t in model.state.items()}, path)
    else:
        path.write_bytes(b"")
    try_checkpoint(case, path, model, **model.settings)


def _rewrites(path: Path, other: Path) -> Callable[..., None]:
    """Replace a file's content in place once a command has begun to read."""
    done: list[bool] = []

    def rewrite(*_: object) -> None:
        if not done:
            done.append(True)
            raw = other.read_bytes()
            with path.open("r+b") as file:
                file.write(raw)
                file.truncate(len(raw))

    return rewrite


@fault(AREA, "a file rewritten while it is read", share=4)
def rewritten(case: Case) -> None:
    """A trainer saves over its file in place: old weights, or new ones, or a refusal."""
    import dmt_convert as dmt

    model = plain_model(case, model=("torchrec", case.choose("dot", "dcn")))
    container = case.turn("safetensors", "torch", "legacy", "ranks")
    path = save_any(model.state, case.folder / "faulty", container)
    state = nudged(model.state)
    if case.rng.random() < 0.3:  # of another model
        state = {n: t.repeat(2, 1) if is_table(n) else t for n, t in state.items()}
    other = save_any(state, case.folder / "other", container)
    new = case.folder / "new.pt"
    shutil.copy(other, new) if container == "torch" else save_new(state, new)
    rewritten_logits = score(new, model.rows)

    def check(got: Any) -> str | None:
        from .case import difference

        old = difference(got, model.logits, 1e-4)
        return old if difference(got, rewritten_logits, 1e-4) else None

    def convert() -> str | None:
        shutil.copytree(path.parent, case.folder / "work", dirs_exist_ok=True)
        source = case.folder / "work" / path.name
        bundle = dmt.convert(
            source,
            case.folder / "bundle",
            towers=2,
            tower_module="passthrough",
            distill_steps=0,
            progress=_rewrites(source, other),
        )
        return check(score(bundle.path, model.rows))

    def unshard() -> str | None:
        shutil.copytree(path.parent, case.folder / "work2", dirs_exist_ok=True)
        source = case.folder / "work2" / path.name
        out = case.folder / "plain.safetensors"
        dmt.unshard(source, out, progress=_rewrites(source, other))
        return check(score(out, model.rows))

    def score_it() -> str | None:
        from dmt_convert.config import ScoreConfig
        from dmt_convert.scoring import open_scored, score_data

        shutil.copytree(path.parent, case.folder / "work3", dirs_exist_ok=True)
        source = case.folder / "work3" / path.name
        opened = open_scored(source, ScoreConfig(data=model.rows))
        _rewrites(source, other)()
        return check(score_data(opened, model.rows).logits)

    case.run("convert", convert)
    case.run("unshard", unshard)
    case.run("score", score_it)


def save_new(state: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(state, path)


@fault(AREA, "output over an input", share=4)
def over_inputs(case: Case) -> None:
    """--out names the source, a file inside a bundle, or the data."""
    import dmt_convert as dmt

    model = plain_model(case)
    source = copy_source(model, case.folder / "faulty")
    bundle = Path(shutil.copytree(model.clean_bundle(), case.folder / "a-bundle"))
    told = model.settings
    rows = Path(shutil.copy(model.rows, case.folder / "rows.npz"))
    inside = case.choose("dmt.json", "plan.json", "weights/dense.safetensors")
    keep = [source, rows, *(f for f in bundle.rglob("*") if f.is_file())]
    before = {f: f.read_bytes() for f in keep}

    def unchanged() -> str | None:
        changed = [f.name for f, raw in before.items() if not f.is_file() or f.read_bytes() != raw]
        for f, raw in before.items():
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(raw)
        return f"{', '.join(changed)} overwritten" if changed else None

    def attempt(work: Callable[[], object]) -> Callable[[], str | None]:
        def run() -> str | None:
            try:
                work()
            except Exception:
                wrong = unchanged()
                if wrong:
                    return wrong
                raise
            return unchanged()

        return run

    link = case.folder / "link"
    link.symlink_to(source)
    out = case.choose(source, link)
    case.run("unshard", attempt(lambda: dmt.unshard(source, out, force=True)))
    case.run(
        "convert",
        attempt(lambda: dmt.convert(source, out, towers=2, distill_steps=0, force=True, **told)),
    )
    case.run("score", attempt(lambda: dmt.score(bundle, rows, out=bundle / inside)))
    case.run("score", attempt(lambda: dmt.score(source, rows, out=case.choose(rows, out), **told)))
    case.run("plan", attempt(lambda: run_plan(bundle, bundle / inside)))
    case.run("partition", attempt(lambda: run_partition(source, out, told)))
    case.run("export", attempt(lambda: dmt.export(bundle, "onnx", bundle)))


def run_plan(bundle: Path, out: Path) -> None:
    """As the command does."""
    invoke("plan", bundle, "--hosts", 2, "--ranks-per-host", 1, "--out", out)


def run_partition(source: Path, out: Path, told: dict[str, Any]) -> None:
    facts = source.with_name("facts.yaml")
    facts.write_text(json.dumps(told.get("model_config", {})))
    invoke("partition", source, "--towers", 2, "--out", out, "--model-config", facts)


def invoke(*arguments: object) -> None:
    """Run `dmt` in this process; what it raises is raised."""
    import contextlib
    import io

    from dmt_convert.cli.main import app

    with contextlib.redirect_stdout(io.StringIO()):
        app([str(argument) for argument in arguments], standalone_mode=False)


@fault(AREA, "trainer's folder, a file missing", share=4)
def trainer_file_missing(case: Case) -> None:
    name = case.turn("fuxictr", "torcheasyrec", "hugectr", "nvidia")
    model = TRAINERS[name](case)
    path = copy_source(model, case.folder / "faulty")
    case.choose(*[f for f in files_of(path) if f.stat().st_size]).unlink()
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "trainer's folder, a file cut short", share=4)
def trainer_file_cut(case: Case) -> None:
    name = case.turn("fuxictr", "torcheasyrec", "hugectr", "nvidia", "deepctr")
    model = TRAINERS[name](case)
    path = copy_source(model, case.folder / "faulty")
    file = case.choose(*[f for f in files_of(path) if f.stat().st_size > 4])
    size = file.stat().st_size
    os.truncate(file, case.choose(size // 2 // 4 * 4, size - 4, size - 1))
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "trainer's folder, files too long", share=3)
def trainer_file_long(case: Case) -> None:
    """Raw files of floats have no header: a longer one is of another model."""
    name = case.turn("hugectr", "nvidia")
    model = TRAINERS[name](case)
    path = copy_source(model, case.folder / "faulty")
    raw = [f for f in files_of(path) if f.suffix in (".bin", ".model", "") and f.stat().st_size]
    file = case.choose(*raw)
    with file.open("ab") as out:
        out.write(np.ones(case.choose(1, 2, 4, 8, 32), "<f4").tobytes())
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "trainer's folder, files of two steps", share=3)
def trainer_two_steps(case: Case) -> None:
    """A later step was saved in part, or an earlier one left some files behind."""
    name = case.turn("hugectr", "torcheasyrec", "fuxictr")
    model = TRAINERS[name](case)
    path = copy_source(model, case.folder / "faulty")
    if name == "hugectr":
        part = case.choose("wdl_dense_20.model", "wdl0_sparse_20.model")
        new = path / part.replace("20", "40")
        old = path / part
        shutil.copytree(old, new) if old.is_dir() else shutil.copy(old, new)
        for file in files_of(new):
            if file.name != "key":
                values = np.frombuffer(file.read_bytes(), "<f4") * 1.5
                file.write_bytes(values.astype("<f4").tobytes())
        if case.rng.random() < 0.5:  # and the older one is gone
            shutil.rmtree(old) if old.is_dir() else old.unlink()
            model = model.never()
    elif name == "torcheasyrec":
        new = path / "model.ckpt-40"
        shutil.copytree(path / "model.ckpt-20", new)
        lost = case.choose(*files_of(new))
        lost.unlink()
    else:
        shutil.copy(path / "expid.model", path / "other.model")
        import torch

        torch.save(nudged_floats(model.state), path / "other.model")
        model = model.never()
    try_checkpoint(case, path, model, unshard=False)


def nudged_floats(state: dict[str, Any]) -> dict[str, Any]:
    floats = {n: t for n, t in state.items() if t.is_floating_point()}
    return dict(state) | nudged(floats)


@fault(AREA, "trainer's description does not fit", share=6)
def wrong_description(case: Case) -> None:
    """feature_map.json, pipeline.config, model.json, metadata.pt: one feature is different."""
    name = case.turn("fuxictr", "torcheasyrec", "hugectr", "nvidia")
    model = TRAINERS[name](case)
    path = copy_source(model, case.folder / "faulty")
    {
        "fuxictr": _change_feature_map,
        "torcheasyrec": _change_pipeline,
        "hugectr": _change_graph,
        "nvidia": _change_mapping,
    }[name](case, path)
    try_checkpoint(case, path, model, unshard=False)


def _change_feature_map(case: Case, path: Path) -> None:
    file = path / "feature_map.json"
    content = json.loads(file.read_text())
    features = content["features"]
    how = case.choose("lost", "more", "size", "type", "order")
    if how == "lost":
        del features[case.rng.randrange(len(features))]
    elif how == "more":
        features.insert(1, {"zip": {"type": "categorical", "vocab_size": 11}})
    elif how == "size":
        features[0]["user"]["vocab_size"] += case.choose(1, -1)
    elif how == "type":
        features[4]["day"]["type"] = case.choose("numeric", "embedding", "sequence_of_what")
    else:
        features[0], features[2] = features[2], features[0]
    file.write_text(json.dumps(content))


def _change_pipeline(case: Case, path: Path) -> None:
    file = path / "pipeline.config"
    text = file.read_text()
    old, new = case.choose(
        ('"day", "item", "look"]', '"day", "item"]'),
        ("value_dim: 2", "value_dim: 3"),
        ("num_buckets: 11", "num_buckets: 12"),
        ('"user" embedding_dim: 4', '"user" embedding_dim: 8'),
        ('"price", ', ""),
        ('feature_name: "day"', 'feature_name: "daily"'),
        ("dcn_v2 { cross {} }", "dcn_v2 { cross { cross_num: 3 } }"),
        ("dcn_v2 { cross {} }", "dcn_v2 { cross {} deep { hidden_units: [5, 4, 3] } }"),
    )
    assert old in text
    file.write_text(text.replace(old, new))


def _change_graph(case: Case, path: Path) -> None:
    file = path / "model.json"
    content = json.loads(file.read_text())
    layers = content["layers"]
    how = case.choose("slots", "dim", "dense", "output", "sizes", "combiner")
    if how == "slots":
        layers[0]["sparse"][1]["slot_num"] = 4
    elif how == "dim":
        layers[1]["sparse_embedding_hparam"]["embedding_vec_size"] = 2
    elif how == "dense":
        layers[0]["dense"]["dense_dim"] = 6
    elif how == "output":
        layers[2]["fc_param"]["num_output"] = 5
    elif how == "sizes":
        layers[1]["sparse_embedding_hparam"]["slot_size_array"] = [6, 9, 5]
    else:
        layers[1]["sparse_embedding_hparam"]["combiner"] = "max"
    file.write_text(json.dumps(content))


def _change_mapping(case: Case, path: Path) -> None:
    import torch

    mapping = case.choose(
        [[2], [1]], [[2, 0], [1, 3]], [[2, 0], [1, 1]], [[], []], [[0, 2, 0], [1]]
    )
    value = {"data": {"device_mapping": {"embedding": mapping}}, "config": {}}
    torch.save(value, path / "metadata.pt")


@fault(AREA, "keys of HugeCTR that number other rows", share=2)
def wrong_keys(case: Case) -> None:
    model = TRAINERS["hugectr"](case)
    path = copy_source(model, case.folder / "faulty")
    file = path / "wdl0_sparse_20.model" / "key"
    keys = np.frombuffer(file.read_bytes(), "<i8").copy()
    how = case.turn("twice", "negative", "beyond", "int32", "huge")
    at = case.rng.randrange(1, len(keys))
    if how == "twice":
        keys[at] = keys[at - 1]
    elif how == "negative":
        keys[at] = -1
    elif how == "beyond":
        keys[at] = 19
    elif how == "huge":
        keys[at] = 1 << 61
    else:
        keys = keys.astype("<i4")
    file.write_bytes(keys.tobytes())
    try_checkpoint(case, path, model, unshard=False)
