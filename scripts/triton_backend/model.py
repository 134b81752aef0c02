"""Stands in for Triton's ONNX Runtime backend in the server that `scripts/triton-server` starts.

The server in the wheel `nvidia-pytriton` has a Python backend only. Under the name of the real
backend, this one loads an unmodified model repository. It reads what the real one reads of our
`config.pbtxt`s, compares their inputs and outputs with the graph as the real one does, and like the
real one answers every request of a batch with the error that one of them causes.
"""

import json
import os
import sys
import time
from pathlib import Path

# The process that embeds Python here does not read PYTHONPATH by itself.
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

# Triton before 26.05 crashes where a step of an ensemble fails while the steps beside it are still
# being started (triton-inference-server/core, pull request 483): a matter of microseconds.
_ERROR_DELAY_S = 0.05

TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint8)": "TYPE_UINT8",
}


class TritonPythonModel:
    """One instance of one model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph of the version that the server asks for."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        path = folder / (config.get("default_model_filename") or "model.onnx")
        self.batching = config["max_batch_size"] > 0
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), _options(config), providers=["CPUExecutionProvider"]
            )
            _compare("input", config, self.session.get_inputs())
            _compare("output", config, self.session.get_outputs())
        except Exception as error:
            raise pb_utils.TritonModelException(_first_line(error)) from error
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list) -> list:
        """Answer requests: together where the model batches, else one by one."""
        groups = [requests] if self.batching else [[request] for request in requests]
        return [response for group in groups for response in self._answer(group)]

    def _answer(self, requests: list) -> list:
        rows = [_array(request, self.inputs[0]).shape[0] for request in requests]
        try:
            feeds = {
                name: np.concatenate([_array(request, name) for request in requests])
                for name in self.inputs
            }
            values = self.session.run(self.outputs, feeds)
        except Exception as error:
            time.sleep(_ERROR_DELAY_S)
            message = f"onnx runtime error: {_first_line(error)}"
            return [  # an error object each: the backend frees them one by one
                pb_utils.InferenceResponse(error=pb_utils.TritonError(message)) for _ in requests
            ]
        if len(requests) == 1:
            return [self._response(values)]
        ends = np.cumsum(rows)[:-1]
        return [
            self._response(own)
            for own in zip(*(np.split(value, ends) for value in values), strict=True)
        ]

    def _response(self, values) -> object:
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(name, np.ascontiguousarray(value))
                for name, value in zip(self.outputs, values, strict=True)
            ]
        )


def _options(config: dict) -> onnxruntime.SessionOptions:
    """Read the parameters that the real backend knows, as far as our configs use them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, entry in config.get("parameters", {}).items():
        value = entry["string_value"]
        if key == "intra_op_thread_count":
            options.intra_op_num_threads = int(value)
        elif key == "enable_mem_pattern":
            options.enable_mem_pattern = value == "1"
        elif key.startswith("session."):
            options.add_session_config_entry(key, value)
        else:
            raise ValueError(f"parameter {key!r} is unknown to this backend")
    return options


def _compare(what: str, config: dict, values: list) -> None:
    """Refuse a config whose tensors are not the graph's."""
    entries = {entry["name"]: entry for entry in config[what]}
    graph = {value.name: value for value in values}
    if entries.keys() != graph.keys():
        raise ValueError(f"{what}s {sorted(entries)} in the config, {sorted(graph)} in the graph")
    batching = config["max_batch_size"] > 0
    for name, entry in entries.items():
        found = [dim if isinstance(dim, int) else -1 for dim in graph[name].shape]
        dims = [int(dim) for dim in entry["dims"]]
        full = [-1, *dims] if batching else dims
        fits = len(full) == len(found) and (not batching or found[0] == -1)
        fits = fits and all(mine in (-1, own) for own, mine in zip(full, found, strict=True))
        if not fits or TYPES.get(graph[name].type) != entry["data_type"]:
            raise ValueError(
                f"{what} {name!r} is {entry['data_type']} {full} in the config, "
                f"{graph[name].type} {found} in the graph"
            )


def _array(request, name: str) -> np.ndarray:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    array: np.ndarray = tensor.as_numpy()
    return array


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
