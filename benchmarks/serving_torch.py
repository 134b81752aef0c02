"""The rivals that run in eager torch: lookups of every kind, and the dense parts behind them.

Letters: B batch, F features, M widths of all embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_case import FEATURES, TOWERS, Case, Inputs, tower_spec
from serving_weights import INT8_WEIGHTS, SharedWeights, table_name
from torch import Tensor, nn

from dmt_convert.model import DmtModel, FlatModel

Prepare = Callable[[Inputs], Any]
"""From a batch to what the runtime takes; not timed."""
Run = Callable[[Any], Any]
"""From that to the result; timed."""


def open_torch(lookup: str, function: str, case: Case, folder: Path) -> tuple[Prepare, Run]:
    """Open an eager model.

    Args:
        lookup: bag, embedding, tbe, tbe-int8 or torchrec-int8.
        function: flat, c2 or c4.
        case: What it serves.
        folder: Where the weights lie.
    """
    shared = SharedWeights(folder)
    prepare, pool = _open_lookup(lookup, shared, case.form, folder)
    spec = tower_spec(case.model, case.rows, function, TOWERS)
    with torch.device("meta"):
        absent = nn.Identity()
        model: nn.Module = (
            FlatModel(spec.flat, absent)
            if function == "flat"
            else DmtModel(spec, [absent] * len(spec.towers))
        )
    shared.load(model, spec, case.model, function)
    model.eval()

    def prepare_all(inputs: Inputs) -> Any:
        return torch.from_numpy(inputs.dense), prepare(inputs)

    def run(prepared: Any) -> Tensor:
        dense, ids = prepared
        with torch.inference_mode():
            pooled = pool(ids)
            if case.part == "lookup":
                return pooled
            logits: Tensor = model.forward_pooled(dense, pooled)  # type: ignore[operator]
            return logits

    return prepare_all, run


def _open_lookup(
    lookup: str, shared: SharedWeights, form: str, folder: Path
) -> tuple[Prepare, Run]:
    if lookup == "bag":
        return _bags(shared, form)
    if lookup == "embedding":
        return _embeddings(shared, form)
    if lookup == "torchrec-int8":
        return _torchrec(_kernel(shared, folder, "int8"))
    return _tbe(_kernel(shared, folder, "int8" if lookup == "tbe-int8" else "fp32"))


def _bags(shared: SharedWeights, form: str) -> tuple[Prepare, Run]:
    """One `nn.EmbeddingBag` per table, as DLRM's authors write it."""
    bags = [
        nn.EmbeddingBag(*weight.shape, mode="sum", _weight=weight)
        for weight in (shared.tensor(table_name(i)) for i in range(FEATURES))
    ]

    def prepare(inputs: Inputs) -> list[tuple[Tensor, ...]]:
        if form != "jagged":
            return [(torch.from_numpy(values),) for values in inputs.values]
        return [
            (torch.from_numpy(values), torch.from_numpy(np.cumsum(lengths) - lengths))
            for values, lengths in zip(inputs.values, inputs.lengths, strict=True)
        ]

    def pool(ids: list[tuple[Tensor, ...]]) -> Tensor:
        return torch.cat([bag(*each) for bag, each in zip(bags, ids, strict=True)], dim=1)

    return prepare, pool


def _embeddings(shared: SharedWeights, form: str) -> tuple[Prepare, Run]:
    """One `nn.Embedding` per table; bags of a fixed length are summed."""
    tables = [
        nn.Embedding(*weight.shape, _weight=weight)
        for weight in (shared.tensor(table_name(i)) for i in range(FEATURES))
    ]
    single = form == "single"

    def prepare(inputs: Inputs) -> list[Tensor]:
        return [torch.from_numpy(v[:, 0].copy() if single else v) for v in inputs.values]

    def pool(ids: list[Tensor]) -> Tensor:
        rows = [table(each) for table, each in zip(tables, ids, strict=True)]
        return torch.cat(rows if single else [each.sum(1) for each in rows], dim=1)

    return prepare, pool


def _kernel(shared: SharedWeights, folder: Path, code: str) -> Any:
    from serving_tbe import build_tbe

    tbe = build_tbe(shared.rows, code)
    if code == "fp32":
        return tbe.share(shared.all_tables())
    data = np.memmap(folder / INT8_WEIGHTS, dtype=np.uint8, mode="c")
    return tbe.share(torch.from_numpy(data))


def _tbe(kernel: Any) -> tuple[Prepare, Run]:
    """fbgemm's inference kernel over all tables at once."""

    def prepare(inputs: Inputs) -> tuple[Tensor, Tensor]:
        offsets = np.concatenate([[0], np.cumsum(inputs.all_lengths)])
        return torch.from_numpy(inputs.all_values), torch.from_numpy(offsets)

    return prepare, lambda ids: kernel(*ids)


def _torchrec(kernel: Any) -> tuple[Prepare, Run]:
    """TorchRec's quantised module, which asks the same kernel."""
    from serving_tbe import build_torchrec
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    collection = build_torchrec(kernel)
    keys = list(collection._feature_names)

    def prepare(inputs: Inputs) -> Any:
        return KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(inputs.all_values),
            lengths=torch.from_numpy(inputs.all_lengths),
        )

    return prepare, lambda ids: collection(ids).values()
