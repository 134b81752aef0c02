"""What is understood of a checkpoint from names and shapes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families import (
    FAMILIES,
    DlrmFamily,
    FeatureConfig,
    ModelConfig,
    infer_model,
    infer_spec,
)
from dmt_convert.families.name_map import WRAPPERS, strip_wrappers
from dmt_convert.spec import ModelSpec
from support.checkpoints.shapes import facebook_shapes, make_checkpoint, torchrec_shapes

EBC = "sparse_arch.embedding_bag_collection.embedding_bags"


def facts(info):
    return {fact.subject: (fact.value, fact.source) for fact in info.facts}


@pytest.mark.parametrize("kind", ["dot", "dcn", "projection"])
def test_torchrec_models(kind):
    info = infer_model(make_checkpoint(("", torchrec_shapes(kind=kind))))
    assert info.spec.family == "torchrec-dlrm"
    assert info.spec.interaction.kind == kind
    assert info.spec.feature_names == ("a", "b")
    assert info.spec.dense_arch.widths == (3, 4)
    assert info.spec.over_arch.widths[1:] == (6, 1)
    assert not info.spec.final_sigmoid and info.spec.dense_arch.final_relu
    assert facts(info)["pooling"] == ("sum", "assumed")
    assert facts(info)["interaction"][1] == "inferred"
    assert ModelSpec.from_json(info.spec.to_json()) == info.spec
    assert set(info.dense_tensors) >= {"over_arch.0.weight", "over_arch.1.bias"}
    assert info.table_info("t_b").shape == (5, 4)


def test_facebook_models():
    info = infer_model(make_checkpoint(("state_dict", facebook_shapes((3, 1, 5)))))
    assert info.spec.family == "facebook-dlrm" and info.spec.final_sigmoid
    assert info.spec.feature_names == ("f0", "f1", "f2")
    assert info.spec.dense_arch.widths == (3, 5, 8)
    assert (info.spec.interaction.kind, info.spec.interaction.pair_order) == ("dot", "tril")
    assert set(info.tensors) >= {"dense_arch.1.weight", "over_arch.0.bias"}


@given(data=st.data())
def test_wrappers_anywhere(data):
    from_names = st.lists(st.sampled_from(WRAPPERS), max_size=2)
    name = f"{EBC}.t_a.weight"
    wrapped = ".".join(part for old in name.split(".") for part in (*data.draw(from_names), old))
    assert strip_wrappers(wrapped) == name


PLAIN = [family for family in FAMILIES if isinstance(family, DlrmFamily)]


@pytest.mark.parametrize("family", PLAIN, ids=lambda family: family.name)
def test_names_read_both_ways(family):
    names = family.names
    canonical = ["tables.7.weight", "dense_arch.3.bias", "over_arch.0.weight"]
    if family.name == "torchrec-dlrm":
        canonical += ["cross.1.w", "cross.0.v", "cross.2.bias", "branch2.1.weight"]
        canonical += ["over_arch.last.weight"]
    for name in canonical:
        source = names.to_source(name)
        assert source is not None and names.to_canonical(source) == (True, name)
    assert names.to_source("nonsense.0.weight") is None
    assert names.to_canonical("nonsense.0.weight") == (False, None)


SORTED = ["t_0", "t_1", "t_10", *(f"t_{i}" for i in range(2, 10))]


@pytest.mark.parametrize(
    ("tables", "ordered", "expected", "source"),
    [
        (SORTED, True, sorted(SORTED, key=lambda name: int(name[2:])), "assumed"),  # as by DMP
        (SORTED, False, sorted(SORTED, key=lambda name: int(name[2:])), "assumed"),
        (["c2_emb", "c3_emb", "c1_emb"], False, ["c1_emb", "c2_emb", "c3_emb"], "assumed"),
        (["t_2", "t_0", "t_1"], False, ["t_0", "t_1", "t_2"], "assumed"),
        (["t_0", "t_1", "t_2"], True, ["t_0", "t_1", "t_2"], "read"),
        (["only"], False, ["only"], "inferred"),
        (["t_b", "t_a"], True, ["t_b", "t_a"], "assumed"),
        (["user2vec_v1", "item2vec_v1"], True, ["user2vec_v1", "item2vec_v1"], "assumed"),
        (["t_853", "t_301"], True, ["t_853", "t_301"], "assumed"),
    ],
)
def test_order_of_features(tables, ordered, expected, source):
    shapes = torchrec_shapes(dict.fromkeys(tables, 3), dim=4)
    info = infer_model(make_checkpoint(("", shapes), ordered=ordered, rebuilt=True))
    assert [feature.table for feature in info.spec.features] == expected
    assert facts(info)["feature order"][1] == source


@pytest.mark.parametrize("tables", [["a", "b", "c"], ["t_30", "t_7"], ["t_2", "t_0", "t_1"]])
def test_modules_tell_the_order_whatever_became_of_the_tensors(tables):
    shapes = torchrec_shapes(dict.fromkeys(tables, 3), dim=4)
    kept = make_checkpoint(("", shapes))
    mixed = replace(kept, tensors=tuple(sorted(kept.tensors, key=lambda info: info.name)))
    info = infer_model(mixed)
    assert [feature.table for feature in info.spec.features] == tables
    assert facts(info)["feature order"][1] == "read"


@pytest.mark.parametrize(
    ("tables", "ordered"),
    [
        (["user", "item"], False),
        (["clicks_7d", "clicks_30d"], False),
        (["t_1_2", "t_2_1"], False),
        (["t_01", "t_1"], False),
        (["t_20", "t_3", "t_7"], False),  # numbers with gaps are names
        (["101", "121", "301"], True),  # so they are if the file stands sorted
        (["t_30", "t_7"], True),  # built so, or sorted by DMP: nothing tells
        (["a", "b", "c"], True),
        (["t_2", "t_0", "t_1"], True),  # built so, or merged from ranks: nothing tells
        (["c10_emb", *(f"c{i}_emb" for i in range(2, 10))], False),
    ],
)
def test_a_lost_order_is_asked_for(tables, ordered):
    shapes = torchrec_shapes(dict.fromkeys(tables, 3))
    checkpoint = make_checkpoint(("", shapes), ordered=ordered, rebuilt=True)
    with pytest.raises(ArchitectureError, match="order in which the features") as caught:
        infer_model(checkpoint)
    assert "features: [" in caught.value.hint
    spec = infer_spec(checkpoint, ModelConfig(features=_features(*tables)))
    assert [feature.table for feature in spec.features] == tables


def test_faults_are_named_before_the_order_is_asked_for():
    shapes = torchrec_shapes({"user": 3, "item": 4}) | {f"{EBC}.item.weight": (0, 4)}
    with pytest.raises(ArchitectureError, match="1 misshapen") as caught:
        infer_model(make_checkpoint(("", shapes), ordered=False))
    assert "has no rows" in caught.value.details[0]


def _features(*names, **tables):
    return tuple(FeatureConfig(name=n) for n in names) + tuple(
        FeatureConfig(name=name, table=table) for name, table in tables.items()
    )


def test_new_names_by_position_need_an_order():
    config = ModelConfig(features=_features("x", "y"))
    kept = make_checkpoint(("", torchrec_shapes({"user": 3, "item": 4})))
    assert infer_spec(kept, config).feature_names == ("x", "y")
    lost = make_checkpoint(("", torchrec_shapes({"user": 3, "item": 4})), ordered=False)
    with pytest.raises(ArchitectureError, match="order in which"):
        infer_spec(lost, config)


def test_shared_tables():
    shapes = torchrec_shapes({"t_a": 3, "t_b": 5})
    width = 4 + 4 * 3 // 2  # three features over two tables
    shapes["over_arch.model.0._mlp.0._linear.weight"] = (6, width)
    with pytest.raises(ArchitectureError, match="a table serves several features"):
        infer_model(make_checkpoint(("", shapes)))
    config = ModelConfig(features=_features(x="t_a", y="t_b", z="t_a"))
    spec = infer_spec(make_checkpoint(("", shapes)), config)
    assert [(f.name, f.table) for f in spec.features] == [("x", "t_a"), ("y", "t_b"), ("z", "t_a")]


def test_two_models_are_told_apart_by_the_config():
    both = make_checkpoint(
        ("model", torchrec_shapes({"t_a": 3})), ("ema", torchrec_shapes({"t_a": 4}))
    )
    with pytest.raises(ArchitectureError, match="holds 2 models") as caught:
        infer_model(both)
    assert "container: 'ema'" in "".join(caught.value.details)
    assert infer_spec(both, ModelConfig(container="ema")).tables[0].rows == 4
    shapes = torchrec_shapes({"t_a": 3}, prefix="student.") | torchrec_shapes(
        {"t_a": 4}, prefix="teacher."
    )
    with pytest.raises(ArchitectureError, match="holds 2 models"):
        infer_model(make_checkpoint(("", shapes)))
    with pytest.raises(ArchitectureError, match="7 extra"):
        infer_model(make_checkpoint(("", shapes)), ModelConfig(prefix="teacher."))
    config = ModelConfig(prefix="teacher.", ignore=("student.*",))
    assert infer_spec(make_checkpoint(("", shapes)), config).tables[0].rows == 4
    with pytest.raises(ArchitectureError, match="no model of a known family with container='x'"):
        infer_model(both, ModelConfig(container="x"))


def test_everything_that_is_wrong_is_said_at_once():
    shapes = torchrec_shapes(kind="dcn")
    del shapes["dense_arch.model._mlp.0._linear.bias"]
    del shapes["inter_arch.crossnet.V_kernels.1"]
    shapes["over_arch.model.1.weight"] = (1, 7)
    shapes["inter_arch.crossnet.bias.0"] = (11,)
    shapes["attention.weight"] = (2, 2)
    dtypes = {f"{EBC}.t_b.weight": "int8"}
    with pytest.raises(ArchitectureError, match="2 missing, 3 misshapen, 1 extra") as caught:
        infer_model(make_checkpoint(("", shapes), dtypes=dtypes))
    text = "\n".join(caught.value.details)
    for name in ("dense_arch.model._mlp.0._linear.bias", "V_kernels.1", "bias.0", "int8"):
        assert name in text
    assert "extra: attention.weight" in text


def test_a_checkpoint_of_another_model():
    shapes = {f"transformer.h.{i}.attn.weight": (4, 4) for i in range(9)}
    with pytest.raises(ArchitectureError, match="no model of a known family") as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert caught.value.details[-1] == "... and 3 more"


@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 2), (0, 4), (3, 0)])
def test_tables_that_are_none(shape):
    shapes = torchrec_shapes({"t_a": 3, "t_b": 4}) | {f"{EBC}.t_b.weight": shape}
    with pytest.raises(ArchitectureError, match="misshapen"):
        infer_model(make_checkpoint(("", shapes)))


@pytest.mark.parametrize("dtype", ["int64", "int8"])
def test_tables_of_other_dtypes(dtype):
    with pytest.raises(ArchitectureError, match="misshapen") as caught:
        infer_model(
            make_checkpoint(("", facebook_shapes((3, 4))), dtypes={"emb_l.1.weight": dtype})
        )
    assert dtype in "".join(caught.value.details)


@pytest.mark.parametrize("name", ["emb_l.x.weight", "emb_l.00.weight", "bot_l.1.weight"])
def test_indices_that_cannot_be(name):
    with pytest.raises(ArchitectureError) as caught:
        infer_model(make_checkpoint(("", facebook_shapes((3, 4)) | {name: (3, 8)})))
    assert f"extra: {name}" in caught.value.details


def test_a_gap_in_the_tables():
    shapes = facebook_shapes((3, 4, 5))
    del shapes["emb_l.1.weight"]
    with pytest.raises(ArchitectureError) as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert caught.value.details == ("missing: emb_l.1.weight",)


def test_a_long_list_is_cut():
    shapes = facebook_shapes((3, 4)) | {"emb_l.9000.weight": (3, 8)}
    with pytest.raises(ArchitectureError, match="8998 missing") as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert len(caught.value.details) < 110


@pytest.mark.parametrize("wrapped", [True, False])
def test_one_ranks_part_of_a_facebook_model(wrapped):
    shapes = facebook_shapes((3, 4, 5), features=26)
    if wrapped:  # what a multi-rank run writes
        shapes = {
            n.replace("_l.", "_l.module.") if n[0] != "e" else n: s for n, s in shapes.items()
        }
    with pytest.raises(ArchitectureError, match="misshapen") as caught:
        infer_model(make_checkpoint(("state_dict", shapes)))
    assert "a dot of 26 features" in "".join(caught.value.details)
    assert "multi-rank" in "".join(caught.value.details)


def test_parts_of_two_interactions():
    shapes = torchrec_shapes(kind="projection") | torchrec_shapes(kind="dcn")
    with pytest.raises(ArchitectureError, match="4 extra"):
        infer_model(make_checkpoint(("", shapes)))


def test_the_same_tensor_under_two_wrappers():
    shapes = torchrec_shapes()
    shapes["module." + next(iter(shapes))] = (3, 4)
    with pytest.raises(ArchitectureError, match="1 extra"):
        infer_model(make_checkpoint(("", shapes)))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (ModelConfig(interaction="dcn"), "holds no tensor of dcn"),
        (ModelConfig(interaction="projection"), "holds no tensor of projection"),
        (ModelConfig(family="deepfm"), "names the family 'deepfm'"),
        (ModelConfig(pooling={"nobody": "mean"}), "unknown features"),
        (ModelConfig(features=_features("a", "a")), "do not fit the 2 tables"),
        (ModelConfig(features=_features("a", "nobody", "b")), "do not fit the 2 tables"),
        (ModelConfig(features=_features("a")), "do not fit the 2 tables"),
    ],
)
def test_a_config_that_does_not_fit(config, match):
    with pytest.raises(ConfigError, match=match):
        infer_model(make_checkpoint(("", torchrec_shapes())), config)


def test_a_config_that_contradicts_the_tensors():
    with pytest.raises(ConfigError, match="holds the tensors of dcn"):
        infer_model(
            make_checkpoint(("", torchrec_shapes(kind="dcn"))), ModelConfig(interaction="dot")
        )


def test_what_is_given_is_said_to_be():
    config = ModelConfig(
        pooling={"b": "mean"}, final_sigmoid=True, pair_order="tril", interaction="dot"
    )
    info = infer_model(make_checkpoint(("", torchrec_shapes())), config)
    assert [feature.pooling for feature in info.spec.features] == ["sum", "mean"]
    assert info.spec.final_sigmoid and info.spec.interaction.pair_order == "tril"
    for subject in ("pooling", "final sigmoid", "order of pairs", "interaction"):
        assert facts(info)[subject][1] == "given"


NUMBERED = {f"t_cat_{i}": 3 + i for i in range(6)}


@pytest.mark.parametrize("kind", ["dot", "dcn", "projection"])
@pytest.mark.parametrize("lost", [0, 2])
def test_a_missing_table_is_named(kind, lost):
    shapes = torchrec_shapes(NUMBERED, kind=kind)
    del shapes[f"{EBC}.t_cat_{lost}.weight"]
    with pytest.raises(ArchitectureError, match=": 1 missing tensors") as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert caught.value.details == (f"missing: {EBC}.t_cat_{lost}.weight",)


@pytest.mark.parametrize("kind", ["dot", "dcn", "projection"])
def test_a_table_of_a_wrong_dim_is_named(kind):
    shapes = torchrec_shapes(NUMBERED, kind=kind) | {f"{EBC}.t_cat_4.weight": (7, 3)}
    with pytest.raises(ArchitectureError, match=": 1 misshapen tensors") as caught:
        infer_model(make_checkpoint(("", shapes)))
    detail = f"wrong: {EBC}.t_cat_4.weight has shape [7, 3], expected [7, 4]"
    assert caught.value.details == (detail,)


def test_a_missing_and_a_misshapen_table_are_named_together():
    shapes = torchrec_shapes(NUMBERED) | {f"{EBC}.t_cat_4.weight": (7, 3)}
    del shapes[f"{EBC}.t_cat_1.weight"]
    with pytest.raises(ArchitectureError, match=": 1 missing, 1 misshapen tensors") as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert "t_cat_1" in caught.value.details[0] and "t_cat_4" in caught.value.details[1]


def test_tables_of_different_dims_that_fit_are_right():
    shapes = torchrec_shapes(NUMBERED, kind="dcn")
    shapes |= {f"{EBC}.t_cat_1.weight": (4, 2), f"{EBC}.t_cat_4.weight": (7, 6)}
    spec = infer_spec(make_checkpoint(("", shapes)))
    assert spec.feature_dims == (4, 2, 4, 4, 6, 4)


def test_gaps_that_explain_nothing_are_not_reported():
    spec = infer_spec(make_checkpoint(("", torchrec_shapes({"t_1": 3, "t_5": 4, "t_9": 2}))))
    assert len(spec.tables) == 3
