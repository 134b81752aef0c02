"""A fine-tuned model as a new bundle, beside the one that it came from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dmt_convert.bundle import (
    DENSE_FILE,
    AccumulatorSource,
    Bundle,
    Documents,
    FloatRows,
    Manifest,
    StreamedWeights,
    accumulator_file,
    open_bundle_model,
    read_rows,
    split_state,
    tower_file,
    write_bundle,
)
from dmt_convert.checkpoint import CHUNK_BYTES, ByteRows, TensorInfo, stream_tensor
from dmt_convert.config import TrainingConfig
from dmt_convert.data import merge_records
from dmt_convert.documents import (
    FinetuneRecord,
    OptimizerState,
    ParentRecord,
    Quality,
    QualityRow,
    TeacherRecord,
    Tool,
)
from dmt_convert.errors import BundleError
from dmt_convert.files import TensorSource, check_space, check_target, digest_names
from dmt_convert.metrics import Accuracy
from dmt_convert.model import DmtModel
from dmt_convert.placement import TowerPlan
from dmt_convert.report import render_documents
from dmt_convert.training.data import TrainingData
from dmt_convert.training.in_memory import measure_rows, table_infos
from dmt_convert.training.loop import Evaluation, TrainResult
from dmt_convert.training.trainable_model import TrainableModel

logger = logging.getLogger(__name__)

ROW_NAME: Final = "fine-tuned"
"""Name of the quality row."""
TORCH_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Pieces = Callable[[], Iterator[FloatRows]]
"""Gives the sums of squared gradients of a table, some rows at a time: shape (n, 1) or (n, N)."""
GetSums = Callable[[str], Pieces | None]
"""Gives the sums of a table by its name; None if there are none."""
GetTable = Callable[[str], Tensor | TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What fine-tuning wrote."""

    bundle: Bundle
    """The new bundle."""
    before: Evaluation
    """The bundle that it came from, on the validation rows."""
    after: Evaluation
    """The new bundle, as stored, on the same rows."""
    notes: tuple[str, ...]
    """What a user should know, one line each."""


def summarise(
    parent: Bundle, written: Finetuned, result: TrainResult, data: TrainingData
) -> dict[str, Any]:
    """Return what `--json` prints of a training."""
    return {
        "bundle": str(written.bundle.path),
        "parent": str(parent.path),
        "steps": result.steps,
        "best_step": written.after.step,
        "improved": written.after.step > 0,
        "ms_per_step": result.ms_per_step,
        "before": written.before.to_json(),
        "after": written.after.to_json(),
        "history": [evaluation.to_json() for evaluation in result.history],
        "data": data.to_json(),
        "notes": list(written.notes),
    }


def check_out(parent: Bundle, out: Path, *, force: bool) -> None:
    """Refuse a target before training starts.

    Args:
        parent: The bundle to be fine-tuned.
        out: Where the new one goes.
        force: Replace a bundle that is there.

    Raises:
        BundleError: The target is taken, lies in the bundle itself, or the disk is full.
    """
    check_target(out, force=force)
    if out.resolve() == parent.path.resolve() or parent.path.resolve() in out.resolve().parents:
        raise BundleError(
            f"--out {out} lies in the bundle {parent.path}",
            expected="a path outside the bundle",
            hint="choose another --out; the bundle that is fine-tuned is never changed",
        )
    weights = parent.manifest.weights.values()
    needed = sum(entry.bytes for entry in weights)
    if not parent.accumulators:  # Adagrad would add some
        needed += sum(4 * table.rows for table in parent.manifest.model.flat.tables)
    check_space(out, needed)


def write_finetuned(
    parent: Bundle,
    out: Path,
    model: TrainableModel,
    result: TrainResult,
    *,
    config: TrainingConfig,
    data: TrainingData,
    teacher: TeacherRecord | None = None,
    force: bool = False,
) -> Finetuned:
    """Write a trained model as a bundle of the same layout as the one that it came from.

    Tables go back into the type in which they were stored; what that rounding costs is measured,
    and if it makes the model worse than the start, the start is written. Adagrad's sums of
    squared gradients go with the tables that they belong to.

    Args:
        parent: The bundle that was fine-tuned.
        out: The new bundle's folder.
        model: The model in its best state; its fp16 and bf16 tables are rounded here.
        result: What came of training.
        config: With which settings.
        data: On which rows.
        teacher: What taught beside the labels.
        force: Replace a bundle that is there.

    Raises:
        BundleError: The target is taken, or the disk is full.
        CheckpointError: A weight is not finite, or overflows the type it is stored in.
    """
    check_out(parent, out, force=force)
    assert isinstance(model.module, DmtModel)
    after, notes = _settle(parent, model, result, data)
    table: GetTable | None = model.store.table
    module: DmtModel = model.module
    if after is result.start and result.improved:  # rounding made it worse
        table, module = None, open_bundle_model(parent)
    trained = TrainedModel(
        result=result,
        after=after,
        notes=notes,
        module=module,
        table=table,
        sums=lambda name: _sums_of(model, name),
        teacher=teacher,
    )
    return write_trained(parent, out, trained, config=config, data=data, force=force)


def _sums_of(model: TrainableModel, table: str) -> Pieces | None:
    sums = model.store.sums(table)
    return None if sums is None else tensor_pieces(sums)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedModel:
    """What a new bundle is made of."""

    result: TrainResult
    """What came of training."""
    after: Evaluation
    """How good the new bundle is, as stored."""
    notes: tuple[str, ...]
    """What a user should know, one line each."""
    module: DmtModel
    """Everything but tables."""
    table: GetTable | None
    """Tables; None takes those of the bundle that was fine-tuned."""
    sums: GetSums = lambda table: None
    """Adagrad's sums of squared gradients, if it moved the tables and they are known."""
    teacher: TeacherRecord | None = None
    """What taught beside the labels."""


def write_trained(
    parent: Bundle,
    out: Path,
    trained: TrainedModel,
    *,
    config: TrainingConfig,
    data: TrainingData,
    force: bool = False,
) -> Finetuned:
    """Write a bundle of the same layout as another, with other weights.

    Args:
        parent: The bundle that was fine-tuned.
        out: The new bundle's folder.
        trained: The weights, and how good they are.
        config: With which settings they were trained.
        data: On which rows.
        force: Replace a bundle that is there.

    Raises:
        BundleError: The target is taken, or the disk is full.
        CheckpointError: A weight is not finite, or overflows the type it is stored in.
    """
    result, after = trained.result, trained.after
    moved = after is not result.start and config.table_lr > 0
    accumulators = plan_tuned_accumulators(parent, trained.sums if moved else None)
    notes = trained.notes + dropping_notes(parent, accumulators, moved=moved)
    record = replace(
        _record(parent, result, after, notes, config=config, data=data), teacher=trained.teacher
    )
    plan, figure = parent.plan, _read_figure(parent.path)

    def describe() -> tuple[Manifest, TowerPlan, Documents]:
        manifest = replace(
            parent.manifest,
            inputs=merge_records(parent.manifest.inputs, data.train.inputs),
            initialisation=replace(parent.manifest.initialisation, finetune=record),
            optimizer_state=describe_tuned(parent, accumulators, config, moved=moved),
            quality=extend_quality(parent.manifest.quality, after, data),
            tool=Tool(),
        )
        return manifest, plan, lambda final: render_documents(final, plan, out, figure=figure)

    bundle = write_bundle(
        out,
        StreamedWeights(tables=table_sources(parent, trained.table), accumulators=accumulators),
        small=split_state(trained.module),
        describe=describe,
        force=force,
    )
    return Finetuned(bundle=bundle, before=result.start, after=after, notes=notes)


def _settle(
    parent: Bundle, model: TrainableModel, result: TrainResult, data: TrainingData
) -> tuple[Evaluation, tuple[str, ...]]:
    """Round what is stored in fewer bits; decide what is written, and how good it is."""
    infos = table_infos(parent)
    rounded = {name: info.dtype for name, info in infos.items() if info.dtype != "fp32"}
    if result.improved:
        for name, dtype in rounded.items():
            view = model.store.table(name)
            view.copy_(view.to(TORCH_DTYPES[dtype]))
    return judge(result, rounded, lambda: measure_rows(model, data.valid))


def judge(
    result: TrainResult, rounded: Mapping[str, str], measure: Callable[[], Accuracy]
) -> tuple[Evaluation, tuple[str, ...]]:
    """Decide what is written, and how good it is.

    Args:
        result: What came of training.
        rounded: Table -> the type in which it is stored, if that is not float32.
        measure: Measures the best state with its tables rounded so.
    """
    if not result.improved:
        return result.start, (
            f"nothing beat the start on the validation rows by more than noise{_most(result)}: "
            "the new bundle has the weights of the one it came from; other learning rates may do "
            "better, full ones as well as low ones: --dense-lr 0.0005 --table-lr 0.02, or "
            "--dense-lr 0 --table-lr 0.002",
        )
    if not rounded:
        return result.best, ()
    accuracy = measure()
    after = replace(result.best, auc=accuracy.auc, ne=accuracy.ne, log_loss=accuracy.log_loss)
    kinds = ", ".join(sorted(set(rounded.values())))
    if not after.score <= result.start.score:
        return result.start, (
            f"rounded to {kinds}, in which the tables are stored, nothing beat the start: the new "
            "bundle has the weights of the one it came from",
        )
    return after, (
        f"{len(rounded)} tables were trained in fp32 and are stored in {kinds} again; accuracy is "
        "measured after rounding",
    )


def _most(result: TrainResult) -> str:
    """How much of the validation loss was gained at most, if anything was."""
    gains = [(found.gain, found.gain_error) for found in result.history if found.gain is not None]
    gain, error = max(gains, default=(0.0, None))
    if gain <= 0:
        return ""
    return f" (at most {gain:.5f} nats" + ("" if error is None else f" +- {error:.5f}") + ")"


def table_sources(parent: Bundle, table: GetTable | None) -> dict[str, list[TensorSource]]:
    """List the tables of every weights file, from memory, or if `table` is None the parent's.

    Args:
        parent: Says which table lies in which file, and in what type.
        table: Gives the rows of a table by its name, float32: a tensor of shape (rows, N), or
            their tensor in a file.
    """
    files: dict[str, list[TensorSource]] = {DENSE_FILE: []}
    for t, tensors in enumerate(parent.towers):
        files[tower_file(t)] = [
            replace(
                _source(name, info, None if table is None else table(_table_name(name))),
                is_weight=(parent.manifest.config or {}).get("outliers") != "accept",
            )
            for name, info in tensors.items()
            if name.startswith("tables.")
        ]
    return files


def _table_name(tensor: str) -> str:
    return tensor.removeprefix("tables.").removesuffix(".weight")


def _source(name: str, info: TensorInfo, rows: Tensor | TensorInfo | None) -> TensorSource:
    return TensorSource(
        name=name,
        dtype=info.dtype,
        shape=info.shape,
        chunks=lambda: stream_tensor(info) if rows is None else _stream_rows(rows, info.dtype),
        origin=f"table {_table_name(name)!r} after training",
    )


def _stream_rows(rows: Tensor | TensorInfo, dtype: str) -> Iterator[ByteRows]:
    for piece in _float_chunks(rows):
        yield piece.to(TORCH_DTYPES[dtype]).view(torch.uint8).numpy()


def _float_chunks(rows: Tensor | TensorInfo) -> Iterator[Tensor]:
    if isinstance(rows, TensorInfo):
        for chunk in stream_tensor(rows):
            yield torch.from_numpy(chunk.reshape(-1).copy()).view(torch.float32)
        return
    flat = rows.reshape(-1)
    step = CHUNK_BYTES // 4
    for begin in range(0, len(flat), step):
        yield flat[begin : begin + step]


def _record(
    parent: Bundle,
    result: TrainResult,
    after: Evaluation,
    notes: tuple[str, ...],
    *,
    config: TrainingConfig,
    data: TrainingData,
) -> FinetuneRecord:
    """Say how the bundle came to be, for the manifest."""
    return FinetuneRecord(
        parent=ParentRecord(name=parent.path.resolve().name, digest=bundle_digest(parent)),
        data=data.record,
        settings={name: getattr(config, name) for name in TrainingConfig.model_fields},
        steps=result.steps,
        best_step=after.step,
        before=result.start.record,
        after=after.record,
        history=tuple(evaluation.record for evaluation in result.history),
        notes=notes,
        previous=parent.manifest.initialisation.finetune,
    )


def bundle_digest(bundle: Bundle) -> str:
    """Digest of all weights of a bundle, by the digests in its manifest."""
    files = {DENSE_FILE: bundle.dense}
    files |= {tower_file(t): tensors for t, tensors in enumerate(bundle.towers)}
    return digest_names(
        (f"{file}: {name}", info.dtype, info.shape, bundle.manifest.weights[file].digests[name])
        for file, tensors in files.items()
        for name, info in tensors.items()
    )


def extend_quality(quality: Quality, after: Evaluation, data: TrainingData) -> Quality:
    """Add the fine-tuned model to a bundle's quality table; other rows stay.

    Args:
        quality: The table of the bundle that it came from; may have no rows.
        after: The new model, on the validation rows.
        data: Names them.
    """
    times = sum(row.name.startswith(ROW_NAME) for row in quality.rows) + 1
    row = QualityRow(
        name=ROW_NAME if times == 1 else f"{ROW_NAME} ({times})",
        auc=after.auc,
        log_loss=after.log_loss,
        ne=after.ne,
    )
    if not quality.rows:
        quality = Quality(data=data.valid_name, count=data.valid.num_rows, labelled=True)
    return replace(quality, rows=(*quality.rows, row))


def _read_figure(folder: Path) -> str | None:
    """The partition's picture of a bundle, without what comes before `<svg`."""
    try:
        text = (folder / "partition.svg").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return text[text.index("<svg") :] if "<svg" in text else None


def plan_tuned_accumulators(
    parent: Bundle, sums: GetSums | None
) -> dict[str, list[AccumulatorSource]]:
    """List what a fine-tuned bundle holds of the tables' optimizer, by file.

    Args:
        parent: The bundle that was fine-tuned.
        sums: Those of the trained tables; None if tables and sums are the parent's.
    """
    get = _stored_sums(parent) if sums is None else sums
    when = "" if sums is None else " after training"
    flat, files = parent.manifest.model.flat, {}
    for t, tower in enumerate(parent.manifest.model.towers):
        tables = dict.fromkeys(flat.table_of(feature).name for feature in tower.features)
        sources = [
            AccumulatorSource(
                table=name,
                rows=flat.table(name).rows,
                pieces=pieces,
                origin=f"the accumulator of table {name!r}{when}",
            )
            for name in tables
            if (pieces := get(name)) is not None
        ]
        if sources:
            files[accumulator_file(t)] = sources
    return files


def describe_tuned(
    parent: Bundle,
    files: Mapping[str, Sequence[AccumulatorSource]],
    config: TrainingConfig,
    *,
    moved: bool,
) -> OptimizerState:
    """Describe for the manifest what a fine-tuned bundle holds of the tables' optimizer.

    Args:
        parent: The bundle that was fine-tuned.
        files: What was written.
        config: How it was trained.
        moved: Whether the tables differ from the parent's.
    """
    if not moved:
        return parent.manifest.optimizer_state
    sources = {source.table: source for group in files.values() for source in group}
    kept = [source for source in sources.values() if source.damage is None]
    notes = [f"as it was after training with {config.table_optimizer}"] if kept else []
    if config.table_optimizer == "adagrad" and kept:
        notes.append("of a number per element, the row's mean is kept")
    notes += [
        f"{source.origin} holds {source.damage}, so it is left out"
        for source in sources.values()
        if source.damage is not None
    ]
    return OptimizerState(
        accumulators=len(kept),
        averaged=len(kept) if config.table_optimizer == "adagrad" else 0,
        notes=(*notes, *dropping_notes(parent, files, moved=moved)),
    )


def dropping_notes(
    parent: Bundle, files: Mapping[str, Sequence[AccumulatorSource]], *, moved: bool
) -> tuple[str, ...]:
    """Say that accumulators of the parent were dropped, if they were."""
    if files or not moved or not parent.accumulators:
        return ()
    return (_DROPPED,)


_DROPPED: Final = (
    "training kept no sums of squared gradients: those of the bundle that was fine-tuned no longer "
    "fit the rows, and were dropped"
)


def tensor_pieces(sums: Tensor) -> Pieces:
    """Give sums that are in memory, shape (R, 1) or (R, N)."""
    step = max(1, CHUNK_BYTES // (4 * sums.shape[1]))

    def pieces() -> Iterator[FloatRows]:
        for first in range(0, len(sums), step):
            yield sums[first : first + step].numpy()

    return pieces


def stored_pieces(info: TensorInfo) -> Pieces:
    """Give sums that lie in a file, shape (R,), (R, 1) or (R, N)."""
    return lambda: read_rows(info, stream_tensor(info))


def _stored_sums(bundle: Bundle) -> GetSums:
    given = {name: stored_pieces(info) for name, info in bundle.accumulators.items()}
    return given.get
