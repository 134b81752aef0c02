"""Options that `dmt convert` and `dmt partition` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dmt_convert.conversion.partition import PartitionConfig
    from dmt_convert.families import ModelConfig

TowersOption = Annotated[
    int | None, typer.Option("--towers", help="Number of towers T.", show_default=False)
]
PartitionOption = Annotated[
    str,
    typer.Option(
        "--partition",
        help="coherent, diverse, round-robin, or a JSON file with the towers.",
        metavar="coherent|diverse|round-robin|FILE",
    ),
]
AffinityOption = Annotated[
    str,
    typer.Option(
        "--affinity",
        help="cosine: how aligned embeddings are; weights: how much the model uses a pair.",
        metavar="cosine|weights",
    ),
]
TogetherOption = Annotated[
    list[str] | None,
    typer.Option("--together", help="Features that share a tower. Repeatable.", metavar="f,g"),
]
ApartOption = Annotated[
    list[str] | None,
    typer.Option("--apart", help="Features in different towers. Repeatable.", metavar="f,g"),
]
GroupOption = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        help="Features of different groups never share a tower. Repeatable.",
        metavar="NAME=f,g",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Data to look at the model on; labels are optional."),
]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option("--model-config", help="YAML that says what the checkpoint does not."),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Python file that describes a model of your own (docs/adapters.md); it is run.",
        metavar="FILE.py",
    ),
]


def read_model_options(model_config: Path | None, adapter: Path | None) -> ModelConfig | None:
    """Read what the user says of a model.

    Args:
        model_config: Value of `--model-config`.
        adapter: Value of `--model`.

    Raises:
        ConfigError: One of them cannot be read, or is wrong.
    """
    from dmt_convert.adapter import load_adapter
    from dmt_convert.families import ModelConfig, read_model_config

    config = None if model_config is None else read_model_config(model_config)
    if adapter is None:
        return config
    return (config or ModelConfig()).model_copy(update={"adapter": load_adapter(adapter)})


def make_partition_config(
    *,
    towers: int | None,
    partition: str,
    affinity: str,
    together: list[str] | None,
    apart: list[str] | None,
    group: list[str] | None,
    seed: int,
) -> PartitionConfig:
    """Turn options into a request.

    Raises:
        ConfigError: An option cannot be understood.
    """
    from dmt_convert.conversion.partition import PartitionConfig
    from dmt_convert.errors import ConfigError

    named = partition in ("coherent", "diverse", "round-robin")
    if not named and not Path(partition).is_file():
        raise ConfigError(
            f"--partition {partition}: no such strategy, and no such file",
            expected="coherent, diverse, round-robin, or a JSON file",
            hint='a file looks like {"towers": [["f0", "f3"], ["f1", "f2"]]}',
        )
    if named and towers is None:
        raise ConfigError(
            "--towers is missing",
            expected="the number of towers, often the number of hosts",
            hint="add --towers 4, or give a file with --partition",
        )
    groups = []
    for text in group or ():
        name, equals, features = text.partition("=")
        if not equals or not name or not features:
            raise ConfigError(
                f"--group {text}",
                expected="NAME=f,g",
                hint="for example --group user=user_id,age",
            )
        groups.append((name, _names(features)))
    return PartitionConfig(
        num_towers=towers,
        strategy=partition if named else Path(partition),  # type: ignore[arg-type]
        affinity=affinity,  # type: ignore[arg-type]
        together=tuple(_names(text) for text in together or ()),
        apart=tuple(_names(text) for text in apart or ()),
        groups=tuple(groups),
        seed=seed,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
