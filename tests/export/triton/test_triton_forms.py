"""Every form of input in a real Triton server."""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from dmt_convert.bundle import Bundle
from dmt_convert.config import ExportConfig
from dmt_convert.families.model_config import FeatureConfig, ModelConfig

PROTOCOLS = ("http", "grpc")
FORMS: dict[str, dict[str, Any]] = {
    "jagged": {"pooling_input": "jagged"},
    "single": {"pooling_input": "single", "out_of_range": "clip"},
    "fixed, weighted, fp16": {"pooling_input": "fixed", "weighted": ("*",), "quantize": "fp16"},
    "mixed, weighted": {"pooling_input": {"cat_0": "jagged"}, "weighted": ("cat_0", "cat_3")},
    "another name": {"pooling_input": "jagged", "weighted": ("*",), "model_name": "Ranker-2.b_1"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_answered_like_the_model(serve_export: Callable[..., Any], form: str) -> None:
    config = ExportConfig(format="triton", **FORMS[form])
    with serve_export(**FORMS[form]) as served:
        name = config.model_name
        limit = 1e-2 if config.quantize != "none" else None
        for rows in (1, 2, 7, 130, 4096):
            batch = served.batch(rows)
            for protocol in PROTOCOLS:
                logits = served.server.ask(protocol, served.feeds(batch), name)
                served.check(batch, logits, limit=limit)
        feeds = served.feeds(served.batch(3))
        ids = next(key for key in feeds if key.startswith("cat_1"))
        feeds[ids][-1] = 50
        for protocol in PROTOCOLS:
            if config.out_of_range == "clip":
                assert served.server.ask(protocol, feeds, name).shape == (3, 1)
                continue
            with pytest.raises(InferenceServerException, match="out of data bounds"):
                served.server.ask(protocol, feeds, name)
        _refuses_lengths(served, name)
        served.answers_still(name, limit=limit)


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_dense", [0, 3])
def test_networks_are_answered_like_the_model(
    serve_export: Callable[..., Any], make_network_bundle: Callable[..., Bundle], num_dense: int
) -> None:
    with serve_export(bundle=make_network_bundle(num_dense=num_dense)) as served:
        for rows in (1, 2, 130):
            batch = served.batch(rows)
            for protocol in PROTOCOLS:
                served.check(batch, served.server.ask(protocol, served.feeds(batch)))


@pytest.mark.exhaustive
def test_without_a_largest_batch_no_rows_have_no_logits(serve_export: Callable[..., Any]) -> None:
    with serve_export(pooling_input="jagged") as served:
        feeds = {name: value[:0] for name, value in served.feeds(served.batch(3)).items()}
        for protocol in PROTOCOLS:
            assert served.server.ask(protocol, feeds).shape == (0, 1)


@pytest.mark.exhaustive
def test_features_may_have_any_printable_name(
    make_bundle: Callable[..., Bundle], serve_export: Callable[..., Any]
) -> None:
    names = ('wörter "und" \\ /$', "a b", "dense", "x.lengths")
    features = tuple(FeatureConfig(name=name, table=f"t_cat_{i}") for i, name in enumerate(names))
    config = ModelConfig(features=features)
    bundle = make_bundle("passthrough", mean=False, convert={"model_config": config})
    with serve_export(bundle=bundle) as served:
        served.answers_still()


def _refuses_lengths(served: Any, name: str) -> None:
    feeds = served.feeds(served.batch(3))
    lengths = [key for key in feeds if key.endswith(".lengths")]
    for key in lengths[:1]:
        for change in (1, -1):
            wrong = {**feeds, key: feeds[key] + np.array([0, 0, change])}
            with pytest.raises(InferenceServerException, match="lengths"):
                served.server.ask("http", wrong, name)


@pytest.mark.exhaustive
def test_the_server_sees_what_does_not_fit(
    serve_export: Callable[..., Any], triton_server: Callable[..., Any], tmp_path: Any
) -> None:
    """The server is no pushover: it refuses a repository whose parts do not fit."""
    with serve_export() as served:
        shutil.copytree(served.exported.path, tmp_path / "models")
    config = tmp_path / "models" / served.part("tower_001") / "config.pbtxt"
    width = served.exported.spec.tower_widths[1]
    config.write_text(config.read_text().replace(f"dims: {width}\n", f"dims: {width + 1}\n"))
    with (
        pytest.raises(AssertionError, match="'tower_001' is TYPE_FP32"),
        triton_server(tmp_path / "models", tmp_path / "log"),
    ):
        pass


@pytest.mark.exhaustive
def test_no_file_of_the_current_folder_runs(
    serve_export: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server embeds a Python, which would import them."""
    for name in ("json", "os", "numpy", "onnxruntime", "random"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})"
        )
    monkeypatch.chdir(tmp_path)
    with serve_export() as served:
        served.answers_still()
    assert not (tmp_path / "ran").exists()
