"""Where settings come from and go to: files, options of a script, tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dmt_convert.config.base import Config, SettingsError
from dmt_convert.config.fields import (
    base_type,
    default_text,
    extra_of,
    key_of,
    literals,
    noun,
    option_name,
)
from dmt_convert.config.yaml_text import load_yaml
from dmt_convert.documents import MAX_SETTINGS_BYTES, MAX_YAML_BYTES, read_whole
from dmt_convert.errors import ConfigError, UsageError

Kind = TypeVar("Kind", bound=Config)


def read_settings(path: Path, kind: type[Config]) -> dict[str, Any]:
    """Read a `--config` file: YAML whose keys are settings, or the `dmt.json` of a bundle.

    Args:
        path: The file.
        kind: The settings of the command.

    Returns:
        The settings that it gives, by key.

    Raises:
        ConfigError: The file cannot be read, or holds a key or a value that is not allowed.
    """
    content = _read_document(path)
    if "schema_version" in content:
        content = _recorded(path, content, kind)
    try:
        kind(**content)
    except SettingsError as error:
        # what is missing, or does not go together, may still come from options
        wrong = [f"{n} {text}" for n, text in error.problems if n and text != "is missing"]
        if wrong:
            raise ConfigError(
                f"{path} has settings that cannot be used",
                expected=f"settings of dmt {kind.command}, as docs/settings.md lists them",
                details=wrong,
            ) from None
    return content


def _read_document(path: Path) -> dict[str, Any]:
    try:
        as_json = path.suffix == ".json"
        text = read_whole(path, MAX_SETTINGS_BYTES if as_json else MAX_YAML_BYTES).decode("utf-8")
        if as_json:
            content = json.loads(text)
        else:
            content = load_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read ({reason})",
            expected="a YAML file whose keys are settings, or the dmt.json of a bundle",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{path} holds {type(content).__name__}, not settings by name",
            expected="a YAML file whose keys are settings, for example `towers: 16`",
        )
    return content


def _recorded(path: Path, document: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    recorded = document.get("config")
    if not isinstance(recorded, dict) or recorded.get("command") != kind.command:
        what = recorded.get("command") if isinstance(recorded, dict) else None
        raise ConfigError(
            f"{path} records {f'a run of dmt {what}' if what else 'no settings'}",
            expected=f"the dmt.json of a bundle that dmt {kind.command} wrote",
            hint="bundles of version 0.1.0 and older record no settings" if not what else "",
        )
    return {key: value for key, value in recorded.items() if key != "command"}


def describe_settings(kind: type[Config]) -> list[tuple[str, str, str, str]]:
    """Return key, values, default and help of every setting of a command, for tables."""
    rows = []
    for name, field in kind.model_fields.items():
        extra = extra_of(field)
        choices = " | ".join(literals(field.annotation)) if not extra["metavar"] else ""
        values = extra["metavar"] or choices or noun(field.annotation)
        rows.append((key_of(name, field), values, default_text(field), str(field.description)))
    return rows


def add_arguments(parser: argparse.ArgumentParser, kind: type[Config]) -> None:
    """Give a script of one's own the options of a command, for `argparse`.

    Args:
        parser: The script's parser; `--config FILE` is added too.
        kind: The settings.
    """
    groups: dict[str, Any] = {}
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    for name, field in kind.model_fields.items():
        panel = extra_of(field)["panel"]
        if panel and panel not in groups:
            groups[panel] = parser.add_argument_group(panel)
        add = groups[panel].add_argument if panel else parser.add_argument
        option, plain = option_name(key_of(name, field)), base_type(field.annotation)
        help_ = f"{field.description} [{default_text(field)}]".replace("%", "%%")
        if plain is bool:
            on = argparse.BooleanOptionalAction if field.default else "store_true"
            add(option, dest=name, action=on, default=None, help=help_)
        else:
            type_ = plain if plain in (int, float) else str
            many = {"action": "append"} if plain is list else {"type": type_}
            choices = literals(field.annotation) if not extra_of(field)["metavar"] else ()
            metavar = None if choices else (extra_of(field)["metavar"] or plain.__name__.upper())
            add(option, dest=name, choices=choices or None, metavar=metavar, help=help_, **many)


def parse_arguments(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Make settings from what a parser of `add_arguments` returned: defaults, file, options.

    Args:
        kind: The settings.
        values: `vars()` of the parsed arguments.

    Raises:
        ConfigError: The file, or an option, is wrong.
    """
    keys = {name: key_of(name, field) for name, field in kind.model_fields.items()}
    given = {key: values[name] for name, key in keys.items() if values.get(name) not in (None, [])}
    file = values.get("config")
    return make_config(kind, given, file)


def make_config(kind: type[Kind], options: Mapping[str, Any], file: Path | None) -> Kind:
    """Make the settings of a command: defaults, then the file, then options.

    Args:
        kind: The settings.
        options: Settings by key.
        file: YAML file with settings, or the `dmt.json` of a bundle.

    Raises:
        ConfigError: The file is wrong.
        UsageError: An option is wrong.
    """
    settings = {} if file is None else read_settings(file, kind)
    rivals = [name for name in kind.alternatives if name in options]
    if len(rivals) > 1:
        raise UsageError(
            f"{' and '.join(map(option_name, rivals))} together",
            expected="one of them",
            hint=f"dmt {kind.command} --help",
        )
    if rivals:
        settings = {k: value for k, value in settings.items() if k not in kind.alternatives}
    try:
        return kind(**(settings | dict(options)))
    except SettingsError as error:
        said = [f"{option_name(name)} {text}" if name else text for name, text in error.problems]
        raise UsageError(
            said[0] if len(said) == 1 else f"{len(said)} options are wrong",
            hint=f"dmt {kind.command} --help",
            details=said if len(said) > 1 else (),
        ) from None


def to_arguments(config: Config, kind: type[Config]) -> list[str]:
    """Write settings as the options that give them; those that were not set are left out.

    Args:
        config: The settings.
        kind: Which of them to write.
    """
    arguments: list[str] = []
    for name, field in kind.model_fields.items():
        value = getattr(config, name)
        if name not in config.model_fields_set or value is None:
            continue
        option = option_name(key_of(name, field))
        if isinstance(value, bool):
            arguments += [option] if value else ["--no-" + option[2:]] * bool(field.default)
        else:
            arguments += [option, str(value)]
    return arguments
