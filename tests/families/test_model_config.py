"""The file of --model-config: the example in the documentation, and every refusal."""

from __future__ import annotations

import pytest

from dmt_convert.errors import ConfigError
from dmt_convert.families import ModelConfig, read_model_config
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
        ("interaction: fm", "interaction: should be 'dot'"),
        ("interaction: [dot]", "should be 'dot'"),
        ("pair_order: upper", "pair_order"),
        ("qr_operation: sum", "qr_operation: should be 'mult'"),
        ("self_pairs: 1", "self_pairs: should be true or false, got 1"),
        ("final_sigmoid: 'yes'", "final_sigmoid"),
        ("family: 3", "family: should be a valid string, got 3"),
        ("container: [model]", "container"),
        ("prefix: {}", "prefix"),
        ("pooling: max", "pooling: should be 'sum' or 'mean', got 'max'"),
        ("pooling: {a: max}", "pooling.a: should be 'sum' or 'mean', got 'max'"),
        ("pooling: {a: }", "pooling.a: should be 'sum' or 'mean', got None"),
        ("pooling: {3: mean}", "pooling.3: should be a valid string"),
        ("pooling: [mean]", "pooling: should be 'sum' or 'mean'"),
        ("features: a", "features: should be a list"),
        ("features: []", "features: should not be empty"),
        ("features: !!set {a, b}", "features: should be a list"),
        ("features: [[a]]", "features.0.name: should be a valid string"),
        ("features: [{table: a}]", "features.0.name: is missing"),
        ("features: [{name: a, dim: 3}]", "features.0.dim: is not a key"),
        ("features: [no]", "features.0.name: should be a valid string, got False"),
        ("features: ['']", "features.0.name: should not be empty"),
        ("features: [{name: a, table: [b]}]", "features.0.table: should be"),
        ("features: [{name: a, pooling: max}]", "features.0.pooling: should be"),
        ("ignore: a", "ignore: should be a list"),
        ("ignore: [1]", "ignore.0: should be a valid string"),
        ("a: &a [x,x,x,x,x,x,x,x]\nfeatures: [[*a,*a,*a,*a,*a,*a,*a,*a]]", "an alias"),
        ("features: &a [*a]", "an alias"),
        ("adapter: x", "unknown key 'adapter'"),
    ],
)
def test_refusals(text, match, tmp_path):
    with pytest.raises(ConfigError, match="model config") as caught:
        read_model_config(write(tmp_path, text))
    assert match in str(caught.value)
    assert "an example:" in caught.value.hint
    assert len(str(caught.value)) < 3000


def test_keys_without_a_value_say_nothing(tmp_path):
    config = read_model_config(write(tmp_path, "family:\npooling:\nfeatures:\nignore:\n"))
    assert config == ModelConfig()


def test_every_key_is_described():
    assert all(field.description for field in ModelConfig.model_fields.values())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_config(tmp_path / "no.yaml")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_model_config(write(tmp_path, "interaction: fm\npooling: max\nfoo: 1"))
    assert len(caught.value.details) == 3
