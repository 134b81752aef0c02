"""Model repositories for Triton, without a server: configs, README, and what is refused."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from dmt_convert.bundle import Bundle
from dmt_convert.config import ExportConfig
from dmt_convert.errors import ExportError
from dmt_convert.serving import ExportedModel, export_bundle
from dmt_convert.serving.exporter import ExportJob
from dmt_convert.serving.triton import check_inputs, check_repository
from support.exports import checks_of

Exporter = Callable[..., ExportedModel]


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle("dlrm", convert={"c": 1, "p": 2, "dim": 4})


@pytest.fixture
def triton(bundle: Bundle, export_unchecked: Exporter) -> Exporter:
    return lambda **options: export_unchecked(bundle, format="triton", **options)


def configs_of(folder: Path) -> list[Any]:
    """Parse all configs: towers, over_arch, the ensemble last."""
    names = ("_tower_", "_over_arch")
    paths = sorted(folder.glob("*/config.pbtxt"))
    paths.sort(key=lambda path: [name in path.parent.name for name in names], reverse=True)
    return [text_format.Parse(path.read_text(), ModelConfig()) for path in paths]


def part_names(exported: ExportedModel, name: str = "dmt") -> tuple[str, ...]:
    """Names of the models under the ensemble: towers, then over_arch."""
    generation = exported.manifest.details["generation"]
    parts = (*(f"tower_{t:03d}" for t in range(len(exported.spec.towers))), "over_arch")
    return tuple(f"{name}_{generation}_{part}" for part in parts)


def dims(entries: Any) -> dict[str, list[int]]:
    return {entry.name: list(entry.dims) for entry in entries}


@pytest.mark.slow
def test_padded_models_batch_and_their_graphs_answer_like_the_model(
    bundle: Bundle, triton: Exporter
) -> None:
    exported = triton()
    checks = checks_of(exported, bundle)
    assert checks and not [check.line for check in checks if not check.passed]
    configs = {config.name: config for config in configs_of(exported.path)}
    names = part_names(exported)
    assert set(configs) == {"dmt", *names}
    assert all(config.max_batch_size == 4096 for config in configs.values())
    tower, over_arch, ensemble = (configs[name] for name in (names[0], names[-1], "dmt"))
    assert dims(tower.input) == {name: [-1] for name in exported.spec.towers[0].features}
    widths = exported.spec.tower_widths
    assert dims(over_arch.input) == {
        "dense": [5],
        "tower_000": [widths[0]],
        "tower_001": [widths[1]],
    }
    assert dims(ensemble.output) == {"logits": [1]}
    assert tower.dynamic_batching.max_queue_delay_microseconds > 0
    assert tower.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    assert [warmup.batch_size for warmup in tower.model_warmup] == [1, 64]
    assert tower.backend == "onnxruntime" and ensemble.platform == "ensemble"


def test_models_behind_jagged_ids_do_not_batch_and_others_do(triton: Exporter) -> None:
    on_gpu: dict[str, Any] = {"gpu": True, "out_of_range": "clip"}
    exported = triton(pooling_input=["single", "cat_0=jagged"], weighted=("cat_0",), **on_gpu)
    with_jagged = next(t for t, own in enumerate(exported.spec.towers) if "cat_0" in own.features)
    configs = {config.name: config for config in configs_of(exported.path)}
    mine, other = (configs[part_names(exported)[t]] for t in (with_jagged, 1 - with_jagged))
    assert (mine.max_batch_size, other.max_batch_size) == (0, 4096)
    assert configs["dmt"].max_batch_size == configs[part_names(exported)[-1]].max_batch_size == 0
    jagged = {"cat_0.values": [-1], "cat_0.lengths": [-1], "cat_0.weights": [-1]}
    assert jagged.items() <= dims(mine.input).items()
    assert all(own == [1] for own in dims(other.input).values())
    assert not mine.HasField("dynamic_batching")
    assert mine.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    for warmup in mine.model_warmup:
        lengths = warmup.inputs["cat_0.lengths"]
        data = exported.path / mine.name / "warmup" / lengths.input_data_file
        assert data.stat().st_size == 8 * lengths.dims[0]
    readme = (exported.path / "README.md").read_text()
    assert "`max_batch_size` is 0" in readme and "--gpus all" in readme


def test_the_readme_names_what_there_is(triton: Exporter) -> None:
    exported = triton(model_name="ranker", out_of_range="clip")
    readme = (exported.path / "README.md").read_text()
    for config in configs_of(exported.path):
        assert f"`{config.name}`" in readme
    for name in exported.manifest.inputs.names:
        assert f"| `{name}` |" in readme and f"    {name!r}: np." in readme
    assert "26.09-py3" in readme and "takes the nearest row" in readme


def _damage(configs: list[Any], what: str) -> None:
    tower, ensemble = configs[0], configs[-1]
    step = ensemble.ensemble_scheduling.step[0]
    if what == "width":
        tower.output[0].dims[0] += 1
    elif what == "type":
        tower.input[0].data_type = tower.output[0].data_type
    elif what == "batch":
        tower.max_batch_size = 64
    elif what == "twice":
        tower.input.append(tower.input[0])
    elif what == "map":
        del step.input_map[tower.input[0].name]
    elif what == "order":
        ensemble.ensemble_scheduling.step.reverse()
    elif what == "model":
        step.model_name = "none"
    elif what == "unused":
        ensemble.input.add(name="more", data_type="TYPE_FP32", dims=[1])
    elif what == "output":
        ensemble.output[0].name = "scores"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("width", "in the graph"),
        ("type", "TYPE_FP32"),
        ("batch", "takes 64 rows at most"),
        ("twice", "2 inputs are called"),
        ("map", "not all of its tensors"),
        ("order", "nothing before it gives 'tower_000'"),
        ("model", "has no such model"),
        ("unused", "no step takes 'more'"),
        ("output", "no step gives 'scores'"),
    ],
)
def test_configs_that_do_not_fit_are_seen(triton: Exporter, what: str, message: str) -> None:
    exported = triton()
    configs = configs_of(exported.path)
    check_repository(exported.path, configs)
    _damage(configs, what)
    with pytest.raises(ExportError) as refused:
        check_repository(exported.path, configs)
    assert message in "\n".join(refused.value.details)


def _job(bundle: Bundle, exported: ExportedModel, **changes: Any) -> ExportJob:
    inputs = exported.manifest.inputs
    if "feature" in changes:
        first = replace(inputs.features[0], feature=changes["feature"])
        inputs = replace(inputs, features=(first, *inputs.features[1:]))
    return ExportJob(
        folder=exported.path,
        spec=bundle.manifest.model,
        inputs=inputs,
        weights=None,  # type: ignore[arg-type]
        config=ExportConfig(format="triton"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": "line\nfeed"}, "cannot have the names"),
        ({"feature": " "}, "cannot have the names"),
        ({"feature": "nul\0"}, "cannot have the names"),
        ({"feature": "tower_001"}, "cannot have the names"),
        ({"feature": "logits"}, "cannot have the names"),
    ],
)
def test_what_triton_cannot_have_is_refused(
    bundle: Bundle, triton: Exporter, changes: dict[str, Any], message: str
) -> None:
    exported = triton()
    check_inputs(_job(bundle, exported))
    check_inputs(_job(bundle, exported, feature='wörter "und" \\ /$'))
    with pytest.raises(ExportError, match=message):
        check_inputs(_job(bundle, exported, **changes))


@pytest.mark.parametrize("name", ["a/b", "../a", "..", "", "a b", "ä", "-a", "a" * 300])
def test_model_names_stay_in_the_folder(bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="model name"):
        export_bundle(bundle, tmp_path / "out", ExportConfig(format="triton", model_name=name))
    assert not list(tmp_path.iterdir())


def test_without_tritons_client_nothing_is_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(ExportError, match="client is not installed") as refused:
        export_bundle(bundle, tmp_path / "out", ExportConfig(format="triton"))
    assert "'.[triton]'" in refused.value.hint
    assert not list(tmp_path.iterdir())
