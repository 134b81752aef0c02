"""Capture a live module: what is behind its look-ups becomes data, and is checked against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dmt_convert.capture.acceptance import check_captured, check_range
from dmt_convert.capture.captured import Captured
from dmt_convert.capture.front import Front, plan_front
from dmt_convert.capture.lookups import Call, Lookups, find_lookups, watched
from dmt_convert.capture.raw_inputs import Inputs, read_example
from dmt_convert.capture.rewrite import Rewriting
from dmt_convert.capture.sources import Places
from dmt_convert.capture.tracing import explained, pick_logit, trace_module
from dmt_convert.errors import ArchitectureError

_TRACED_ROWS = 11
_OTHER_ROWS = 5


def capture_module(module: nn.Module, example: object, *, is_logit: bool = False) -> Captured:
    """Capture what a module computes behind its look-ups; the module stays as it is.

    Args:
        module: The module, with its trained weights.
        example: What it is called with: a tuple of arguments, a dict of arguments by name, or the
            only argument. A few rows will do; their ids must lie in the tables.
        is_logit: Whether outputs that look like probabilities are logits all the same.

    Raises:
        ArchitectureError: It cannot be captured exactly; the error names the operator and the line.
        ConfigError: The example is not what a module can be called with.
    """
    inputs = read_example(module, example)
    _check_types(module)
    lookups = find_lookups(module)
    with _as_served(module):
        with explained("the module cannot be run on the example"), torch.no_grad():
            pick_logit(inputs.call(module))
        rows = inputs.redraw(_TRACED_ROWS, seed=0)
        calls = _record(module, lookups, rows)
        looked = _outside(calls, _record(module, lookups, inputs.redraw(_OTHER_ROWS, seed=0)))
        trace = trace_module(module, rows, lookups, looked)
        places = Places(trace, rows)
        front = plan_front(trace, places, calls, rows, module)
        rewriting = Rewriting(trace, front, places, rows)
        dense, final_sigmoid = rewriting.run()
        rewriting.audit()
        graph = rewriting.to_graph()
        captured = Captured(
            name=type(module).__name__,
            features=front.features,
            dense=dense,
            config=graph.to_config(),
            weights={name: trace.values[name] for name in graph.weights},
            final_sigmoid=final_sigmoid,
            notes=(),
        )
        checked = check_captured(module, inputs, captured)
        if not final_sigmoid and not is_logit and rewriting.may_be_probability():
            check_range(checked.outputs)
    notes = _notes(calls, front, checked.largest, checked.failing)
    return replace(captured, notes=tuple(notes))


def _check_types(module: nn.Module) -> None:
    """Refuse a module that does not compute in float32, as a bundle does.

    Raises:
        ArchitectureError: It does not.
    """
    for name, value in module.named_parameters():
        if value.dtype != torch.float32:
            raise ArchitectureError(
                f"the parameter {name} is of type {str(value.dtype).removeprefix('torch.')}",
                expected="a module in float32, in which a bundle computes",
                hint="module.float()",
            )


@contextmanager
def _as_served(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and leave every part in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _record(module: nn.Module, lookups: Lookups, inputs: Inputs) -> list[Call]:
    what = f"the module cannot be run on {inputs.rows} rows of the example"
    with explained(what), torch.no_grad(), watched(lookups) as calls:
        inputs.call(module)
    return calls


def _outside(calls: Sequence[Call], others: Sequence[Call]) -> list[Tensor | None]:
    """Return what is looked up per row; None for look-ups that do not depend on the batch.

    Raises:
        ArchitectureError: A batch of another size has other look-ups, or there are none per row.
    """
    if [call.name for call in calls] != [call.name for call in others]:
        raise ArchitectureError(
            f"a batch of {_TRACED_ROWS} rows has other look-ups than one of {_OTHER_ROWS}",
            expected="the same look-ups for every batch",
        )
    looked: list[Tensor | None] = []
    for call, other in zip(calls, others, strict=True):
        sizes = (len(call.output), len(other.output))
        if sizes == (_TRACED_ROWS, _OTHER_ROWS):
            looked.append(call.output.detach().clone())
        elif call.output.shape == other.output.shape:
            looked.append(None)  # positions, for example
        else:
            raise ArchitectureError(
                f"the look-up {call.name!r} gives {sizes[0]} rows for a batch of {_TRACED_ROWS}",
                expected="ids whose first dim is the batch",
                hint="look up ids of shape (B, L) as they are, without flattening them",
            )
    if all(value is None for value in looked):
        raise ArchitectureError(
            "no look-up module is called with ids of the batch",
            expected="ids that are columns of the inputs",
        )
    return looked


def _notes(
    calls: Sequence[Call], front: Front, largest: float, failing: Sequence[int]
) -> Iterator[tuple[str, str, str]]:
    """Say what was found out on the way."""
    yield "captured graph", f"max |diff| {largest:.2g}", "against the module, at 64, 7 and 1 rows"
    if failing:
        yield "batches of one row", "not compared", "the module itself fails on them; 2 rows were"
    padded = [
        call.name
        for call, looked in zip(calls, front.calls, strict=True)
        if looked is not None
        and isinstance(call.module, nn.Embedding)
        and call.module.padding_idx is not None
    ]
    if padded:
        names = ", ".join(dict.fromkeys(padded))
        yield "padding rows", names, "looked up as they are; fine-tuning trains them like others"
    kept = [c.name for c, looked in zip(calls, front.calls, strict=True) if looked is None]
    if kept:
        yield (
            "look-ups without a batch",
            ", ".join(dict.fromkeys(kept)),
            "weights of the dense part",
        )
