"""Logits that are not finite: which rows, and what in the model or the data is to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from dmt_convert.arrays import Float32Array, IntArray
from dmt_convert.checkpoint import (
    ITEM_BYTES,
    TensorInfo,
    check_outliers,
    find_outlier_in_bytes,
    outlier_error,
    read_tensor,
    stream_tensor,
)
from dmt_convert.data import Batch
from dmt_convert.errors import BundleError, CheckpointError, DmtError, ExportError

if TYPE_CHECKING:
    from dmt_convert.scoring.scored_model import ScoredModel

_ERRORS: Final[Mapping[str, type[DmtError]]] = {
    "flat": CheckpointError,
    "bundle": BundleError,
    "export": ExportError,
}
_SHOWN: Final = 5
_ABSURD: Final = 1e6
"""A number is absurd if it is so much larger than the median of its tensor, and than 1."""


class LogitCheck:
    """Looks at the logits of every batch, and refuses the run in the end if any is not finite.

    Args:
        model: What computes them.
    """

    def __init__(self, model: ScoredModel) -> None:
        self._model = model
        self._rows = self._bad = 0
        self._first: list[int] = []
        self._batch: Batch | None = None

    def update(self, batch: Batch, logits: Float32Array) -> None:
        """Take the logits of the next batch."""
        bad = np.flatnonzero(~np.isfinite(logits))
        if len(bad):
            self._bad += len(bad)
            self._first += [self._rows + int(row) for row in bad[: _SHOWN - len(self._first)]]
            self._batch = self._batch or batch
        self._rows += len(logits)

    def finish(self) -> None:
        """Refuse logits that are not finite, and weights that can only be wrong.

        Raises:
            DmtError: Some are; what may be the cause is listed.
        """
        if self._batch is None:
            for tensor in self._model.weights:
                _refuse_outliers(tensor)
            return
        rows = ", ".join(map(str, self._first)) + (", ..." if self._bad > len(self._first) else "")
        causes = [*_causes(self._model, self._batch)]
        raise _ERRORS[self._model.kind](
            f"{self._bad} of {self._rows} logits of {self._model.path} are NaN or infinite "
            f"(rows {rows})",
            expected="finite logits",
            hint="use a checkpoint from before the training diverged; if it did not, the file is "
            "damaged: copy it again",
            details=causes,
        )


def _refuse_outliers(tensor: TensorInfo) -> None:
    """Refuse a weight that is absurd beside all others, though the logits are finite."""
    if len(tensor.shape) != 2:
        check_outliers(read_tensor(tensor), tensor.path)
        return
    first, item = 0, ITEM_BYTES[tensor.dtype]
    for chunk in stream_tensor(tensor):
        outlier = find_outlier_in_bytes(chunk, tensor.dtype)
        if outlier is not None:
            raise outlier_error(tensor.path, outlier, tensor.shape, first=first)
        first += chunk.nbytes // item


def _causes(model: ScoredModel, batch: Batch) -> Iterator[str]:
    """Say what is absurd: inputs, rows of tables, weights; and where it first shows."""
    dense = np.abs(batch.dense)
    if dense.size and float(dense.max()) > _ABSURD:
        row, column = np.unravel_index(int(dense.argmax()), dense.shape)
        yield f"dense input {column} of the data is {batch.dense[row, column]:.3g} in some row"
    if isinstance(model.module, torch.nn.Module):  # an export's weights are in its graphs
        for name, value in model.module.state_dict().items():
            yield from _absurd(name, value.detach())
    for name, value in model.stages(batch):
        if name.startswith("pooled embedding of "):
            feature = name.removeprefix("pooled embedding of ")
            yield from _absurd_rows(model, batch, feature, value)
        if not bool(torch.isfinite(value).all()):
            yield f"the first step whose result is not finite: {name}"
            return


def _absurd(name: str, value: torch.Tensor) -> Iterator[str]:
    if not value.numel() or not value.is_floating_point():
        return
    size = value.abs().flatten().float()
    largest, median = float(size.max()), float(size.median())
    if not largest <= _ABSURD * max(1.0, median):
        yield f"{name} holds {largest:.3g}; its median is {median:.3g}"


def _absurd_rows(
    model: ScoredModel, batch: Batch, feature: str, pooled: torch.Tensor
) -> Iterator[str]:
    size = pooled.abs().amax(dim=1)
    if bool((size <= _ABSURD).all()):
        return
    row = int(torch.argmax(torch.nan_to_num(size, nan=torch.inf)))
    bag = batch.bags[batch.feature_names.index(feature)]
    ids: IntArray = np.unique(bag.values[bag.offsets[row] : bag.offsets[row + 1]])
    shown = ", ".join(map(str, ids[:_SHOWN].tolist()))
    table = model.spec.table_of(feature).name
    yield f"table {table!r} gives up to {float(size[row]):.3g}: look at its rows {shown}"
