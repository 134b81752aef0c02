"""Do towers of other kinds keep more than linear ones of the same width?

    python benchmarks/module_kinds.py --data data/frappe --flat-cache flat --steps 500

converts a flat model to linear towers by the closed form (no distillation), gives every tower and
the receiver something on top that starts at zero, and distils all of them for the same steps
against the flat model's logits on the training rows. All send the same number of float32:

- linear: nothing on top, and the flat network stays as it is;
- linear, over_arch too: the network behind the towers is trained as well, as for all below;
- MLP: a hidden layer, twice as wide as its input, in every tower and in the receiver;
- experts: four linear maps with softmax gates over the input, in every tower and in the receiver;
- cross: the input times a linear map of itself, mapped linearly, in both.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from flat_models import Flat, FlatJob, open_flat
from frontier import Record, read_setting
from quality_tables import print_table, write_json
from torch import Tensor, nn

import dmt_convert as dmt
from dmt_convert.bundle import open_bundle_model
from dmt_convert.model import DmtModel

BATCH: Final = 512
LEARNING_RATE: Final = 2e-3
HELD_OUT: Final = 8192
CHECK_EVERY: Final = 50
EXPERTS: Final = 4

Build = Callable[[int, int], nn.Module]
"""Makes what is added to a linear map, from its numbers of inputs and outputs."""


class Sum(nn.Module):
    """A linear map, and what is added to it."""

    def __init__(self, base: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.base, self.extra = base, extra

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


class Experts(nn.Module):
    """Linear maps, mixed row by row by a softmax of another one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, EXPERTS)
        self.maps = zero(nn.Linear(inputs, EXPERTS * outputs))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(1)
        return (gates[:, :, None] * self.maps(x).unflatten(1, (EXPERTS, -1))).sum(1)


class Cross(nn.Module):
    """Products of inputs: x times a linear map of x, mapped linearly."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.factor = nn.Linear(inputs, inputs)
        self.out = zero(nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.factor(x))


def zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int) -> nn.Module:
    hidden = 2 * inputs
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), zero(nn.Linear(hidden, outputs)))


KINDS: Final[Mapping[str, Build | None]] = {
    "linear": None,
    "linear, over_arch too": None,
    "MLP": mlp,
    "experts": Experts,
    "cross": Cross,
}


def convert(flat: Flat, compression: float, settings: Mapping[str, object]) -> DmtModel:
    """Linear towers by the product's closed form."""
    job = flat.job
    with tempfile.TemporaryDirectory() as folder:
        bundle = dmt.convert(
            job.path,
            Path(folder) / "bundle",
            **{
                "towers": 4,
                "tower_module": "linear",
                "compression": compression,
                "calibration": job.data / "train.npz",
                "distill_steps": 0,
                **settings,
            },
        )
        model = open_bundle_model(bundle)
        # The tables lie in the folder. These runs need pooled embeddings alone.
        for tower in model.tower_list:
            tower.tables = nn.Module()
        return model


def extend(start: DmtModel, kind: str) -> tuple[DmtModel, list[nn.Parameter]]:
    """Copy a model with something added to every linear map; returns what is to be trained."""
    model, build = copy.deepcopy(start), KINDS[kind]
    assert model.restore is not None
    if build is not None:
        for tower in model.tower_list:
            outputs, inputs = tower.tower_module.weight.shape  # type: ignore[misc, union-attr]
            tower.tower_module = Sum(tower.tower_module, build(inputs, outputs))
        sizes = sum(model.spec.tower_widths), sum(model.spec.flat.feature_dims)
        model.restore = Sum(model.restore, build(*sizes))  # type: ignore[assignment]
    parts: list[nn.Module] = [*model.tower_list, model.restore]
    if kind != "linear":
        parts += [model.interaction, model.over_arch]
    return model, [p for part in parts for p in part.parameters()]


def distil(
    model: DmtModel, trained: list[nn.Parameter], rows: tuple[Tensor, ...], steps: int, seed: int
) -> None:
    """Adam on the squared error of the logits; the best state on held-out rows is kept."""
    dense, pooled, target = rows
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    best, state = held_out_error(model, rows), copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        drawn = torch.randint(len(dense) - HELD_OUT, (BATCH,), generator=generator)
        loss = (model.forward_pooled(dense[drawn], pooled[drawn]) - target[drawn]).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == steps:
            error = held_out_error(model, rows)
            if error < best:
                best, state = error, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)


def held_out_error(model: DmtModel, rows: tuple[Tensor, ...]) -> float:
    dense, pooled, target = (part[-HELD_OUT:] for part in rows)
    with torch.inference_mode():
        return float((model.forward_pooled(dense, pooled) - target).square().mean())


def measure(
    flat: Flat, compressions: list[float], steps: list[int], settings: Mapping[str, object]
) -> Iterator[Record]:
    train, test = flat.rows("train"), flat.rows("test")
    rows = tuple(map(torch.from_numpy, (train.dense, train.pooled, train.reference)))
    job = flat.job
    for compression in compressions:
        start = convert(flat, compression, settings)
        keys = {"data": job.data.name, "arch": job.arch, "seed": job.seed}
        keys |= {"compression": compression, "elements": sum(start.spec.tower_widths)}
        yield keys | {"kind": "closed form", "steps": 0, "weights": 0} | test.compare(start)
        for kind in KINDS:
            for count in steps:
                torch.manual_seed(job.seed)
                model, trained = extend(start, kind)
                distil(model, trained, rows, count, job.seed)
                weights = sum(p.numel() for p in trained)
                found = {"kind": kind, "steps": count, "weights": weights}
                yield keys | found | test.compare(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--flat-cache", type=Path, required=True)
    parser.add_argument("--archs", nargs="+", choices=("dlrm", "dcn"), default=["dlrm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--compressions", type=float, nargs="+", default=[8.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[500])
    parser.add_argument("--set", type=read_setting, action="append", default=[], metavar="NAME=X")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records: list[Record] = []
    for seed in options.seeds:
        for arch in options.archs:
            for data in options.data:
                job = FlatJob(data=data, arch=arch, seed=seed, cache=options.flat_cache)
                flat = open_flat(job)
                for record in measure(flat, options.compressions, options.steps, dict(options.set)):
                    print(record, flush=True)
                    records.append(record)
    titles = {"data": "data", "arch": "model", "compression": "compression", "kind": "towers"}
    titles |= {"steps": "steps", "weights": "weights trained"}
    print_table(records, titles, {"r2": "R^2 of logits", "auc_lost": "AUC lost"})
    write_json(options.json, [], {"kinds": records})


if __name__ == "__main__":
    main()
