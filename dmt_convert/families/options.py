"""What the user says of a model, from the settings of a command."""

from __future__ import annotations

from pathlib import Path

from dmt_convert.adapter import LoadedBuilder, load_adapter
from dmt_convert.config import BundleOptions, ModelOptions
from dmt_convert.families.model_config import ModelConfig, parse_model_config, read_model_config


def read_model_options(options: ModelOptions | BundleOptions) -> ModelConfig | None:
    """Read the facts of `--model-config`, and run the file of `--model`.

    Raises:
        ConfigError: One of them cannot be read, or is wrong.
    """
    facts = options.model_facts if isinstance(options, ModelOptions) else None
    config: ModelConfig | None
    if isinstance(facts, Path):
        config = read_model_config(facts)
    else:
        config = None if facts is None else parse_model_config("model_config", dict(facts))
    if options.model is None:
        return config
    loaded = load_adapter(options.model)
    key = "builder" if isinstance(loaded, LoadedBuilder) else "adapter"
    return (config or ModelConfig()).model_copy(update={key: loaded})
