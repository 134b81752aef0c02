"""Checkpoints whose tensors have a fault, in any container."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, fault
from .commands import try_checkpoint
from .containers import ANY, is_table, save_any, split_state
from .models import Model, State, deepctr_model, plain_model

AREA = "tensors"


def dense_names(state: State) -> list[str]:
    return [name for name in state if not is_table(name)]


def table_names(state: State) -> list[str]:
    return [name for name in state if is_table(name)]


def any_model(case: Case, **options: Any) -> tuple[Model, str]:
    """A model and a container; over the cases, each model meets each container."""
    container = ANY[(case.number // 2 + case.number) % len(ANY)]
    return plain_model(case, **options), container


def attack(case: Case, model: Model, state: State, container: str, **options: Any) -> None:
    """Save a faulty state, and run the commands."""
    path = save_any(state, case.folder / "faulty", container)
    try_checkpoint(case, path, model, **{**model.settings, **options})


@fault(AREA, "dense tensor missing", share=2)
def dense_missing(case: Case) -> None:
    model, container = any_model(case)
    state = dict(model.state)
    del state[case.choose(*dense_names(state))]
    attack(case, model, state, container)


@fault(AREA, "table missing", share=2)
def table_missing(case: Case) -> None:
    model, container = any_model(case)
    state = dict(model.state)
    del state[case.choose(*table_names(state))]
    attack(case, model, state, container)


@fault(AREA, "tensor renamed", share=2)
def renamed(case: Case) -> None:
    model, container = any_model(case)
    name = case.choose(*model.state)
    new = case.choose(f"{name}_old", f"x.{name}", name.replace("weight", "wieght"), name + ".0")
    state = {new if n == name else n: t for n, t in model.state.items()}
    attack(case, model, state, container)


@fault(AREA, "tensor of another shape", share=2)
def misshapen(case: Case) -> None:
    model, container = any_model(case)
    name = case.choose(*dense_names(model.state))
    tensor = model.state[name]
    cut = tensor[: max(1, len(tensor) - 1)] if tensor.ndim == 1 else tensor[:, :-1]
    grown = tensor.repeat(2) if tensor.ndim == 1 else tensor.repeat(1, 2)
    changed = grown if len(tensor) == 1 else case.choose(cut, grown)
    attack(case, model, dict(model.state) | {name: changed.contiguous()}, container)


@fault(AREA, "dense tensor transposed")
def transposed(case: Case) -> None:
    model, container = any_model(case)
    names = [n for n in dense_names(model.state) if model.state[n].ndim == 2]
    name = case.choose(*[n for n in names if len(set(model.state[n].shape)) == 2])
    attack(case, model, dict(model.state) | {name: model.state[name].T.contiguous()}, container)


@fault(AREA, "dtype of one tensor changed", share=3)
def dtype_changed(case: Case) -> None:
    import torch

    model, container = any_model(case)
    name = case.choose(*model.state)
    dtype = case.choose(
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64,
        torch.bool, torch.complex64, torch.float8_e4m3fn,
    )  # fmt: skip
    state = dict(model.state) | {name: model.state[name].to(dtype)}
    close = 0.03 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    attack(case, model, state, container, tolerance=close)


@fault(AREA, "model in fp64")
def doubled(case: Case) -> None:
    model, container = any_model(case)
    attack(case, model, {n: t.double() for n, t in model.state.items()}, container)


@fault(AREA, "not a number", share=2)
def not_a_number(case: Case) -> None:
    model, container = any_model(case)
    name = case.choose(*model.state)
    tensor = model.state[name].clone()
    flat = tensor.view(-1)
    flat[case.rng.randrange(len(flat))] = case.choose(float("nan"), float("inf"), -float("inf"))
    attack(case, model, dict(model.state) | {name: tensor}, container)


def flip_exponent(tensor: Any, at: int) -> Any:
    """Flip the highest exponent bit of an element: 0.3 becomes 1e38.

    Elements of 2 and more would become tiny instead, which nothing shows.
    """
    import torch

    raw = tensor.clone().contiguous().view(-1).numpy().view(np.uint32)
    small = np.flatnonzero((raw >> np.uint32(30)) & np.uint32(1) == 0)
    at = int(small[at % len(small)])
    raw[at] ^= np.uint32(1 << 30)
    return torch.from_numpy(raw.view(np.float32)).reshape(tensor.shape)


@fault(AREA, "exponent flipped in a table", share=2)
def table_outlier(case: Case) -> None:
    model, container = any_model(case)
    name = case.choose(*table_names(model.state))
    tensor = model.state[name]
    changed = flip_exponent(tensor, case.rng.randrange(tensor.numel()))
    attack(case, model, dict(model.state) | {name: changed}, container, named=name.split(".")[-2])


@fault(AREA, "exponent flipped in a dense tensor", share=2)
def dense_outlier(case: Case) -> None:
    model, container = any_model(case)
    names = [n for n in dense_names(model.state) if model.state[n].numel() > 8]
    name = case.choose(*names)
    tensor = model.state[name]
    changed = flip_exponent(tensor, case.rng.randrange(tensor.numel()))
    attack(case, model, dict(model.state) | {name: changed}, container, named=name)


@fault(AREA, "upper half of a table missing", share=2)
def half_table(case: Case) -> None:
    model, container = any_model(case)
    names = [n for n in table_names(model.state) if model.state[n].shape[0] > 3]
    name = case.choose(*names)
    half = model.state[name][: len(model.state[name]) // 2].clone()
    attack(case, model, dict(model.state) | {name: half}, container)


NUMBERS = (101, 853, 7, 302)


def renumbered(state: State, numbers: tuple[int, ...]) -> State:
    """Call the tables by numbers that are names: t_cat_0 becomes t_cat_101, ..."""
    renamed: State = OrderedDict()
    tables = iter(numbers)
    for name, tensor in state.items():
        old = name
        if is_table(name):
            old = name.replace("t_cat_" + name.split("t_cat_")[1].split(".")[0], "t_f")
            old = old.replace("t_f", f"t_{next(tables)}")
        renamed[old] = tensor
    return renamed


@fault(AREA, "numbers with gaps, out of order", share=2)
def gaps(case: Case) -> None:
    """The features are called by ids that are no places; the container keeps no order."""
    import torch

    base = plain_model(case, model=("torchrec", case.turn("dot", "dcn", "projection")))
    numbers = case.turn(NUMBERS, (1, 2, 5, 3), (10, 30, 20, 40), (2019, 2018, 2021, 2020))
    state = renumbered(base.state, numbers)
    torch.save(state, base.folder / "clean.pt")
    facts = {"features": [f"{n}" for n in numbers]}
    tables = [{"name": f"{n}", "table": f"t_{n}"} for n in numbers]
    model = Model("torchrec", base.folder, state, base.source, facts=facts | {"features": tables})
    container = case.turn("safetensors", "dcp", "indexed", "hub-shards", "sorted")
    if container == "sorted":
        dense = [n for n in state if not is_table(n)]
        state = {n: state[n] for n in [*sorted(table_names(state)), *dense]}
        container = "torch"
    path = save_any(state, case.folder / "faulty", container)
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "tables in the order of ranks", share=2)
def rank_order(case: Case) -> None:
    """What rebuilds a dict from shards (dcp_to_torch, merged dicts) keeps the order of ranks."""
    model = plain_model(case)
    tables, dense = table_names(model.state), dense_names(model.state)
    order = case.turn([0, 2, 1, 3], [2, 3, 0, 1], [3, 1, 2, 0])
    parts = [[tables[i] for i in order[:2]], [tables[i] for i in order[2:]]]
    cut = len(dense) // 2
    names = [*parts[0], *dense[:cut], *parts[1], *dense[cut:]]
    container = case.turn("torch", "legacy", "nested", "torchsnapshot")
    attack(case, model, {n: model.state[n] for n in names}, container)


@fault(AREA, "numbered tables shuffled")
def shuffled(case: Case) -> None:
    """Sorted by size, or as a set gave them. A ModuleList's numbers are its order."""
    model = plain_model(case, model=("facebook", case.turn("dot", "cat", "self-pairs")))
    tables = table_names(model.state)
    by_size = sorted(tables, key=lambda name: model.state[name].shape[0])
    case.rng.shuffle(tables)
    order = case.choose(by_size, tables)
    names = [*order, *dense_names(model.state)]
    attack(case, model, {n: model.state[n] for n in names}, case.turn("torch", "nested", "legacy"))


def nudged(state: State, scale: float = 0.3) -> State:
    """The weights of another moment of the same training."""
    import torch

    draw = torch.Generator().manual_seed(4)
    return {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in state.items()}


@fault(AREA, "averaged weights beside", share=2)
def averaged(case: Case) -> None:
    import torch

    model = plain_model(case)
    other = case.turn("ema", "model_ema", "state_dict_ema", "swa", "best")
    name = case.choose("model", "state_dict", "net")
    entries = {name: dict(model.state), other: nudged(model.state)}
    if case.rng.random() < 0.5:
        entries = dict(reversed(entries.items()))
    path = case.folder / "faulty.pt"
    torch.save(entries | {"epoch": 3}, path)
    try_checkpoint(case, path, model.never(), unshard=False, **model.settings)


@fault(AREA, "averaged weights under a prefix")
def averaged_prefix(case: Case) -> None:
    model, container = any_model(case)
    prefix = case.turn("ema_model.", "ema.", "averaged.", "_ema.module.")
    state = {f"model.{n}": t for n, t in model.state.items()}
    state |= {prefix + n: t for n, t in nudged(model.state).items()}
    container = case.turn("torch", "safetensors", "dcp")
    path = save_any(state, case.folder / "faulty", container)
    try_checkpoint(case, path, model.never(), unshard=False, **model.settings)


@fault(AREA, "two saves in one dict", share=2)
def two_saves(case: Case) -> None:
    """`module.x` and `x`: dicts of two runs, or of a wrapped and a bare model, were merged."""
    model, _container = any_model(case)
    prefix = case.turn("module.", "_orig_mod.", "_dmp_wrapped_module.", "model.")
    other = {prefix + n: t for n, t in nudged(model.state).items()}
    if case.rng.random() < 0.5:  # only some were overwritten
        keep = set(case.rng.sample(sorted(other), len(other) // 2))
        other = {n: t for n, t in other.items() if n in keep}
    state = dict(model.state) | other
    path = save_any(state, case.folder / "faulty", case.turn("torch", "safetensors", "dcp"))
    try_checkpoint(case, path, model.never(), unshard=False, **model.settings)


@fault(AREA, "dicts of two ranks in one file", share=2)
def merged_ranks(case: Case) -> None:
    """{"rank0": its half of all rows, "rank1": the other half}."""
    import torch

    model = plain_model(case)
    tables, dense = split_state(model.state)
    halves: list[State] = [dict(dense), dict(dense)]
    for name, tensor in tables.items():
        cut = -(-len(tensor) // 2)
        halves[0][name], halves[1][name] = tensor[:cut].clone(), tensor[cut:].clone()
    names = case.turn(("rank0", "rank1"), ("0", "1"), (0, 1), ("model", "model_1"))
    path = case.folder / "faulty.pt"
    if case.number % 2:  # in a list
        torch.save(halves, path)
    else:
        torch.save(dict(zip(names, halves, strict=True)), path)
    try_checkpoint(case, path, model, unshard=False, **model.settings)


@fault(AREA, "one rank's plain half", share=2)
def one_half(case: Case) -> None:
    """A rank saved its local rows as plain tensors; the other ranks' files lie beside it."""
    import torch

    model = plain_model(case)
    tables, dense = split_state(model.state)
    folder = case.folder / "faulty"
    folder.mkdir()
    stem = case.turn("model_rank{}.pt", "mp_rank_0{}_model_states.pt", "model-{}-of-2.pt")
    for rank in range(2):
        half = dict(dense)
        for name, tensor in tables.items():
            cut = -(-len(tensor) // 2)
            half[name] = (tensor[:cut] if rank == 0 else tensor[cut:]).clone()
        torch.save(half, folder / stem.format(rank))
    path = case.choose(folder, folder / stem.format(0))
    try_checkpoint(case, path, model, **model.settings)


@fault(AREA, "model in two dicts")
def two_dicts(case: Case) -> None:
    import torch

    model = plain_model(case)
    tables = {n: model.state[n] for n in table_names(model.state)}
    dense = {n: model.state[n] for n in dense_names(model.state)}
    path = case.folder / "faulty.pt"
    names = case.turn(("sparse", "dense"), ("embeddings", "model"), ("a", "b"))
    torch.save(dict(zip(names, (tables, dense), strict=True)), path)
    try_checkpoint(case, path, model, unshard=False, **model.settings)


HARMLESS = (
    "n_averaged",
    "train_auroc.num_positives",
    "metrics.ne.window_sum",
    "bn.num_batches_tracked",
    "loss_fn.pos_weight",
    "step",
)
REMAPS = (
    "_mch_sorted_raw_ids",
    "_mch_remapped_ids_mapping",
    "_hash_zch_identities",
    "_hash_zch_metadata",
    "weight_id",
    "bucket",
    "_itep_iteration",
    "address_lookup_0",
    "row_util_0",
    "_output_segments_tensor",
)
"""Buffers of look-ups that map ids to rows: without them, ids mean other rows."""


@fault(AREA, "counters and metrics beside")
def counters(case: Case) -> None:
    import torch

    model, container = any_model(case)
    name = case.turn(*HARMLESS)
    state = dict(model.state) | {name: torch.tensor([3.0]) if "." in name else torch.tensor(3)}
    attack(case, model, state, container)


@fault(AREA, "id remap beside a table", share=4)
def remapped(case: Case) -> None:
    """The remap is part of the model: its ids are not rows. Also if told to ignore it."""
    import torch

    model, _ = any_model(case)
    container = case.turn("torch", "dcp", "safetensors")
    table = table_names(model.state)[0]
    name = case.turn(*REMAPS)
    stem = table.rsplit(".", 2)[0]
    place = case.turn(
        f"{stem}.{name}",
        f"{stem}.t_cat_0.{name}",
        f"mc_modules.t_cat_0.{name}",
        table.replace(".weight", f".{name}"),
        f"_itp_modules.0.{name}",
    )
    ids = torch.from_numpy(np.random.default_rng(1).permutation(7))
    state = dict(model.state) | {place: ids}
    path = save_any(state, case.folder / "faulty", container)
    # the truth is not the plain look-up: scoring by plain rows is wrong
    facts: dict[str, Any] = dict(model.facts)
    if case.rng.random() < 0.6:
        facts["ignore"] = case.choose([place], [f"*{name}*"], ["*"])
    settings = {"model_config": facts} if facts else {}
    try_checkpoint(case, path, model.never(), unshard=False, **settings)


@fault(AREA, "part of the model ignored", share=4)
def ignored_part(case: Case) -> None:
    """A module of the trainer's that takes part in the logit, passed over by a pattern."""
    import torch

    model = deepctr_model(case) if case.number % 2 else plain_model(case)
    extra, pattern = case.turn(
        ("cin.conv1ds.0.weight", "cin*"),
        ("afm.attention_W", "afm*"),
        ("senet.excitation.0.weight", "senet*"),
        ("linear.weight", "linear.*"),
        ("wide.bias", "wide*"),
        ("fm_bias", "fm_bias"),
        ("din.attention.0.weight", "*attention*"),
        ("over_arch2.model.0.weight", "over_arch2*"),
        ("dense_arch.model._mlp.9._linear.weight", "*_mlp.9*"),
    )
    state = dict(model.state) | {extra: torch.ones(3, 4)}
    if extra.startswith("cin"):
        state["cin_linear.weight"] = torch.ones(1, 4)
    path = save_any(state, case.folder / "faulty", case.turn("torch", "safetensors"))
    told = dict(model.facts) | ({"ignore": [pattern]} if case.rng.random() < 0.75 else {})
    settings = {"model_config": told} if told else {}
    try_checkpoint(case, path, model.never(), unshard=False, **settings)


@fault(AREA, "pattern to ignore that matches nothing")
def idle_pattern(case: Case) -> None:
    model, container = any_model(case)
    told = dict(model.facts) | {"ignore": [case.turn("train_auroc.*", "metrics*", "emb_1.*")]}
    path = save_any(model.state, case.folder / "faulty", container)
    try_checkpoint(case, path, model.never(), unshard=False, model_config=told)


@fault(AREA, "tables that share memory")
def tied(case: Case) -> None:
    """One tensor under two names: torch.save keeps both, safetensors one and an alias."""
    import torch
    from safetensors.torch import save_model

    base = plain_model(case, rows=(7, 11, 11, 6))
    tables = table_names(base.state)
    state = dict(base.state)
    state[tables[2]] = state[tables[1]]
    torch.save({n: t.clone() for n, t in state.items()}, base.source)
    model = Model(base.family, base.folder, state, base.source, facts=base.facts)

    class Holder(torch.nn.Module):
        pass

    folder = case.folder / "faulty"
    folder.mkdir()
    if case.number % 2:
        holder = Holder()
        for name, tensor in state.items():
            *modules, leaf = name.split(".")
            inside: torch.nn.Module = holder
            for key in modules:
                if key not in inside._modules:
                    inside.add_module(key, Holder())
                inside = inside._modules[key]  # type: ignore[assignment]
            inside.register_buffer(leaf, tensor)
        save_model(holder, str(folder / "model.safetensors"))
        path = folder / "model.safetensors"
    else:
        torch.save(state, folder / "model.pt")
        path = folder / "model.pt"
    try_checkpoint(case, path, model, **model.settings)


def pack_rows(table: Any, packing: str) -> tuple[Any, Any]:
    """Quantise a table as fbgemm, torch or TorchRec do.

    Returns:
        Rows as uint8, and what they decode to.
    """
    import torch

    values = table.numpy().astype(np.float32)
    rows, dim = values.shape
    if packing == "fp16":
        half = values.astype(np.float16)
        return torch.from_numpy(half.view(np.uint8).copy()), torch.from_numpy(half.astype("f4"))
    if packing == "fp32":
        return torch.from_numpy(values.view(np.uint8).copy()), torch.from_numpy(values)
    low = values.min(1, keepdims=True)
    scale = (values.max(1, keepdims=True) - low) / 255
    if packing == "int8-fp16":
        low, scale = (x.astype(np.float16).astype(np.float32) for x in (low, scale))
    codes = np.clip(np.rint((values - low) / scale), 0, 255).astype(np.uint8)
    decoded = codes.astype(np.float32) * scale + low
    if packing == "int8-fp32":  # codes, fp32 scale and bias: embedding_bag_byte_prepack
        tail = np.concatenate([scale, low], 1).astype("<f4").view(np.uint8)
        raw = np.concatenate([codes, tail], 1)
    else:  # fbgemm's TBE: fp16 scale and bias, then codes, padded to 16 bytes
        head = np.concatenate([scale, low], 1).astype("<f2").view(np.uint8)
        raw = np.concatenate([head, codes], 1)
        raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 16)))
    assert len(raw) == rows and dim
    return torch.from_numpy(raw.copy()), torch.from_numpy(decoded)


@fault(AREA, "tables packed in another way", share=6)
def packed(case: Case) -> None:
    """uint8 rows: fp16, fp32, int8 with fp16 or fp32 scales, one table or all, at many widths."""
    import torch

    dim = case.turn(4, 8, 16, 24, 12, 32, 40)
    interaction = case.choose("dot", "dcn")
    base = plain_model(case, model=("torchrec", interaction), dim=dim)
    tables = table_names(base.state)
    mixed = case.rng.random() < 0.4
    kinds = ["fp16", "fp32", "int8-fp32", "int8-fp16"]
    one = kinds[(case.number // 7) % 4]
    packings = [case.choose(*kinds) if mixed else one for _ in tables]
    state, clean = dict(base.state), dict(base.state)
    for name, packing in zip(tables, packings, strict=True):
        state[name], clean[name] = pack_rows(base.state[name], packing)
    torch.save(clean, base.source)
    model = Model(base.family, base.folder, clean, base.source)
    path = save_any(state, case.folder / "faulty", case.choose("torch", "safetensors", "dcp"))
    try_checkpoint(case, path, model, tolerance=1e-3, unshard=False)


@fault(AREA, "width that fits two interactions", share=2)
def two_readings(case: Case) -> None:
    """Dot and cat, or self-pairs and one feature more, give over_arch the same width."""
    if case.number % 2:  # cat of 3 tables + dense of dim 3: 12; a dot gives 3 + 6 + ...
        dim, count = case.choose((2, 3), (3, 5), (4, 7), (5, 9))  # (F + 1) F / 2 = F dim
        interaction = case.choose("cat", "dot")
    else:
        dim, count, interaction = 6, 4, "self-pairs"
    rows = tuple(case.rng.randrange(5, 30) for _ in range(count))
    base = plain_model(case, model=("facebook", interaction), dim=dim, rows=rows)
    facts = {"self_pairs": True} if interaction == "self-pairs" else {"interaction": interaction}
    model = Model(base.family, base.folder, base.state, base.source, facts=facts)
    state = dict(base.state)
    path = save_any(state, case.folder / "faulty", case.choose("torch", "safetensors"))
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "a feature less, width of self-pairs")
def pairs_or_feature(case: Case) -> None:
    """A table is lost; without it, the width is that of a dot with self-pairs."""
    base = plain_model(case, model=("facebook", "dot"), rows=(7, 50, 11, 6, 9))
    state = dict(base.state)
    del state[case.choose(*table_names(state))]
    path = save_any(state, case.folder / "faulty", case.turn("torch", "safetensors", "dcp"))
    model = Model(base.family, base.folder, base.state, base.source)
    try_checkpoint(case, path, model, unshard=False)


@fault(AREA, "trainer's tensor missing", share=3)
def trainer_part_missing(case: Case) -> None:
    """DeepCTR: an optional module's tensors are gone, wholly or in part."""
    import torch

    model = deepctr_model(case)
    state = dict(model.state)
    name = case.choose(*state)
    lost = (
        [name]
        if case.rng.random() < 0.7
        else [n for n in state if n.split(".")[0] == name.split(".")[0]]
    )
    for key in lost:
        del state[key]
    path = Path(case.folder / "faulty.h5")
    torch.save(state, path)
    if lost == [n for n in model.state if n.split(".")[0] == name.split(".")[0]]:
        return _optional_module_lost(case, path)
    try_checkpoint(case, path, model, unshard=False)


def _optional_module_lost(case: Case, path: Path) -> None:
    """Without a whole module, what is left may be a model of its own; nothing says it is not."""
    import dmt_convert as dmt

    def inspect() -> str | None:
        dmt.inspect(path)
        return None

    case.run("inspect", inspect)
