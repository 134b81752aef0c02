"""What Triton is told of every model of a repository, as messages of its own protobuf.

Letters: B batch, D dense inputs, L ids per bag, O tower output.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Final

from dmt_convert.errors import ExportError
from dmt_convert.serving.export_manifest import OVER_ARCH, tower_name
from dmt_convert.serving.graph_inputs import FeatureInput
from dmt_convert.serving.graph_writer import ExportJob

LOGITS: Final = "logits"
"""Output of the ensemble and of the over_arch."""
MAX_BATCH: Final = 4096
"""Rows of one request, and of several that are answered together."""
QUEUE_DELAY_US: Final = 100
"""How long a request waits for others. Rankers' requests hold many rows and have to be quick, so
this is a tenth of what answering one takes. No batch size is preferred to another: Triton's guide
advises against it for backends that do not compile a plan per size."""
WARM_ROWS: Final = (1, 64)
"""Rows of the batches that are run before a model counts as ready."""
WARMUP_FOLDER: Final = "warmup"
"""Where a model's folder has the data of its warm-up."""

_PARAMETERS: Final[Mapping[str, str]] = {"enable_mem_pattern": "0"}
"""Batches differ in shape, and ONNX Runtime would keep a plan of the memory for every one."""
_TOWER_PARAMETERS: Final[Mapping[str, str]] = {"intra_op_thread_count": "1"}
"""Towers run side by side, and look up more than they compute: a pool of threads as large as the
machine for each would only get in the others' way."""
_GPU_PARAMETERS: Final[Mapping[str, str]] = {"session.use_device_allocator_for_initializers": "1"}
"""Tables take what they need on the GPU, instead of the next power of two."""


def triton_messages() -> Any:
    """Import Triton's messages.

    Raises:
        ExportError: Its client is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise ExportError(
            "Triton's client is not installed",
            expected="the package tritonclient, whose messages config.pbtxt is written with",
            hint="pip install 'dmt-convert[triton]'",
        ) from None
    return model_config_pb2


def model_of(name: str, part: str) -> str:
    """Name of a part's model, and of its folder.

    Args:
        name: Name of the ensemble.
        part: `tower_000`, ..., `over_arch`.
    """
    return f"{name}_{part}"


def is_batched(job: ExportJob, part: str) -> bool:
    """Tell whether Triton may answer several requests to a model together.

    The ids of jagged bags are one tensor for all rows, whose first axis is not the batch. What
    lies behind such a tower takes its requests as they come, too.

    Args:
        job: What is exported.
        part: `tower_000`, ...; anything else stands for the over_arch and the ensemble.
    """
    towers = range(len(job.spec.towers))
    behind = [t for t in towers if tower_name(t) == part] or towers
    return all(f.form != "jagged" for t in behind for f in features_of(job, t))


def features_of(job: ExportJob, tower: int) -> Iterator[FeatureInput]:
    """Yield what a tower's graph takes, in the model's order."""
    features = set(job.spec.towers[tower].features)
    return (feature for feature in job.inputs.features if feature.feature in features)


def make_configs(job: ExportJob) -> tuple[Any, ...]:
    """Describe every model in an `inference.ModelConfig`: towers, over_arch, the ensemble last.

    Raises:
        ExportError: Triton's client is not installed.
    """
    towers = [tower_name(t) for t in range(len(job.spec.towers))]
    return (*(_tower(job, t) for t in range(len(towers))), _over_arch(job), _ensemble(job, towers))


def _tower(job: ExportJob, tower: int) -> Any:
    part = tower_name(tower)
    batched = is_batched(job, part)
    config = _model(job, part, batched, count=2, parameters=_TOWER_PARAMETERS)
    features = list(features_of(job, tower))
    for feature in features:
        _add_feature(config, feature, batched)
    _add(config.output, part, "TYPE_FP32", [job.spec.tower_widths[tower]], batched)
    _add_warmup(config, lengths={feature.lengths for feature in features})
    return config


def _over_arch(job: ExportJob) -> Any:
    batched = is_batched(job, OVER_ARCH)
    config = _model(job, OVER_ARCH, batched, count=1, parameters={})
    _add_dense(config, job, batched)
    for t, width in enumerate(job.spec.tower_widths):
        _add(config.input, tower_name(t), "TYPE_FP32", [width], batched)
    _add(config.output, LOGITS, "TYPE_FP32", [1], batched)
    _add_warmup(config)
    return config


def _ensemble(job: ExportJob, towers: Sequence[str]) -> Any:
    name = job.config.model_name
    batched = is_batched(job, OVER_ARCH)
    config = triton_messages().ModelConfig(
        name=name, platform="ensemble", max_batch_size=MAX_BATCH if batched else 0
    )
    _add_dense(config, job, batched)
    for feature in job.inputs.features:
        _add_feature(config, feature, batched)
    _add(config.output, LOGITS, "TYPE_FP32", [1], batched)
    for t, part in enumerate(towers):
        taken = [tensor for feature in features_of(job, t) for tensor in feature.names]
        _add_step(config, model_of(name, part), taken, part)
    dense = [job.inputs.dense] if job.inputs.num_dense else []
    _add_step(config, model_of(name, OVER_ARCH), [*dense, *towers], LOGITS)
    return config


def _model(
    job: ExportJob, part: str, batched: bool, *, count: int, parameters: Mapping[str, str]
) -> Any:
    """Start the config of a model that is a graph; `count` instances of it run on a CPU."""
    messages = triton_messages()
    gpu = job.config.gpu
    config = messages.ModelConfig(
        name=model_of(job.config.model_name, part),
        backend="onnxruntime",
        default_model_filename="model.onnx",
        max_batch_size=MAX_BATCH if batched else 0,
        instance_group=[
            messages.ModelInstanceGroup(
                kind="KIND_GPU" if gpu else "KIND_CPU", count=1 if gpu else count
            )
        ],
    )
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = QUEUE_DELAY_US
    for key, value in {**_PARAMETERS, **(_GPU_PARAMETERS if gpu else parameters)}.items():
        config.parameters[key].string_value = value
    return config


def _add_dense(config: Any, job: ExportJob, batched: bool) -> None:
    """Add the dense input, if there is one: Triton has no tensors of no columns."""
    if job.inputs.num_dense:
        _add(config.input, job.inputs.dense, "TYPE_FP32", [job.inputs.num_dense], batched)


def _add_feature(config: Any, feature: FeatureInput, batched: bool) -> None:
    dims = {"single": [1], "jagged": []}.get(feature.form, [-1])
    for name in feature.names:
        data_type = "TYPE_FP32" if name == feature.weights else "TYPE_INT64"
        _add(config.input, name, data_type, dims, batched)


def _add(entries: Any, name: str, data_type: str, dims: Sequence[int], batched: bool) -> None:
    """Add an input or output of shape (B, *dims); Triton knows of the batch where it batches."""
    entries.add(name=name, data_type=data_type, dims=dims if batched else [-1, *dims])


def _add_step(config: Any, model: str, inputs: Sequence[str], output: str) -> None:
    """Add a step; tensors of the ensemble are called like the models' own."""
    step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
    for name in inputs:
        step.input_map[name] = name
    step.output_map[output] = output


def _add_warmup(config: Any, lengths: Container[str | None] = ()) -> None:
    """Run batches of bags with one id before the model counts as ready."""
    batched = config.max_batch_size > 0
    for rows in WARM_ROWS:
        sample = config.model_warmup.add(name=f"{rows} rows", batch_size=rows if batched else 1)
        for entry in config.input:
            dims = [abs(dim) for dim in entry.dims]  # a bag of any length has one id
            tensor = sample.inputs[entry.name]
            tensor.data_type = entry.data_type
            tensor.dims.extend(dims if batched else [rows, *dims[1:]])
            if entry.name in lengths:
                tensor.input_data_file = ones_file(rows)
            else:
                tensor.zero_data = True


def ones_file(rows: int) -> str:
    """Name of a warm-up's file with the lengths of so many bags of one id."""
    return f"{rows}_ones"
