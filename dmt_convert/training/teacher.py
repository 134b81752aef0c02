"""The flat model that a bundle was made from, as the teacher of its fine-tuning.

Half of what is learnt is the labels, half the probabilities that the flat model gives. As binary
cross entropy is linear in the label, both together are the cross entropy against one mixed label:
(1 - w) y + w sigmoid(t), for a label y, the teacher's logit t and its weight w.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch

from dmt_convert.arrays import Float32Array
from dmt_convert.bundle import Bundle, digest_dense, plan_table_files
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.config import ModelOptions
from dmt_convert.data import Batch
from dmt_convert.documents import TeacherRecord
from dmt_convert.errors import ConfigError, DmtError
from dmt_convert.families import FlatModelInfo, infer_model, read_model_options
from dmt_convert.files import TreeDigest, digest_names
from dmt_convert.model import MappedTables, open_flat_model, to_tensor
from dmt_convert.spec import ModelSpec

_HINT: Final = (
    "name the checkpoint that the bundle was made from; --teacher none learns from labels alone"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherChoice:
    """Which checkpoint teaches, if any. Crosses from rank to rank."""

    line: str
    """What is said of it."""
    path: Path | None = None
    """The checkpoint; None: labels alone."""
    digest: str = ""
    """Digest of its tables."""
    dense_digest: str = ""
    """Digest of its other weights."""
    weight: float = 0.0
    """Its weight against the labels."""

    @property
    def record(self) -> TeacherRecord | None:
        """What the manifest says of it."""
        if self.path is None:
            return None
        return TeacherRecord(
            name=self.path.name,
            digest=self.digest,
            dense_digest=self.dense_digest,
            weight=self.weight,
        )


class Teacher:
    """A flat model that gives soft labels; its tables stay on disk.

    Args:
        info: The checkpoint.
        weight: Weight of its probabilities against the labels.
        device: Where its dense parts compute.
    """

    def __init__(self, info: FlatModelInfo, weight: float, device: str = "cpu") -> None:
        self._model = open_flat_model(info)
        self._tables = self._model.tables
        assert isinstance(self._tables, MappedTables)
        self._device = torch.device(device)
        self._model.to(self._device)
        self.weight = weight

    def logits(self, batch: Batch) -> Float32Array:
        """Return the logits of a batch, shape (B,): on a CPU, those of `dmt score` to the bit."""
        with torch.inference_mode():
            pooled = {
                name: self._tables(name, bag).to(self._device)
                for name, bag in zip(batch.feature_names, batch.bags, strict=True)
            }
            dense = to_tensor(batch.dense).to(self._device)
            logits: Float32Array = self._model.forward_vectors(dense, pooled).cpu().numpy()
        return logits

    def mix(self, batch: Batch) -> Batch:
        """Return a batch whose labels are mixed with the teacher's probabilities."""
        assert batch.labels is not None
        soft = 0.5 + 0.5 * np.tanh(0.5 * self.logits(batch))  # a sigmoid that cannot overflow
        mixed = (1 - self.weight) * batch.labels + self.weight * soft
        return replace(batch, labels=mixed.astype(np.float32))


def choose_teacher(
    bundle: Bundle, asked: Path | Literal["auto", "none"], weight: float, model: Path | None = None
) -> TeacherChoice:
    """Find the checkpoint that a bundle was made from, and check that it is the same.

    Args:
        bundle: The bundle.
        asked: The checkpoint; auto looks for it beside the bundle, under its recorded name.
        weight: Its weight against the labels.
        model: The Python file that defines the user's own model, if it has one.

    Raises:
        DmtError: The checkpoint that was asked for cannot be read, or is another one. What `auto`
            finds is set aside instead, and the reason is said.
    """
    if asked == "none" or not weight:
        return TeacherChoice(line="learning from the labels alone, as asked for")
    if bundle.manifest.model.is_passthrough and asked == "auto":
        return TeacherChoice(
            line="learning from the labels alone: this bundle computes what the flat model computes"
        )
    source = bundle.manifest.source
    path = asked if isinstance(asked, Path) else _find(bundle)
    if path is None:
        return TeacherChoice(
            line=f"learning from the labels alone: the flat model {source.name or '(unnamed)'} is "
            "not beside the bundle; name it with --teacher"
        )
    try:
        if not isinstance(asked, Path):
            _check_sizes(bundle, path)
        digest, dense_digest = _check_same(bundle, path, model)
    except DmtError as error:
        if isinstance(asked, Path):
            raise
        return TeacherChoice(
            line=f"learning from the labels alone: {path} is set aside as a teacher: {error.found}"
        )
    line = f"learning from the labels and from the flat model {path}, weight {weight:g}"
    if not source.dense_digest:
        line += "; an earlier version made the bundle, so only the tables could be compared"
    return TeacherChoice(
        line=line,
        path=path,
        digest=digest,
        dense_digest=dense_digest,
        weight=weight,
    )


def open_teacher(
    choice: TeacherChoice, bundle: Bundle, model: Path | None = None, device: str = "cpu"
) -> Teacher | None:
    """Open the checkpoint that was chosen; None if there is none.

    Raises:
        DmtError: It cannot be read.
    """
    if choice.path is None:
        return None
    return Teacher(_open(bundle, choice.path, model), choice.weight, device)


def _find(bundle: Bundle) -> Path | None:
    name = Path(bundle.manifest.source.name).name
    path = bundle.path.resolve().parent / name
    return path if name and path.exists() else None


def _check_sizes(bundle: Bundle, path: Path) -> None:
    """Refuse a checkpoint whose files cannot be those that were converted; reads no tensor."""
    source, files = bundle.manifest.source, open_checkpoint(path).files
    found = {(file.name, file.stat().st_size) for file in files}
    if found != {(file.name, file.bytes) for file in source.files}:
        raise ConfigError(
            "its files have other names or sizes than those that the bundle was made from",
            expected=f"the checkpoint {source.name}",
            hint=_HINT,
        )


def _check_same(bundle: Bundle, path: Path, model: Path | None) -> tuple[str, str]:
    """Refuse another model than the bundle's flat one.

    Returns:
        The digest of its tables, and that of its other weights.
    """
    info = _open(bundle, path, model)
    dtype = (bundle.manifest.config or {}).get("dtype")
    towers = [tower.features for tower in bundle.manifest.model.towers]
    digests: dict[str, str] = {}
    entries = []
    for sources in plan_table_files(info, towers, dtype=dtype).values():
        for source in sources:
            if source.name not in digests:
                digest = TreeDigest()
                for chunk in source.chunks():
                    digest.update(chunk)
                digests[source.name] = digest.finish()
            entries.append((source.name, source.dtype, source.shape, digests[source.name]))
    recorded = bundle.manifest.source
    tables, dense = digest_names(entries), digest_dense(info)
    other = ["tables"] if tables != recorded.digest else []
    if recorded.dense_digest not in ("", dense):  # empty: of an earlier version
        other.append("dense weights")
    if other:
        raise ConfigError(
            f"{path} holds other {' and other '.join(other)} than the bundle was made from",
            expected=f"the checkpoint {recorded.name}, unchanged",
            hint=_HINT,
        )
    return tables, dense


def _open(bundle: Bundle, path: Path, model: Path | None) -> FlatModelInfo:
    """Open a checkpoint as it was read when the bundle was made of it."""
    facts = (bundle.manifest.config or {}).get("model_config")
    if isinstance(facts, str):  # a file, which may be gone: the model is compared in any case
        facts = Path(facts) if Path(facts).is_file() else None
    options = ModelOptions(model_facts=facts, model=model)
    info = infer_model(open_checkpoint(path), read_model_options(options))
    if _shape(info.spec) != _shape(bundle.manifest.model.flat):
        raise ConfigError(
            f"{path} holds another model than the one that the bundle was made from",
            expected=f"the checkpoint {bundle.manifest.source.name}",
            hint=_HINT,
        )
    return info


def _shape(spec: ModelSpec) -> ModelSpec:
    """A model, whatever the type in which its tables are stored."""
    return replace(spec, tables=tuple(replace(t, dtype="fp32") for t in spec.tables))
