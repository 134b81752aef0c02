"""The file of --model-config: the example in the documentation, and every refusal."""

from __future__ import annotations

import pytest

from dmt_convert.errors import ConfigError
from dmt_convert.families import read_model_config
from dmt_convert.families.model_config import EXAMPLE


def write(tmp_path, text):
    path = tmp_path / "model.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_example_is_read(tmp_path):
    config = read_model_config(write(tmp_path, EXAMPLE))
    assert (config.family, config.container, config.prefix) == ("torchrec-dlrm", "model", "model.")
    assert (config.interaction, config.self_pairs, config.pair_order) == ("dot", False, "triu")
    assert config.features is not None and config.features[0].table == "t_user"
    assert config.features[1].name == "last_item" and config.features[1].table is None
    assert config.qr_operation == "mult"
    assert config.ignore == ("train_auroc.*",)


def test_numbers_are_names(tmp_path):
    config = read_model_config(write(tmp_path, "features: [3, {name: 7, table: 0}]"))
    assert config.features is not None
    assert [(f.name, f.table) for f in config.features] == [("3", None), ("7", "0")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"\xff\xfe\x00", "cannot be read"),
        ("a: [", "cannot be read"),
        ("a: 2024-13-45", "cannot be read"),
        ("[" * 20_000, "cannot be read"),
        ("", "NoneType"),
        ("- a", "list"),
        ("pooling: sum\nfoo: 1", "unknown key 'foo'"),
        ("1: 2", "unknown key 1"),
        ("interaction: fm", "interaction: 'fm' is not one of dot"),
        ("interaction: [dot]", "is not one of dot"),
        ("pair_order: upper", "pair_order"),
        ("qr_operation: sum", "qr_operation: 'sum' is not one of mult"),
        ("self_pairs: 1", "self_pairs: 1 is neither true nor false"),
        ("final_sigmoid: 'yes'", "final_sigmoid"),
        ("family: 3", "family: 3 is not a string"),
        ("container: [model]", "container"),
        ("prefix: {}", "prefix"),
        ("pooling: max", "pooling: 'max' is neither"),
        ("pooling: {a: max}", "pooling: 'max' is neither"),
        ("pooling: {a: }", "pooling: None is neither"),
        ("pooling: {3: mean}", "pooling: 3 is no name"),
        ("pooling: [mean]", "is neither sum nor mean"),
        ("features: a", "features: not a list"),
        ("features: []", "features: not a list"),
        ("features: [[a]]", "neither a name"),
        ("features: [{table: a}]", "neither a name"),
        ("features: [{name: a, dim: 3}]", "neither a name"),
        ("features: [no]", "features: False is neither a name"),
        ("features: [{name: a, table: [b]}]", "neither a name"),
        ("features: [{name: a, pooling: max}]", "a pooling that is neither"),
        ("ignore: a", "ignore: not a list"),
        ("ignore: [1]", "ignore: not a list"),
        ("a: &a [x,x,x,x,x,x,x,x]\nfeatures: [[*a,*a,*a,*a,*a,*a,*a,*a]]", "neither a name"),
    ],
)
def test_refusals(text, match, tmp_path):
    with pytest.raises(ConfigError, match="model config") as caught:
        read_model_config(write(tmp_path, text))
    assert match in str(caught.value)
    assert "an example:" in caught.value.hint
    assert len(str(caught.value)) < 3000


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_config(tmp_path / "no.yaml")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_model_config(write(tmp_path, "interaction: fm\npooling: max\nfoo: 1"))
    assert len(caught.value.details) == 3
