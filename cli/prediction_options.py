"""Options of `dmt plan` that say what to predict, and for which machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dmt_convert.placement import Cluster
    from dmt_convert.placement.predict import Machine

DEFAULT_GPU = "h100"
DEFAULT_BATCH = 1024
DEFAULT_COMM_DTYPE = "fp32"
DEFAULT_IDS = 1.0

_PANEL = "Prediction (modelled)"

PredictOption = Annotated[
    bool,
    typer.Option(
        "--predict",
        help="Predict step times, flat, SPTT and this bundle, and suggest towers and compression.",
        rich_help_panel=_PANEL,
    ),
]
PredictScalingOption = Annotated[
    bool,
    typer.Option(
        "--predict-scaling",
        help="Predict the same for 16 to 16,384 GPUs.",
        rich_help_panel=_PANEL,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Draw --predict-scaling.",
        metavar="FILE.svg|png",
        rich_help_panel=_PANEL,
    ),
]
GpuOption = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="Preset v100, a100 or h100, with its memory and links unless they are given.",
        rich_help_panel=_PANEL,
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        help=f"Samples per rank and step, {DEFAULT_BATCH} if not given.",
        rich_help_panel=_PANEL,
    ),
]
CommDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--comm-dtype",
        help="What embeddings and their gradients travel as: fp32, fp16, bf16 or int8.",
        rich_help_panel=_PANEL,
    ),
]
IdsPerBagOption = Annotated[
    float | None,
    typer.Option(
        "--ids-per-bag",
        help="Mean ids per sample and feature, 1 if not given.",
        rich_help_panel=_PANEL,
    ),
]
AssumeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        help="Replace a constant of the cost model (repeatable), such as scale_loss=0.05.",
        metavar="NAME=VALUE",
        rich_help_panel=_PANEL,
    ),
]


def refuse_idle_options(
    *,
    predict: bool,
    scaling: bool,
    plot: Path | None,
    given: dict[str, object],
) -> None:
    """Refuse options that nothing would look at.

    Args:
        predict: Whether a plan is predicted.
        scaling: Whether sizes are.
        plot: Where to draw them.
        given: The prediction's other options by name, None or empty where not given.

    Raises:
        ConfigError: One was given in vain.
    """
    from dmt_convert.errors import ConfigError

    named = [name for name, value in given.items() if value]
    if named and not (predict or scaling):
        raise ConfigError(
            f"{', '.join(named)} without a prediction",
            expected="--predict or --predict-scaling beside it",
            hint="add --predict",
        )
    if plot is not None and not scaling:
        raise ConfigError(
            f"--plot {plot.name} without sizes to draw",
            expected="--predict-scaling beside it",
            hint="add --predict-scaling",
        )


def make_machine(
    cluster: Cluster,
    *,
    gpu: str | None,
    batch: int | None,
    comm_dtype: str | None,
    assume: Sequence[str] | None,
) -> Machine:
    """Turn options into what steps are predicted for; what is None keeps its default.

    Raises:
        ConfigError: No machine has these numbers.
    """
    from typing import cast

    from dmt_convert.placement.predict import Assumptions, Machine, Network, find_gpu
    from dmt_convert.spec import CommDtype

    return Machine(
        gpu=find_gpu(gpu or DEFAULT_GPU),
        network=Network(cluster=cluster, assumptions=Assumptions().override(assume or [])),
        batch=DEFAULT_BATCH if batch is None else batch,
        comm_dtype=cast(CommDtype, comm_dtype or DEFAULT_COMM_DTYPE),
    )
