"""Small models as users write them, to be captured; and some that may not be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = (30, 40, 20)


class DeepFm(nn.Module):
    """One matrix of floats holds ids and dense inputs, as DeepCTR's models take it."""

    def __init__(self, rows: tuple[int, ...] = ROWS, dim: int = 4, dense: int = 2) -> None:
        super().__init__()
        self.count = len(rows)
        self.embedding = nn.ModuleList(nn.Embedding(n, dim) for n in rows)
        self.linear = nn.ModuleList(nn.Embedding(n, 1) for n in rows)
        width = dim * self.count + dense
        self.dnn = nn.Sequential(
            nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.wide = nn.Parameter(torch.randn(dense, 1) * 0.1)
        self.dnn[1].running_mean.normal_()
        self.dnn[1].running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids = [x[:, i : i + 1].long() for i in range(self.count)]
        vectors = torch.cat([table(i) for table, i in zip(self.embedding, ids, strict=True)], 1)
        linear = torch.cat([table(i) for table, i in zip(self.linear, ids, strict=True)], -1)
        dense = x[:, self.count :]
        pairs = 0.5 * (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1, keepdim=True)
        deep = self.dnn(torch.cat([vectors.flatten(1), dense], 1))
        return torch.sigmoid(linear.sum(-1) + pairs + dense @ self.wide + deep)


class Dcn(nn.Module):
    """One table for all fields, with offsets, attention, and positions; a dict of inputs."""

    offsets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(ROWS), 4)
        self.position = nn.Embedding(len(ROWS), 4)
        offsets = torch.tensor([0, *ROWS[:-1]]).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cross = nn.ModuleList(nn.Linear(14, 14) for _ in range(2))
        self.norm = nn.LayerNorm(14)
        self.head = nn.Linear(14, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = self.table(batch["fields"] + self.offsets)
        vectors = vectors + self.position(torch.arange(len(ROWS), device=vectors.device))
        mixed, _ = self.attention(vectors, vectors, vectors)
        first = torch.cat([mixed.flatten(1), batch["price"].unsqueeze(1), batch["age"][:, None]], 1)
        x = first
        for layer in self.cross:
            x = first * layer(x) + x
        return {"y": self.head(self.norm(x))}


class History(nn.Module):
    """A history that is pooled, and a table that two inputs share; a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(25, 4)
        self.history = nn.EmbeddingBag(25, 4, mode="mean", padding_idx=0)
        self.head = nn.Linear(12, 1)

    def forward(self, item: Tensor, other: Tensor, history: Tensor) -> tuple[Tensor, None]:
        parts = [self.item(item), self.item(other), self.history(history)]
        return self.head(torch.cat(parts, 1)).squeeze(-1), None


class Pair(nn.Module):
    """Two inputs in one table; what is in the way stands in `forward` of subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.head = nn.Linear(8, 1)
        self.weight = nn.Parameter(torch.randn(20, 4))
        self.register_buffer("seen", torch.zeros(()))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([a, b], dim=1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join(self.table(a), self.table(b))


class Functional(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join(self.table(a), functional.embedding(b, self.weight))  # HERE


class Indexed(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join(self.table(a), self.weight[b])  # HERE


class Tied(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first = self.table(a)
        score = (first @ self.table.weight.T).sum(1, keepdim=True)  # HERE
        return self.join(first, self.table(b)) + score


class Chained(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        chosen = self.table(b).sum(1).abs().long().clamp(0, 3)
        return self.join(self.table(a), self.table(chosen))


class Hashed(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join(self.table(a % 10), self.table(b))  # HERE


class Random(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return functional.dropout(super().forward(a, b), 0.5)  # HERE


class Counting(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(a, b)


class Masked(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join(self.table(a), self.table(b) * (b != 0).unsqueeze(1))  # HERE


class Branching(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.max() > 3:  # HERE
            return super().forward(a, b)
        return super().forward(b, a)


class Mixing(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        vectors = self.table(a)
        return self.join(vectors - vectors.mean(0, keepdim=True), self.table(b))


class TwoHeads(Pair):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        logit = super().forward(a, b)
        return logit, logit + 1


class Raising(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        raise ValueError("not today")  # HERE


class Probable(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(a, b)) * 0.5


class Ordering(Pair):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        vectors = torch.cat([self.table(a), self.table(b)], dim=1)
        return self.head(torch.special.bessel_j0(vectors))  # HERE


class Half(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class NoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.stack([a, b], 1).float())


class Squeezing(Pair):
    """Fails on one row, as an unqualified squeeze does."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b).squeeze()[:, None]


def fields(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (rows,), generator=generator) for n in ROWS], 1)


def matrix(rows: int = 6, seed: int = 0) -> Tensor:
    """Inputs of `DeepFm`."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, 2, generator=generator)
    return torch.cat([fields(rows, seed).float(), dense], 1)


def pair(rows: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs of `Pair`."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(20, (rows,), generator=generator) for _ in range(2))
