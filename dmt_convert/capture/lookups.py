"""The look-ups of a live module: their calls are numbered, recorded, and given other answers.

A call is known by its place in the order of all calls, so a table that is looked up twice is no
difficulty. Only the outermost module counts: a collection of bags looks its bags up itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from torch import Tensor, nn

from dmt_convert.capture.raw_inputs import keyed_tensor
from dmt_convert.errors import ArchitectureError

Kind = Literal["one", "bag", "collection"]
_COLLECTIONS: Final = ("EmbeddingBagCollection",)
_UNREAD: Final = (
    "EmbeddingCollection",
    "ManagedCollisionEmbeddingBagCollection",
    "ManagedCollisionEmbeddingCollection",
    "SplitTableBatchedEmbeddingBagsCodegen",
)
_SUPPORTED: Final = (
    "nn.Embedding, nn.EmbeddingBag (sum or mean) or TorchRec's EmbeddingBagCollection"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One call of a look-up module."""

    module: nn.Module
    """The module."""
    name: str
    """Its name in the whole module."""
    kind: Kind
    """one: a row per id; bag: a sum or mean of a row's ids; collection: TorchRec's."""
    ids: Any
    """What it was called with: a tensor, or a `KeyedJaggedTensor`."""
    output: Tensor
    """What it gave."""


@dataclass(slots=True, eq=False)
class Lookups:
    """The look-up modules of a module, and how they answer at the moment."""

    names: dict[int, str]
    """id(module) -> its name."""
    kinds: frozenset[type[nn.Module]]
    """Classes whose `forward` looks up."""
    calls: list[Call] = field(default_factory=list)
    """Calls so far."""
    answers: Sequence[Tensor | None] | None = None
    """What to give instead, call by call; None: look up."""
    inside: bool = False
    """Whether a look-up module is running."""

    def answer(
        self, real: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Record a call, and look up or give the answer that is prepared for it."""
        if self.inside or id(module) not in self.names:
            return real(module, *args, **kwargs)
        name, kind = self.names[id(module)], _kind(module)
        ids = _ids_of(name, kind, args, kwargs)
        given = None if self.answers is None else self._next_answer(name)
        if given is not None:
            self.calls.append(Call(module=module, name=name, kind=kind, ids=ids, output=given))
            return keyed_tensor(module, given) if kind == "collection" else given
        self.inside = True
        try:
            output = real(module, *args, **kwargs)
        finally:
            self.inside = False
        values = output.values() if kind == "collection" else output
        self.calls.append(Call(module=module, name=name, kind=kind, ids=ids, output=values))
        return output

    def _next_answer(self, name: str) -> Tensor | None:
        assert self.answers is not None
        if len(self.calls) >= len(self.answers):
            raise ArchitectureError(
                f"the look-up {name!r} is called more often for another number of rows",
                expected="the same look-ups for every batch",
            )
        return self.answers[len(self.calls)]


def find_lookups(module: nn.Module) -> Lookups:
    """Find the outermost look-up modules.

    Raises:
        ArchitectureError: There is none, or one of a kind that cannot be captured.
    """
    found: dict[int, str] = {}
    kinds: set[type[nn.Module]] = {nn.Embedding, nn.EmbeddingBag}
    within: tuple[str, ...] = ()
    for name, child in module.named_modules():
        if any(name.startswith(prefix) for prefix in within):
            continue
        collection = _class_named(child, _COLLECTIONS)
        if _class_named(child, _UNREAD):
            raise ArchitectureError(
                f"{name or 'the module'} is a {type(child).__name__}, which cannot be captured",
                expected=_SUPPORTED,
            )
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) or collection:
            kinds |= {collection} if collection else set()
            within += (f"{name}.",)
            found[id(child)] = name
            _check(name, child)
    if not found:
        raise ArchitectureError(
            f"{type(module).__name__} has no embeddings: no look-up module was found",
            expected=_SUPPORTED,
            hint="a model without tables has nothing to put into towers",
        )
    return Lookups(names=found, kinds=frozenset(kinds))


@contextmanager
def watched(
    lookups: Lookups, answers: Sequence[Tensor | None] | None = None
) -> Iterator[list[Call]]:
    """Watch the look-ups while a module runs; calls are counted from 0.

    The classes' own `forward` is replaced meanwhile, so that a subclass may do more around it.

    Args:
        lookups: The look-ups.
        answers: What they are to give, call by call; None: what they look up.

    Yields:
        The calls; filled while the module runs.
    """
    lookups.calls, lookups.answers, lookups.inside = [], answers, False
    real = {kind: kind.forward for kind in lookups.kinds}
    for kind, forward in real.items():
        kind.forward = _watching(lookups, forward)
    try:
        yield lookups.calls
    finally:
        for kind, forward in real.items():
            kind.forward = forward


def _watching(lookups: Lookups, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return lookups.answer(real, self, args, kwargs)

    return forward


def _class_named(module: nn.Module, names: Sequence[str]) -> type[nn.Module] | None:
    """Return the class of that name that a module is of; TorchRec may not be installed."""
    return next((kind for kind in type(module).__mro__ if kind.__name__ in names), None)


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Embedding):
        return "one"
    return "bag" if isinstance(module, nn.EmbeddingBag) else "collection"


def _check(name: str, module: nn.Module) -> None:
    """Refuse look-ups that a bundle cannot do.

    Raises:
        ArchitectureError: It is one.
    """
    found = ""
    if getattr(module, "max_norm", None) is not None:
        found = "has max_norm, which writes to the table at every look-up"
    elif isinstance(module, nn.EmbeddingBag) and module.mode not in ("sum", "mean"):
        found = f"pools by {module.mode!r}"
    elif _kind(module) == "collection" and module.is_weighted():  # type: ignore[operator]
        found = "weights the rows of a bag"
    if found:
        raise ArchitectureError(f"the look-up {name!r} {found}", expected=_SUPPORTED)


def _ids_of(name: str, kind: Kind, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Return what a look-up was called with.

    Raises:
        ArchitectureError: It is of a form that a bundle cannot give.
    """
    values = [*args, *kwargs.values()]
    if kind == "bag" and (len([v for v in values if v is not None]) > 1 or values[0].ndim != 2):
        raise ArchitectureError(
            f"the look-up {name!r} is called with offsets or with weights per id",
            expected="ids of shape (B, L), all of them of weight 1",
            hint="call it with ids of shape (B, L), padded with its padding_idx; or describe the "
            "model by an ADAPTER (docs/adapters.md), whose bags may have any length",
        )
    return values[0]
