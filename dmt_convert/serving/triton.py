"""The Triton format: a model repository, one model per part and an ensemble over them.

Every model's `config.pbtxt` is made as a message of Triton's own protobuf, and compared with the
graphs, because Triton would refuse a mistake only when it loads the repository.

Letters: B batch, D dense inputs, L ids per bag, O tower output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import onnx

from dmt_convert.config import ExportConfig, ExportFormat
from dmt_convert.errors import ExportError
from dmt_convert.free_memory import gib
from dmt_convert.serving.export_manifest import OVER_ARCH, list_sent, tower_name
from dmt_convert.serving.exporter import ExportJob, Written
from dmt_convert.serving.graph_inputs import PADDING, FeatureInput
from dmt_convert.serving.onnx_writer import LOGITS, ONNX_DETAILS, OnnxGraphs

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
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""Names that are one part of a path and of a URL as they stand."""
_TYPES: Final = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}
_SENT_TYPES: Final = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}
Tensor = tuple[str, tuple[int, ...]]
"""Type, and shape with the batch; -1 is any size."""
CONTAINER: Final = "nvcr.io/nvidia/tritonserver:26.09-py3"
"""A release whose ONNX Runtime is new enough for our graphs; it must be 1.17 at least."""
SAFE_RELEASE: Final = "26.05"
"""The first release cut after https://github.com/triton-inference-server/core/pull/483."""
TESTED: Final = "Triton 2.51 (the release of container 24.10)"
"""The server that the tests of dmt-convert load such repositories with."""
_FORMS: Final = {
    "single": "exactly one id per row",
    "fixed": "the same number of ids in every row of a request",
    "padded": f"up to L ids per row, the rest filled with {PADDING}",
    "jagged": "the ids of all rows one after another; the lengths say how many each row has",
}
CONFIG: Final = "config.pbtxt"
SWITCH: Final = "switch.sh"
CONFIGS: Final = "configs"
"""Where a model's folder has further configs; Triton reads them when asked to only."""
_PLACEHOLDER: Final = (
    "An ensemble has no file of its own, but Triton wants a folder for its version, and what\n"
    "copies folders often leaves out empty ones.\n"
)


def triton_messages() -> Any:
    """Import the messages of Triton's configs.

    Raises:
        ExportError: Its client is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise ExportError(
            "Triton's client is not installed",
            expected="the package tritonclient, which defines the messages of config.pbtxt",
            hint="pip install '.[triton]' in a clone of the repository",
        ) from None
    return model_config_pb2


def model_of(name: str, generation: str, part: str) -> str:
    """Name of a part's model, and of its folder.

    Every generation has parts of its own, so that those of the next one can lie beside them and be
    loaded before the ensemble, whose name stays, passes requests on to them: all at once.

    Args:
        name: Name of the ensemble.
        generation: The export's generation.
        part: `tower_000`, ..., `over_arch`.
    """
    return f"{name}_{generation}_{part}"


def _own(job: ExportJob, part: str) -> str:
    return model_of(job.config.model_name, job.generation, part)


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


def place_on_gpus(job: ExportJob) -> tuple[tuple[int, ...], ...]:
    """Return the GPUs that hold each tower: one, or all if it is meant to be everywhere.

    The largest tower comes first, and each goes where the fewest bytes are. Without `--gpus`, the
    list is empty: Triton makes an instance on every GPU that it sees.
    """
    count = job.config.gpus
    if count is None:
        return ((),) * len(job.spec.towers)
    loads = [0] * count
    placed: dict[int, tuple[int, ...]] = {}
    sizes = [file.bytes for file in job.weights.towers]
    for t in sorted(range(len(sizes)), key=lambda t: -sizes[t]):
        if job.spec.towers[t].everywhere:
            placed[t] = tuple(range(count))
        else:
            placed[t] = (min(range(count), key=lambda gpu: loads[gpu]),)
        for gpu in placed[t]:
            loads[gpu] += sizes[t]
    return tuple(placed[t] for t in range(len(sizes)))


def _tower(job: ExportJob, tower: int) -> Any:
    part = tower_name(tower)
    batched = is_batched(job, part)
    gpus = place_on_gpus(job)[tower]
    config = _model(job, part, batched, count=2, parameters=_TOWER_PARAMETERS, gpus=gpus)
    features = list(features_of(job, tower))
    for feature in features:
        _add_feature(config, feature, batched)
    sent = list_sent(job.spec)[tower]
    _add(config.output, part, _SENT_TYPES[sent.dtype], [sent.columns], batched)
    _add_warmup(config, lengths={feature.lengths for feature in features})
    return config


def _over_arch(job: ExportJob) -> Any:
    batched = is_batched(job, OVER_ARCH)
    every = range(job.config.gpus or 0)
    config = _model(job, OVER_ARCH, batched, count=1, parameters={}, gpus=every)
    _add_dense(config, job, batched)
    for sent in list_sent(job.spec):
        _add(config.input, sent.part, _SENT_TYPES[sent.dtype], [sent.columns], batched)
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
        _add_step(config, _own(job, part), taken, part)
    dense = [job.inputs.dense] if job.inputs.num_dense else []
    _add_step(config, _own(job, OVER_ARCH), [*dense, *towers], LOGITS)
    config.parameters["generation"].string_value = job.generation
    return config


def _model(
    job: ExportJob,
    part: str,
    batched: bool,
    *,
    count: int,
    parameters: Mapping[str, str],
    gpus: Sequence[int],
) -> Any:
    """Start the config of a model that is a graph: `count` instances on a CPU, one on each GPU."""
    messages = triton_messages()
    gpu = job.config.gpu
    config = messages.ModelConfig(
        name=_own(job, part),
        backend="onnxruntime",
        default_model_filename="model.onnx",
        max_batch_size=MAX_BATCH if batched else 0,
        instance_group=[
            messages.ModelInstanceGroup(
                kind="KIND_GPU" if gpu else "KIND_CPU", count=1 if gpu else count, gpus=gpus
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
    """Name of the warm-up file with the lengths of `rows` bags of one id."""
    return f"{rows}_ones"


def check_model_name(name: str) -> None:
    """Refuse a name that is not valid for models, folders and URLs.

    Raises:
        ExportError: The name is not valid.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ExportError(
            f"invalid model name {name!r}",
            expected="only letters, digits, '.', '_' and '-', starting with a letter or digit: "
            "Triton uses the name in paths and URLs",
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
            f"{len(wrong)} inputs cannot have the names of their features in Triton",
            expected="names of printable characters that no other tensor has",
            hint="rename these features in --model-config when converting",
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
            hint="this is a bug: please report it. No repository was written",
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
            yield f"step {step.model_name}: the repository has no such model"
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


def describe_repository(job: ExportJob, configs: Sequence[Any]) -> str:
    """Write the README of a repository.

    Args:
        job: What is exported.
        configs: The repository's `inference.ModelConfig`s, the ensemble last.
    """
    return _render(
        "triton_readme.md.j2",
        name=configs[-1].name,
        generation=job.generation,
        tower=configs[0].name,
        towers=len(job.spec.towers),
        packed=[_own(job, s.part) for s in list_sent(job.spec) if s.dtype == "uint8"],
        everywhere=[_own(job, s.part) for s in list_sent(job.spec) if s.everywhere],
        models=[_describe_model(config) for config in configs],
        unmerged=[config.name for config in configs if not config.max_batch_size],
        num_dense=job.inputs.num_dense,
        dense=job.inputs.dense,
        features=[_describe_feature(job, feature) for feature in job.inputs.features],
        logits=LOGITS,
        gpu=job.config.gpu,
        gpus=_describe_gpus(job),
        clip=job.config.out_of_range == "clip",
        instances=configs[0].instance_group[0].count,
        max_batch=MAX_BATCH,
        container=CONTAINER,
        safe_release=SAFE_RELEASE,
        tested=TESTED,
    )


def _describe_gpus(job: ExportJob) -> list[dict[str, Any]]:
    """Say what each GPU holds; empty without `--gpus`."""
    places, towers = place_on_gpus(job), job.weights.towers
    return [
        {
            "models": [
                *(_own(job, tower_name(t)) for t, on in enumerate(places) if gpu in on),
                _own(job, OVER_ARCH),
            ],
            "size": gib(
                job.weights.over_arch.bytes
                + sum(towers[t].bytes for t, on in enumerate(places) if gpu in on)
            ),
        }
        for gpu in range(job.config.gpus or 0)
    ]


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dmt_convert.serving", ""),
        autoescape=False,  # no HTML; filters quote names in Markdown, and models' need no quotes
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code_span, "literal": repr}
    return environment.get_template(template).render(**values)


def _code_span(name: str) -> str:
    """Quote a name in Markdown, also in a table's cell, whatever characters it has."""
    longest = max((len(run) for run in re.findall("`+", name)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{name}{space}{fence}".replace("|", r"\|")


def _describe_model(config: Any) -> dict[str, Any]:
    (output,) = config.output
    return {
        "name": config.name,
        "inputs": [entry.name for entry in config.input],
        "output": output.name,
        "kind": triton_messages().DataType.Name(output.data_type).removeprefix("TYPE_"),
        "dims": list(output.dims if config.max_batch_size else output.dims[1:]),
        "max_batch_size": config.max_batch_size,
    }


def _describe_feature(job: ExportJob, feature: FeatureInput) -> dict[str, Any]:
    """Describe the inputs of a feature, with an example of two rows that hold the ids 0 and 1."""
    rows = job.spec.flat.table_of(feature.feature).rows
    last = min(1, rows - 1)
    examples = {
        "single": f"[[0], [{last}]]",
        "fixed": f"[[0, {last}], [{last}, 0]]",
        "padded": f"[[0, {last}], [{last}, {PADDING}]]",
        "jagged": f"[0, {last}, {last}]",
    }
    return {
        "ids": feature.ids,
        "lengths": feature.lengths,
        "weights": feature.weights,
        "form": _FORMS[feature.form],
        "shape": {"single": "(B, 1)", "jagged": "(ids of all rows)"}.get(feature.form, "(B, L)"),
        "last_row": rows - 1,
        "example": examples[feature.form],
        "example_shape": {"single": "(2, 1)", "jagged": "3"}.get(feature.form, "(2, 2)"),
    }


class TritonWriter:
    """Writes models `<name>_<generation>_tower_000`, ..., and the ensemble `<name>` over them.

    Args:
        config: What is asked for; names the models.
        generation: See `ExportJob.generation`.

    Raises:
        ExportError: Triton's client is not installed, or the models cannot be called so.
    """

    format: ExportFormat = "triton"

    def __init__(self, config: ExportConfig, generation: str) -> None:
        check_model_name(config.model_name)  # before a folder is called so
        triton_messages()  # whoever lacks them should hear so before the weights are placed
        self._name, self._generation = config.model_name, generation

    def folder_of(self, part: str) -> str:
        """See `GraphWriter.folder_of`."""
        return f"{model_of(self._name, self._generation, part)}/1"

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """See `GraphWriter.write`."""
        check_inputs(job)
        graphs = OnnxGraphs(job)
        towers = [tower_name(t) for t in range(len(job.spec.towers))]
        parts = {part: f"{self.folder_of(part)}/model.onnx" for part in (*towers, OVER_ARCH)}
        for t, part in enumerate(towers):
            graphs.write_tower(t, job.folder / parts[part])
            on_part(t + 1, len(parts))
        graphs.write_over_arch(job.folder / parts[OVER_ARCH])
        on_part(len(parts), len(parts))
        configs = make_configs(job)
        for config in configs:
            _write_model(job.folder / config.name, config)
        ensemble = configs[-1]
        _write_switch(job.folder / ensemble.name, job.generation)
        check_repository(job.folder, configs)
        text = describe_repository(job, configs)
        (job.folder / "README.md").write_text(text, encoding="utf-8")
        switch = _render("triton_switch.sh.j2", name=ensemble.name)
        (job.folder / SWITCH).write_text(switch, encoding="utf-8")
        return Written(
            parts=parts,
            details={
                **ONNX_DETAILS,
                "ensemble": ensemble.name,
                "generation": job.generation,
                "max_batch_size": {config.name: config.max_batch_size for config in configs},
            },
        )


def _write_switch(folder: Path, generation: str) -> None:
    """Give the ensemble its version's folder, and keep its config under the generation's name.

    To go on to a generation, or back to it, its config takes the place of `config.pbtxt`.
    """
    (folder / "1").mkdir()
    (folder / "1" / "placeholder.txt").write_text(_PLACEHOLDER, encoding="utf-8")
    (folder / CONFIGS).mkdir()
    (folder / CONFIGS / f"{generation}.pbtxt").write_bytes((folder / CONFIG).read_bytes())


def _write_model(folder: Path, config: Any) -> None:
    """Write a model's config, read it back, and write the data of its warm-up."""
    from google.protobuf import text_format  # comes with Triton's client

    text = text_format.MessageToString(config, as_utf8=True)
    again = text_format.Parse(text, triton_messages().ModelConfig())
    assert again == config
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    for warmup in config.model_warmup:
        for tensor in warmup.inputs.values():
            if tensor.input_data_file:
                (rows,) = tensor.dims
                assert tensor.input_data_file == ones_file(rows)
                (folder / WARMUP_FOLDER).mkdir(exist_ok=True)
                np.ones(rows, dtype="<i8").tofile(folder / WARMUP_FOLDER / tensor.input_data_file)
