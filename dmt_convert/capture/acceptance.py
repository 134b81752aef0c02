"""A captured graph is accepted only if it answers like the live module, gradients included.

Both are run on the same rows, at several batch sizes: the module on its inputs, the graph on dense
inputs and on vectors that are pooled here from the module's tables as the bundle will pool them.
So what is compared is the whole of features, tables and graph.

Letters: B batch, N embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmt_convert.capture.captured import Captured, DenseColumn, FeaturePlan
from dmt_convert.capture.captured_network import CapturedNetwork
from dmt_convert.capture.raw_inputs import Inputs
from dmt_convert.capture.tracing import pick_logit
from dmt_convert.errors import ArchitectureError

SIZES: Final = (64, 7, 1)
_LOGITS: Final = 1e-5
"""Of the largest logit: sums may be taken in another order, which in float32 costs some 1e-7."""
_FLOOR: Final = 1e-6
"""Whatever the scale: a sigmoid is rounded to 6e-8."""
_GRADIENTS: Final = 1e-4
"""Of the largest gradient of all: gradients that are zero in theory are rounding, 1e-7 of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checked:
    """What the comparison came to."""

    outputs: Tensor
    """The module's own outputs on random rows."""
    largest: float
    """Largest difference between logits."""
    failing: tuple[int, ...]
    """Batch sizes at which the live module itself fails."""


def check_captured(module: nn.Module, inputs: Inputs, captured: Captured) -> Checked:
    """Compare a captured graph with the module that it came from.

    Args:
        module: The module, in eval mode.
        inputs: What it is called with.
        captured: The graph.

    Raises:
        ArchitectureError: They differ, or rows of a batch depend on each other.
    """
    network = _build(captured, inputs.tensors[0].device)
    jagged = any(entry.is_jagged for entry in inputs.raw)
    whole = draw_valid(inputs, captured, SIZES[0])
    with torch.no_grad():
        reference = _run(module, whole)
    largest, failing = 0.0, []
    sizes = list(SIZES)
    for size in sizes:
        part = whole.redraw(size, seed=size) if jagged else _first(whole, size)
        try:
            with torch.no_grad():
                live = _run(module, part)
        except Exception as error:  # a user's code may raise anything
            if size > 1:
                raise _differs(f"the module fails at {size} rows: {error}") from error
            failing.append(size)
            sizes.append(2)
            continue
        with torch.no_grad():
            mine = _answer(network, module, part, captured)
        largest = max(largest, _compare(mine, live, f"the outputs at {size} rows"))
        if not jagged:
            _compare_rows(live, reference[:size])
    _check_gradients(module, network, draw_valid(inputs, captured, 16), captured)
    return Checked(outputs=reference, largest=largest, failing=tuple(failing))


def _build(captured: Captured, device: torch.device) -> CapturedNetwork:
    dims = [feature.table.dim for feature in captured.features]
    network = CapturedNetwork(captured.config, dims, len(captured.dense))
    network.load_state_dict({name: value.detach() for name, value in captured.weights.items()})
    return network.eval().to(device)


def draw_valid(inputs: Inputs, captured: Captured, rows: int) -> Inputs:
    """Draw rows whose ids reach all rows of the tables; dense values are the example's."""
    drawn = inputs.redraw(rows, seed=1)
    generator = torch.Generator().manual_seed(3)
    values: dict[int, Any] = {}
    for feature in captured.features:
        entry = drawn.raw[feature.source]
        if entry.is_jagged:
            continue
        value = values.setdefault(feature.source, entry.value.clone())
        flat = value.view(len(value), -1)
        most = feature.table.parts[0].rows
        ids = torch.randint(most, (rows, len(feature.columns)), generator=generator)
        if feature.padding is not None:
            hidden = torch.rand(ids.shape, generator=generator) < 0.3
            ids = torch.where(hidden, feature.padding, ids)
        flat[:, list(feature.columns)] = ids.to(flat)
    return drawn.with_values(values)


def _first(inputs: Inputs, rows: int) -> Inputs:
    return inputs.with_values({i: entry.value[:rows] for i, entry in enumerate(inputs.raw)})


def dense_of(inputs: Inputs, dense: Sequence[DenseColumn]) -> Tensor:
    """Return the dense inputs, shape (B, D)."""
    columns = [
        inputs.raw[d.source].value.reshape(inputs.rows, -1)[:, d.column].float() for d in dense
    ]
    if columns:
        return torch.stack(columns, dim=1)
    return torch.zeros(inputs.rows, 0, device=inputs.tensors[0].device)


def pool(
    module: nn.Module | _Held, inputs: Inputs, features: Sequence[FeaturePlan]
) -> list[Tensor]:
    """Return one vector per feature, (B, N_f), as a bundle pools them."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    return [
        torch.cat(
            [
                _pool_part(weights[part.weight][part.begin : part.end], inputs, feature)
                for part in feature.table.parts
            ],
            dim=1,
        )
        for feature in features
    ]


def _pool_part(table: Tensor, inputs: Inputs, feature: FeaturePlan) -> Tensor:
    entry = inputs.raw[feature.source]
    if entry.is_jagged:
        jagged = entry.value[entry.value.keys()[feature.columns[0]]]
        ids, lengths = jagged.values(), jagged.lengths()
    else:
        chosen = entry.value.reshape(inputs.rows, -1)[:, list(feature.columns)].long()
        kept = torch.ones_like(chosen, dtype=torch.bool)
        if feature.padding is not None:
            kept = chosen != feature.padding
        ids, lengths = chosen[kept], kept.sum(dim=1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[:-1]
    return nn.functional.embedding_bag(ids.long(), table, offsets.long(), mode=feature.pooling)


def _run(module: Any, inputs: Inputs) -> Tensor:
    """Return the module's own outputs, shape (B,)."""
    return pick_logit(inputs.call(module)).reshape(-1)


def _answer(network: Any, module: nn.Module, inputs: Inputs, captured: Captured) -> Tensor:
    """Return what the graph answers, behind the sigmoid if the module has one."""
    pooled = pool(module, inputs, captured.features)
    return _finished(network(dense_of(inputs, captured.dense), pooled), captured)


def _finished(logits: Tensor, captured: Captured) -> Tensor:
    return torch.sigmoid(logits) if captured.final_sigmoid else logits


def check_range(outputs: Tensor) -> None:
    """Ask if all outputs look like probabilities, though no sigmoid was found at the very end.

    Raises:
        ArchitectureError: They do.
    """
    if bool(((outputs >= 0) & (outputs <= 1)).all()):
        raise ArchitectureError(
            f"all of {len(outputs)} outputs lie between 0 and 1, but the module does not end in a "
            "sigmoid: they look like probabilities",
            expected="logits, or a sigmoid as the last step",
            hint="return the logit, or end in torch.sigmoid, which is left out and recorded; if "
            "they are logits, say `final_sigmoid: false` in the model config",
        )


def _compare(mine: Tensor, live: Tensor, what: str) -> float:
    """Return the largest difference.

    Raises:
        ArchitectureError: It is too large, or not a number.
    """
    mine, live = mine.detach().double(), live.detach().double()
    difference, scale = float((mine - live).abs().max()), float(live.abs().max())
    if not difference <= _LOGITS * scale + _FLOOR:
        raise _differs(f"{what} differ by {difference:.3g}, the largest is {scale:.3g}")
    return difference


def _compare_rows(live: Tensor, reference: Tensor) -> None:
    """Compare rows alone with the same rows among others.

    Raises:
        ArchitectureError: They differ.
    """
    try:
        _compare(live, reference, "the outputs")
    except ArchitectureError as error:
        raise ArchitectureError(
            f"outputs depend on the other rows of the batch: {len(live)} rows alone and among "
            f"{SIZES[0]}: {error.found.partition(': ')[2]}",
            expected="a logit that depends on its own row",
            hint="leave out of forward() what compares the rows of a batch",
        ) from None


def _check_gradients(
    module: nn.Module, network: CapturedNetwork, inputs: Inputs, captured: Captured
) -> None:
    """Compare gradients by tables and weights, at weights that are moved a little.

    A module may start with zeros at the end, at which all outputs and gradients are equal.

    Raises:
        ArchitectureError: They differ.
    """
    tables = sorted({part.weight for f in captured.features for part in f.table.parts})
    held = dict(module.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(4)
    moved = {}
    for name in captured.weights:
        if name in held and held[name].requires_grad:
            value = held[name].detach()
            noise = torch.randn(value.shape, generator=generator).to(value)
            moved[name] = (value + 0.05 * (noise + value.abs() * noise)).requires_grad_(True)
    leaves = {name: held[name].detach().clone().requires_grad_(True) for name in tables}
    scattered = torch.randn(inputs.rows, generator=generator).to(inputs.tensors[0].device)
    everything = {**moved, **leaves}
    # names that one tensor has are set together
    live = _run(lambda *a, **k: functional_call(module, everything, a, k), inputs)
    pooled = pool(_Held(leaves), inputs, captured.features)
    dense = dense_of(inputs, captured.dense)
    mine = _finished(functional_call(network, moved, (dense, pooled)), captured)
    _compare(mine, live, "the outputs at other weights")
    wanted = [*everything.values()]
    theirs, ours = (_gradients((out * scattered).sum(), wanted) for out in (live, mine))
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    for name, a, b in zip(everything, theirs, ours, strict=True):
        difference = float((a - b).abs().max())
        if not difference <= _GRADIENTS * scale + _FLOOR:
            raise _differs(
                f"the gradients by {name} differ by {difference:.3g}, the largest is {scale:.3g}"
            )


def _gradients(value: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients; zeros by what has no part in the value."""
    found: Sequence[Any] = torch.autograd.grad(value, wanted, allow_unused=True)
    return [torch.zeros(1) if g is None else g.to_dense().cpu() for g in found]


class _Held:
    """Tensors under the names of parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def named_parameters(self, *, remove_duplicate: bool) -> Iterable[tuple[str, Tensor]]:
        """Yield all of them."""
        yield from self._tensors.items()


def _differs(what: str) -> ArchitectureError:
    return ArchitectureError(
        f"the captured graph does not answer like the module: {what}",
        expected="the same outputs and gradients",
        hint="describe the model by an ADAPTER (docs/adapters.md), and report this model",
    )
