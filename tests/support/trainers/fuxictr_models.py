"""FuxiCTR's DLRM and DCNv2: their parameters' names, and what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """MLP_Block: linear layers, batch norms, activations and dropouts in one nn.Sequential."""

    def __init__(self, width, hidden, *, output=False, bn=False, act=nn.ReLU, dropout=False):
        super().__init__()
        layers: list[nn.Module] = []
        for units in hidden:
            layers.append(nn.Linear(width, units))
            layers += [nn.BatchNorm1d(units)] if bn else []
            layers.append(act() if isinstance(act, type) else act(units))
            layers += [nn.Dropout(0.1)] if dropout else []
            width = units
        self.mlp = nn.Sequential(*layers, *([nn.Linear(width, 1)] if output else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Embeddings(nn.Module):
    """The tables under two layers of names; shared ones twice, numeric ones as vectors."""

    def __init__(self, specs, dim, *, numeric=True):
        super().__init__()
        self.specs = specs
        layers = nn.ModuleDict()
        for name, spec in specs.items():
            if spec["type"] == "numeric":
                if numeric:
                    layers[name] = nn.Linear(1, dim, bias=False)
            elif spec.get("share_embedding") in layers:
                layers[name] = layers[spec["share_embedding"]]
            else:
                layers[name] = nn.Embedding(spec["vocab_size"], dim, padding_idx=0)
        self.embedding_layer = nn.Module()
        self.embedding_layer.embedding_layers = layers

    def forward(self, ids: dict[str, Tensor], dense: dict[str, Tensor]) -> list[Tensor]:
        out = []
        for name, layer in self.embedding_layer.embedding_layers.items():
            if name in dense:
                out.append(layer(dense[name].unsqueeze(1)))
                continue
            vectors = layer(ids[name])
            encoder = self.specs[name].get("feature_encoder")
            if encoder == "layers.MaskedAveragePooling()":
                count = (vectors.sum(-1) != 0).float().sum(-1, keepdim=True)
                out.append(vectors.sum(1) / (count + 1e-12))
            else:
                out.append(vectors.sum(1))
        return out


class Dlrm(nn.Module):
    def __init__(self, specs, dim, *, pairs=True, bn=False, act=nn.ReLU, dropout=False):
        super().__init__()
        num_dense = sum(spec["type"] == "numeric" for spec in specs.values())
        self.embedding_layer = Embeddings(specs, dim, numeric=False)
        count = len(specs) - num_dense + (num_dense > 0)
        width = count * (count - 1) // 2 + dim * (num_dense > 0) if pairs else count * dim
        options = {"bn": bn, "act": act, "dropout": dropout}
        self.bottom_mlp = Block(num_dense, [5, dim], **options) if num_dense else None
        self.interact = nn.Module()
        if pairs:
            mask = torch.triu(torch.ones(count, count), 1).bool()
            self.interact.triu_mask = nn.Parameter(mask, requires_grad=False)
        self.pairs = pairs
        self.top_mlp = Block(width, [7, 6], output=True, **options)

    def forward(self, ids, dense):
        vectors = self.embedding_layer(ids, {})
        if self.bottom_mlp is not None:
            bottom = self.bottom_mlp(torch.stack(list(dense.values()), dim=1))
            vectors.append(bottom)
        if not self.pairs:
            return self.top_mlp(torch.cat(vectors, dim=1))
        parts = [
            (vectors[i] * vectors[j]).sum(1, keepdim=True)
            for i in range(len(vectors))
            for j in range(i + 1, len(vectors))
        ]
        parts += [bottom] if self.bottom_mlp is not None else []
        return self.top_mlp(torch.cat(parts, dim=1))


class CrossV2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.cross_layers:
            x = x + x0 * layer(x)
        return x


class DcnV2(nn.Module):
    """`cross`: a module of its own, else CrossNetV2."""

    def __init__(self, specs, dim, structure, *, cross=None, bn=False):
        super().__init__()
        self.embedding_layer = Embeddings(specs, dim)
        width = len(specs) * dim
        self.structure = structure
        self.crossnet = CrossV2(width) if cross is None else cross(width)
        final = width if structure in ("crossnet_only", "parallel") else 0
        if "stacked" in structure:
            self.stacked_dnn = Block(width, [6, 5], bn=bn)
            final += 5
        if "parallel" in structure:
            self.parallel_dnn = Block(width, [4], bn=bn)
            final += 4
        self.fc = nn.Linear(final, 1)

    def forward(self, ids, dense):
        x = torch.cat(self.embedding_layer(ids, dense), dim=1)
        crossed = self.crossnet(x)
        parts = [self.stacked_dnn(crossed) if "stacked" in self.structure else crossed]
        if "parallel" in self.structure:
            parts.append(self.parallel_dnn(x))
        return self.fc(torch.cat(parts, dim=1))
