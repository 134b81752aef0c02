"""Export a flat model the common way: a plain torch module given to `torch.onnx.export`.

    python benchmarks/serving_common_way.py JOB.json

Runs in an interpreter of its own (`--rival-python`), which needs onnxscript for the exporter of
today; the older one, which traces TorchScript, does without. The model is written as DLRM's
authors and TorchRec write it. It is exported over tables of a few rows; then the graph is pointed
at the shared file, so that the exporter's own copy of the tables costs nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

_FEW_ROWS = 11
_OPSET = 20
_PARENT_DEATH_SIGNAL = 1


class Cross(nn.Module):
    """Low-rank cross layers, as `torchrec.modules.crossnet.LowRankCrossNet`."""

    def __init__(self, width: int, rank: int, layers: int) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.zeros(width, rank)) for _ in range(layers))
        self.v = nn.ParameterList(nn.Parameter(torch.zeros(rank, width)) for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for w, v, bias in zip(self.w, self.v, self.bias, strict=True):
            x = x0 * (torch.matmul(torch.matmul(x, v.t()), w.t()) + bias) + x
        return x


class Flat(nn.Module):
    """DLRM or DCNv2."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.form, self.lookup, self.part = job["form"], job["lookup"], job["part"]
        count, dim = job["features"], job["dim"]
        self.emb = nn.ModuleList(
            nn.EmbeddingBag(_FEW_ROWS, dim, mode="sum")
            if self.lookup == "bag"
            else nn.Embedding(_FEW_ROWS, dim)
            for _ in range(count)
        )
        self.dim, self.count = dim, count + 1
        self.dot = job["model"] == "dlrm"
        self.bottom = _mlp(job["dense_arch"], last_relu=True)
        self.top = _mlp(job["over_arch"], last_relu=False)
        if not self.dot:
            self.cross = Cross(dim * (count + 1), job["cross_rank"], job["cross_layers"])
        left, right = torch.triu_indices(count + 1, count + 1, 1)
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, dense: Tensor, *ids: Tensor) -> Tensor:
        pooled = self.pool(ids)
        if self.part == "lookup":
            return torch.cat(pooled, dim=1)
        x = self.bottom(dense)
        if self.dot:
            z = torch.cat([x, *pooled], dim=1).view(-1, self.count, self.dim)
            pairs = torch.bmm(z, z.transpose(1, 2))[:, self.left, self.right]
            crossed = torch.cat([x, pairs], dim=1)
        else:
            crossed = self.cross(torch.cat([x, *pooled], dim=1))
        logits: Tensor = self.top(crossed)
        return logits

    def pool(self, ids: tuple[Tensor, ...]) -> list[Tensor]:
        if self.form == "jagged":
            pairs = zip(self.emb, ids[::2], ids[1::2], strict=True)
            return [table(values, offsets) for table, values, offsets in pairs]
        rows = [table(each) for table, each in zip(self.emb, ids, strict=True)]
        if self.lookup == "bag":
            return rows
        return [row.squeeze(1) if self.form == "single" else row.sum(1) for row in rows]


def _mlp(widths: list[int], *, last_relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def example(job: dict[str, Any]) -> tuple[tuple[Tensor, ...], list[str], list[dict[int, str]]]:
    """Example inputs, their names, and which of their dims vary."""
    values, names = [torch.randn(3, job["num_dense"])], ["dense"]
    dims = [{0: "batch"}]
    for i in range(job["features"]):
        if job["form"] == "jagged":
            values += [torch.randint(0, _FEW_ROWS, (7,)), torch.tensor([0, 2, 4])]
            names += [f"f{i:02d}.values", f"f{i:02d}.offsets"]
            dims += [{0: f"n{i}"}, {0: "batch"}]
        else:
            values.append(torch.randint(0, _FEW_ROWS, (3, job["length"])))
            names.append(f"f{i:02d}")
            dims.append({0: "batch"})
    return tuple(values), names, dims


def export(job: dict[str, Any], path: Path) -> onnx.ModelProto:
    """Run the exporter."""
    model = Flat(job)
    load_small(model, Path(job["weights"]), job["model"])
    model.eval()
    values, names, dims = example(job)
    with torch.no_grad():
        if job["exporter"] == "dynamo":
            known = {name: torch.export.Dim(name) for d in dims for name in d.values()}
            shapes = [{axis: known[name] for axis, name in d.items()} for d in dims]
            torch.onnx.export(
                model,
                values,
                path,
                dynamo=True,
                dynamic_shapes=(shapes[0], tuple(shapes[1:])),
                input_names=names,
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
        else:
            torch.onnx.export(
                model,
                values,
                path,
                dynamo=False,
                dynamic_axes=dict(zip(names, dims, strict=True)) | {"logits": {0: "batch"}},
                input_names=names,
                output_names=["logits"],
                opset_version=_OPSET,
            )
    return onnx.load(path)


def load_small(model: Flat, weights: Path, name: str) -> None:
    """Give the model its weights beside tables."""
    from safetensors import safe_open

    parts = {"dense_arch": model.bottom, "over_arch": model.top}
    with safe_open(weights, "pt") as file, torch.no_grad():
        for part, layers in parts.items():
            for i, layer in enumerate(layers[::2]):
                layer.weight.copy_(file.get_tensor(f"{name}.flat.{part}.{i}.weight"))
                layer.bias.copy_(file.get_tensor(f"{name}.flat.{part}.{i}.bias"))
        for kind in () if model.dot else ("w", "v", "bias"):
            for i, tensor in enumerate(getattr(model.cross, kind)):
                tensor.copy_(file.get_tensor(f"{name}.flat.cross.{i}.{kind}"))


def point_at_tables(graph: onnx.ModelProto, job: dict[str, Any], location: str) -> None:
    """Replace the tables of few rows by the shared file's."""
    found = 0
    for tensor in graph.graph.initializer:
        if list(tensor.dims) != [_FEW_ROWS, job["dim"]]:
            continue
        index = int(tensor.name.split(".")[1])
        offset, length = job["tables"][index]
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.dims[0] = job["rows"]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        found += 1
    if found != job["features"]:
        raise SystemExit(f"{found} of {job['features']} tables found in the exported graph")
    del graph.graph.value_info[:]  # shapes of few rows


def main(path: str) -> None:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    warnings.simplefilter("ignore")
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    out = Path(job["out"])
    graph = export(job, out)
    point_at_tables(graph, job, Path(job["weights"]).name)
    onnx.save(graph, out)


if __name__ == "__main__":
    main(sys.argv[1])
