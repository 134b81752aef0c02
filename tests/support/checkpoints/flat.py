"""Tiny flat models under their trainers' names, and files of them."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

TORCHREC_TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"


def flat_state(
    *,
    names: str = "torchrec",
    interaction: str = "dot",
    rows: Sequence[int] = (7, 50, 11, 6),
    dim: int = 8,
    num_dense: int = 5,
    dense: Sequence[int] = (16,),
    hidden: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Weights of a tiny flat model under its trainer's names.

    Args:
        names: torchrec (interactions dot, dcn, projection) or facebook (dot, self-pairs, cat).
        interaction: of the model.
        rows: of the tables, which serve the features cat_0, cat_1, ... or 0, 1, ...
        dim: of the tables.
        num_dense: number of dense inputs.
        dense: widths of dense_arch between its inputs and `dim`.
        hidden: width of over_arch between the interaction and the logit.
        seed: of the weights.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {}

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = draw(outputs, inputs) / inputs**0.5
        state[f"{name}.bias"] = draw(outputs) * 0.1

    torchrec = names == "torchrec"
    table = TORCHREC_TABLE if torchrec else "emb_l.{}.weight"
    over = ["over_arch.model.0._mlp.0._linear", "over_arch.model.1"]
    over = over if torchrec else ["top_l.0", "top_l.2"]
    for i, count in enumerate(rows):
        state[table.format(i)] = draw(count, dim)
    for i, (inputs, outputs) in enumerate(pairwise((num_dense, *dense, dim))):
        linear(
            f"dense_arch.model._mlp.{i}._linear" if torchrec else f"bot_l.{2 * i}", inputs, outputs
        )
    vectors = len(rows) + 1
    width = vectors * dim
    if interaction == "dcn":
        for layer in range(2):
            state[f"inter_arch.crossnet.W_kernels.{layer}"] = draw(width, 4) / width**0.5
            state[f"inter_arch.crossnet.V_kernels.{layer}"] = draw(4, width) / width**0.5
            state[f"inter_arch.crossnet.bias.{layer}"] = draw(width) * 0.1
    elif interaction == "projection":
        for branch in (1, 2):
            linear(f"inter_arch.interaction_branch{branch}.model._mlp.0._linear", width, 2 * dim)
        width = dim + 4
    elif interaction != "cat":
        own = vectors if interaction == "self-pairs" else 0
        width = dim + vectors * (vectors - 1) // 2 + own
    linear(over[0], width, hidden)
    linear(over[1], hidden, 1)
    return state


def save_flat(path: Path, state: Mapping[str, Any]) -> Path:
    """Write weights as the suffix says: .pt, .safetensors, or without one a DCP directory."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(state), path)
    elif path.suffix:
        torch.save(dict(state), path)
    else:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    return path


def make_flat(
    path: Path, *, edit: Callable[[dict[str, Any]], object] | None = None, **options: Any
) -> Path:
    """Write a tiny flat checkpoint; see `flat_state` for the options.

    `edit` changes the weights before they are written.
    """
    state = flat_state(**options)
    if edit is not None:
        edit(state)
    return save_flat(path, state)


def make_sparse_flat(path: Path, *, rows: Sequence[int], dim: int = 64) -> Path:
    """Write a .safetensors checkpoint whose tables are holes of a sparse file."""
    small = flat_state(rows=[1] * len(rows), dim=dim)
    header: dict[str, Any] = {}
    tables, dense, position = {}, {}, 0
    for name, tensor in small.items():
        (tables if "embedding_bags" in name else dense)[name] = tensor
    for name, tensor in dense.items():
        end = position + tensor.numel() * 4
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    for name, count in zip(tables, rows, strict=True):
        end = position + count * dim * 4
        header[name] = {"dtype": "F32", "shape": [count, dim], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in dense.values():
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + position)
    return path
