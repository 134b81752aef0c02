"""Train a small flat DLRM or DLRM-DCNv2, and save it under TorchRec's names.

    python -m dmt_convert.recipes.train_flat --data clicks --arch dlrm --out flat.pt

The data folder holds train, validation and test rows (`train.npz`, `valid.npz`, `test.npz`). The
checkpoint is what a TorchRec user would save: `{"model": state dict, "optimizer": state dict}`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dmt_convert.data import Batch, Dataset, adapt_batches, open_data
from dmt_convert.families import TORCHREC_DLRM
from dmt_convert.metrics import measure_accuracy
from dmt_convert.model import DmtModel, FlatModel
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train, and for how long."""

    data: Path
    """Folder with `train.npz`, `valid.npz` and `test.npz`."""
    arch: Literal["dlrm", "dcn"] = "dlrm"
    """dlrm: dot interaction; dcn: low-rank cross network (DCNv2)."""
    embedding_dim: int = 16
    """Embedding dim N of every table."""
    dense_layers: tuple[int, ...] = (64, 32)
    """Widths of dense_arch before its last layer, which is N wide."""
    over_layers: tuple[int, ...] = (64, 32)
    """Widths of over_arch before the logit."""
    cross_layers: int = 3
    """dcn: number of cross layers."""
    cross_rank: int = 24
    """dcn: their rank."""
    epochs: int = 3
    """Passes over the training rows."""
    batch_size: int = 512
    """Rows per step."""
    learning_rate: float = 2e-3
    """Of Adam."""
    table_decay: float = 1e-4
    """L2 penalty on the tables: without one they overfit rare ids within the second epoch."""
    table_spread: float = 0.01
    """Standard deviation of the tables before training."""
    seed: int = 0
    """Seed of weights and of the order of rows."""


def train_flat(
    config: TrainConfig, *, on_epoch: Callable[[int, float | None], None] = lambda epoch, auc: None
) -> tuple[FlatModel, torch.optim.Optimizer]:
    """Train, and keep the epoch with the best validation AUC.

    Args:
        config: What to train.
        on_epoch: Told of every epoch and its validation AUC.

    Returns:
        The model, and the optimizer in its last state.
    """
    torch.manual_seed(config.seed)
    train, valid = (open_data(config.data / f"{split}.npz") for split in ("train", "valid"))
    model = FlatModel(make_spec(config, train))
    optimizer = make_optimizer(model, config)
    best, best_state = -1.0, model.state_dict()
    for epoch in range(config.epochs):
        for batch in epoch_batches(train, model.spec, config, epoch):
            train_step(model, optimizer, batch)
        auc = validate(model, valid)
        on_epoch(epoch, auc)
        if auc is None or auc > best:
            best = -1.0 if auc is None else auc
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    return model.eval(), optimizer


def epoch_batches(
    rows: Dataset, spec: ModelSpec, config: TrainConfig, epoch: int
) -> Iterator[Batch]:
    """Yield the batches of one pass, in the order that the seed gives it."""
    shuffled = rows.batches(config.batch_size, shuffle_seed=config.seed * 1000 + epoch)
    return adapt_batches(rows, spec, shuffled)


def make_optimizer(model: FlatModel | DmtModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Draw the tables anew, small; parameters stay in TorchRec's order, tables first."""
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    parameters = dict(model.named_parameters())
    for name in _torchrec_order(parameters):
        (tables if "tables" in name.split(".") else others).append(parameters[name])
    for table in tables:
        nn.init.normal_(table, std=config.table_spread)
    groups: list[dict[str, Any]] = [
        {"params": tables, "weight_decay": config.table_decay},
        {"params": others},
    ]
    return torch.optim.Adam(groups, lr=config.learning_rate)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Take one step on one batch; returns the loss."""
    assert batch.labels is not None
    labels = torch.from_numpy(np.array(batch.labels))
    loss = nn.functional.binary_cross_entropy_with_logits(model(batch), labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def validate(model: FlatModel | DmtModel, dataset: Dataset) -> float | None:
    """AUC of a model on a data set."""
    spec = model.spec.flat if isinstance(model, DmtModel) else model.spec
    logits, labels = [], []
    with torch.inference_mode():
        for batch in adapt_batches(dataset, spec, dataset.batches(4096)):
            assert batch.labels is not None
            logits.append(model(batch).numpy())
            labels.append(batch.labels)
    return measure_accuracy(np.concatenate(logits), np.concatenate(labels)).auc


def make_spec(config: TrainConfig, dataset: Dataset) -> ModelSpec:
    """Describe the model for a data set: one table per feature, as large as its ids need."""
    rows = dict.fromkeys(dataset.feature_names, 1)
    for split in ("train", "valid", "test"):
        other = open_data(config.data / f"{split}.npz")
        for batch in other.batches(65536):
            for name, bag in zip(batch.feature_names, batch.bags, strict=True):
                rows[name] = max(rows[name], int(bag.values.max(initial=0)) + 1)
    dim = config.embedding_dim
    dense = max(1, dataset.num_dense)  # without dense inputs the model is fed a constant
    interaction = (
        InteractionSpec(kind="dot")
        if config.arch == "dlrm"
        else InteractionSpec(
            kind="dcn", cross_layers=config.cross_layers, cross_rank=config.cross_rank
        )
    )
    width = interaction.output_width([dim] * (1 + len(rows)))
    return ModelSpec(
        family=TORCHREC_DLRM.name,
        tables=tuple(TableSpec(name=f"t_{name}", rows=n, dim=dim) for name, n in rows.items()),
        features=tuple(FeatureSpec(name=name, table=f"t_{name}") for name in rows),
        dense_arch=MlpSpec(widths=(dense, *config.dense_layers, dim), final_relu=True),
        interaction=interaction,
        over_arch=MlpSpec(widths=(width, *config.over_layers, 1), final_relu=False),
    )


def save_flat(model: FlatModel, optimizer: torch.optim.Optimizer, out: Path) -> None:
    """Save a checkpoint under TorchRec's names, in the order of the optimizer's parameters."""
    last = f"over_arch.{model.spec.over_arch.num_layers - 1}."
    state, values = {}, model.state_dict()
    for name in _torchrec_order(values):
        canonical = name.removeprefix("interaction.").replace(last, "over_arch.last.")
        source = TORCHREC_DLRM.names.to_source(canonical)
        assert source is not None, name
        state[f"model.{source}"] = values[name]
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, out)


def _torchrec_order(names: Iterable[str]) -> list[str]:
    """Order names as TorchRec's modules do: its cross network has a list per kind of tensor."""
    kinds = {name: re.sub(r"\bcross\.\d+\.", "cross.", name) for name in names}
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds.values()))}
    return sorted(kinds, key=lambda name: places[kinds[name]])


def main(arguments: list[str] | None = None) -> None:
    """Train and save, as the module's docstring shows."""
    defaults = TrainConfig(data=Path())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz, ...")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--arch", choices=("dlrm", "dcn"), default=defaults.arch)
    parser.add_argument("--embedding-dim", type=int, default=defaults.embedding_dim)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--table-decay", type=float, default=defaults.table_decay)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    values = vars(parser.parse_args(arguments))
    out: Path = values.pop("out")
    begin = time.perf_counter()

    def show(epoch: int, auc: float | None) -> None:
        text = "-" if auc is None else f"{auc:.4f}"
        print(f"epoch {epoch}: validation AUC {text}, {time.perf_counter() - begin:.1f} s")

    model, optimizer = train_flat(TrainConfig(**values), on_epoch=show)
    save_flat(model, optimizer, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
