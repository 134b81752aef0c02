"""Checkpoints made of shapes alone: inference reads headers, so no file is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmt_convert.checkpoint import ITEM_BYTES, FlatCheckpoint, Piece, TensorInfo

Shapes = dict[str, tuple[int, ...]]


def torchrec_shapes(
    tables: Mapping[str, int] | None = None, *, kind: str = "dot", dim: int = 4, prefix: str = ""
) -> Shapes:
    """Names and shapes of a TorchRec model with tables of that many rows."""
    tables = {"t_a": 3, "t_b": 5} if tables is None else tables
    count, all_dims = len(tables), dim * (len(tables) + 1)
    ebc = "sparse_arch.embedding_bag_collection.embedding_bags"
    shapes: Shapes = {f"{ebc}.{name}.weight": (rows, dim) for name, rows in tables.items()}
    width = dim + (count + 1) * count // 2
    shapes |= _linear("dense_arch.model._mlp.0._linear", 3, dim)
    if kind == "dcn":
        width = all_dims
        for layer in range(2):
            shapes[f"inter_arch.crossnet.W_kernels.{layer}"] = (width, 2)
            shapes[f"inter_arch.crossnet.V_kernels.{layer}"] = (2, width)
            shapes[f"inter_arch.crossnet.bias.{layer}"] = (width,)
    if kind == "projection":
        width = dim + 3 * 2
        branch = "inter_arch.interaction_branch{}.model._mlp.0._linear"
        shapes |= _linear(branch.format(1), all_dims, 3 * dim)
        shapes |= _linear(branch.format(2), all_dims, 2 * dim)
    shapes |= _linear("over_arch.model.0._mlp.0._linear", width, 6)
    shapes |= _linear("over_arch.model.1", 6, 1)
    return {prefix + name: shape for name, shape in shapes.items()}


def facebook_shapes(rows: tuple[int, ...], *, dim: int = 8, features: int | None = None) -> Shapes:
    """Names and shapes of a facebook DLRM (dot); `features`: as many as its top MLP expects."""
    shapes: Shapes = {f"emb_l.{i}.weight": (count, dim) for i, count in enumerate(rows)}
    count = 1 + (len(rows) if features is None else features)
    shapes |= _linear("bot_l.0", 3, 5) | _linear("bot_l.2", 5, dim)
    return shapes | _linear("top_l.0", dim + count * (count - 1) // 2, 1)


def _linear(name: str, fan_in: int, fan_out: int) -> Shapes:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def make_checkpoint(
    *groups: tuple[str, Mapping[str, tuple[int, ...]]],
    ordered: bool = True,
    dtypes: Mapping[str, str] | None = None,
    rebuilt: bool = False,
) -> FlatCheckpoint:
    """Make a checkpoint of dicts, each with its dotted container; no bytes lie behind it.

    An ordered one holds state dicts, which name their modules, unless they were `rebuilt`.
    """
    tensors = []
    modules = {
        tuple(container.split(".")) if container else (): tuple(
            dict.fromkeys(name.rpartition(".")[0] for name in shapes)
        )
        for container, shapes in groups
    }
    for container, shapes in groups:
        for name, shape in shapes.items():
            dtype = (dtypes or {}).get(name, "fp32")
            piece = Piece(
                path=Path("none"),
                offset=0,
                length=ITEM_BYTES[dtype],
                starts=(0,) * len(shape),
                sizes=shape,
            )
            tensors.append(
                TensorInfo(
                    name=name,
                    container=tuple(container.split(".")) if container else (),
                    dtype=dtype,
                    shape=shape,
                    pieces=(piece,),
                )
            )
    return FlatCheckpoint(
        source=Path("model.pt"),
        format="torch",
        tensors=tuple(tensors),
        ordered=ordered,
        files=(),
        modules=modules if ordered and not rebuilt else {},
    )
