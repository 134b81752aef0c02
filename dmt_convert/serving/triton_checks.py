"""What Triton would refuse when it loads a repository, and its protobuf cannot see."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from dmt_convert.errors import ExportError
from dmt_convert.serving.export_manifest import tower_name
from dmt_convert.serving.graph_writer import ExportJob
from dmt_convert.serving.triton_config import LOGITS, triton_messages

_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""Names that are one part of a path and of a URL as they stand."""
_TYPES: Final = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}

Tensor = tuple[str, tuple[int, ...]]
"""Type, and shape with the batch; -1 is any size."""


def check_model_name(name: str) -> None:
    """Refuse a name that models, folders and URLs cannot have.

    Raises:
        ExportError: It is such a name.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ExportError(
            f"the model name {name!r}",
            expected="letters, digits, '.', '_' and '-' only, the first a letter or digit: Triton "
            "has it in paths and URLs",
            hint="choose another --model-name",
        )


def check_inputs(job: ExportJob) -> None:
    """Refuse inputs that Triton cannot have.

    Raises:
        ExportError: An input cannot be called as it is.
    """
    taken = {LOGITS, *(tower_name(t) for t in range(len(job.spec.towers)))}
    wrong = [
        f"{tensor!r}: {why}" for tensor in job.inputs.names for why in _objections(tensor, taken)
    ]
    if wrong:
        raise ExportError(
            f"{len(wrong)} inputs cannot be called in Triton as their features are",
            expected="names of printable characters that no other tensor has",
            hint="give these features other names in --model-config when converting",
            details=wrong,
        )


def _objections(tensor: str, taken: set[str]) -> Iterator[str]:
    if not tensor.isprintable() or not tensor.strip():
        yield "it is empty, or has characters that do not print"
    if tensor in taken:
        yield "it is the name of an output as well"


def check_repository(folder: Path, configs: Sequence[Any]) -> None:
    """Compare the configs of a repository with its graphs and with each other.

    Args:
        folder: The repository.
        configs: Its `inference.ModelConfig`s, the ensemble last.

    Raises:
        ExportError: Triton would refuse it.
    """
    problems = []
    for config in configs:
        if not (folder / config.name / "1").is_dir():
            problems.append(f"{config.name}: it has no folder of version 1")
        for what, entries in (("inputs", config.input), ("outputs", config.output)):
            names = Counter(entry.name for entry in entries)
            problems += [
                f"{config.name}: {count} {what} are called {name!r}"
                for name, count in names.items()
                if count > 1
            ]
        if not config.HasField("ensemble_scheduling"):
            problems += _compare_with_graph(folder, config)
    problems += _check_ensemble(configs[-1], {config.name: config for config in configs})
    if problems:
        raise ExportError(
            f"{len(problems)} mistakes in the configs for Triton",
            expected="configs that fit the graphs and each other",
            hint="this is a bug; report it. Nothing was left in place",
            details=problems,
        )


def _compare_with_graph(folder: Path, config: Any) -> Iterator[str]:
    """Compare names, types and shapes as the ONNX Runtime backend does."""
    path = folder / config.name / "1" / config.default_model_filename
    graph = onnx.load(str(path), load_external_data=False).graph
    for what, entries, values in (
        ("input", config.input, graph.input),
        ("output", config.output, graph.output),
    ):
        told, found = _tensors(config, entries), {value.name: _of_graph(value) for value in values}
        if told.keys() != found.keys():
            yield f"{config.name}: {what}s {sorted(told)}, in the graph {sorted(found)}"
            continue
        for name, tensor in told.items():
            fits = tensor[0] == found[name][0] and len(tensor[1]) == len(found[name][1])
            # where the graph takes any size, the config may say which
            if not fits or any(
                of not in (-1, dim) for of, dim in zip(found[name][1], tensor[1], strict=True)
            ):
                yield f"{config.name}: {what} {name!r} is {tensor}, in the graph {found[name]}"


def _tensors(config: Any, entries: Any) -> dict[str, Tensor]:
    names = triton_messages().DataType
    batch = (-1,) if config.max_batch_size > 0 else ()
    return {
        entry.name: (names.Name(entry.data_type), (*batch, *map(int, entry.dims)))
        for entry in entries
    }


def _of_graph(value: Any) -> Tensor:
    kind = value.type.tensor_type
    return _TYPES.get(kind.elem_type, f"ONNX type {kind.elem_type}"), tuple(
        dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim
    )


def _check_ensemble(ensemble: Any, models: Mapping[str, Any]) -> Iterator[str]:
    """Follow the tensors of an ensemble through its steps, which stand in order."""
    known = _tensors(ensemble, ensemble.input)
    used: set[str] = set()
    for step in ensemble.ensemble_scheduling.step:
        model = models.get(step.model_name)
        if model is None:
            yield f"step {step.model_name}: there is no such model"
            continue
        if 0 < model.max_batch_size < ensemble.max_batch_size:
            yield f"step {step.model_name}: it takes {model.max_batch_size} rows at most"
        inputs, outputs = _tensors(model, model.input), _tensors(model, model.output)
        if set(step.input_map) != set(inputs) or set(step.output_map) != set(outputs):
            yield f"step {step.model_name}: not all of its tensors are mapped, or more"
            continue
        for name, tensor in step.input_map.items():
            used.add(tensor)
            if tensor not in known:
                yield f"step {step.model_name}: nothing before it gives {tensor!r}"
            elif not _same(known[tensor], inputs[name]):
                yield f"step {step.model_name}: {tensor!r} is {known[tensor]}, not {inputs[name]}"
        for name, tensor in step.output_map.items():
            if tensor in known:
                yield f"step {step.model_name}: something before it gives {tensor!r} already"
            known[tensor] = outputs[name]
    for name, tensor in _tensors(ensemble, ensemble.output).items():
        if name not in known or not _same(known[name], tensor):
            yield f"{ensemble.name}: no step gives {name!r} as {tensor}"
    for entry in ensemble.input:
        if entry.name not in used:
            yield f"{ensemble.name}: no step takes {entry.name!r}"


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a[0] == b[0]
        and len(a[1]) == len(b[1])
        and all(x == y or -1 in (x, y) for x, y in zip(a[1], b[1], strict=True))
    )
