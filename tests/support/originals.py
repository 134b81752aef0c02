"""What our models are compared with: TorchRec's own, and what dlrm_s_pytorch.py documents.

Logits are compared at 1e-6 of the largest one: the same sums are taken, but TorchRec pools with
fbgemm, multiplies pairs over another layout, and BLAS may add up in another order.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import Batch
from dmt_convert.families import FlatModelInfo, ModelConfig, infer_model
from dmt_convert.model import DmtModel, FlatModel, open_flat_model
from dmt_convert.model.dmt_spec import DmtSpec, TowerModuleSpec, TowerSpec
from dmt_convert.spec import TowerAssignment
from support.rows import random_bag

Logits = npt.NDArray[np.float32]

RTOL = 1e-6
NUM_DENSE = 3
ROWS = (1, 7, 30, 11, 2, 16, 9, 40, 5, 12, 21)
"""Rows of the tables; eleven of them, so that sorting names as strings moves some."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """A model as its trainer builds it, and what it says on a batch."""

    model: nn.Module
    batch: Batch
    logits: Logits

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())


def random_rows(rows: tuple[int, ...], *, lengths: int, size: int = 33, seed: int = 0) -> Batch:
    """Draw a batch; `lengths` 1: one id per bag, else 0 to that many."""
    rng = np.random.default_rng(seed)
    return Batch(
        bags=tuple(random_bag(rng, count, size, most=lengths) for count in rows),
        dense=rng.standard_normal((size, NUM_DENSE)).astype(np.float32),
        feature_names=tuple(f"f{i}" for i in range(len(rows))),
    )


@functools.cache
def torchrec_original(
    kind: str,
    *,
    rows: tuple[int, ...] = ROWS,
    dim: int = 6,
    lengths: int = 1,
    pooling: str = "sum",
    dtype: str = "float32",
    dense: tuple[int, ...] = (5,),
    over: tuple[int, ...] = (4, 1),
    layers: int = 3,
) -> Original:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchrec.models import dlrm
        from torchrec.modules.embedding_configs import (
            DataType,
            EmbeddingBagConfig,
            PoolingType,
        )
        from torchrec.modules.embedding_modules import EmbeddingBagCollection
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        torch.manual_seed(3)
        types = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
        collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t_cat_{i}",
                    embedding_dim=dim,
                    num_embeddings=count,
                    feature_names=[f"cat_{i}"],
                    data_type=DataType[types[dtype]],
                    pooling=PoolingType[pooling.upper()],
                )
                for i, count in enumerate(rows)
            ]
        )
        common: dict[str, Any] = {
            "embedding_bag_collection": collection,
            "dense_in_features": NUM_DENSE,
            "dense_arch_layer_sizes": [*dense, dim],
            "over_arch_layer_sizes": [*over],
        }
        if kind == "dcn":
            model: nn.Module = dlrm.DLRM_DCN(**common, dcn_num_layers=layers, dcn_low_rank_dim=4)
        elif kind == "projection":
            model = dlrm.DLRM_Projection(
                **common,
                interaction_branch1_layer_sizes=[7, 3 * dim],
                interaction_branch2_layer_sizes=[2 * dim],
            )
        else:
            model = dlrm.DLRM(**common)
        for table in collection.parameters():  # wide enough that a swapped table shows
            nn.init.uniform_(table, -1, 1)
        for name, parameter in model.named_parameters():
            if "crossnet.bias" in name:  # zero at the start
                nn.init.uniform_(parameter, -0.5, 0.5)
        batch = random_rows(rows, lengths=lengths)
        names = tuple(f"cat_{i}" for i in range(len(rows)))
        jagged = KeyedJaggedTensor.from_lengths_sync(
            keys=list(names),
            values=torch.cat([torch.from_numpy(bag.values) for bag in batch.bags]),
            lengths=torch.cat([torch.from_numpy(np.diff(bag.offsets)) for bag in batch.bags]),
        )
        if dtype != "float32":  # the trainer runs such tables under autocast; float them here
            wide = torchrec_original(
                kind, rows=rows, dim=dim, lengths=lengths, pooling=pooling, dense=dense, over=over
            ).model
            wide = copy.deepcopy(wide)
            wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        else:
            wide = model
        with torch.no_grad():
            logits = wide(torch.from_numpy(batch.dense), jagged).squeeze(1).numpy()
        model = dlrm.DLRMTrain(model) if kind == "train" else model
    return Original(model=model, batch=replace(batch, feature_names=names), logits=logits)


class FacebookDlrm(nn.Module):
    """What dlrm_s_pytorch.py computes, by its documentation; its names, none of its code."""

    def __init__(
        self,
        rows: tuple[int, ...],
        dim: int,
        bottom: list[int],
        top: list[int],
        *,
        itself: bool,
        interaction: str,
    ) -> None:
        super().__init__()
        self.interaction, self.itself = interaction, itself
        self.emb_l = nn.ModuleList(
            nn.EmbeddingBag(count, dim, mode="sum", include_last_offset=True) for count in rows
        )
        count = len(rows) + 1
        pairs = count * (count + 1) // 2 if itself else count * (count - 1) // 2
        width = count * dim if interaction == "cat" else dim + pairs
        self.bot_l = self._stack([NUM_DENSE, *bottom, dim], nn.ReLU())
        self.top_l = self._stack([width, *top, 1], nn.Sigmoid())

    @staticmethod
    def _stack(widths: list[int], last: nn.Module) -> nn.Sequential:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1], last)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return click probabilities, shape (B,)."""
        dense = self.bot_l(torch.from_numpy(batch.dense))
        vectors = [dense] + [
            table(torch.from_numpy(bag.values), torch.from_numpy(bag.offsets))
            for table, bag in zip(self.emb_l, batch.bags, strict=True)
        ]
        if self.interaction == "cat":
            return self.top_l(torch.cat(vectors, dim=1)).squeeze(1)
        dots = [
            (vectors[i] * vectors[j]).sum(dim=1, keepdim=True)
            for i in range(len(vectors))
            for j in range(i + 1 if self.itself else i)
        ]
        return self.top_l(torch.cat([dense, *dots], dim=1)).squeeze(1)


@functools.cache
def facebook_original(
    interaction: str,
    *,
    itself: bool = False,
    rows: tuple[int, ...] = ROWS,
    dim: int = 5,
    lengths: int = 4,
    bottom: tuple[int, ...] = (5,),
    top: tuple[int, ...] = (4,),
) -> Original:
    torch.manual_seed(5)
    model = FacebookDlrm(rows, dim, [*bottom], [*top], itself=itself, interaction=interaction)
    batch = random_rows(rows, lengths=lengths)
    with torch.no_grad():
        model = model.double()  # else the logit is lost where the sigmoid is near 0 or 1
        wide = replace(batch, dense=batch.dense.astype(np.float64))  # type: ignore[arg-type]
        logits = torch.logit(model(wide)).float().numpy()
        model = model.float()
    return Original(model=model, batch=batch, logits=logits)


def save_facebook(original: Original, path: Path) -> Path:
    """Save as `--save-model` does."""
    state = original.model.state_dict()
    torch.save(
        {
            "nepochs": 1,
            "nbatches": 10,
            "nbatches_test": 5,
            "state_dict": state,
            "test_acc": np.float64(78.25),
            "epoch": 0,
            "iter": 10,
            "train_loss": np.float64(0.45),
            "total_loss": np.float64(0.44),
            "opt_state_dict": {
                "state": {
                    i: {"step": torch.tensor(10.0), "sum": torch.full_like(t, i)}
                    for i, t in enumerate(state.values())
                },
                "param_groups": [{"lr": 0.1, "params": list(range(len(state)))}],
            },
        },
        path,
    )
    return path


def flat_logits(info: FlatModelInfo, batch: Batch) -> tuple[FlatModel, Logits]:
    model = open_flat_model(info)
    with torch.no_grad():
        return model, model(replace(batch, feature_names=info.spec.feature_names)).numpy()


def difference(ours: Logits, theirs: Logits) -> float:
    """Largest difference, relative to the largest logit."""
    assert np.abs(theirs).max() > 0.01 and theirs.std() > 0.001, "logits that say nothing"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def passthrough(flat: FlatModel, towers: int) -> DmtModel:
    """Deal the features out to towers, in turn, and backwards within each."""
    names = flat.spec.feature_names
    assignment = TowerAssignment(towers=tuple(names[t::towers][::-1] for t in range(towers)))
    module = TowerModuleSpec(kind="passthrough")
    spec = DmtSpec(
        flat=flat.spec,
        towers=tuple(TowerSpec(features=t, module=module) for t in assignment.towers),
    )
    model = DmtModel(spec, [flat.tables] * towers)
    missing, unexpected = model.load_state_dict(flat.state_dict(), strict=False)
    assert not missing and not unexpected
    return model.eval()


def assert_agrees(path: Path, original: Original, config: ModelConfig | None = None) -> None:
    """Compare the original, the flat model, and passthrough models of 1, 3 and F towers."""
    info = infer_model(open_checkpoint(path), config)
    flat, logits = flat_logits(info, original.batch)
    assert difference(logits, original.logits) <= RTOL
    batch = replace(original.batch, feature_names=info.spec.feature_names)
    count = len(info.spec.features)
    for towers in {1, min(3, count), count}:
        with torch.no_grad():
            same = passthrough(flat, towers)(batch).numpy()
        assert np.array_equal(same, logits), f"{towers} towers"
