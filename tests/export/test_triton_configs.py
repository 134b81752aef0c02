"""The configurations of a model repository, without a server."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dmt_convert.bundle import Bundle
from dmt_convert.errors import ExportError
from dmt_convert.serving import ExportedModel

Exporter = Callable[..., ExportedModel]


def config_of(exported: ExportedModel, model: str) -> Any:
    text = (exported.path / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_padded_inputs_are_batched(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), format="triton", model_name="clicks")
    tower = config_of(exported, "clicks_tower_000")
    assert tower.backend == "onnxruntime" and tower.HasField("dynamic_batching")
    assert tower.max_batch_size == 4096
    assert {tuple(value.dims) for value in tower.input} == {(-1,)}
    ensemble = config_of(exported, "clicks")
    steps = {step.model_name: step for step in ensemble.ensemble_scheduling.step}
    assert set(steps) == {"clicks_tower_000", "clicks_tower_001", "clicks_over_arch"}
    made = {value for step in steps.values() for value in step.output_map.values()}
    taken = {value for step in steps.values() for value in step.input_map.values()}
    assert taken - made == {value.name for value in ensemble.input}
    assert {value.name for value in ensemble.output} == {"logits"}


def test_jagged_inputs_are_not_batched(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), format="triton", form="jagged")
    for model in ("dmt", "dmt_tower_000", "dmt_over_arch"):
        assert config_of(exported, model).max_batch_size == 0
    dense = config_of(exported, "dmt").input[0]
    assert list(dense.dims) == [-1, 5]


def test_gpus_are_a_kind_of_instance(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    exported = export_unchecked(make_bundle("dlrm"), format="triton", gpu=True)
    (group,) = config_of(exported, "dmt_tower_000").instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


def test_names_that_triton_cannot_have(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    with pytest.raises(ExportError, match="a/b"):
        export_unchecked(make_bundle("dlrm"), format="triton", model_name="a/b")
