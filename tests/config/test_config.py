"""Settings check themselves, and are the same as options, as YAML and in Python."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.config import (
    COMMANDS,
    Config,
    ConvertConfig,
    ExportConfig,
    FinetuneConfig,
    LaunchConfig,
    PlanConfig,
    RunConfig,
    TrainingConfig,
    add_arguments,
    describe_settings,
    make_config,
    parse_arguments,
    read_settings,
    to_arguments,
)
from dmt_convert.errors import ConfigError, UsageError
from support.paths import REPOSITORY

WRONG: list[tuple[type[Config], dict[str, Any], str]] = [
    (ConvertConfig, {"towers": 0}, "towers must be an integer >= 1, got 0"),
    (ConvertConfig, {"towers": True}, "towers must be an integer"),
    (ConvertConfig, {"towers": 2.5}, "towers must be an integer"),
    (ConvertConfig, {"towers": "4"}, "towers must be an integer"),
    (ConvertConfig, {}, "towers is missing"),
    (ConvertConfig, {"towers": 2, "affinity": "foo"}, "affinity must be one of cosine, weights"),
    (ConvertConfig, {"towers": 2, "partition": "coherant"}, "neither a strategy"),
    (ConvertConfig, {"towers": 2, "compression": math.nan}, "compression must be a finite number"),
    (ConvertConfig, {"towers": 2, "hbm_gib": 0}, "hbm_gib must be a number > 0"),
    (ConvertConfig, {"towers": 2, "together": ["a"]}, "needs two or more"),
    (ConvertConfig, {"towers": 2, "apart": ["a,a"]}, "needs two or more"),
    (ConvertConfig, {"towers": 2, "group": ["user"]}, "NAME=f,g"),
    (ConvertConfig, {"towers": 2, "group": ["u=a", "i=a"]}, "feature a is in several groups"),
    (ConvertConfig, {"towers": 2, "group": ["u=a", "u=b"]}, "group u is given twice"),
    (ConvertConfig, {"towrs": 2}, "did you mean towers"),
    (ConvertConfig, {"towers": 2, "force": "yes"}, "force must be true or false"),
    (TrainingConfig, {"epochs": 0}, "epochs must be an integer >= 1"),
    (TrainingConfig, {"dense_lr": -1.0}, "dense_lr must be a number >= 0"),
    (TrainingConfig, {"table_lr": math.inf}, "table_lr must be a finite number"),
    (TrainingConfig, {"table_lr": "fast"}, "table_lr must be a number"),
    (TrainingConfig, {"table_optimizer": "lamb"}, "one of rowwise-adagrad, adagrad"),
    (TrainingConfig, {"clip_norm": 0.0}, "clip_norm must be a number > 0"),
    (TrainingConfig, {"seed": True}, "seed must be an integer"),
    (LaunchConfig, {"nproc": 0}, "nproc must be an integer >= 1"),
    (LaunchConfig, {"nnodes": 2}, "rdzv-endpoint"),
    (LaunchConfig, {"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "h:1"}, "0 to 1"),
    (LaunchConfig, {"nnodes": 2, "rdzv_endpoint": "host0"}, "HOST:PORT"),
    (PlanConfig, {"hosts": 2}, "ranks_per_host is missing"),
    (PlanConfig, {"hosts": 2, "ranks_per_host": 1, "batch": 8}, "--batch without a prediction"),
    (
        PlanConfig,
        {"hosts": 2, "ranks_per_host": 1, "hosts_per_pod": 2, "matmul_precision": "highest"},
        "--hosts-per-pod, --matmul-precision without a prediction",
    ),
    (PlanConfig, {"hosts": 2, "ranks_per_host": 1, "plot": "a.svg"}, "--predict-scaling"),
    (ExportConfig, {"format": "onnx", "out": "x", "dense_per_request": True}, "request-batching"),
    (ExportConfig, {"format": "onnx", "out": "x", "max_auc_loss": 0.1}, "without quantisation"),
    (ExportConfig, {"format": "pt2", "out": "x", "request_batching": True}, "only --format onnx"),
    (ExportConfig, {"format": "onnx", "out": "x", "pooling_input": ["a=long"]}, "jagged"),
]


@pytest.mark.parametrize(("kind", "values", "found"), WRONG)
def test_a_wrong_setting_is_named(kind: type[Config], values: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert found in str(caught.value)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ConvertConfig(towers=0, c=-1, dtype="fp64")
    assert [line.split()[0] for line in caught.value.details] == ["towers", "c", "dtype"]


def test_options_yaml_and_python_give_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "towers: 4\ncompression: 5e-1\ntogether: [[a, b], 'c,d']\ngroup: {user: [a], item: [c]}\n"
    )
    python = ConvertConfig(
        towers=4,
        compression=0.5,
        together=[("a", "b"), ("c", "d")],
        group={"user": ["a"], "item": ["c"]},
    )
    options = {
        "towers": 4,
        "compression": 0.5,
        "together": ["a,b", "c,d"],
        "group": ["user=a", "item=c"],
    }
    assert make_config(ConvertConfig, {}, path) == python
    assert make_config(ConvertConfig, options, None) == python


def test_options_override_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("towers: 4\nseed: 3\n")
    made = make_config(ConvertConfig, {"towers": 8}, path)
    assert (made.towers, made.seed) == (8, 3)


def test_a_wrong_option_is_a_usage_error_and_a_wrong_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--affinity must be one of"):
        make_config(ConvertConfig, {"towers": 2, "affinity": "foo"}, None)
    path = tmp_path / "recipe.yaml"
    path.write_text("towers: 0\nseeds: 1\n")
    with pytest.raises(ConfigError) as caught:
        make_config(ConvertConfig, {"towers": 2}, path)
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.found
    assert [line.split()[0] for line in caught.value.details] == ["towers", "seeds"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("- 1\n", "holds list"), ("a: [\n", "cannot be read"), ("1: 2\n", "holds dict")],
)
def test_what_is_not_a_file_of_settings_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=found):
        read_settings(path, ConvertConfig)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml", ConvertConfig)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# nothing yet\n")
    assert read_settings(path, ConvertConfig) == {}


def test_what_a_bundle_records_makes_the_same_settings_again(tmp_path: Path) -> None:
    made = ConvertConfig(
        towers=4,
        compression=2,
        group={"user": ["a", "b"], "item": ["c"]},
        apart=[["a", "b"]],
        model_config={"family": "torchrec-dlrm"},
        out=tmp_path / "out",
        force=True,
    )
    document = {"schema_version": 1, "config": {"command": "convert", **made.record()}}
    path = tmp_path / "dmt.json"
    path.write_text(json.dumps(document))
    again = ConvertConfig(**read_settings(path, ConvertConfig))
    # where a bundle goes, and whether it may replace one, is said anew
    assert again == made.replace(out=None, force=False)


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"schema_version": 1}, "records no settings"),
        ({"schema_version": 1, "config": {"command": "export"}}, "a run of dmt export"),
    ],
)
def test_a_document_without_such_settings_is_refused(
    tmp_path: Path, document: dict[str, Any], found: str
) -> None:
    path = tmp_path / "dmt.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=found):
        read_settings(path, ConvertConfig)


def test_replaced_settings_are_checked_again() -> None:
    made = ConvertConfig(towers=2)
    assert made.replace(seed=4).seed == 4
    with pytest.raises(ConfigError, match="towers"):
        made.replace(towers=-1)


def test_options_of_a_script_come_from_the_settings() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, RunConfig)
    given = ["--data", "d", "--table-lr", "0.5", "--no-prefetch", "--lr-decay", "cosine"]
    made = parse_arguments(RunConfig, vars(parser.parse_args(given)))
    assert (made.data, made.table_lr, made.prefetch, made.lr_decay) == (
        Path("d"),
        0.5,
        False,
        "cosine",
    )
    assert made.epochs == 1
    assert to_arguments(made, RunConfig) == [
        "--table-lr",
        "0.5",
        "--lr-decay",
        "cosine",
        "--no-prefetch",
        "--data",
        "d",
    ]


def test_arguments_give_the_same_settings_again() -> None:
    made = FinetuneConfig(data="d", max_steps=3, resume=True, nproc=2, table_lr=0.125)
    parser = argparse.ArgumentParser()
    add_arguments(parser, RunConfig)
    again = parse_arguments(RunConfig, vars(parser.parse_args(to_arguments(made, RunConfig))))
    fields = RunConfig.model_fields
    assert {n: getattr(again, n) for n in fields} == {n: getattr(made, n) for n in fields}


def test_steps_follow_from_passes_or_are_given() -> None:
    assert TrainingConfig(epochs=2, batch_size=100).total_steps(250) == 6
    assert TrainingConfig(max_steps=7).total_steps(250) == 7
    assert TrainingConfig(batch_size=10).steps_between_evaluations(1000) == 10
    assert TrainingConfig(batch_size=10, max_steps=20).steps_between_evaluations(1000) == 2
    assert TrainingConfig(batch_size=1000).steps_between_evaluations(10) == 1
    assert TrainingConfig(eval_every=3).steps_between_evaluations(10) == 3


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.command)
def test_every_setting_is_described(kind: type[Config]) -> None:
    for key, values, default, text in describe_settings(kind):
        assert text.endswith("."), key
        assert values, key
        assert default, key


def test_the_page_of_settings_is_current() -> None:
    script = REPOSITORY / "scripts" / "settings_page.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["epochs", "table_lr", "tower_module", "compression", "quantize"])
def test_a_setting_is_declared_once(name: str) -> None:
    declared = [
        str(path.relative_to(REPOSITORY))
        for folder in ("dmt_convert", "cli", "recipes")
        for path in (REPOSITORY / folder).rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if line.strip().startswith((f"{name}: ", f'"--{name.replace("_", "-")}"'))
        and "setting(" in line
    ]
    assert len(declared) == 1
    assert declared[0].startswith("dmt_convert/config/")


def test_every_shipped_recipe_loads() -> None:
    files = sorted((REPOSITORY / "recipes" / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        settings = read_settings(file, TrainingConfig)
        assert TrainingConfig(**settings) != TrainingConfig(), file
        first = file.read_text("utf-8").splitlines()[0]
        assert first.startswith("# python -m dmt_convert.recipes.finetune_dmt"), file
        assert f"--config recipes/configs/{file.name}" in first, file


def test_passes_and_steps_replace_each_other(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: 4\ndense_lr: 0.5\n")
    assert make_config(TrainingConfig, {}, path).total_steps(10**6) == 4
    made = make_config(TrainingConfig, {"epochs": 2}, path)
    assert (made.max_steps, made.epochs, made.dense_lr) == (None, 2, 0.5)
    with pytest.raises(UsageError, match="--epochs and --max-steps together"):
        make_config(TrainingConfig, {"epochs": 2, "max_steps": 3}, None)


def test_a_size_of_tower_modules_replaces_the_other(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("towers: 4\ncompression: 8\n")
    made = make_config(ConvertConfig, {"dim": 16}, path)
    assert (made.dim, made.compression) == (16, None)
    with pytest.raises(UsageError, match="--dim and --compression together"):
        make_config(ConvertConfig, {"dim": 4, "compression": 2.0}, None)
