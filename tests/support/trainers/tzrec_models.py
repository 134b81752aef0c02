"""TorchEasyRec's DLRM and DCNv2: their parameters' names, and what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, width, hidden, *, bn=False, ln=False, act=nn.ReLU):
        super().__init__()
        self.mlp = nn.ModuleList()
        for units in hidden:
            norms = [nn.BatchNorm1d(units)] * bn + [nn.LayerNorm(units)] * ln
            layer = nn.Module()
            linear = nn.Linear(width, units, bias=not bn)
            layer.perceptron = nn.Sequential(linear, *norms, act())
            self.mlp.append(layer)
            width = units

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.mlp:
            x = layer.perceptron(x)
        return x


class Group(nn.Module):
    """An EmbeddingBagCollection below the names of an EmbeddingGroup."""

    def __init__(self, tables: dict[str, int], dim: int) -> None:
        super().__init__()
        base = self.emb_impls = nn.ModuleDict({"__BASE__": nn.Module()})
        base["__BASE__"].ebc = nn.Module()
        base["__BASE__"].ebc.embedding_bags = nn.ModuleDict(
            {name: nn.EmbeddingBag(rows, dim, mode="sum") for name, rows in tables.items()}
        )

    def forward(self, table: str, bag, mean: bool) -> Tensor:
        layer = self.emb_impls["__BASE__"].ebc.embedding_bags[table]
        values, offsets = torch.from_numpy(bag.values), torch.from_numpy(bag.offsets)
        mode = "mean" if mean else "sum"
        return nn.functional.embedding_bag(
            values, layer.weight, offsets, mode=mode, include_last_offset=True
        )


class Dlrm(nn.Module):
    """`features`: name -> (table, whether it is pooled by mean)."""

    def __init__(self, tables, features, num_dense, *, dim=4, with_sparse=True, **options):
        super().__init__()
        self.features, self.with_sparse = features, with_sparse
        self.embedding_group = Group(tables, dim)
        self.dense_mlp = Mlp(num_dense, [5, dim], **options) if num_dense else None
        count = len(features) + (num_dense > 0)
        width = count * (count - 1) // 2 + dim * (num_dense > 0)
        width += dim * len(features) * with_sparse
        self.final_mlp = Mlp(width, [7, 6], **options)
        self.output_mlp = nn.Linear(6, 1)

    def forward(self, bags, dense):
        sparse = [self.embedding_group(t, bags[n], mean) for n, (t, mean) in self.features.items()]
        vectors = [self.dense_mlp(dense), *sparse] if self.dense_mlp is not None else sparse
        parts = [
            (vectors[i] * vectors[j]).sum(1, keepdim=True)
            for i in range(len(vectors))
            for j in range(i + 1, len(vectors))
        ]
        parts += vectors[:1] if self.dense_mlp is not None else []
        parts += sparse if self.with_sparse else []
        return self.output_mlp(self.final_mlp(torch.cat(parts, dim=1)))


class Cross(nn.Module):
    def __init__(self, width: int, layers: int = 2, rank: int = 3) -> None:
        super().__init__()
        self.u_kernels = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.v_kernels = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for u, v in zip(self.u_kernels, self.v_kernels, strict=True):
            x = x0 * v(u(x)) + x
        return x


class DcnV2(nn.Module):
    """`order`: what the group holds: a feature's name, or columns of the dense inputs."""

    def __init__(self, tables, features, order, *, dim=4, backbone=False, deep=True, final=True):
        super().__init__()
        self.features, self.order = features, order
        self.embedding_group = Group(tables, dim)
        width = sum(dim if isinstance(entry, str) else len(entry) for entry in order)
        self.backbone = Mlp(width, [6], bn=True) if backbone else None
        self.cross = Cross(6 if backbone else width)
        self.deep = Mlp(width, [5, 4]) if deep else None
        joined = (6 if backbone else width) + (4 if deep else 0)
        self.final = Mlp(joined, [5], ln=True) if final else None
        self.output_mlp = nn.Linear(5 if final else joined, 1, bias=False)

    def forward(self, bags, dense):
        parts = []
        for entry in self.order:
            if isinstance(entry, str):
                parts.append(self.embedding_group(self.features[entry][0], bags[entry], False))
            else:
                parts.append(dense[:, entry])
        x = torch.cat(parts, dim=1)
        crossed = self.cross(self.backbone(x) if self.backbone is not None else x)
        joined = crossed if self.deep is None else torch.cat([crossed, self.deep(x)], dim=1)
        return self.output_mlp(self.final(joined) if self.final is not None else joined)
