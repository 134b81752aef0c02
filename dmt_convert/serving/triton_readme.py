"""The README.md of a model repository: what it holds, how it is started, asked and updated."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

from dmt_convert.serving.graph_inputs import PADDING, FeatureInput
from dmt_convert.serving.graph_writer import ExportJob
from dmt_convert.serving.triton_config import LOGITS, MAX_BATCH, triton_messages

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
    "jagged": "the ids of all rows one after another, and how many each row has",
}


def describe_repository(job: ExportJob, configs: Sequence[Any]) -> str:
    """Write the README of a repository.

    Args:
        job: What is exported.
        configs: The repository's `inference.ModelConfig`s, the ensemble last.
    """
    sections = (
        _models(job, configs),
        _start(job, configs),
        _ask(job, configs[-1]),
        _behaviour(job, configs),
        _update(configs),
        _tested(),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _wrap(text: str, *, bullet: bool = False) -> list[str]:
    """Break a paragraph into lines."""
    return textwrap.wrap(
        text,
        width=96,
        initial_indent="- " if bullet else "",
        subsequent_indent="  " if bullet else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _tested() -> list[str]:
    return [
        "## Tested",
        "",
        *_wrap(
            "Before it was put in place, every graph here was run in ONNX Runtime against the "
            "model that it was made of; `export.json` has each check. The tests of dmt-convert "
            f"load such repositories, unmodified, into {TESTED}, on the CPU, and ask it over HTTP "
            "and gRPC; ONNX Runtime runs there behind Triton's Python backend, under the name of "
            "the ONNX Runtime backend. They have not run the container "
            f"`{CONTAINER.rpartition(':')[2]}` itself, nor a GPU."
        ),
    ]


def _models(job: ExportJob, configs: Sequence[Any]) -> list[str]:
    name = configs[-1].name
    towers = len(job.spec.towers)
    lines = [
        f"# {name}: a model repository for Triton Inference Server",
        "",
        *_wrap(
            f"The ensemble `{name}` is what clients ask. It fans out to {towers} towers, which "
            "look up and pool their own features side by side, and joins their outputs in the "
            "over_arch."
        ),
        "",
        "| model | takes | gives | largest batch |",
        "|---|---|---|---|",
    ]
    for config in configs:
        takes = ", ".join(f"`{entry.name}`" for entry in config.input)
        (output,) = config.output
        largest = config.max_batch_size or "any; requests are not merged"
        lines.append(f"| `{config.name}` | {takes} | {_shape(config, output)} | {largest} |")
    lines += [
        "",
        f"Inputs of `{name}`, B rows:",
        "",
        "| input | type | shape | |",
        "|---|---|---|---|",
    ]
    if count := job.inputs.num_dense:
        lines.append(f"| `{job.inputs.dense}` | FP32 | (B, {count}) | dense inputs |")
    for feature in job.inputs.features:
        lines += _input_rows(job, feature)
    lines += ["", f"`{LOGITS}` are the model's logits: a sigmoid makes probabilities of them."]
    return lines


def _input_rows(job: ExportJob, feature: FeatureInput) -> Iterator[str]:
    rows = job.spec.flat.table_of(feature.feature).rows
    shape = {"single": "(B, 1)", "jagged": "(ids of all rows)"}.get(feature.form, "(B, L)")
    what = f"ids from 0 to {rows - 1}; {_FORMS[feature.form]}"
    yield f"| `{feature.ids}` | INT64 | {shape} | {what} |"
    if feature.lengths is not None:
        yield f"| `{feature.lengths}` | INT64 | (B) | ids of every row |"
    if feature.weights is not None:
        yield f"| `{feature.weights}` | FP32 | {shape} | a weight for every id |"


def _shape(config: Any, entry: Any) -> str:
    kind = triton_messages().DataType.Name(entry.data_type).removeprefix("TYPE_")
    dims = entry.dims if config.max_batch_size else entry.dims[1:]
    return f"`{entry.name}` {kind} (B, {', '.join(map(str, dims))})"


def _start(job: ExportJob, configs: Sequence[Any]) -> list[str]:
    gpu = "--gpus all " if job.config.gpu else ""
    lines = [
        "## Start",
        "",
        "In this folder:",
        "",
        "```sh",
        f"docker run --rm {gpu}-p 8000:8000 -p 8001:8001 -p 8002:8002 \\",
        f'  -v "$PWD":/models:ro {CONTAINER} \\',
        "  tritonserver --model-repository=/models --disable-auto-complete-config",
        "curl -f localhost:8000/v2/health/ready",
        "```",
        "",
        *_wrap(
            "Port 8000 is HTTP, 8001 gRPC, 8002 metrics. The weights (`*.safetensors`) lie beside "
            "the graphs that point into them, and are memory-mapped: the server is ready at once, "
            "and the first requests read from the disk. Where they fit into the memory, read them "
            "once before that:"
        ),
        "",
        "```sh",
        "cat */*/*.safetensors > /dev/null",
        "```",
        "",
    ]
    if job.config.gpu:
        return lines + _wrap(
            "All models are on the GPU (`instance_group` in each `config.pbtxt`), with their "
            "weights. A tower whose tables do not fit stays on the CPU with `kind: KIND_CPU`."
        )
    return lines + _wrap(
        "Every `config.pbtxt` may be tuned to the machine: `instance_group` says how many batches "
        "a model works on at a time, `intra_op_thread_count` with how many threads each. As it is, "
        f"a tower has one thread for each of {configs[0].instance_group[0].count} batches, and the "
        "over_arch, which computes most, all cores for one."
    )


def _ask(job: ExportJob, ensemble: Any) -> list[str]:
    lines = [
        "## Ask",
        "",
        "Two rows, with `pip install 'tritonclient[http]'`:",
        "",
        "```python",
        "import numpy as np",
        "import tritonclient.http as triton",
        "",
        "inputs = {",
    ]
    if count := job.inputs.num_dense:
        lines.append(f"    {job.inputs.dense!r}: np.zeros((2, {count}), dtype=np.float32),")
    for feature in job.inputs.features:
        last = min(1, job.spec.flat.table_of(feature.feature).rows - 1)
        lines += [f"    {name!r}: {value}," for name, value in _example(feature, last)]
    return [
        *lines,
        "}",
        "tensors = []",
        "for name, value in inputs.items():",
        '    kind = "FP32" if value.dtype == np.float32 else "INT64"',
        "    tensors.append(triton.InferInput(name, value.shape, kind))",
        "    tensors[-1].set_data_from_numpy(value)",
        'client = triton.InferenceServerClient("localhost:8000")',
        f"logits = client.infer({ensemble.name!r}, tensors).as_numpy({LOGITS!r})  # (2, 1)",
        "print(1 / (1 + np.exp(-logits)))",
        "```",
        "",
        "`import tritonclient.grpc as triton` and port 8001 do the same over gRPC.",
    ]


def _example(feature: FeatureInput, last: int) -> Iterator[tuple[str, str]]:
    """Yield name and expression of a feature's inputs, for two rows with ids 0 and `last`."""
    ids = {
        "single": f"[[0], [{last}]]",
        "fixed": f"[[0, {last}], [{last}, 0]]",
        "padded": f"[[0, {last}], [{last}, {PADDING}]]",
        "jagged": f"[0, {last}, {last}]",
    }[feature.form]
    yield feature.ids, f"np.array({ids}, dtype=np.int64)"
    if feature.lengths is not None:
        yield feature.lengths, "np.array([2, 1], dtype=np.int64)"
    if feature.weights is not None:
        yield feature.weights, f"np.ones({_example_shape(feature)}, dtype=np.float32)"


def _example_shape(feature: FeatureInput) -> str:
    return {"single": "(2, 1)", "jagged": "3"}.get(feature.form, "(2, 2)")


def _behaviour(job: ExportJob, configs: Sequence[Any]) -> list[str]:
    lines = ["## How it behaves", ""]
    single = [config.name for config in configs if not config.max_batch_size]
    if len(single) < len(configs):
        lines += _wrap(
            f"Requests of up to {MAX_BATCH} rows are accepted, and merged while they wait for a "
            "model that is busy (dynamic batching), if all their shapes but B agree. Clients that "
            "pad ids to a few widths L, instead of the longest bag of each request, let Triton "
            "merge more of them.",
            bullet=True,
        )
    if single:
        names = ", ".join(f"`{name}`" for name in single)
        lines += _wrap(
            f"{names}: `max_batch_size` is 0. These take jagged ids, or lie behind a model that "
            "does. The ids of all rows are one tensor, whose first axis is not B: Triton cannot "
            "merge such requests. Put all rows that are to be answered together into one request, "
            "or export with `--pooling-input padded`.",
            bullet=True,
        )
    if job.config.out_of_range == "clip":
        lines += _wrap("An id outside its table takes the nearest row.", bullet=True)
    else:
        merged = " Those merged with it fail with it: the ONNX Runtime backend runs one batch."
        merged = merged if len(single) < len(configs) else ""
        lines += _wrap(
            f"An id outside its table makes a request fail.{merged} Check ids before asking, or "
            "export with `--out-of-range clip`.",
            bullet=True,
        )
        if job.config.gpu:
            lines += _wrap(
                "ONNX Runtime's lookup on a GPU does not check ids: where they are not checked "
                "before, export with `--out-of-range clip`.",
                bullet=True,
            )
        lines += _wrap(
            f"Triton before {SAFE_RELEASE} can crash when one of the steps that an ensemble starts "
            "together fails at once (triton-inference-server/core, pull request 483), as a tower "
            "does that refuses an id. Use a newer one wherever ids are not checked before.",
            bullet=True,
        )
    return lines


def _update(configs: Sequence[Any]) -> list[str]:
    tower = configs[0].name
    return [
        "## Update one tower",
        "",
        *_wrap(
            "A tower is a model with versions of its own. While its outputs mean the same to the "
            "over_arch (tables trained further, the rest frozen), it can be replaced by itself. "
            "Export the new bundle, and put its folder under the next number, in one move on the "
            "same disk:"
        ),
        "",
        "```sh",
        f"cp -r NEW_EXPORT/{tower}/1 .{tower}.new && mv .{tower}.new {tower}/2",
        "```",
        "",
        *_wrap(
            "A server started with `--model-control-mode=poll` loads it within seconds; one with "
            "`--model-control-mode=explicit --load-model='*'` when it is told:"
        ),
        "",
        "```sh",
        f"curl -f -X POST localhost:8000/v2/repository/models/{tower}/load",
        "```",
        "",
        "Requests are answered meanwhile, by the old version until the new one is ready.",
    ]
