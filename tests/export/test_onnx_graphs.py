"""ONNX graphs answer like the model, whatever the interaction, the module and the inputs' form."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.config import ExportConfig
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import DataError
from dmt_convert.serving import ExportedModel, export_bundle, onnx_jagged, open_graph
from dmt_convert.serving.checks import generate_batch
from support.exports import checks_of
from support.paths import REPOSITORY

Exporter = Callable[..., ExportedModel]

MODELS: tuple[dict[str, Any], ...] = (
    {"module": "passthrough"},
    {"module": "dlrm", "convert": {"c": 1, "p": 2, "dim": 4}},
    {"module": "dcn", "interaction": "dcn"},
    {"module": "passthrough", "interaction": "dcn"},
    {"module": "dlrm", "interaction": "projection"},
    {"module": "passthrough", "interaction": "self-pairs", "names": "facebook", "mean": False},
    {"module": "dlrm", "interaction": "cat", "names": "facebook", "mean": False},
)
FORMS = (
    {"pooling_input": "single"},
    {"pooling_input": "fixed", "weighted": ("*",)},
    {"pooling_input": "padded", "out_of_range": "clip"},
    {"pooling_input": "jagged"},
    {"pooling_input": "single", "weighted": ("*",), "out_of_range": "clip"},
    {"pooling_input": "fixed"},
    {"pooling_input": "padded", "weighted": ("*",)},
    {"pooling_input": "jagged", "weighted": ("*",), "out_of_range": "clip"},
)
ONE_IN_EIGHT = [
    pytest.param(i, j, marks=[] if (i + j) % 8 == 0 else pytest.mark.exhaustive)
    for i in range(len(MODELS))
    for j in range(len(FORMS))
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "form"), ONE_IN_EIGHT)
def test_graphs_answer_like_the_model(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, model: int, form: int
) -> None:
    bundle = make_bundle(**MODELS[model])
    checks = checks_of(export_unchecked(bundle, **FORMS[form]), bundle)
    assert not [check.line for check in checks if not check.passed]
    assert {check.part for check in checks} == {"tower_000", "tower_001", "joined", "whole"}
    assert len(checks) > 20


def narrow_table(state: dict[str, Any]) -> None:
    state["emb_l.1.weight"] = state["emb_l.1.weight"][:, :4].contiguous()
    weight = state["top_l.0.weight"]
    state["top_l.0.weight"] = torch.cat([weight[:, :20], weight[:, 24:]], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["passthrough", "dlrm"])
def test_tables_of_different_widths_and_forms(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, module: str
) -> None:
    bundle = make_bundle(module, names="facebook", interaction="cat", edit=narrow_table, mean=False)
    names = bundle.manifest.model.flat.feature_names
    assert len(set(bundle.manifest.model.flat.feature_dims)) == 2
    forms = dict(zip(names, ("single", "single", "padded", "jagged"), strict=True))
    exported = export_unchecked(bundle, pooling_input=forms, weighted=(names[0], names[3]))
    assert not [check.line for check in checks_of(exported, bundle) if not check.passed]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_tables(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, dtype: str
) -> None:
    bundle = make_bundle("passthrough", convert={"dtype": dtype})
    forms = dict(
        zip(
            bundle.manifest.model.flat.feature_names,
            ("single", "fixed", "padded", "jagged"),
            strict=True,
        )
    )
    exported = export_unchecked(bundle, pooling_input=forms)
    assert not [check.line for check in checks_of(exported, bundle) if not check.passed]


@pytest.mark.slow
def test_export_with_its_own_process(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = make_bundle("passthrough")
    export = export_bundle(bundle, tmp_path / "out", ExportConfig(format="onnx"))
    assert export.manifest.details == {"opset": 20, "ir_version": 9}
    assert len(export.checks) > 20


@pytest.mark.slow
def test_the_onnx_package_opens_copied_weights_and_refuses_hard_links(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    """docs/export.md quotes the words."""
    bundle = make_bundle("dlrm", convert={"c": 1, "p": 2, "dim": 4})
    shared, own = (export_unchecked(bundle, copy_weights=copy) for copy in (False, True))
    with pytest.raises(Exception, match="hard link"):
        onnx.load(str(shared.path / "whole.onnx"))
    onnx.load(str(own.path / "whole.onnx"))
    onnx.checker.check_model(str(own.path / "whole.onnx"))
    assert "hardlink" in (REPOSITORY / "docs/export.md").read_text("utf-8")


@pytest.mark.slow
def test_files_say_what_they_are_and_hold_no_table(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, tmp_path: Path
) -> None:
    bundle = make_bundle("dlrm", convert={"c": 1, "p": 2, "dim": 4})
    exported = export_unchecked(bundle, pooling_input="padded", copy_weights=True)
    folder = exported.path
    for part, name in exported.manifest.parts.items():
        onnx.checker.check_model(str(folder / name))
        model = onnx.load(str(folder / name), load_external_data=False)
        said = {prop.key: prop.value for prop in model.metadata_props}
        assert said["dmt.part"] == part
        assert (model.ir_version, model.opset_import[0].version) == (9, 20)
        features = json.loads(said["dmt.features"])
        taken = [name for feature in features for name in feature["inputs"]]
        given = [value.name for value in model.graph.input]
        assert taken == [name for name in given if name != "dense" and "tower" not in name]
        for tensor in model.graph.initializer:
            inline = tensor.data_location != onnx.TensorProto.EXTERNAL
            assert not inline or len(tensor.raw_data) < 1024, tensor.name
            for entry in tensor.external_data:
                assert entry.key != "location" or ".." not in entry.value
    whole = onnx.load(str(folder / "whole.onnx"), load_external_data=False)
    described = json.loads({p.key: p.value for p in whole.metadata_props}["dmt.features"])
    spec = bundle.manifest.model
    assert [f["name"] for f in described] == list(spec.flat.feature_names)
    assert [f["rows"] for f in described] == [
        spec.flat.table_of(name).rows for name in spec.flat.feature_names
    ]


def swap_towers(model: onnx.ModelProto) -> None:
    """Let the first tower read the second one's module."""
    for tensor in model.graph.initializer:
        if "tower_001" in tensor.name and "tower_module" in tensor.name:
            other = tensor.name.replace("tower_001", "tower_000")
            first = next((t for t in model.graph.initializer if t.name == other), None)
            if first is not None and list(first.dims) == list(tensor.dims):
                del first.external_data[:]
                first.external_data.extend(tensor.external_data)


def shift_a_table(model: onnx.ModelProto) -> None:
    """Let a stack of tables begin one row later."""
    tensor = next(t for t in model.graph.initializer if ":tables." in t.name)
    row = 4 * tensor.dims[1]
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + row)


def forget_the_range(model: onnx.ModelProto) -> None:
    """Let ids past their table read the next one."""
    for node in model.graph.node:
        if node.op_type == "Where" and "behind_the_end" in node.name:
            node.op_type = "Identity"
            kept = node.input[2]
            del node.input[:]
            node.input.append(kept)


def swap_pairs(model: onnx.ModelProto) -> None:
    """Put two dot products in each other's place."""
    (picked,) = (node for node in model.graph.node if node.op_type == "GatherElements")
    (expanded,) = (node for node in model.graph.node if picked.input[1] in node.output)
    tensor = next(t for t in model.graph.initializer if t.name == expanded.input[0])
    cells = onnx.numpy_helper.to_array(tensor).copy()
    cells[..., :2] = cells[..., 1::-1]
    tensor.CopyFrom(onnx.numpy_helper.from_array(cells, tensor.name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_it", [swap_towers, shift_a_table, forget_the_range, swap_pairs], ids=lambda f: f.__name__
)
def test_checks_notice_a_broken_graph(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Exporter,
    break_it: Callable[[onnx.ModelProto], None],
) -> None:
    bundle = make_bundle("dlrm", convert={"c": 1, "p": 2, "dim": 4})
    exported = export_unchecked(bundle, pooling_input="single")
    path = exported.path / "whole.onnx"
    model = onnx.load(str(path), load_external_data=False)
    before = model.SerializeToString()
    break_it(model)
    assert model.SerializeToString() != before
    broken = ExportedModel(exported.path, checked=False)  # its digests would notice as well
    path.write_bytes(model.SerializeToString())
    failed = {check.part for check in checks_of(broken, bundle) if not check.passed}
    assert failed == {"whole"}


def jagged(exported: ExportedModel, lengths: np.ndarray, seed: int = 0) -> Batch:
    """Rows with bags of the given lengths, (F, B)."""
    rng = np.random.default_rng(seed)
    flat = exported.spec.flat
    bags = []
    for name, own in zip(flat.feature_names, lengths, strict=True):
        offsets = np.concatenate([[0], np.cumsum(own)]).astype(np.int64)
        ids = rng.integers(0, flat.table_of(name).rows, offsets[-1])
        bags.append(Bag(values=ids, offsets=offsets))
    dense = rng.standard_normal((lengths.shape[1], flat.num_dense)).astype(np.float32)
    return Batch(dense=dense, feature_names=flat.feature_names, bags=tuple(bags))


LONG = np.random.default_rng(1).integers(0, 5, (4, 300))
LONG[1, 7], LONG[2, 299], LONG[2, 0] = 5000, 65, 9


@pytest.fixture
def unstacked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Read one feature after the other, however few bags there are."""
    return lambda: monkeypatch.setattr(onnx_jagged, "_CACHED_BYTES", -1000)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one by one"])
@pytest.mark.parametrize(
    "lengths",
    [LONG, np.zeros((4, 3), dtype=int), np.array([[0], [4096], [1], [0]]), LONG[:, 6:8]],
    ids=["one long bag", "nothing", "one row", "a long one of two"],
)
def test_jagged_bags_of_any_length(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Exporter,
    unstacked: Callable[[], None],
    lengths: np.ndarray,
    stacked: bool,
) -> None:
    if not stacked:
        unstacked()
    bundle = make_bundle("passthrough")
    exported = export_unchecked(bundle, pooling_input="jagged")
    batch = jagged(exported, lengths)
    with torch.inference_mode():
        expected = open_bundle_model(bundle)(batch).numpy()
    limit = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(exported.whole(batch), expected, rtol=0, atol=limit)
    np.testing.assert_allclose(exported.joined(batch), expected, rtol=0, atol=limit)


def test_no_rows_have_no_logits(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    exported = export_unchecked(make_bundle("passthrough"), pooling_input="jagged")
    feeds = exported.manifest.inputs.feeds(jagged(exported, LONG[:, :0]))
    assert exported._runner("whole").run(feeds).shape == (0, 1)


def test_large_batches_of_the_checks_touch_few_rows(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter
) -> None:
    """Each page that a lookup maps is resident: 2,048 rows of a large bundle would take GBs."""
    exported = export_unchecked(make_bundle("passthrough"), pooling_input="jagged")
    spec = exported.spec.flat
    batch = generate_batch(spec, exported.manifest.inputs, 300, seed=0, longest=50, first_rows=3)
    for name, bag in zip(batch.feature_names, batch.bags, strict=True):
        assert {*bag.values.tolist()} <= {0, 1, 2, spec.table_of(name).rows - 1}
        assert np.diff(bag.offsets).max() == 50


@pytest.mark.parametrize("way", ["stacked", "rectangle", "chunks"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.__setitem__(0, x[0] + 1),
        lambda x: x.__setitem__(-1, x[-1] - 1),
        lambda x: (x.__setitem__(0, -1), x.__setitem__(1, x[1] + LONG[2, 0] + 1)),
        lambda x: x.__setitem__(slice(0, 2), (2**63 - 1, 2**63 - 1)),
    ],
    ids=["too many", "too few", "negative", "overflow"],
)
def test_lengths_that_do_not_fit_are_refused(
    make_bundle: Callable[..., Bundle],
    export_unchecked: Exporter,
    unstacked: Callable[[], None],
    way: str,
    change: Callable[[np.ndarray], object],
) -> None:
    if way != "stacked":
        unstacked()
    exported = export_unchecked(make_bundle("passthrough"), pooling_input="jagged")
    batch = jagged(exported, LONG if way == "chunks" else LONG[:, 10:20])
    feeds = exported.manifest.inputs.feeds(batch)
    name = f"{exported.spec.flat.feature_names[2]}.lengths"
    feeds[name] = feeds[name].copy()
    change(feeds[name])
    with pytest.raises(DataError, match="do_not_fit_their_ids"):
        exported._runner("whole").run(feeds)


def test_one_weight_per_id(make_bundle: Callable[..., Bundle], export_unchecked: Exporter) -> None:
    exported = export_unchecked(
        make_bundle("passthrough"), pooling_input="jagged", weighted=("cat_2",)
    )
    feeds = exported.manifest.inputs.feeds(jagged(exported, LONG[:, 10:20]))
    for changed in (np.append(feeds["cat_2.weights"], np.float32(1)), feeds["cat_2.weights"][:-1]):
        with pytest.raises(DataError, match="do_not_fit_their_ids"):
            exported._runner("whole").run(feeds | {"cat_2.weights": changed})


@pytest.mark.parametrize("form", ["fixed", "padded", "single"])
def test_one_weight_is_not_taken_for_many(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, form: str
) -> None:
    exported = export_unchecked(make_bundle("passthrough"), pooling_input=form, weighted=("cat_2",))
    batch = jagged(exported, np.ones((4, 3), dtype=int))
    bags = [*batch.bags]
    bags[2] = replace(bags[2], weights=np.ones(3, dtype=np.float32))
    feeds = exported.manifest.inputs.feeds(replace(batch, bags=tuple(bags)))
    exported._runner("whole").run(feeds)
    with pytest.raises(DataError):
        exported._runner("whole").run(feeds | {"cat_2.weights": feeds["cat_2.weights"][:1]})


@pytest.mark.parametrize("form", ["fixed", "padded", "jagged", "single"])
def test_an_id_outside_its_table_names_the_place(
    make_bundle: Callable[..., Bundle], export_unchecked: Exporter, form: str
) -> None:
    exported = export_unchecked(make_bundle("passthrough"), pooling_input=form)
    batch = jagged(exported, np.ones((4, 3), dtype=int))
    for bad in (-3, 50, 2**40, -(2**63), 1 - 2**63, 2**63 - 1):
        bag = replace(batch.bags[1], values=np.array([0, bad, 1]))
        wrong = replace(batch, bags=(batch.bags[0], bag, *batch.bags[2:]))
        named = f"id {bad} of feature {batch.feature_names[1]!r} is outside its table"
        with pytest.raises(DataError, match=named):
            exported.whole(wrong)
        with pytest.raises(DataError, match=named):
            exported.joined(wrong)
        graph = open_graph(exported.path / "whole.onnx")
        with pytest.raises(DataError, match="indices element out of data bounds"):
            graph.run(exported.manifest.inputs.feeds(wrong))
