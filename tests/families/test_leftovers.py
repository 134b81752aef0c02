"""Tensors beside the model's own: what may be passed over, what never is, and what is recorded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families import ModelConfig, infer_model
from support.checkpoints.flat import make_flat
from support.checkpoints.shapes import facebook_shapes, make_checkpoint, torchrec_shapes

TORCHREC = torchrec_shapes()
WRAPPED = torchrec_shapes(prefix="model.")
FACEBOOK = facebook_shapes((3, 4))
EBC = "sparse_arch.embedding_bag_collection.embedding_bags"


def extended(shapes, name, shape=(3, 4), dtype="fp32"):
    return make_checkpoint(("", shapes | {name: shape}), dtypes={name: dtype})


@pytest.mark.parametrize("name", ["n_averaged", "model.n_averaged", "bn.num_batches_tracked"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_counters_of_torch_are_passed_over_and_recorded(name, shape):
    info = infer_model(extended(TORCHREC, name, shape, "int64"))
    (ignored,) = info.ignored_tensors
    assert (ignored.name, ignored.dtype, ignored.shape) == (name, "int64", shape)
    assert "counter" in ignored.reason


@pytest.mark.parametrize(
    "name",
    [
        "train_auroc.preds",
        "metrics.val_logloss.total",
        "loss_fn.pos_weight",
        "valid_metrics_0.BinaryAUROC.confmat",
        "criterion.weight",
    ],
)
def test_metrics_are_passed_over_where_the_user_says_so(name):
    checkpoint = extended(TORCHREC, name)
    with pytest.raises(ArchitectureError, match="1 extra") as caught:
        infer_model(checkpoint)
    assert f'ignore: ["{name}"]' in caught.value.hint and "--model " not in caught.value.hint
    info = infer_model(checkpoint, ModelConfig(ignore=(name.split(".")[0] + ".*",)))
    assert [tensor.name for tensor in info.ignored_tensors] == [name]
    assert "ignore" in info.ignored_tensors[0].reason


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cin.conv1ds.0.weight", "an xDeepFM"),
        ("inter_arch.deep_fm.dense_module.0.weight", "SimpleDeepFMNN"),
        ("factor_estimating_net.linears.0.weight", "an IFM"),
        ("wide.weight", "wide"),
        ("auc_attention.weight", "auc_attention"),
        ("step", "step"),  # a float is no counter
    ],
)
@pytest.mark.parametrize("shapes", [TORCHREC, FACEBOOK])
def test_parts_of_a_model_are_named_and_never_dropped(name, said, shapes):
    checkpoint = extended(shapes, name)
    with pytest.raises(ArchitectureError, match="1 extra") as caught:
        infer_model(checkpoint)
    assert said in caught.value.found and "--model" in caught.value.hint
    assert "ignore" not in caught.value.hint
    for pattern in (name, "*", f"*{name[2:]}"):
        with pytest.raises(ConfigError, match="inside the model's own modules"):
            infer_model(checkpoint, ModelConfig(ignore=(pattern,)))


def test_a_pattern_that_catches_the_model_itself_is_refused():
    with pytest.raises(ConfigError, match="inside the model's own modules") as caught:
        infer_model(extended(TORCHREC, "auroc.n"), ModelConfig(ignore=("*auroc*", "dense_arch.*")))
    assert "dense_arch.model._mlp.0._linear.weight" in caught.value.details


def test_what_stands_outside_the_modules_may_be_passed_over():
    checkpoint = extended(WRAPPED, "teacher_head.weight")
    with pytest.raises(ArchitectureError, match="teacher_head"):
        infer_model(checkpoint)
    info = infer_model(checkpoint, ModelConfig(ignore=("teacher_head.*",)))
    assert [tensor.name for tensor in info.ignored_tensors] == ["teacher_head.weight"]


@pytest.mark.parametrize("pattern", ["cin*", "train_auroc.*", "model.x"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(ConfigError, match="matches no tensor") as caught:
        infer_model(make_checkpoint(("", TORCHREC)), ModelConfig(ignore=(pattern,)))
    assert repr(pattern) in caught.value.found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{EBC}.t_a._mch_sorted_raw_ids", "ZCH"),
        ("sparse_arch.mc._managed_collision_modules.t_a.counts", "ZCH"),
        ("beside._hash_zch_identities", "MP-ZCH"),
        (f"{EBC}.t_a.weight_id", "KVZCH"),
        (f"{EBC}.t_a.bucket", "KVZCH"),
        ("t_a_itp_address_lookup", "ITEP"),
        ("sparse_arch._itep_modules.0.row_util_0", "ITEP"),
    ],
)
@pytest.mark.parametrize("ignore", [(), ("*",)])
@pytest.mark.parametrize("shapes", [TORCHREC, WRAPPED, {"other.weight": (3, 4)}])
def test_id_remapping_is_refused_whatever_the_user_says(name, said, ignore, shapes):
    checkpoint = extended(shapes, name, (7,), "int64")
    with pytest.raises(ArchitectureError, match="remaps or prunes ids") as caught:
        infer_model(checkpoint, ModelConfig(ignore=ignore))
    assert said in caught.value.found and name in caught.value.details[0]
    assert "ignore" not in caught.value.hint


def test_a_table_may_have_the_name_of_a_remap():
    shapes = torchrec_shapes({"bucket": 3, "weight_id": 4, "module": 5})
    info = infer_model(make_checkpoint(("", shapes)))
    assert [table.name for table in info.spec.tables] == ["bucket", "weight_id", "module"]


def test_a_part_with_tables_of_its_own_is_no_second_model():
    table = "embedding_layer.embedding_layer.embedding_layers.{}.weight"
    shapes = {table.format(name): (5, 4) for name in "ab"}
    shapes |= {"fm.lr_layer." + table.format(name): (5, 1) for name in "ab"}
    shapes |= {"mlp.mlp.0.weight": (1, 8)}
    with pytest.raises(ArchitectureError, match="neither a DLRM nor a DCNv2") as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert "fm.lr_layer" in caught.value.found and "mlp" in caught.value.found
    assert "--model" in caught.value.hint


@pytest.mark.parametrize("inner", ["ema_model.", "teacher."])
def test_a_copy_inside_the_model_is_asked_about(inner):
    shapes = TORCHREC | {inner + name: shape for name, shape in TORCHREC.items()}
    with pytest.raises(ArchitectureError, match="holds 2 models") as caught:
        infer_model(make_checkpoint(("", shapes)))
    assert f"prefix: '{inner}'" in "".join(caught.value.details)


@pytest.mark.parametrize(
    "group",
    [
        ("ema.shadow_params", {"0": (3, 4), "1": (5, 4)}),
        ("optimizer.ema", {"12": (4, 3)}),
        ("callbacks.EMA", {"ema_weights.0": (3, 4)}),
        ("callbacks.WeightAveraging.average", {"w": (3, 4)}),
        ("swa_state", {"0": (4,)}),
    ],
)
def test_averaged_weights_without_names_are_asked_about(group):
    checkpoint = make_checkpoint(("model", TORCHREC), group)
    with pytest.raises(ArchitectureError, match="averaged weights beside") as caught:
        infer_model(checkpoint)
    assert "container: model" in caught.value.hint
    assert infer_model(checkpoint, ModelConfig(container="model")).spec.family == "torchrec-dlrm"


@pytest.mark.parametrize(
    "group",
    [
        ("optimizer.state.0", {"exp_avg": (3, 4), "exp_avg_sq": (3, 4)}),
        ("ema", {"decay": ()}),
        ("schema", {"0": (3, 4)}),
    ],
)
def test_other_dicts_are_no_averages(group):
    infer_model(make_checkpoint(("model", TORCHREC), group))


def test_an_averaged_model_alone_is_read():
    shapes = {f"module.{name}": shape for name, shape in TORCHREC.items()}
    infer_model(make_checkpoint(("ema", shapes)))


def test_what_was_not_read_is_named():
    shapes = dict(TORCHREC)
    del shapes[f"{EBC}.t_b.weight"]
    unread = {f"{EBC}.t_b.weight": "a tensor of torch.quint4x2"}
    checkpoint = replace(make_checkpoint(("", shapes)), unread=unread)
    with pytest.raises(ArchitectureError) as caught:
        infer_model(checkpoint)
    assert f"not read: {EBC}.t_b.weight (a tensor of torch.quint4x2)" in caught.value.details
    del shapes[f"{EBC}.t_a.weight"]
    tables = replace(make_checkpoint(("", shapes)), unread=unread)
    with pytest.raises(ArchitectureError, match="whose tables are of types that are not read"):
        infer_model(tables)
    unread = {"a": "a tensor of torch.quint4x2"}
    other = replace(make_checkpoint(("", {"x": (3,)})), unread=unread)
    with pytest.raises(ArchitectureError, match="no model of a known family") as caught:
        infer_model(other)
    processed = "ebc._feature_processors.features.position_weights.a"
    with pytest.raises(ArchitectureError, match="a feature processor"):
        infer_model(make_checkpoint(("", {processed: (3,)})))
    assert "torch.quint4x2" in caught.value.details[-1] and "--model" in caught.value.hint


@pytest.fixture
def averaged(tmp_path):
    """A model with a counter of AveragedModel and a metric beside it."""
    beside = {"n_averaged": torch.tensor(3), "train_auroc.preds": torch.ones(2)}
    path = make_flat(tmp_path / "flat.pt", edit=lambda state: state.update(beside))
    (tmp_path / "facts.yaml").write_text('ignore: ["train_auroc.*"]')
    return path, "--model-config", tmp_path / "facts.yaml"


def test_inspect_shows_what_is_passed_over_and_how_facts_are_known(averaged, call_dmt):
    run = call_dmt("inspect", *averaged, "--json")
    value = json.loads(run.stdout)
    assert [tensor["name"] for tensor in value["ignored_tensors"]] == [
        "n_averaged",
        "train_auroc.preds",
    ]
    assert all(fact["source"] and fact["reason"] for fact in value["facts"])
    run = call_dmt("inspect", *averaged)
    assert "torch's counter of averaged models" in run.stdout
    assert all(word in run.stdout for word in ("read", "inferred", "assumed"))


@pytest.mark.slow
def test_bundles_and_reports_record_what_was_passed_over(averaged, tmp_path, call_dmt):
    run = call_dmt(
        "convert",
        *averaged,
        "--towers",
        2,
        "--tower-module",
        "passthrough",
        "--out",
        tmp_path / "b",
    )
    assert run.code == 0, run.stderr
    assert "2 tensors are passed over: n_averaged, train_auroc.preds" in run.stderr
    recorded = json.loads((tmp_path / "b" / "dmt.json").read_text())["ignored_tensors"]
    assert [tensor["name"] for tensor in recorded] == ["n_averaged", "train_auroc.preds"]
    page = (tmp_path / "b" / "report.html").read_text()
    assert "train_auroc.preds" in page and "2 tensors of the checkpoint were passed over" in page
    run = call_dmt("partition", *averaged, "--towers", 2)
    assert "2 tensors are passed over" in run.stderr
