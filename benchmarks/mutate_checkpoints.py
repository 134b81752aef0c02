"""Tiny checkpoints of every container, and ways to damage them; see fuzz_checkpoints.py."""

from __future__ import annotations

import copy
import io
import json
import os
import pickletools
import random
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer_seeds import write_trainer_seeds

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for the writers in tests/support

INTERESTING = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x80\x02", b".", b"PK\x03\x04")
GLOBALS = (
    "os system",
    "builtins eval",
    "builtins getattr",
    "torch Size",
    "pathlib Path",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._tensor _rebuild_from_type_v2",
    "collections OrderedDict",
    "numpy._core.multiarray scalar",
    "torch.nn.modules.linear Linear",
    "torch.distributed._shard.sharded_tensor.api ShardedTensor",
)
VALUES = (
    None,
    -1,
    0,
    1,
    1 << 40,
    1 << 70,
    1.5,
    "",
    "x",
    "../x",
    "/etc/passwd",
    [],
    {},
    [0, 0],
    True,
)


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def write_seeds(folder: Path) -> dict[str, Path]:
    """Write one tiny checkpoint per kind; return what to open of each."""
    import torch

    torch.serialization.set_crc32_options(False)  # else checksums refuse nearly everything
    try:
        return _write_seeds(folder)
    finally:
        torch.serialization.set_crc32_options(True)


def _write_seeds(folder: Path) -> dict[str, Path]:
    import torch

    from support.checkpoints.containers import (
        SAVES,
        save_dcp,
        save_indexed,
        save_torch,
        tiny_state,
    )
    from support.checkpoints.rank_files import save_ranks
    from support.checkpoints.torchsnapshot_files import Snapshot

    state = tiny_state()
    seeds: dict[str, Path] = {}

    def place(kind: str) -> Path:
        (folder / kind).mkdir()
        return folder / kind

    for kind, save in SAVES.items():
        seeds[kind] = save(state, place(kind))
    nn = torch.nn
    tables = nn.ModuleList([nn.EmbeddingBag(rows, 4) for rows in (5, 1, 9)])
    layers = {"bot_l": nn.Sequential(nn.Linear(3, 4)), "top_l": nn.Sequential(nn.Linear(10, 1))}
    inside = nn.ModuleDict({"emb_l": tables, **layers})
    content = {"state_dict": state, "x": Hostile(folder / "it_ran"), "y": torch.nn.Linear(2, 1)}
    for kind, value in (("module", inside), ("hostile", content)):
        for legacy in (False, True):
            seeds[f"{kind}-legacy" if legacy else kind] = path = place(f"{kind}{legacy}") / "a.ckpt"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    blocks = [(0, 0, 5, 4, 0), (5, 0, 4, 4, 1)]
    table = {"emb_l.2.weight": (state["emb_l.2.weight"], blocks)}
    dense = {name: tensor for name, tensor in state.items() if name not in table}
    seeds["ranks"] = save_ranks(place("ranks"), table, dense)[0]
    for kind in ("snapshot", "snapshot-yaml"):
        snapshot = Snapshot(place(kind), batched=True)
        snapshot.keys("model", list(state))
        for name, tensor in dense.items():
            snapshot.dense(f"model/{name}", tensor, saved=name.endswith("bias"))
        snapshot.sharded("model/emb_l.2.weight", state["emb_l.2.weight"], blocks)
        snapshot.pickled("model/x", 3)
        seeds[kind] = snapshot.finish(as_yaml=kind.endswith("yaml"))
    for kind in ("safetensors", "bin"):
        seeds[f"indexed-{kind}"] = save_indexed(state, place(f"indexed-{kind}"), kind)
    pair = place("pair")
    sums = {"state": {name: {"sum": tensor} for name, tensor in state.items()}}
    for name, value in (("model", state), ("optimizer", sums)):
        save_dcp(value, place(f"pair-{name}")).rename(pair / name)
    seeds["dcp-pair"] = pair
    parts = {name: tensor for name, tensor in state.items() if name != "emb_l.1.weight"}
    parts |= {f"emb_l.1.weight_{part}": torch.ones(2, 2) for part in "qr"}
    seeds["quotient-remainder"] = save_torch(parts, place("quotient-remainder"))
    seeds["nvidia"] = write_nvidia(place("nvidia"), state)
    seeds |= write_parts(place, state)
    return seeds | write_trainer_seeds(place)


def write_parts(place: Callable[[str], Path], state: dict[str, Any]) -> dict[str, Path]:
    """Write checkpoints of several files or dicts, and payloads in other forms."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file, save_model
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat

    seeds: dict[str, Path] = {}
    tables = {name: tensor for name, tensor in state.items() if name.startswith("emb")}
    dense = {name: tensor for name, tensor in state.items() if name not in tables}
    folder = seeds["shards"] = place("shards")
    for rank, rows in enumerate((slice(0, 5), slice(5, 9))):
        part = {"emb_l.2.weight": tables["emb_l.2.weight"][rows].clone()}
        part |= {name: tensor for name, tensor in state.items() if name not in part and not rank}
        starts = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in part.items()}
        starts["emb_l.2.weight"]["saved_offsets"] = [rows.start, 0]
        file = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(part, file, {"DCP_SHARDING_INFO": json.dumps(starts), "format": "pt"})
    folder = place("parts")
    for rank, name in enumerate(tables):
        torch.save({name: tables[name]} | dense, folder / f"rank{rank}.pt", pickle_protocol=4)
    seeds["parts"] = folder / "rank0.pt"
    folder = seeds["folder"] = place("folder")
    torch.save(tables, folder / "sparse.pt")
    save_file(dense, folder / "dense.safetensors")
    nn = torch.nn
    embeddings = nn.ModuleList(nn.Embedding(5, 4) for _ in range(3))
    layers = {"bot_l": nn.Sequential(nn.Linear(3, 4)), "top_l": nn.Sequential(nn.Linear(10, 1))}
    model = nn.ModuleDict({"emb_l": embeddings, **layers})
    embeddings[1].weight = embeddings[0].weight
    seeds["tied"] = place("tied") / "model.safetensors"
    save_model(model, str(seeds["tied"]))
    content = {"model": state, "a": {("b", (1,)): frozenset("c")}, "d": bytearray(b"e")}
    content["f"] = torch.ones(3).numpy()
    seeds["protocol-5"] = place("protocol-5") / "model.pt"
    torch.save(content, seeds["protocol-5"], pickle_protocol=5)
    seeds["dcp-safetensors"], seeds["dcp-objects"] = place("dcp-safetensors"), place("dcp-objects")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            dict(state),
            storage_writer=FileSystemWriter(
                seeds["dcp-safetensors"], serialization_format=SerializationFormat.SAFETENSORS
            ),
            no_dist=True,
        )
        dcp.save(
            {"model": state},
            checkpoint_id=seeds["dcp-objects"],
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    return seeds


def write_nvidia(folder: Path, state: dict[str, Any]) -> Path:
    """Write a directory of NVIDIA's DLRM."""
    import torch

    parts: dict[str, Any] = {
        "metadata.pt": {
            "data": {"device_mapping": {"embedding": [[2, 0], [1]]}},
            "config": {"interaction_op": "dot"},
        },
        "bottom_model.mlp.pt": {
            "weights": [state["bot_l.0.weight"]],
            "biases": [state["bot_l.0.bias"]],
        },
        "top_model.mlp.pt": {"weights": [torch.ones(2, 16)], "biases": [torch.ones(2)]},
        "top_model.out.pt": {"weight": torch.ones(1, 2), "bias": torch.ones(1)},
    }
    for number in range(3):
        table = state[f"emb_l.{number}.weight"]
        raw = table.numpy().tobytes()
        (folder / f"bottom_model.embeddings.{number}.bin").write_bytes(raw)
        parts[f"embeddings.{number}.meta.pt"] = {"shape": table.shape}
    for name, value in parts.items():
        torch.save(value, folder / name)
    return folder


def flip_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, mostly near the beginning or the end, where headers are."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        size = max(1, len(data))
        near = rng.choice((size, 64, 512, 4096))
        at = rng.randrange(min(near, size))
        at = size - 1 - at if rng.random() < 0.4 else at
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            piece = rng.choice(INTERESTING)
            data[at : at + len(piece)] = piece
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 9)]
        elif kind == 4 and rng.random() < 0.2:
            del data[at:]
        else:
            other = rng.randrange(size)
            data[at : at + 8] = data[other : other + 8]
    return bytes(data)


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Exchange, repeat or drop opcodes of a pickle, or change what a global names."""
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except Exception:
        return flip_bytes(data, rng)
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(ops))
        kind = rng.randrange(5)
        if kind == 0 and len(ops) > 1:
            del ops[at]
        elif kind == 1:
            ops.insert(at, ops[rng.randrange(len(ops))])
        elif kind == 2:
            ops[at] = ops[rng.randrange(len(ops))]
        elif kind == 3:
            names = [i for i, op in enumerate(ops) if op[:1] == b"c"] or [at]
            ops[rng.choice(names)] = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
        else:
            ops.insert(at, rng.choice((b"R", b"\x81", b"b", b"s", b"K\xff", b"\x8a\x01\xff", b"N")))
    return b"".join(ops)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Replace a few values of a document by others of any type."""
    try:
        document = json.loads(data)
    except ValueError:
        return flip_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        node, parent, key = document, None, None
        while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.9):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, rng.choice(keys)
            node = node[key]
        if parent is not None and rng.random() < 0.2:
            del parent[key]
        elif parent is not None:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(document).encode()


def change_zip(raw: bytes, rng: random.Random) -> bytes:
    """Change the pickle of an archive, and write the archive around it anew."""
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
            for member in old.infolist():
                member.CRC = None  # type: ignore[assignment]  # it holds zeros; none is compared
                data = old.read(member)
                pickled = member.filename.endswith("data.pkl")
                new.writestr(member.filename, change_pickle(data, rng) if pickled else data)
    except Exception:  # it was damaged before
        return flip_bytes(raw, rng)
    return made.getvalue()


def change_file(path: Path, rng: random.Random) -> None:
    """Mutate one file the way that its content allows."""
    raw = path.read_bytes()
    choices: list[Callable[[bytes, random.Random], bytes]] = [flip_bytes]
    if raw[:2] == b"PK":
        choices += [change_zip] * 3
    elif raw[:1] == b"\x80":
        choices += [change_pickle] * 2
    elif raw[:1] == b"{":
        choices += [change_json] * 3
    elif path.suffix == ".safetensors":
        choices += [change_header] * 2
    path.write_bytes(rng.choice(choices)(raw, rng))


def change_header(raw: bytes, rng: random.Random) -> bytes:
    """Change the JSON header of a safetensors file; its length is put right."""
    length = int.from_bytes(raw[:8], "little")
    text = change_json(raw[8 : 8 + length], rng)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def mutate(folder: Path, rng: random.Random) -> None:
    """Change one or two files of a checkpoint, or remove or swap some."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if len(files) > 1 and rng.random() < 0.06:
        a, b = rng.sample(files, 2)
        if rng.random() < 0.5:
            a.unlink()
        else:
            data = a.read_bytes()
            a.write_bytes(b.read_bytes())
            b.write_bytes(data)
        return
    headers = [
        path for path in files if path.name.startswith(".") or path.suffix in (".json", ".config")
    ]
    for _ in range(rng.choice((1, 1, 1, 2))):
        change_file(rng.choice(headers if headers and rng.random() < 0.7 else files), rng)


def prepare(
    seeds: dict[str, Path], root: Path, folder: Path, case: tuple[str, int], seed: int
) -> Path:
    """Write one mutated checkpoint; return what to open."""
    kind, number = case
    shutil.rmtree(folder, ignore_errors=True)
    source = root / seeds[kind].relative_to(root).parts[0]
    shutil.copytree(source, folder)
    mutate(folder, random.Random(f"{seed} {kind} {number}"))
    return folder / seeds[kind].relative_to(source)
