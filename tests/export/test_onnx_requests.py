"""One user against many candidates: the same scores as the plain graph, and less work."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.errors import DmtError
from dmt_convert.serving import ExportedModel
from dmt_convert.serving.checks import generate_batch
from support.exports import checks_of

MODELS = [("torchrec", "dot"), ("torchrec", "dcn"), ("torchrec", "projection"), ("facebook", "cat")]
SIDES = [((0, 3), False), ((0, 2, 3), True), ((1,), True)]
Exporter = Callable[..., ExportedModel]


@pytest.fixture(scope="session")
def bundle_of(
    make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """A bundle with towers {0, 3}, {1}, {2}."""

    def make(names: str, interaction: str, module: str) -> Bundle:
        prefix = "cat_" if names == "torchrec" else "f"
        towers = [[f"{prefix}{i}" for i in tower] for tower in ((0, 3), (1,), (2,))]
        file = tmp_path_factory.mktemp("towers") / "towers.json"
        file.write_text(json.dumps({"towers": towers}))
        return make_bundle(
            module,
            names=names,
            interaction=interaction,
            mean=names == "torchrec",
            convert={"towers": None, "partition": file},
        )

    return make


def per_request(bundle: Bundle, places: tuple[int, ...]) -> tuple[str, ...]:
    names = bundle.manifest.model.flat.feature_names
    return tuple(names[i] for i in places)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "interaction", "module", "places", "dense"),
    [
        pytest.param(
            *model,
            module,
            *side,
            marks=[] if i == 2 * j + k else pytest.mark.exhaustive,
        )
        for i, model in enumerate(MODELS)
        for j, module in enumerate(("passthrough", "auto"))
        for k, side in enumerate(SIDES)
    ],
)
def test_scores_are_the_models(
    bundle_of: Callable[..., Bundle],
    export_unchecked: Exporter,
    names: str,
    interaction: str,
    module: str,
    places: tuple[int, ...],
    dense: bool,
) -> None:
    bundle = bundle_of(names, interaction, module)
    user = per_request(bundle, places)
    form = "jagged" if module == "passthrough" else "single"
    exported = export_unchecked(
        bundle, pooling_input=form, per_request=user, dense_per_request=dense
    )
    checks = checks_of(exported, bundle)
    assert {check.part for check in checks} > {"whole", "joined"}
    assert [check.line for check in checks if not check.passed] == []


@pytest.mark.slow
def test_rows_of_several_users_are_several_requests(
    bundle_of: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    bundle = bundle_of("torchrec", "dot", "auto")
    exported = export_unchecked(
        bundle, pooling_input="jagged", per_request=per_request(bundle, (0, 3))
    )
    plain = replace(exported.manifest.inputs, per_request=())
    batch = generate_batch(bundle.manifest.model.flat, plain, 50, seed=3)  # every row another user
    with torch.inference_mode():
        expected = open_bundle_model(bundle)(batch).numpy()
    np.testing.assert_allclose(exported.score(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_user_side_has_one_row(
    bundle_of: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    """A graph that is given the user's features per candidate says so, and does not guess."""
    import onnxruntime as ort

    bundle = bundle_of("torchrec", "dot", "auto")
    exported = export_unchecked(
        bundle, pooling_input="single", per_request=per_request(bundle, (0, 3))
    )
    plain = replace(exported.manifest.inputs, per_request=())
    batch = generate_batch(bundle.manifest.model.flat, plain, 4, seed=1)
    session = ort.InferenceSession(str(exported.path / "whole.onnx"))
    with pytest.raises(Exception, match="Got: 4 Expected: 1"):
        session.run(None, plain.feeds(batch))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"places": (0,)}, "towers mix features"),
        ({"places": (0, 1, 2, 3), "dense_per_request": True}, "every input comes once"),
        ({"places": (), "dense_per_request": True}, "needs --request-batching"),
        ({"places": (1,), "format": "triton"}, "--request-batching for triton"),
    ],
)
def test_requests_that_cannot_be(
    bundle_of: Callable[..., Bundle],
    export_unchecked: Exporter,
    tmp_path: Path,
    options: dict[str, Any],
    found: str,
) -> None:
    bundle = bundle_of("torchrec", "dot", "auto")
    user = per_request(bundle, options.pop("places"))
    with pytest.raises(DmtError, match=found):
        export_unchecked(bundle, pooling_input="single", per_request=user, **options)
    assert list(tmp_path.glob("*out*")) == []
