"""Any model that can be scored: a flat checkpoint, a bundle, or an export."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dmt_convert.arrays import Float32Array
from dmt_convert.bundle import Bundle, is_bundle, open_bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, open_checkpoint
from dmt_convert.config import ScoringOptions
from dmt_convert.data import Batch, adapt_batches, open_inputs
from dmt_convert.documents import InputRecord
from dmt_convert.errors import DataError
from dmt_convert.families import FlatModelInfo, ModelConfig, infer_model, read_model_options
from dmt_convert.files import check_checksums
from dmt_convert.metrics import Agreement, measure_agreement
from dmt_convert.model import Code, DmtModel, DmtSpec, FlatModel, open_flat_model
from dmt_convert.progress import Progress, no_progress
from dmt_convert.scoring.non_finite import LogitCheck
from dmt_convert.serving import ExportedModel, is_export
from dmt_convert.spec import ModelSpec

BATCH_ROWS: Final = 4096
"""Rows that are scored at a time."""
_CHECKED_BYTES: Final = 256 << 20
"""Tables up to this size in total are compared with their checksums and looked through for absurd
values. Larger ones would take long to read; this is done when they are converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel:
    """A model opened for scoring; its tables stay on disk."""

    path: Path
    """What was opened."""
    kind: Literal["flat", "bundle", "export"]
    """What it is."""
    module: FlatModel | DmtModel | ExportedModel
    """The model itself."""
    bundle: Bundle | None = None
    """The bundle, where it is one."""
    inputs: InputRecord | None = None
    """Which columns of the data fed it so far, if that is known."""
    files: tuple[Path, ...] = ()
    """Files of a checkpoint, which may lie beside each other."""
    weights: tuple[TensorInfo, ...] = ()
    """Tensors of a checkpoint that have no digest of ours: the dense ones, and tables if they are
    small."""

    @property
    def spec(self) -> ModelSpec:
        """The flat model's spec: what the data must fit."""
        spec = self.module.spec
        return spec if isinstance(spec, ModelSpec) else spec.flat

    @property
    def towers(self) -> DmtSpec | None:
        """The converted model's spec; None for a flat one."""
        spec = self.module.spec
        return None if isinstance(spec, ModelSpec) else spec

    @property
    def quantised(self) -> str | None:
        """How the tables of an export are quantised, where they are."""
        if not isinstance(self.module, ExportedModel):
            return None
        code = self.module.manifest.quantize
        return None if code == "none" else code

    def code(self, tower: int) -> Code | None:
        """Return the code in which a tower sends what it emits; None for float32."""
        if isinstance(self.module, ExportedModel):
            return self.module.code(tower)
        assert isinstance(self.module, DmtModel)
        code = getattr(self.module.tower_list[tower].tower_module, "code", None)
        return code if isinstance(code, Code) else None

    def score(self, batch: Batch) -> Float32Array:
        """Return the logits of one batch, shape (B,)."""
        if isinstance(self.module, ExportedModel):
            return self.module.score(batch)
        with torch.inference_mode():
            logits: Float32Array = self.module(batch).numpy()
        return logits

    def stages(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield every intermediate result of one batch."""
        with torch.inference_mode():
            yield from self.module.stages(batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The logits of a data set."""

    logits: Float32Array
    """Shape (rows,)."""
    labels: Float32Array | None
    """Shape (rows,), if the data has labels."""
    truth: Float32Array | None
    """The original model's logits, shape (rows,), if the data holds them (probes)."""
    seconds: float
    """Time spent reading and scoring."""
    inputs: InputRecord
    """Which columns of the data fed the model."""
    path: Path | None = None
    """The npz that holds `logits`, if one was written."""

    def __repr__(self) -> str:
        """Say how many there are."""
        return f"<Scores: {self.rows:,} rows, {self.rows_per_s:,.0f} per second>"

    @property
    def rows(self) -> int:
        """Rows that were scored."""
        return len(self.logits)

    @property
    def rows_per_s(self) -> float:
        """Rows read and scored per second."""
        return self.rows / max(self.seconds, 1e-9)

    @property
    def agreement(self) -> Agreement | None:
        """How well the logits agree with the original ones, if the data holds those."""
        return None if self.truth is None else measure_agreement(self.truth, self.logits)

    @property
    def truth_scale(self) -> float | None:
        """Largest absolute original logit, if the data holds them."""
        return None if self.truth is None else float(np.abs(self.truth).max())


def open_scored(
    model: ScoredModel | Bundle | str | os.PathLike[str], options: ScoringOptions
) -> ScoredModel:
    """Open a model by its path, with what the user says of it; one that is open stays as it is.

    Raises:
        DmtError: It cannot be read, or is not a model that is known.
    """
    if isinstance(model, ScoredModel):
        return model
    facts = read_model_options(options)
    if isinstance(model, Bundle):
        return _open_bundle(model)
    accepted = options.outliers == "accept"
    return open_model(Path(model), facts, trust_code=options.trust_code, accept_outliers=accepted)


def open_model(
    path: Path,
    config: ModelConfig | None = None,
    *,
    trust_code: bool = False,
    accept_outliers: bool = False,
) -> ScoredModel:
    """Open a flat checkpoint, a bundle or an export for scoring.

    Args:
        path: The checkpoint, the bundle's folder, or the export's.
        config: What the user says of a flat checkpoint.
        trust_code: Whether the machine code of a pt2 export may run.
        accept_outliers: Take weights of a flat checkpoint that are absurd beside all others.

    Raises:
        DmtError: It cannot be read, or is no model that is known.
    """
    if is_bundle(path):
        return _open_bundle(open_bundle(path))
    if is_export(path):
        exported = ExportedModel(path, trust_code=trust_code)
        return ScoredModel(
            path=path, kind="export", module=exported, inputs=exported.manifest.columns
        )
    info = infer_model(open_checkpoint(path), config)
    weights = _quickly_read(info)
    for tensor in weights:
        check_checksums(tensor, tensor.path)
    return ScoredModel(
        path=path,
        kind="flat",
        module=open_flat_model(info),
        inputs=info.inputs,
        files=info.checkpoint.files,
        weights=() if accept_outliers else weights,
    )


def _open_bundle(bundle: Bundle) -> ScoredModel:
    """Score a bundle as it was opened, even if it was replaced since."""
    return ScoredModel(
        path=bundle.path,
        kind="bundle",
        module=open_bundle_model(bundle),
        bundle=bundle,
        inputs=bundle.manifest.inputs,
    )


def _quickly_read(info: FlatModelInfo) -> tuple[TensorInfo, ...]:
    """Return the tensors that can be read through before scoring: tables only if they are small."""
    small = sum(table.nbytes for table in info.spec.tables) <= _CHECKED_BYTES
    return tuple((info.tensors if small else info.dense_tensors).values())


def score_data(
    model: ScoredModel,
    data: Path,
    *,
    max_rows: int | None = None,
    needs_labels: bool = False,
    progress: Progress = no_progress,
) -> Scores:
    """Score every row of a data set, in its order.

    Args:
        model: The model.
        data: The data set.
        max_rows: Score at most this many rows.
        needs_labels: Refuse data without labels.
        progress: Told of the rows that are scored.

    Raises:
        DataError: The data cannot be read, has no rows, or does not fit the model.
        DmtError: A logit is not finite, or a weight of a flat checkpoint is absurd.
    """
    dataset = open_inputs(data, model.spec, model.inputs)
    assert dataset.inputs is not None
    if needs_labels:
        dataset.require_labels("or use `dmt score`, which needs no labels")
    total = dataset.num_rows if max_rows is None else min(max_rows, dataset.num_rows)
    begin = time.perf_counter()
    parts: list[tuple[Float32Array, Float32Array | None, Float32Array | None]] = []
    done = 0
    batches = dataset.batches(BATCH_ROWS, max_rows=max_rows)
    check = LogitCheck(model)
    for batch in adapt_batches(dataset, model.spec, batches):
        logits = model.score(batch)
        check.update(batch, logits)
        parts.append((logits, batch.labels, batch.logits))
        done += batch.num_rows
        progress("scoring", done, total)
    if not parts:
        raise DataError(
            f"{data} has no rows",
            expected="at least one row to score",
            hint="name a data set that has rows",
        )
    check.finish()
    return Scores(
        logits=np.concatenate([logits for logits, _, _ in parts]),
        labels=_join([labels for _, labels, _ in parts]),
        truth=_join([truth for _, _, truth in parts]),
        seconds=time.perf_counter() - begin,
        inputs=dataset.inputs,
    )


def _join(arrays: list[Float32Array | None]) -> Float32Array | None:
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if len(known) == len(arrays) else None
