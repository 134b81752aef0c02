"""How a batch fills the inputs of a graph."""

from typing import Any

import numpy as np
import pytest

from dmt_convert.data import Bag, Batch
from dmt_convert.errors import DataError, ExportError
from dmt_convert.serving import (
    PADDING,
    FeatureInput,
    GraphInputs,
    generate_batch,
    join_inputs,
)
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec

BAG = Bag(
    values=np.array([5, 6, 7]),
    offsets=np.array([0, 2, 2, 3]),
    weights=np.array([0.5, 2.0, 3.0], dtype=np.float32),
)
PLAIN = Bag(values=BAG.values, offsets=BAG.offsets)
FLAT = ModelSpec(
    family="test",
    tables=(TableSpec(name="t", rows=9, dim=4),),
    features=(FeatureSpec(name="f", table="t"),),
    dense_arch=MlpSpec(widths=(2, 4), final_relu=True),
    interaction=InteractionSpec(kind="cat"),
    over_arch=MlpSpec(widths=(8, 1), final_relu=False),
)
ONES = Bag(values=np.array([3, 1, 2]), offsets=np.arange(4))


def filled(bag: Bag, form: str, *, weighted: bool = False) -> dict[str, object]:
    feature = FeatureInput(feature="f", form=form, weighted=weighted)  # type: ignore[arg-type]
    return {name: value.tolist() for name, value in feature.fill(bag)}


def test_every_form() -> None:
    assert filled(ONES, "single") == {"f": [[3], [1], [2]]}
    pairs = Bag(values=np.arange(6), offsets=np.array([0, 2, 4, 6]))
    assert filled(pairs, "fixed") == {"f": [[0, 1], [2, 3], [4, 5]]}
    assert filled(PLAIN, "padded") == {"f": [[5, 6], [PADDING, PADDING], [7, PADDING]]}
    assert filled(PLAIN, "jagged") == {"f.lengths": [2, 0, 1], "f.values": [5, 6, 7]}


def test_weights_come_in_the_shape_of_the_ids() -> None:
    assert filled(BAG, "padded", weighted=True)["f.weights"] == [[0.5, 2], [0, 0], [3, 0]]
    assert filled(BAG, "jagged", weighted=True)["f.weights"] == [0.5, 2, 3]
    assert filled(PLAIN, "jagged", weighted=True)["f.weights"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("bag", "form", "found"),
    [
        (PLAIN, "single", "row 0 has 2 ids of feature 'f'"),
        (PLAIN, "fixed", "row 1 has 0 ids of feature 'f'"),
        (BAG, "jagged", "the bags of feature 'f' have weights"),
    ],
)
def test_bags_of_another_form_are_refused(bag: Bag, form: str, found: str) -> None:
    with pytest.raises(DataError, match=found):
        filled(bag, form)


def test_dense_input_gives_way_to_a_feature_of_its_name() -> None:
    features = (FeatureInput(feature="dense", form="single"),)
    inputs = GraphInputs(num_dense=2, features=features)
    assert inputs.names == ("dense_", "dense")
    assert GraphInputs.from_json(inputs.to_json()) == inputs


def test_without_columns_there_is_no_dense_input() -> None:
    inputs = GraphInputs(num_dense=0, features=(FeatureInput(feature="f", form="single"),))
    batch = Batch(
        dense=np.zeros((3, 0), dtype=np.float32), feature_names=("f",), bags=(ONES,), labels=None
    )
    assert inputs.names == ("f",) and list(inputs.feeds(batch)) == ["f"]
    assert inputs.dense_feed(batch) == {}


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ExportError, match=r"'f\.values'"):
        GraphInputs(
            num_dense=1,
            features=(
                FeatureInput(feature="f", form="jagged"),
                FeatureInput(feature="f.values", form="single"),
            ),
        )


def test_requests_are_runs_of_equal_user_sides() -> None:
    user = Bag(values=np.array([1, 2, 1, 2, 9]), offsets=np.array([0, 2, 4, 5, 5]))
    item = Bag(values=np.arange(4), offsets=np.arange(5))
    batch = Batch(
        dense=np.zeros((4, 1), dtype=np.float32), feature_names=("u", "i"), bags=(user, item)
    )
    inputs = GraphInputs(
        num_dense=1,
        features=(
            FeatureInput(feature="u", form="padded"),
            FeatureInput(feature="i", form="single"),
        ),
        per_request=("u",),
    )
    requests = list(inputs.requests(batch))
    assert [request.num_rows for request in requests] == [2, 1, 1]
    feeds = inputs.feeds(requests[0])
    assert feeds["u"].tolist() == [[1, 2]] and feeds["i"].tolist() == [[0], [1]]
    assert inputs.feeds(requests[2])["u"].tolist() == [[PADDING]]


@pytest.mark.parametrize(
    ("forms", "joined"),
    [
        ([], "jagged"),
        (["padded"], "padded"),
        (["jagged", "single"], "single"),
        (["fixed", "padded"], "fixed"),
        (["single", "fixed"], "single"),
    ],
)
def test_joined_inputs_fit_every_export(forms: list[Any], joined: str) -> None:
    exports = [
        GraphInputs(num_dense=2, features=(FeatureInput(feature="f", form=form, weighted=i == 0),))
        for i, form in enumerate(forms)
    ]
    inputs = join_inputs(FLAT, exports)
    assert inputs.features[0].form == joined
    assert inputs.features[0].weighted == (len(forms) == 1)
    batch = generate_batch(FLAT, inputs, 6, seed=0)
    for own in exports:
        assert set(own.feeds(batch)) == set(own.names)
