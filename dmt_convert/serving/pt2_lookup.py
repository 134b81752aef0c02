"""Pooled lookups as a traced graph holds them: few calls for many tables, and no id outside.

Ids are moved into their table before anything is read, whatever they are, and bags into the ids
that there are: a graph that is given nonsense reads its own rows. What was nonsense is found by
comparisons beside that, and refused once per graph (`refuse_wrong`).

Letters: B batch, F features, N embedding dim, L ids per bag, nnz ids of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.serving.graph_inputs import PADDING, FeatureInput, GraphInputs
from dmt_convert.spec import FeatureSpec, ModelSpec

Feeds = Mapping[str, Tensor]

_QUANTISED: Final = (".quantized", ".scale", ".zero_point")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Tables that lie side by side in a file and are alike: one tensor to a graph."""

    tables: tuple[str, ...]
    """Their names."""
    rows: tuple[int, ...]
    """Rows of each."""
    dim: int
    """N."""
    suffixes: tuple[str, ...]
    """What the file calls the tensors of a table, behind its name: the first holds its rows."""
    plain: bool
    """Whether they are stored as float32: their rows can be pooled as they are."""
    packed: bool
    """Whether one byte holds two columns (int4)."""

    def names(self, suffix: str) -> tuple[str, ...]:
        """Names of the tensors that one suffix stacks."""
        return tuple(f"tables.{table}{suffix}" for table in self.tables)

    def first_row(self, table: str) -> int:
        """Where a table begins."""
        return sum(self.rows[: self.tables.index(table)])


def stack_tables(
    spec: ModelSpec, tables: Sequence[str], tensors: Mapping[str, TensorInfo], *, packed: bool
) -> tuple[Stack, ...]:
    """Join neighbours of one width and type.

    Args:
        spec: The flat model.
        tables: The tables of one weights file.
        tensors: Its tensors.
        packed: Whether quantised tables hold two columns per byte.
    """
    stacks: list[Stack] = []
    for name in dict.fromkeys(tables):
        table = spec.table(name)
        quantised = f"tables.{name}.quantized" in tensors
        alone = Stack(
            tables=(name,),
            rows=(table.rows,),
            dim=table.dim,
            suffixes=_QUANTISED if quantised else (".weight",),
            plain=not quantised and tensors[f"tables.{name}.weight"].dtype == "fp32",
            packed=packed and quantised,
        )
        if stacks and _follows(stacks[-1], alone, tensors):
            last = stacks[-1]
            stacks[-1] = replace(last, tables=(*last.tables, name), rows=(*last.rows, table.rows))
        else:
            stacks.append(alone)
    return tuple(stacks)


def _follows(stack: Stack, alone: Stack, tensors: Mapping[str, TensorInfo]) -> bool:
    if (stack.dim, stack.suffixes) != (alone.dim, alone.suffixes):
        return False
    for suffix in stack.suffixes:
        last, new = tensors[stack.names(suffix)[-1]], tensors[alone.names(suffix)[0]]
        (end,), (begin,) = last.pieces, new.pieces
        if last.dtype != new.dtype or end.offset + end.length != begin.offset:
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Features that are looked up by one call."""

    stack: int
    """Index of the stack."""
    features: tuple[str, ...]
    """The features."""
    single: bool
    """Whether each has one id per row: then nothing is pooled."""
    weighted: bool
    """Whether the call takes a weight per id (padding has the weight 0)."""
    mean: bool
    """Whether it gives means."""


class TowerLookup(nn.Module):
    """Pooled embeddings of one tower.

    Args:
        spec: The flat model.
        features: Features of the tower.
        inputs: What the graph takes.
        stacks: Stacked tables.
        tensors: The tensors of every stack, in the order of its suffixes.
        clip: Whether an id outside its table takes the nearest row, and is not refused.
    """

    def __init__(
        self,
        spec: ModelSpec,
        features: Sequence[str],
        inputs: GraphInputs,
        stacks: Sequence[Stack],
        tensors: Sequence[Sequence[Tensor]],
        *,
        clip: bool,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.stacks = tuple(stacks)
        self.clip = clip
        self._specs = {f.name: f for f in spec.features if f.name in self.features}
        self._inputs = {name: inputs.feature(name) for name in self.features}
        self.sources: dict[str, tuple[str, ...]] = {}
        for i, (stack, parts) in enumerate(zip(self.stacks, tensors, strict=True)):
            for suffix, tensor in zip(stack.suffixes, parts, strict=True):
                name = f"stack_{i}_{suffix[1:]}"
                # no buffer: torch._inductor copies the values of buffers, not those of parameters
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                self.sources[name] = stack.names(suffix)
        self._groups = tuple(_group(self.stacks, self.features, self._specs, self._inputs))

    def forward(self, feeds: Feeds) -> tuple[Tensor, list[Tensor]]:
        """Look up a batch.

        Returns:
            Pooled embeddings side by side, shape (B, M), float32; and whether something was wrong,
            each of shape (), bool.
        """
        wrong: list[Tensor] = []
        pooled: dict[str, Tensor] = {}
        for group in self._groups:
            look_up = self._singles if group.single else self._bags
            vectors_BFN = look_up(group, feeds, wrong)
            if group.features == self.features:
                return vectors_BFN.flatten(1), wrong
            pooled.update(zip(group.features, vectors_BFN.unbind(1), strict=True))
        return torch.cat([pooled[name] for name in self.features], dim=1), wrong

    def _singles(self, group: _Group, feeds: Feeds, wrong: list[Tensor]) -> Tensor:
        """Return one row per feature, shape (B, F, N)."""
        ids_BF = torch.cat([self._ids(name, feeds, wrong) for name in group.features], dim=1)
        table = getattr(self, f"stack_{group.stack}_{self.stacks[group.stack].suffixes[0][1:]}")
        if self.stacks[group.stack].plain:
            # a bag each: on CPUs its kernel asks for rows ahead of time, which a compiled gather
            # does not; on a GPU inductor would try a gather out on a table of its own making
            ids = ids_BF.flatten()
            each = torch.arange(ids.shape[0], device=ids.device)
            rows = functional.embedding_bag(ids, table, each, mode="sum")
            rows_BFN = rows.reshape(-1, len(group.features), rows.shape[1])
        else:
            rows_BFN = self._rows(group.stack, ids_BF)
        if group.weighted:
            weights = [feeds[f"{name}.weights"] for name in group.features]
            rows_BFN = rows_BFN * torch.cat(weights, dim=1).unsqueeze(2)
        return rows_BFN

    def _bags(self, group: _Group, feeds: Feeds, wrong: list[Tensor]) -> Tensor:
        """Return one pooled vector per feature, shape (B, F, N)."""
        ids = [self._ids(name, feeds, wrong).flatten() for name in group.features]
        lengths_F = [self._lengths(name, feeds, wrong) for name in group.features]
        values, lengths = torch.cat(ids), torch.cat(lengths_F)
        count = values.shape[0]
        ends = lengths.clamp(min=0, max=count).cumsum(0).clamp(max=count)
        weights = [self._weights(name, feeds) for name in group.features] if group.weighted else []
        stack = self.stacks[group.stack]
        if stack.plain:
            table = getattr(self, f"stack_{group.stack}_weight")
        else:
            table = self._rows(group.stack, values)
            values = torch.arange(count, device=values.device)
        pooled = functional.embedding_bag(
            values,
            table,
            functional.pad(ends, (1, 0)),
            mode="mean" if group.mean and not group.weighted else "sum",
            per_sample_weights=torch.cat(weights) if weights else None,
            include_last_offset=True,
        )
        if group.mean and group.weighted:
            counts = torch.cat([self._counts(name, feeds) for name in group.features])
            pooled = pooled / counts.clamp(min=1).unsqueeze(1)
        features = len(group.features)
        return pooled.reshape(features, lengths_F[0].shape[0], stack.dim).transpose(0, 1)

    def _ids(self, feature: str, feeds: Feeds, wrong: list[Tensor]) -> Tensor:
        """Return rows of the feature's stack in the shape of its ids."""
        table = self._specs[feature].table
        stack = next(stack for stack in self.stacks if table in stack.tables)
        rows = stack.rows[stack.tables.index(table)]
        form = self._inputs[feature]
        ids = feeds[form.ids]
        if not self.clip:
            lowest = PADDING if form.form == "padded" else 0
            wrong.append(((ids < lowest) | (ids >= rows)).any())
        return ids.clamp(0, rows - 1) + stack.first_row(table)

    def _lengths(self, feature: str, feeds: Feeds, wrong: list[Tensor]) -> Tensor:
        """Return the ids of every bag, padding included, shape (B,)."""
        form = self._inputs[feature]
        ids = feeds[form.ids]
        if form.lengths is None:
            return torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
        lengths = feeds[form.lengths]
        wrong.append(((lengths < 0) | (lengths > ids.shape[0])).any())
        wrong.append(lengths.sum() != ids.shape[0])
        return lengths

    def _weights(self, feature: str, feeds: Feeds) -> Tensor:
        """Return the weight of every id, shape (nnz,); 0 for padding."""
        form = self._inputs[feature]
        given = None if form.weights is None else feeds[form.weights].flatten()
        if form.form != "padded":
            assert given is not None
            return given
        filled = (feeds[form.ids] != PADDING).to(torch.float32).flatten()
        return filled if given is None else given * filled

    def _counts(self, feature: str, feeds: Feeds) -> Tensor:
        """Return the ids of every bag, padding left out, shape (B,)."""
        form = self._inputs[feature]
        if form.form == "padded":
            return (feeds[form.ids] != PADDING).sum(dim=1)
        return self._lengths(feature, feeds, [])

    def _rows(self, index: int, rows: Tensor) -> Tensor:
        """Return rows of a stack as float32, in the shape of `rows`, then N."""
        stack = self.stacks[index]
        stored = [getattr(self, f"stack_{index}_{suffix[1:]}") for suffix in stack.suffixes]
        values: Tensor = stored[0][rows]
        if len(stored) == 1:
            return values.to(torch.float32)
        if stack.packed:
            values = torch.cat((values & 15, values >> 4), dim=-1)[..., : stack.dim]
        scale, zero_point = (part[rows].unsqueeze(-1) for part in stored[1:])
        decoded: Tensor = (values.to(torch.float32) - zero_point.to(torch.float32)) * scale
        return decoded


def _group(
    stacks: Sequence[Stack],
    features: Sequence[str],
    specs: Mapping[str, FeatureSpec],
    inputs: Mapping[str, FeatureInput],
) -> Iterator[_Group]:
    """Join features that one call can look up.

    Bags of tables that are not float32 are decoded before they are pooled: all features at once
    would take memory that no cache holds, so each has a call of its own.
    """
    members: dict[tuple[int, bool, bool, bool, str], list[str]] = {}
    for name in features:
        table = specs[name].table
        (stack,) = (i for i, stack in enumerate(stacks) if table in stack.tables)
        form = inputs[name]
        single = form.form == "single"
        weighted = form.weighted or form.form == "padded"
        mean = specs[name].pooling == "mean" and not single
        alone = "" if single or stacks[stack].plain else name
        members.setdefault((stack, single, weighted, mean, alone), []).append(name)
    for (stack, single, weighted, mean, _), names in members.items():
        yield _Group(
            stack=stack, features=tuple(names), single=single, weighted=weighted, mean=mean
        )


def refuse_wrong(wrong: Sequence[Tensor]) -> None:
    """Make a graph fail where one of these holds; each of shape (), bool."""
    if wrong:
        found = torch.stack(list(wrong)).any().to(torch.int64).item()
        torch._check(found == 0)  # type: ignore[no-untyped-call]
