"""Matrices whose columns are joined as late as possible, for graphs that answer requests.

What the towers emit meets in the head: columns are joined, put into another order, multiplied by a
layer's weight. `Columns` stands in for such a matrix while a graph is traced. It lets the model's
own code run as it is, and postpones the joining, so that the traced graph

- moves no vector whose only use is in dot products, where any order does, and
- computes once what depends on tensors of one row alone (one user, many candidates): a layer over
  columns of both kinds is split into two products, and dot products of two such vectors have one
  row.

Every operation that is not known here gets the joined matrix, so that other models are right too.

Letters: B batch, M columns, K vectors, D their width, P pairs.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from dmt_convert.arrays import BoolArray, IntArray

Rows = int | torch.SymInt


def keep_values(index: Tensor) -> None:
    """Let the values of an index be known while a graph is traced; the tracer hides them."""
    index.known_values = index.numpy()  # type: ignore[attr-defined]


def known_values(index: Tensor) -> IntArray | None:
    """Return what `keep_values` kept, if it did."""
    return getattr(index, "known_values", None)


@dataclass(eq=False, slots=True, kw_only=True)
class Source:
    """A matrix that columns come from."""

    tensor: Tensor
    """Shape (B, width), or (1, width)."""
    once: bool
    """Whether it has one row, which stands for all B."""
    pieces: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Begin and end -> the columns between them, where the matrix was cut into such pieces."""

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.tensor.shape[1])

    def cut(self, runs: Sequence[tuple[int, int]]) -> None:
        """Cut the matrix by one operation, if these runs of columns are all that it has."""
        ordered = sorted(runs)
        ends = [0, *(end for _, end in ordered)]
        if len(ordered) > 1 and [*(begin for begin, _ in ordered), self.width] == ends:
            parts = torch.split(self.tensor, [end - begin for begin, end in ordered], dim=1)
            self.pieces = dict(zip(ordered, parts, strict=True))

    def take(self, begin: int, end: int) -> Tensor:
        """Return neighbouring columns."""
        if (begin, end) == (0, self.width):
            return self.tensor
        piece = self.pieces.get((begin, end))
        return self.tensor[:, begin:end] if piece is None else piece


class Joinable(ABC):
    """What stands for a tensor and knows its parts; otherwise it does as the tensor does."""

    @abstractmethod
    def joined(self) -> Tensor:
        """Return the tensor."""

    def __getattr__(self, name: str) -> Any:
        """Let the tensor answer whatever else a model asks."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.joined(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do to the tensors what a subclass does not do better."""
        return func(*_join(args), **_join(kwargs or {}))


class Columns(Joinable):
    """A matrix (B, M), as columns of other matrices.

    Args:
        batch: B.
        sources: The other matrices.
        source: Which of them every column comes from, shape (M,).
        column: Which column of it that is, shape (M,).
    """

    def __init__(
        self, batch: Rows, sources: Sequence[Source], source: IntArray, column: IntArray
    ) -> None:
        self.batch = batch
        self.sources = tuple(sources)
        self.source, self.column = source, column
        self._joined: Tensor | None = None

    @classmethod
    def of(cls, batch: Rows, tensor: Tensor, *, once: bool = False) -> Columns:
        """Return all columns of one matrix, (B, M) or (1, M)."""
        width = int(tensor.shape[1])
        return cls(
            batch,
            (Source(tensor=tensor, once=once),),
            np.zeros(width, dtype=np.int64),
            np.arange(width),
        )

    @classmethod
    def cat(cls, parts: Sequence[Columns | Tensor]) -> Columns:
        """Put matrices side by side; at least one is a `Columns`."""
        batch = next(part.batch for part in parts if isinstance(part, Columns))
        known = [part if isinstance(part, Columns) else cls.of(batch, part) for part in parts]
        begins = np.cumsum([0, *(len(part.sources) for part in known)])
        return cls(
            batch,
            [source for part in known for source in part.sources],
            np.concatenate([p.source + b for p, b in zip(known, begins[:-1], strict=True)]),
            np.concatenate([part.column for part in known]),
        )

    @property
    def shape(self) -> tuple[Rows, int]:
        """(B, M)."""
        return self.batch, len(self.column)

    @property
    def once(self) -> BoolArray:
        """Whether every column has one row that stands for all, shape (M,)."""
        return np.array([source.once for source in self.sources], dtype=bool)[self.source]

    def take(self, index: IntArray) -> Columns:
        """Return some columns, in the given order."""
        return Columns(self.batch, self.sources, self.source[index], self.column[index])

    def joined(self) -> Tensor:
        """Return the matrix, (B, M)."""
        if self._joined is None:
            pieces = [
                piece.expand(self.batch, -1) if source.once else piece
                for source, piece in self._pieces()
            ]
            if not pieces:
                pieces = [self.sources[0].tensor.new_zeros(self.batch, 0)]
            self._joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return self._joined

    def split(self, widths: int | list[int], dim: int = 0) -> Sequence[Columns | Tensor]:
        """Cut the matrix into neighbouring columns."""
        if dim != 1 or isinstance(widths, int):
            return torch.split(self.joined(), widths, dim)
        ends = np.cumsum(widths)
        parts = [self.take(np.arange(end - w, end)) for end, w in zip(ends, widths, strict=True)]
        Columns.cat(parts)._cut()
        return parts

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Columns:
        """Apply a linear layer; what has one row is multiplied once."""
        once = self.once
        if once.all() or not once.any():
            product = functional.linear(self.side(), weight, bias)
            return Columns.of(self.batch, product, once=bool(once.any()))
        products = []
        for wanted, added in ((once, None), (~once, bias)):
            places = self.stored_order(np.flatnonzero(wanted))
            own = weight.index_select(1, torch.from_numpy(places).to(weight.device))
            products.append(functional.linear(self.take(places).side(), own, added))
        return Columns.of(self.batch, products[0] + products[1])

    def apply(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """Apply a function to every element."""
        once = bool(self.once.all())
        tensor = self.side() if once else self.joined()
        return Columns.of(self.batch, function(tensor), once=once)

    def pad(
        self, sizes: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> Columns | Tensor:
        """Append columns of zeros."""
        if len(sizes) != 2 or sizes[0] or mode != "constant" or value:
            return functional.pad(self.joined(), list(sizes), mode, value)
        zeros = self.sources[0].tensor.new_zeros(1, sizes[1])
        return Columns.cat((self, Columns.of(self.batch, zeros, once=True)))

    def reshape(self, *shape: Any) -> Vectors | Tensor:
        """Cut every row into vectors, (B, K, D), or into any other shape."""
        known = len(shape) == 3 and isinstance(shape[2], int) and shape[2] > 0
        if known and self.shape[1] % shape[2] == 0 and shape[1] in (-1, self.shape[1] // shape[2]):
            return Vectors(self, shape[2])
        return self.joined().reshape(*shape)

    def index_select(self, dim: int, index: Tensor) -> Columns | Tensor:
        """Return some columns, as `Tensor.index_select` does."""
        values = known_values(index)
        if dim != 1 or values is None:
            return self.joined().index_select(dim, index)
        return self.take(values)._cut()

    def __getitem__(self, index: Any) -> Columns | Tensor:
        """Return some columns if the index asks for columns of all rows."""
        rows, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, None)
        if rows == slice(None) and isinstance(columns, Tensor):
            return self.index_select(1, columns)
        return self.joined()[index]

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore[arg-type]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what is known here to columns, and all else to the joined matrix."""
        kwargs = kwargs or {}
        if func is torch.cat and (args[1:] or tuple(kwargs.values())) == (1,):
            return cls.cat(args[0])
        known = _FUNCTIONS.get(func)
        if known is not None and isinstance(args[0], Columns):
            return known(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield source, begin and end of neighbours that are neighbours in their source, too."""
        step = np.flatnonzero((np.diff(self.source) != 0) | (np.diff(self.column) != 1)) + 1
        edges = [0, *step.tolist(), len(self.column)] if len(self.column) else []
        for begin, end in itertools.pairwise(edges):
            first = int(self.column[begin])
            yield int(self.source[begin]), first, first + end - begin

    def _pieces(self) -> list[tuple[Source, Tensor]]:
        """Return matrices that are all columns side by side, and where each is from."""
        pieces: list[tuple[Source, Tensor]] = []
        for number, begin, end in self._runs():
            source = self.sources[number]
            pieces.append((source, source.take(begin, end)))
        return pieces

    def _cut(self) -> Columns:
        """Cut every source where neighbours are apart: one operation makes all pieces of it."""
        runs: dict[int, list[tuple[int, int]]] = {}
        for number, begin, end in self._runs():
            runs.setdefault(number, []).append((begin, end))
        for number, own in runs.items():
            self.sources[number].cut(own)
        return self

    def side(self) -> Tensor:
        """Join columns that all have one row, or all B."""
        pieces = [piece for _, piece in self._pieces()]
        if self._joined is not None and not self.once.any():
            return self._joined
        side = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if not self.once.any():
            self._joined = side
        return side

    def stored_order(self, places: IntArray) -> IntArray:
        """Sort places by where their columns are stored, so that none has to be moved."""
        order = np.lexsort((self.column[places], self.source[places]))
        return np.ascontiguousarray(places[order])


class Vectors(Joinable):
    """K vectors per row, (B, K, D), as columns side by side.

    Args:
        columns: The matrix, (B, K * D).
        dim: D.
        turned: Whether the last two axes are exchanged.
    """

    def __init__(self, columns: Columns, dim: int, *, turned: bool = False) -> None:
        self.columns, self.dim, self.turned = columns, dim, turned

    def transpose(self, first: int, second: int) -> Vectors | Tensor:
        """Exchange two axes."""
        if {first % 3, second % 3} == {1, 2}:
            return Vectors(self.columns, self.dim, turned=not self.turned)
        return self.joined().transpose(first, second)

    def joined(self) -> Tensor:
        """Return the vectors as a tensor."""
        vectors = self.columns.joined().reshape(-1, self.columns.shape[1] // self.dim, self.dim)
        return vectors.transpose(1, 2) if self.turned else vectors

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply the vectors by each other; all else is done to the joined tensor."""
        if func in (torch.bmm, torch.matmul) and len(args) == 2:
            left, right = args
            both = isinstance(left, Vectors) and isinstance(right, Vectors)
            if both and left.columns is right.columns and right.turned and not left.turned:
                return Gram(left)
        return super().__torch_function__(func, types, args, kwargs)


class Gram(Joinable):
    """Dot products of vectors with each other, (B, K, K) or, flat, (B, K * K).

    They are computed of the vectors as they are stored, and the wanted ones are looked up there: a
    product is the same whichever of the two vectors is named first.

    Args:
        vectors: The vectors.
    """

    def __init__(self, vectors: Vectors) -> None:
        self._vectors, self._flat = vectors, False
        columns, dim = vectors.columns, vectors.dim
        places = np.arange(columns.shape[1]).reshape(-1, dim)
        once = columns.once.reshape(-1, dim)
        if (once.any(axis=1) != once.all(axis=1)).any():  # vectors that are filled up with zeros
            columns, once = Columns.of(columns.batch, columns.joined()), np.zeros_like(once)
        self._batch = columns.batch
        self._once: BoolArray = once[:, 0]
        self._place = np.zeros(len(places), dtype=np.int64)
        self._sides: dict[bool, Tensor] = {}
        for kind in (True, False):
            members = np.flatnonzero(self._once == kind)
            if len(members):
                stored = columns.stored_order(places[members, 0]) // dim
                self._place[stored] = np.arange(len(stored))
                side = columns.take(places[stored].reshape(-1)).side()
                self._sides[kind] = side.reshape(-1, len(stored), dim)

    def joined(self) -> Tensor:
        """Return all dot products."""
        vectors = self._vectors.joined()
        dots = torch.bmm(vectors, vectors.transpose(1, 2))
        return dots.flatten(1) if self._flat else dots

    def flatten(self, start_dim: int) -> Gram | Tensor:
        """Take every row's matrix for a vector."""
        if start_dim != 1:
            return self.joined().flatten(start_dim)
        self._flat = True
        return self

    def index_select(self, dim: int, index: Tensor) -> Columns | Tensor:
        """Return some dot products, (B, P)."""
        values = known_values(index)
        if dim != 1 or not self._flat or values is None:
            return self.joined().index_select(dim, index)
        left, right = np.divmod(values, len(self._place))
        alone = self._once[left] & self._once[right]
        parts, places = [], []
        for once, pick in ((True, self._of_one_row), (False, self._of_all_rows)):
            pairs = np.flatnonzero(alone == once)
            if len(pairs):
                dots = pick(left[pairs], right[pairs])
                parts.append(Columns.of(self._batch, dots, once=once))
                places.append(pairs)
        return Columns.cat(parts).take(np.argsort(np.concatenate(places)))

    def _of_one_row(self, left: IntArray, right: IntArray) -> Tensor:
        """Multiply vectors of one row with each other: (1, P)."""
        vectors = self._sides[True]
        dots = torch.bmm(vectors, vectors.transpose(1, 2))
        return _pick(dots, self._place[left] * dots.shape[2] + self._place[right])

    def _of_all_rows(self, left: IntArray, right: IntArray) -> Tensor:
        """Multiply vectors of B rows with each other, and with those of one row: (B, P)."""
        vectors = self._sides[False]
        blocks = [torch.bmm(vectors, vectors.transpose(1, 2))]
        if True in self._sides:
            blocks.append(torch.matmul(vectors, self._sides[True][0].transpose(0, 1)))
        dots = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        row = np.where(self._once[left], right, left)
        other = np.where(self._once[left], left, right)
        column = self._place[other] + vectors.shape[1] * self._once[other]
        return _pick(dots, self._place[row] * dots.shape[2] + column)


def _pick(dots: Tensor, cells: IntArray) -> Tensor:
    """Return some cells of every row's matrix."""
    index = torch.from_numpy(cells).to(dots.device)
    # runtimes gather with one index per row by a loop of its own; with one index for all rows
    # they copy number by number
    return dots.flatten(1).gather(1, index.expand(dots.shape[0], -1))


def _join(values: Any) -> Any:
    return tree_map(lambda v: v.joined() if isinstance(v, Joinable) else v, values)


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    functional.linear: Columns.linear,
    functional.pad: Columns.pad,
    torch.split: Columns.split,
    torch.relu: lambda columns: columns.apply(torch.relu),
}
