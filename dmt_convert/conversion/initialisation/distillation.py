"""Distillation: after the closed form, teach the converted model the flat one's logits.

Tables stay frozen, so pooled embeddings are computed once and training needs no lookups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from dmt_convert.conversion import Sample
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.model import DmtModel, DmtSpec, FlatModel, count_parameters, to_tensor

_BATCH: Final = 512
_LEARNING_RATE: Final = 2e-3
_VALIDATION: Final = 0.2
_CHECK_EVERY: Final = 50
_PATIENCE: Final = 20
_DEFAULT_STEPS: Final = 500
_FEWEST_STEPS: Final = 100
_BUDGET: Final = 4e11
"""Floating-point operations that distillation may cost unasked: some seconds on two cores."""

_KEPT_ELEMENTS: Final = 1 << 26
_KEPT_TENSORS: Final = 8
"""Tensors as wide as embeddings and interaction together that a step keeps for its gradient."""
_SMALL: Final = 1 << 20
"""Weights that a row meets below which one thread is as fast as two."""


def default_steps(spec: DmtSpec) -> int:
    """Return the default number of steps: 500, fewer for a large model, 0 for a very large one.

    It depends on the model's size alone, so that a conversion gives the same weights anywhere.
    """
    # 2 operations an element, forward and twice back
    steps = int(_BUDGET / (6 * _BATCH * _elements(spec)))
    return 0 if steps < _FEWEST_STEPS else min(_DEFAULT_STEPS, steps)


def _elements(spec: DmtSpec) -> int:
    """Weights that a row meets: multiplications, tower modules as if they were dense."""
    flat, interaction, dims = spec.flat, spec.interaction, spec.interaction_dims
    elements = (flat.dense_arch.work.flops + spec.over_arch.work.flops) / 2
    work = interaction.rules.work(interaction, dims)
    elements += count_parameters(interaction, dims) if work is None else work.flops / 2
    for width, own in zip(spec.tower_widths, spec.dims_by_tower, strict=True):
        elements += width * sum(own)
    return int(elements)


def distill(
    flat: FlatModel,
    model: DmtModel,
    sample: Sample,
    *,
    steps: int,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[DmtModel, str]:
    """Train tower modules and what changed behind them against the flat model's logits.

    A fifth of the rows is held out, and the mean squared error of their logits decides: the best
    state is kept, and training stops once it has not improved for 1,000 steps. If no state beats
    the closed form, the closed form is returned.

    Args:
        flat: The teacher.
        model: Where to start; not changed.
        sample: Rows with their pooled embeddings.
        steps: Steps of Adam, 512 rows each.
        seed: Seed of the order of rows.
        on_step: Called with the steps that are done, and all steps.

    Returns:
        The best model found, and one line about the result.
    """
    dense, pooled = to_tensor(sample.batch.dense), to_tensor(sample.pooled)
    target = _logits(flat, dense, pooled)
    cut = max(1, int(len(dense) * (1 - _VALIDATION)))
    student, trained = _trainable_copy(model)
    generator = torch.Generator().manual_seed(seed)
    best = _Best(student, trained, (dense[cut:], pooled[cut:], target[cut:]))
    optimizer = torch.optim.Adam(trained.values(), lr=_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    at_once = rows_with_gradients(model.spec)
    with _few_threads(model.spec):
        for step in range(1, steps + 1):
            drawn = torch.randint(cut, (min(_BATCH, cut),), generator=generator)
            optimizer.zero_grad()
            for rows in torch.split(drawn, at_once):
                with torch.enable_grad():
                    logits = student.forward_pooled(dense[rows], pooled[rows])
                    loss = (logits - target[rows]).square().sum() / len(drawn)
                    loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % _CHECK_EVERY == 0 or step == steps:
                on_step(step, steps)
                if not best.improves(step):
                    break
    if best.state is None:
        return model, f"distillation ({steps} steps) did not beat the closed form, which stays"
    student.load_state_dict(best.state, strict=False)
    for value in trained.values():
        value.requires_grad_(False)
    return student.eval(), f"distilled, {best.describe()}"


class _Best:
    """The best state so far, by rows that are never trained on.

    Args:
        model: The model that is trained.
        trained: Its parameters that are trained, by name.
        held: Dense inputs, pooled embeddings and logits of the rows.
    """

    def __init__(
        self,
        model: DmtModel,
        trained: Mapping[str, nn.Parameter],
        held: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self._model, self._trained, self._held = model, trained, held
        self._start = self._error = self._measure()
        self._step = 0
        self.state: dict[str, Tensor] | None = None

    def improves(self, step: int) -> bool:
        """Keep the current state if it is better; False once there was no better one for long."""
        error = self._measure()
        if error < self._error:
            self._error, self._step = error, step
            self.state = {name: value.detach().clone() for name, value in self._trained.items()}
        return step - self._step < _PATIENCE * _CHECK_EVERY

    def describe(self) -> str:
        """Say when it was reached, and by how much it is better than the start."""
        return f"best after {self._step} steps: logit MSE {self._start:.3g} -> {self._error:.3g}"

    def _measure(self) -> float:
        dense, pooled, target = self._held
        return float((_logits(self._model, dense, pooled) - target).square().mean())


def _logits(model: FlatModel | DmtModel, dense: Tensor, pooled: Tensor) -> Tensor:
    spec = model.spec if isinstance(model, FlatModel) else model.spec.flat
    with torch.no_grad():
        parts = [
            model.forward_pooled(dense[rows], pooled[rows]) for rows in row_blocks(spec, len(dense))
        ]
    return torch.cat(parts)


def rows_with_gradients(spec: DmtSpec) -> int:
    """Rows of a step that are computed at a time: the results kept for them take 256 MiB."""
    width = sum(spec.flat.input_dims) + spec.interaction.output_width(spec.interaction_dims)
    return max(1, min(_BATCH, _KEPT_ELEMENTS // (_KEPT_TENSORS * width)))


@contextmanager
def _few_threads(spec: DmtSpec) -> Iterator[None]:
    """Train a small model on one thread: several would spend their time waiting for each other."""
    before = torch.get_num_threads()
    if _elements(spec) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trainable_copy(model: DmtModel) -> tuple[DmtModel, dict[str, nn.Parameter]]:
    """Copy the weights but not the table lookups, which stay shared.

    Tables and dense_arch are the flat model's and stay so: they lose nothing by the conversion.
    So does a network that linear tower modules restore its inputs for.

    Returns:
        The copy, and what of it is to be trained, by name.
    """
    lookups = [tower.tables for tower in model.tower_list]
    student = DmtModel(model.spec, lookups)
    student.load_state_dict(model.state_dict())
    student.eval()  # a network may hold dropout or batch norm: the teacher is in eval mode too
    kept: tuple[str, ...] = ("dense_arch.",)
    if model.spec.keeps_network:
        kept = (*kept, "interaction.", "over_arch.")
    trained = {}
    for name, value in student.named_parameters(remove_duplicate=False):
        if ".tables." not in name:
            value.requires_grad_(not name.startswith(kept))
            if value.requires_grad:
                trained[name] = value
    return student, trained
