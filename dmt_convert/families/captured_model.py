"""A model that is captured from the live module: one in memory, or one that a file builds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dmt_convert.adapter import LoadedBuilder
from dmt_convert.capture import CAPTURED
from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo, derived, read_tensor
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.averages import check_averages
from dmt_convert.families.model_config import LiveModel, ModelConfig
from dmt_convert.families.model_info import FlatModelInfo, ModelPlace
from dmt_convert.families.name_map import strip_wrappers
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, ModelSpec, NetworkSpec, network_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dmt_convert.capture import Captured

_log = logging.getLogger(__name__)
_MAX_LISTED: Final = 20


def open_live(module: nn.Module) -> FlatCheckpoint:
    """Return the tensors of a module as those of a checkpoint; they stay in memory."""
    tensors = [_in_memory(name, value) for name, value in module.state_dict().items()]
    return FlatCheckpoint(
        source=Path(type(module).__name__),
        format="module",
        tensors=tuple(tensors),
        ordered=True,
        files=(),
    )


def describe_captured(checkpoint: FlatCheckpoint, config: ModelConfig) -> FlatModelInfo:
    """Capture the model that a file builds, with a checkpoint's weights; or one in memory.

    Of the model config, `container`, `prefix`, `ignore`, `final_sigmoid` and `dense_features`
    count.

    Args:
        checkpoint: The weights.
        config: What the user says; `builder` makes the model.

    Raises:
        ArchitectureError: The checkpoint does not fit the model, or it cannot be captured.
        ConfigError: The file fails, or what the user says does not fit.
    """
    from dmt_convert.capture import capture_module  # here, as it needs torch

    builder = config.builder
    assert builder is not None
    module, example, origin = _make(builder)
    state = module.state_dict()
    source = TrainerTensors(
        family=type(module).__name__,
        trainer="the user's own",
        checkpoint=checkpoint,
        place=_find_place(checkpoint, config, state, origin),
        config=config,
    )
    check_averages(checkpoint, source.place, config)
    _check_state(source, state, origin)
    if isinstance(builder, LoadedBuilder):
        _load(module, source)
    captured = capture_module(module, example, is_logit=config.final_sigmoid is False)
    for subject, value, reason in captured.notes:
        _log.info("%s: %s (%s)", subject, value, reason)
    spec = _describe(source, captured, origin)
    return source.finish(spec)


def _make(builder: LoadedBuilder | LiveModel) -> tuple[nn.Module, object, str]:
    """Return the module, what it is called with, and what to call where it comes from."""
    from torch import nn

    if isinstance(builder, LiveModel):
        return builder.module, builder.example, "the live module"
    with builder.blame("build()"):
        module: object = builder.build()
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"build() of {builder.path} returned a {type(module).__name__}",
            expected="the model, an nn.Module",
            hint="docs/capture.md has a complete example",
        )
    with builder.blame("example()"):
        example = builder.example()
    return module, example, f"--model {builder.path.name}"


def _find_place(
    checkpoint: FlatCheckpoint, config: ModelConfig, state: Iterable[str], origin: str
) -> ModelPlace:
    """Find the dict that holds the module's state, and what precedes its names.

    Raises:
        ArchitectureError: There is none, or there are several and the user does not choose.
    """
    wanted = list(state)
    counts: dict[ModelPlace, int] = {}
    for container in dict.fromkeys(tensor.container for tensor in checkpoint.tensors):
        held = {strip_wrappers(t.name) for t in checkpoint.tensors if t.container == container}
        prefixes = {n.removesuffix(wanted[0]) for n in held if n.endswith(wanted[0])}
        for prefix in sorted(prefixes):
            place = ModelPlace(container=container, prefix=prefix)
            counts[place] = sum(prefix + name in held for name in wanted)
    chosen = {
        place: count
        for place, count in counts.items()
        if config.container in (None, ".".join(place.container))
        and config.prefix in (None, place.prefix, place.prefix.removesuffix("."))
    }
    best = [place for place, count in chosen.items() if count == max(chosen.values())]
    if len(best) == 1:
        return best[0]
    names = [tensor.path for tensor in checkpoint.tensors]
    raise ArchitectureError(
        f"{checkpoint.source} holds {len(best)} models with the tensors of {origin}",
        expected="one",
        hint="say which one with --model-config (keys container, prefix)"
        if best
        else "build() must return the model that was saved",
        details=[f"container: {'.'.join(p.container) or '(top)'!r}, prefix: {p.prefix!r}"
                 for p in best] or names[:10],
    )  # fmt: skip


def _check_state(source: TrainerTensors, state: Mapping[str, Tensor], origin: str) -> None:
    """Refuse a checkpoint that does not hold exactly the module's state.

    Raises:
        ArchitectureError: It does not; all tensors are listed.
    """
    left = [info for name, info in source.tensors.items() if name not in state]
    details = [f"missing: {name}" for name in state if name not in source.tensors]
    details += [
        f"wrong shape: {source.tensors[name].path} {list(source.tensors[name].shape)}, the model "
        f"has {list(value.shape)}"
        for name, value in state.items()
        if name in source.tensors and source.tensors[name].shape != tuple(value.shape)
    ]
    details += [f"unknown: {info.path}" for info in source.pass_over([*source.others, *left])]
    if details:
        more = len(details) - _MAX_LISTED
        raise ArchitectureError(
            f"{source.checkpoint.source} and the model of {origin} do not fit: "
            f"{len(details)} tensors",
            expected="exactly the tensors of the model's state dict",
            hint="build() must return the model that was saved",
            details=details[:_MAX_LISTED] + ([f"... and {more} more"] if more > 0 else []),
        )


def _load(module: nn.Module, source: TrainerTensors) -> None:
    """Give a module the checkpoint's weights; nothing that was pickled is run."""
    import torch

    state = module.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            array = np.array(read_tensor(source.tensors[name]))
            value.copy_(torch.from_numpy(array).reshape(value.shape))


def _describe(source: TrainerTensors, captured: Captured, origin: str) -> ModelSpec:
    """Put the tensors under canonical names, and say what is known."""
    used: set[str] = set()
    for plan in captured.tables:
        parts = []
        for part in plan.parts:
            used.add(part.weight)
            whole = source.tensors[part.weight]
            parts.append(derived.slice_rows(whole, part.begin, part.end))
        joined = parts[0] if len(parts) == 1 else derived.concat_columns(*parts)
        source.table(plan.name, joined)
    for name, value in captured.weights.items():
        held = source.tensors.get(name)
        source.put(name, _in_memory(name, value) if held is None else held)
        used.add(name)
    for name, info in source.tensors.items():
        if name not in used and info.path not in source.ignored:
            source.ignore(info, "no logit depends on it")
    # columns of one input have its order; those of several have only the order that was met
    if len({column.source for column in captured.dense}) > 1:
        source.dense_names = tuple(column.name for column in captured.dense)
    _note_facts(source, captured, origin)
    sigmoid = source.config.final_sigmoid
    return network_model(
        family=captured.name,
        tables=source.tables,
        features=[
            FeatureSpec(
                name=feature.name,
                table=feature.table.name,
                pooling=feature.pooling,
                max_ids=1 if feature.single else None,
                padding_id=feature.padding,
            )
            for feature in captured.features
        ],
        num_dense=len(captured.dense),
        network=NetworkSpec(name=CAPTURED, config=captured.config),
        final_sigmoid=captured.final_sigmoid if sigmoid is None else sigmoid,
    )


def _note_facts(source: TrainerTensors, captured: Captured, origin: str) -> None:
    source.fact("family", captured.name, "given", origin)
    tables = f"{len(captured.features)} in {len(captured.tables)} tables"
    source.fact("features", tables, "read", f"look-ups of {origin}")
    nodes = f"a captured graph of {len(captured.config['nodes'])} operators"
    source.fact("dense part", nodes, "read", origin)
    sigmoid = str(captured.final_sigmoid).lower()
    source.fact("final sigmoid", sigmoid, "read", f"last step of {origin}")
    for subject, value, reason in captured.notes:
        source.fact(subject, value, "inferred", reason)


_DTYPES: Final = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "int64",
    "int32": "int32",
    "int16": "int16",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}


def _in_memory(name: str, value: Tensor) -> TensorInfo:
    """Describe a tensor of a module."""
    import torch

    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None:
        raise ArchitectureError(
            f"the tensor {name} is of type {value.dtype}",
            expected="floats, integers or booleans",
            hint="module.float()",
        )
    flat = value.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return derived.in_memory(name, dtype, tuple(value.shape), data)
