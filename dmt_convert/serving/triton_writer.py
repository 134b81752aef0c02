"""The Triton format: a model repository, one model per part and an ensemble over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.serving.export_config import ExportConfig
from dmt_convert.serving.export_manifest import OVER_ARCH, ExportFormat, tower_name
from dmt_convert.serving.graph_writer import ExportJob, Written
from dmt_convert.serving.onnx_writer import ONNX_DETAILS, OnnxGraphs
from dmt_convert.serving.triton_checks import check_inputs, check_model_name, check_repository
from dmt_convert.serving.triton_config import (
    WARMUP_FOLDER,
    make_configs,
    model_of,
    ones_file,
    triton_messages,
)
from dmt_convert.serving.triton_readme import describe_repository

CONFIG: Final = "config.pbtxt"
_PLACEHOLDER: Final = (
    "An ensemble has no file of its own, but Triton wants a folder for its version, and what\n"
    "copies folders often leaves out empty ones.\n"
)


class TritonWriter:
    """Writes models `<name>_tower_000`, ..., `<name>_over_arch` and the ensemble `<name>`.

    Args:
        config: What is asked for; names the models.

    Raises:
        ExportError: Triton's client is not installed, or the models cannot be called so.
    """

    format: ExportFormat = "triton"

    def __init__(self, config: ExportConfig) -> None:
        check_model_name(config.model_name)  # before a folder is called so
        triton_messages()  # whoever lacks them should hear so before the weights are placed
        self._name = config.model_name

    def folder_of(self, part: str) -> str:
        """See `GraphWriter.folder_of`."""
        return f"{model_of(self._name, part)}/1"

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
        version = job.folder / configs[-1].name / "1"
        version.mkdir()
        (version / "placeholder.txt").write_text(_PLACEHOLDER, encoding="utf-8")
        check_repository(job.folder, configs)
        text = describe_repository(job, configs)
        (job.folder / "README.md").write_text(text, encoding="utf-8")
        ensemble = configs[-1]
        return Written(
            parts=parts,
            details={
                **ONNX_DETAILS,
                "ensemble": ensemble.name,
                "max_batch_size": {config.name: config.max_batch_size for config in configs},
            },
        )


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
