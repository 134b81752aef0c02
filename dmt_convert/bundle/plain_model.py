"""A bundle as a plain `nn.Module` over tensors, for a program of one's own.

Letters: B batch, D dense inputs, L ids per row, nnz ids in total.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dmt_convert.arrays import AnyArray
from dmt_convert.bundle.bundle import Bundle
from dmt_convert.bundle.bundle_model import open_bundle_model
from dmt_convert.checkpoint import read_tensor
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import DataError
from dmt_convert.model import DmtModel, TrainableTables

Ids = Tensor | tuple[Tensor, ...]
"""Ids of one feature, see `PlainModel.forward`."""


class PlainModel(nn.Module):
    """The converted model of a bundle.

    Attributes:
        dmt: The model itself: `dense_arch`, `towers`, `interaction`, `over_arch`.
        feature_names: The categorical features, in the model's order.
        num_dense: D, the number of dense inputs; may be 0.

    Args:
        dmt: The model.
    """

    def __init__(self, dmt: DmtModel) -> None:
        super().__init__()
        self.dmt = dmt
        self.feature_names = dmt.spec.flat.feature_names
        self.num_dense = dmt.spec.flat.num_dense

    def forward(self, dense: Tensor | None, features: Mapping[str, Ids]) -> Tensor:
        """Return logits before any sigmoid, shape (B,), float32.

        Args:
            dense: Dense inputs as they are fed to the flat model, shape (B, D), float32. None for a
                model without dense inputs.
            features: Ids of every feature by name, int64, each in one of these forms:
                shape (B,), one id per row;
                shape (B, L), up to L ids per row, filled up with -1;
                `(values, offsets)`, shapes (nnz,) and (B + 1,): row i has the ids
                `values[offsets[i]:offsets[i + 1]]`;
                `(values, offsets, weights)`, with one float32 weight per id, shape (nnz,).

        Raises:
            DataError: A feature is missing, has another number of rows, offsets that do not divide
                its ids, or an id that is not in its table; or `dense` has another shape.
        """
        missing = [name for name in self.feature_names if name not in features]
        unknown = [name for name in features if name not in self.feature_names]
        if missing or unknown:
            raise DataError(
                f"features that are missing: {missing[:5]}, that the model does not have: "
                f"{unknown[:5]}",
                expected=f"the {len(self.feature_names)} features of the model",
                hint="`model.feature_names` lists them",
            )
        bags = tuple(_bag(name, features[name]) for name in self.feature_names)
        rows = len(bags[0].offsets) - 1 if dense is None else len(dense)
        for name, bag in zip(self.feature_names, bags, strict=True):
            self._check(name, bag, rows)
        values = torch.zeros(rows, 0) if dense is None else dense
        if values.shape != (rows, self.num_dense):
            raise DataError(
                "no dense inputs"
                if dense is None
                else f"dense inputs of shape {list(dense.shape)}",
                expected=f"shape (B, {self.num_dense})",
                hint="give what the flat model takes, columns in its order",
            )
        batch = Batch(
            dense=np.asarray(values.detach().cpu(), dtype=np.float32),
            feature_names=self.feature_names,
            bags=bags,
        )
        logits: Tensor = self.dmt(batch)
        return logits

    def _check(self, name: str, bag: Bag, rows: int) -> None:
        if len(bag.offsets) - 1 != rows:
            raise DataError(
                f"feature {name!r} has {len(bag.offsets) - 1} rows",
                expected=f"{rows} rows, as the other inputs have",
                hint="every input holds the same rows, in the same order",
            )
        feature = next(f for f in self.dmt.spec.flat.features if f.name == name)
        feature.check_bags(bag.values, bag.offsets)
        last = self.dmt.spec.flat.table(feature.table).rows - 1
        if len(bag.values) and not 0 <= bag.values.min() <= bag.values.max() <= last:
            raise DataError(
                f"feature {name!r} has ids from {bag.values.min()} to {bag.values.max()}",
                expected=f"ids from 0 to {last}",
                hint="-1 fills up rows of shape (B, L) only; other ids are not mapped",
            )


def _bag(name: str, ids: Ids) -> Bag:
    if isinstance(ids, tuple):
        values, offsets, *weights = (part.detach().cpu().numpy() for part in ids)
        _check_whole(name, values, offsets)
        _check_jagged(name, values, offsets, *weights)
        return Bag(
            values=values.astype(np.int64),
            offsets=offsets.astype(np.int64),
            weights=weights[0].astype(np.float32) if weights else None,
        )
    table = ids.detach().cpu().numpy()
    _check_whole(name, table)
    if table.ndim not in (1, 2):
        raise DataError(
            f"feature {name!r} has ids of shape {list(table.shape)}",
            expected="shape (B,) or (B, L), or a tuple (values, offsets)",
            hint="flatten them to (B, L)",
        )
    kept = np.ones((len(table), 1), bool) if table.ndim == 1 else table != -1
    table = table.reshape(kept.shape).astype(np.int64)
    offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int64)
    return Bag(values=table[kept], offsets=offsets)


def _check_whole(name: str, *arrays: AnyArray) -> None:
    """Refuse numbers that are not integers: rounding them would look up other rows."""
    for array in arrays:
        if array.dtype.kind not in "iu":
            raise DataError(
                f"feature {name!r} has ids or offsets of type torch.{array.dtype}",
                expected="int64",
                hint="convert them with .long(), if they are whole numbers",
            )


def _check_jagged(
    name: str, values: AnyArray, offsets: AnyArray, weights: AnyArray | None = None
) -> None:
    """Refuse offsets that leave ids out or take some twice, and weights of another number."""
    whole = offsets.ndim == 1 and len(offsets) > 0 and values.ndim == 1
    if not whole or offsets[0] or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"feature {name!r} has offsets that do not divide its {values.size} ids",
            expected="B + 1 offsets that begin with 0, never fall and end with the number of ids",
            hint="nn.EmbeddingBag leaves out the last one: append the number of ids",
        )
    if weights is not None and weights.shape != values.shape:
        raise DataError(
            f"feature {name!r} has {weights.size} weights for {values.size} ids",
            expected="one weight per id",
            hint="give (values, offsets), if ids have no weights",
        )


def open_plain_model(bundle: Bundle, *, in_memory: bool = False) -> PlainModel:
    """Build the model of a bundle, in eval mode.

    Args:
        bundle: The bundle.
        in_memory: Load the tables, as parameters that can be trained. By default they stay on
            disk, and a batch reads the rows that it touches.

    Raises:
        BundleError: A tensor is missing, or has the wrong shape.
    """
    model = open_bundle_model(bundle)
    if not in_memory:
        return PlainModel(model).eval()
    for tower, tensors in zip(model.tower_list, bundle.towers, strict=True):
        tables = TrainableTables(model.spec.flat, tower.features)
        for table, module in tables.items():
            rows = read_tensor(tensors[f"tables.{table}.weight"])
            module.weight.data = torch.from_numpy(np.array(rows, dtype=np.float32))
        tower.tables = tables
    return PlainModel(model).eval()
