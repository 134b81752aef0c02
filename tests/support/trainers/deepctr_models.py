"""DeepCTR-Torch's DCN, DCNMix, DeepFM and WDL: their parameters' names, and what they compute."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from dmt_convert.data import Bag


class Tables(nn.Module):
    """Embeddings of one id, or the mean over a sequence without its zeros."""

    def __init__(self, rows: dict[str, int], dims: dict[str, int]) -> None:
        super().__init__()
        for name in rows:
            self.add_module(name, nn.Embedding(rows[name], dims[name]))

    def forward(self, name: str, ids: Tensor | Bag) -> Tensor:
        if isinstance(ids, Bag):  # its combiner is `sum`
            values, offsets = torch.from_numpy(ids.values), torch.from_numpy(ids.offsets)
            weight = self.get_submodule(name).weight
            return embedding_bag(values, weight, offsets[:-1], mode="sum")
        vectors = self.get_submodule(name)(ids)
        mask = (ids != 0).float().unsqueeze(2) if ids.shape[1] > 1 else torch.ones(len(ids), 1, 1)
        return (vectors * mask).sum(1) / (mask.sum(1) + 1e-8)


class Linear(nn.Module):
    def __init__(self, rows: dict[str, int], num_dense: int) -> None:
        super().__init__()
        self.embedding_dict = Tables(rows, dict.fromkeys(rows, 1))
        if num_dense:
            self.weight = nn.Parameter(torch.zeros(num_dense, 1))


class Dnn(nn.Module):
    def __init__(self, widths: list[int], *, bn: bool, prelu: bool) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        if bn:
            self.bn = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs)
        self.activation_layers = nn.ModuleList(nn.PReLU() if prelu else nn.ReLU() for _ in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i, linear in enumerate(self.linears):
            x = linear(x)
            x = self.bn[i](x) if hasattr(self, "bn") else x
            x = self.activation_layers[i](x)
        return x


class Cross(nn.Module):
    def __init__(self, kind: str, width: int, layers: int, *, listed: bool) -> None:
        super().__init__()
        self.kind, self.count = kind, layers
        experts, rank = 3, 4
        shapes = {
            "vector": {"kernels": (width, 1)},
            "matrix": {"kernels": (width, width)},
            "mix": {
                "U_list": (experts, width, rank),
                "V_list": (experts, width, rank),
                "C_list": (experts, rank, rank),
            },
        }[kind] | {"bias": (width, 1)}
        for name, shape in shapes.items():
            parts = [nn.Parameter(torch.zeros(shape)) for _ in range(layers)]
            whole = nn.Parameter(torch.zeros(layers, *shape))
            setattr(self, name, nn.ParameterList(parts) if listed else whole)
        if kind == "mix":
            self.gating = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(experts))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for i in range(self.count):
            bias = self.bias[i].squeeze(1)
            if self.kind == "vector":
                x = x0 * (x @ self.kernels[i]) + bias + x
            elif self.kind == "matrix":
                x = x0 * (x @ self.kernels[i].T + bias) + x
            else:
                gates = torch.cat([gate(x) for gate in self.gating], dim=1).softmax(1)
                inner = torch.tanh(torch.einsum("bn,enr->ber", x, self.V_list[i]))
                inner = torch.tanh(torch.einsum("ers,bes->ber", self.C_list[i], inner))
                outer = torch.einsum("enr,ber->ben", self.U_list[i], inner) + bias
                x = (x0.unsqueeze(1) * outer * gates.unsqueeze(2)).sum(1) + x
        return x


class Out(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))


class DeepCtr(nn.Module):
    """`cross`: vector, matrix, mix or none; `fm`: DeepFM's term."""

    def __init__(
        self, rows, dims, num_dense, *, hidden=(6, 5), cross=None, layers=2, fm=False, wide=True,
        bn=False, prelu=False, listed=False,
    ):  # fmt: skip
        super().__init__()
        width = sum(dims.values()) + num_dense
        self.names, self.use_fm, self.wide = list(rows), fm, wide
        self.embedding_dict = Tables(rows, dims)
        self.linear_model = Linear(rows if wide else {}, num_dense if wide else 0)
        self.out = Out()
        if fm:
            self.fm = nn.Module()
        self.dnn = Dnn([width, *hidden], bn=bn, prelu=prelu) if hidden else None
        joined = (width if cross and layers else 0) + (hidden[-1] if hidden else 0)
        self.dnn_linear = nn.Linear(joined, 1, bias=False) if joined else None
        self.crossnet = Cross(cross, width, layers, listed=listed) if cross else None

    def forward(self, ids: dict[str, Tensor], dense: Tensor) -> Tensor:
        logit = torch.zeros(len(dense), 1)
        if self.wide:
            for name in self.names:
                logit = logit + self.linear_model.embedding_dict(name, ids[name])
            logit = logit + dense @ self.linear_model.weight
        vectors = [self.embedding_dict(name, ids[name]) for name in self.names]
        x = torch.cat([*vectors, dense], dim=1)
        if self.use_fm:
            for i in range(len(vectors)):
                for j in range(i):
                    logit = logit + (vectors[i] * vectors[j]).sum(1, keepdim=True)
        parts = [self.crossnet(x)] if self.crossnet is not None and self.crossnet.count else []
        parts += [self.dnn(x)] if self.dnn is not None else []
        if parts:
            logit = logit + self.dnn_linear(torch.cat(parts, dim=1))
        return logit + self.out.bias
