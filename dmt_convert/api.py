"""The public functions: what `import dmt_convert as dmt` offers, and what every command calls.

Every function takes paths as `str` or `Path`, and the settings of its command as keyword arguments
with the same names and defaults as the options (docs/settings.md); or a whole `config`, whose
settings the keyword arguments override. `progress(step, done, total)` is called as work goes on.

All of them raise `DmtError` (dmt_convert.errors) for what a user can mend: it says what was found,
what was expected and what to try.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

from dmt_convert.adapter import load_adapter
from dmt_convert.bundle import Bundle, is_bundle
from dmt_convert.bundle import open_bundle as _open_bundle
from dmt_convert.config import (
    Config,
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    InspectConfig,
    PartitionConfig,
    PlanConfig,
    ScoreConfig,
    SelftestConfig,
    UnshardConfig,
    VerifyConfig,
)
from dmt_convert.errors import UsageError
from dmt_convert.progress import Progress, no_progress

if TYPE_CHECKING:
    from torch import nn

    from dmt_convert.conversion import Preview
    from dmt_convert.conversion.partition import Partition
    from dmt_convert.data import DataReport
    from dmt_convert.documents import Frontier
    from dmt_convert.families import FlatModelInfo, LiveModel
    from dmt_convert.files import Unsharded
    from dmt_convert.placement import TowerPlan
    from dmt_convert.placement.predict import PredictionReport
    from dmt_convert.scoring import Evaluation, ScoredModel, Scores, VerifyReport
    from dmt_convert.selftest import CheckResult, SelftestReport
    from dmt_convert.serving import Export, ExportManifest

AnyPath = str | os.PathLike[str]
"""A path, as every function takes it."""
AnyModel = Union[AnyPath, "nn.Module"]
"""A path, or a module in memory."""
Kind = TypeVar("Kind", bound=Config)


def inspect(
    source: AnyModel,
    *,
    example: object = None,
    config: InspectConfig | None = None,
    **settings: Any,
) -> FlatModelInfo | Bundle | ExportManifest:
    """Say what a checkpoint, a bundle or an export is; reads headers only.

    Args:
        source: A checkpoint file or folder, a bundle, an export, or a module in memory.
        example: What a module in memory is called with; see `convert`.
        config: Settings of `dmt inspect`.
        **settings: Settings that differ from `config`, or from the defaults.
    """
    from dmt_convert.conversion import describe_flat
    from dmt_convert.serving import is_export, read_export_manifest

    opened, config = _source(source, example), _settings(InspectConfig, config, settings)
    if not isinstance(opened, Path):
        return describe_flat(opened, config)
    path = opened
    if is_bundle(path):
        return _open_bundle(path)
    if is_export(path):
        return read_export_manifest(path)
    return describe_flat(path, config)


def convert(
    source: AnyModel,
    out: AnyPath | None = None,
    *,
    example: object = None,
    config: ConvertConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Bundle:
    """Convert a flat checkpoint into a bundle of towers, put in place whole or not at all.

    Args:
        source: A checkpoint file or folder; or a module in memory, with its weights, whose dense
            part is captured (docs/capture.md).
        out: Folder of the bundle; by default `ckpt-dmt16` beside `ckpt.pt`.
        example: What a module in memory is called with, for a few rows: a tuple of arguments, or a
            dict of arguments by name.
        config: Settings of `dmt convert`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults: `towers=16`,
            `compression=4`, ...
    """
    from dmt_convert.conversion import convert_checkpoint

    config = _settings(ConvertConfig, config, settings | _given(out=out))
    return convert_checkpoint(_source(source, example), config, progress)


def preview(
    source: AnyModel,
    *,
    example: object = None,
    config: ConvertConfig | None = None,
    **settings: Any,
) -> Preview:
    """Say what `convert` would do with the same settings; reads headers, writes nothing."""
    from dmt_convert.conversion import preview_conversion

    return preview_conversion(_source(source, example), _settings(ConvertConfig, config, settings))


def frontier(
    source: AnyModel,
    *,
    example: object = None,
    plot: AnyPath | None = None,
    config: ConvertConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Frontier:
    """Measure what fewer bytes between hosts cost, from exact to 128 times fewer; no bundle.

    Args:
        source: A checkpoint file or folder, or a module in memory.
        example: What a module in memory is called with; see `convert`.
        plot: Draw it into this .svg or .png file.
        config: Settings of `dmt convert`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults: `towers=16`,
            `calibration="clicks.npz"`, ...

    Returns:
        The points, and the flat model with its embeddings rounded beside them. With `max_auc_loss`
        or `min_r2`, `chosen` is the compression that a conversion would take.
    """
    from dmt_convert.conversion import measure_checkpoint

    return measure_checkpoint(
        _source(source, example),
        _settings(ConvertConfig, config, settings),
        plot=None if plot is None else Path(plot),
        progress=progress,
    )


def open_bundle(path: AnyPath) -> Bundle:
    """Open a bundle by its manifest and the headers of its weights.

    `bundle.model()` gives the model itself.

    Raises:
        BundleError: A file is missing, damaged, cut short, or not what the manifest says.
    """
    return _open_bundle(Path(path))


def partition(
    source: AnyPath,
    *,
    config: PartitionConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Partition:
    """Find towers: which features of a flat checkpoint belong together.

    Args:
        source: A checkpoint file or folder.
        config: Settings of `dmt partition`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.
    """
    from dmt_convert.conversion import partition_checkpoint

    return partition_checkpoint(
        Path(source), _settings(PartitionConfig, config, settings), progress
    )


def plan(
    bundle: Bundle | AnyPath, *, config: PlanConfig | None = None, **settings: Any
) -> TowerPlan:
    """Place a bundle's towers on the hosts of a cluster.

    Args:
        bundle: The bundle, or its folder.
        config: Settings of `dmt plan`.
        **settings: Settings that differ from `config`: `hosts` and `ranks_per_host` are needed.
    """
    from dmt_convert.bundle import plan_bundle

    return plan_bundle(_opened(bundle), _settings(PlanConfig, config, settings))


def predict(
    bundle: Bundle | AnyPath, *, config: PlanConfig | None = None, **settings: Any
) -> PredictionReport:
    """Predict the time of a training step on a cluster: flat, SPTT and this bundle.

    Args:
        bundle: The bundle, or its folder.
        config: Settings of `dmt plan`.
        **settings: Settings that differ from `config`: `hosts` and `ranks_per_host` are needed.
    """
    from dmt_convert.bundle import plan_bundle, predict_plan

    opened = _opened(bundle)
    config = _settings(PlanConfig, config, settings)
    if not config.predict_scaling:
        config = config.replace(predict=True)
    return predict_plan(opened, plan_bundle(opened, config.replace(out=None)), config)


def check_data(
    model: Bundle | AnyPath,
    data: AnyPath,
    *,
    config: DataConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> DataReport:
    """Say what a data set would feed a model, column by column, and what is in the way.

    Args:
        model: A flat checkpoint, a bundle or an export; only headers are read.
        data: The data set.
        config: Settings of `dmt data`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.

    Returns:
        The report; `report.usable` says whether the data can be used, `report.faults` why not.
    """
    from dmt_convert.conversion import describe_flat
    from dmt_convert.data import profile_data
    from dmt_convert.serving import is_export, read_export_manifest

    config = _settings(DataConfig, config, settings)
    path = model.path if isinstance(model, Bundle) else Path(model)
    if is_bundle(path):
        made = _opened(model).manifest
        spec, known = made.model.flat, made.inputs
    elif is_export(path):
        manifest = read_export_manifest(path)
        spec, known = manifest.model.flat, manifest.columns
    else:
        info = describe_flat(path, config)
        spec, known = info.spec, info.inputs
    return profile_data(Path(data), spec, known, max_rows=config.rows, progress=progress)


def score(
    model: ScoredModel | Bundle | AnyPath,
    data: AnyPath | None = None,
    *,
    config: ScoreConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Scores:
    """Compute a model's logits on every row of a data set.

    Args:
        model: A flat checkpoint, a bundle or an export.
        data: The data set.
        config: Settings of `dmt score`; with `out`, the logits are also written to that file.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.

    Returns:
        The logits, float32 of shape (rows,), and what else the data holds.
    """
    from dmt_convert.scoring import open_scored, score_data, score_to_file

    config = _settings(ScoreConfig, config, settings | _given(data=data))
    opened = open_scored(model, config)
    if config.out is None:
        return score_data(opened, config.data, progress=progress)
    return score_to_file(opened, config.data, config.out, progress=progress)


def evaluate(
    model: ScoredModel | Bundle | AnyPath,
    data: AnyPath | None = None,
    *,
    config: EvaluateConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Evaluation:
    """Measure a model on labelled data: AUC, log loss, normalised entropy.

    Args:
        model: A flat checkpoint, a bundle or an export.
        data: The data set, with labels.
        config: Settings of `dmt evaluate`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.
    """
    from dmt_convert.scoring import evaluate_model, open_scored

    config = _settings(EvaluateConfig, config, settings | _given(data=data))
    return evaluate_model(open_scored(model, config), config.data, progress=progress)


def verify(
    reference: ScoredModel | Bundle | AnyPath,
    other: ScoredModel | Bundle | AnyPath,
    *,
    config: VerifyConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> VerifyReport:
    """Check that two models give the same logits, stage by stage.

    Args:
        reference: A flat checkpoint, a bundle or an export.
        other: Another one.
        config: Settings of `dmt verify`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.

    Returns:
        The report; `report.same` says whether every stage is within tolerance.
    """
    from dmt_convert.scoring import check_bytes, open_scored, verify_models

    config = _settings(VerifyConfig, config, settings)
    models = (open_scored(reference, config), open_scored(other, config))
    for model in models if config.checksums else ():
        check_bytes(model)
    return verify_models(
        *models, data=config.data, atol=config.atol, rtol=config.rtol, progress=progress
    )


def finetune(
    bundle: Bundle | AnyPath,
    data: AnyPath | None = None,
    *,
    config: FinetuneConfig | None = None,
    capture: bool = True,
    **settings: Any,
) -> Bundle | None:
    """Train a bundle further on labelled rows, on the ranks of this host and others.

    Starts `torchrun` on the recipe `finetune_dmt.py` in processes of its own.

    Args:
        bundle: The bundle to start from, or its folder; it is not changed.
        data: Labelled rows.
        config: Settings of `dmt finetune`.
        capture: Keep what the ranks print away from this process's stdout.
        **settings: Settings that differ from `config`, or from the defaults.

    Returns:
        The new bundle; None on a host that does not see it.
    """
    from dmt_convert.cluster import FinetuneJob, run_finetune

    config = _settings(FinetuneConfig, config, settings | _given(data=data))
    job = FinetuneJob(bundle=_opened(bundle), config=config, capture=capture)
    return run_finetune(job).bundle


def export(
    bundle: Bundle | AnyPath,
    format: str | None = None,  # noqa: A002 (the option's name)
    out: AnyPath | None = None,
    *,
    config: ExportConfig | None = None,
    on_quality: Callable[[Mapping[str, Any]], None] = lambda quality: None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Export:
    """Write graphs for serving, and check each against the bundle before it is put in place.

    Args:
        bundle: The bundle, or its folder.
        format: onnx, pt2 or triton.
        out: Folder to write; it must not exist.
        config: Settings of `dmt export`.
        on_quality: Called with what quantisation costs, before anything is written.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.
    """
    from dmt_convert.serving import export_bundle

    config = _settings(ExportConfig, config, settings | _given(format=format, out=out))
    if config.out is None:
        raise UsageError("--out is missing", expected="the folder to write")
    if config.model is not None:
        load_adapter(config.model)
    return export_bundle(
        _opened(bundle), config.out, config, on_quality=on_quality, progress=progress
    )


def unshard(
    source: AnyPath,
    out: AnyPath | None = None,
    *,
    config: UnshardConfig | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Unsharded:
    """Write the tensors of any checkpoint to one plain `.safetensors` file.

    Args:
        source: A checkpoint file or folder.
        out: The file to write.
        config: Settings of `dmt unshard`.
        progress: Called as work goes on.
        **settings: Settings that differ from `config`, or from the defaults.
    """
    from dmt_convert.files import unshard_checkpoint

    config = _settings(UnshardConfig, config, settings | _given(out=out))
    return unshard_checkpoint(
        Path(source), config.out, only=config.only, force=config.force, progress=progress
    )


def check_machine(
    *,
    config: SelftestConfig | None = None,
    on_result: Callable[[CheckResult], None] = lambda result: None,
    **settings: Any,
) -> SelftestReport:
    """Check that training over ranks, checkpoints and exports work on this machine.

    Args:
        config: Settings of `dmt selftest`.
        on_result: Told of every check when it has run.
        **settings: Settings that differ from `config`, or from the defaults.
    """
    from dmt_convert.selftest import run_selftest

    return run_selftest(_settings(SelftestConfig, config, settings), on_result)


def _source(source: AnyModel, example: object) -> Path | LiveModel:
    """Return a path, or a module in memory with what it is called with.

    Raises:
        UsageError: An example is missing, or of no use.
    """
    if isinstance(source, str | os.PathLike):
        if example is not None:
            raise UsageError("an example beside a path", expected="one beside a module in memory")
        return Path(source)
    from dmt_convert.families import LiveModel

    if example is None:
        raise UsageError(
            f"a {type(source).__name__} without an example",
            expected="example=..., what it is called with, for a few rows",
            hint="docs/capture.md has a complete example",
        )
    return LiveModel(module=source, example=example)


def _settings(kind: type[Kind], config: Kind | None, changes: Mapping[str, Any]) -> Kind:
    if config is None:
        return kind(**changes)
    return config.replace(**changes) if changes else config


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _opened(bundle: Bundle | AnyPath) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else _open_bundle(Path(bundle))
