"""What the serving benchmark asks: models at Criteo's shapes, forms of input, batches of ids.

Letters: B batch, F features, L ids per bag, nnz ids of a batch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec, module_spec
from dmt_convert.serving import FeatureInput, GraphInputs
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec

FEATURES: Final = 26
DIM: Final = 128
NUM_DENSE: Final = 13
TOWERS: Final = 4
MODELS: Final = ("dlrm", "dcn")
FORMS: Final = ("single", "fixed", "jagged")
FUNCTIONS: Final = {"flat": 1.0, "c2": 2.0, "c4": 4.0}
"""What a model computes -> the compression of its towers; `flat` is the flat model."""
FIXED_LENGTH: Final = 4
MAX_LENGTH: Final = 8
_CACHE_BYTES: Final = 96 << 20
"""Rows that are read before a batch comes again: three times a large last-level cache."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model with one form of input: what a process of a variant serves."""

    model: str
    form: str
    rows: int
    """Rows of every table."""
    ids: str = "uniform"
    """How ids are drawn: uniform or zipf."""
    part: str = "model"
    """model, or lookup: only the pooled embeddings, side by side."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """B rows of input."""

    dense: FloatArray
    """Shape (B, 13)."""
    values: tuple[IntArray, ...]
    """Ids of every feature: (B, L), or (nnz,) for jagged."""
    lengths: tuple[IntArray, ...]
    """Ids per bag of every feature, shape (B,)."""

    @property
    def all_values(self) -> IntArray:
        """Ids of all features one after the other."""
        return np.concatenate([values.reshape(-1) for values in self.values])

    @property
    def all_lengths(self) -> IntArray:
        """Lengths of all features one after the other, shape (F * B,)."""
        return np.concatenate(self.lengths)

    def feeds(self, inputs: GraphInputs) -> dict[str, npt.NDArray[Any]]:
        """Name the tensors as our exported graphs do."""
        feeds: dict[str, npt.NDArray[Any]] = {inputs.dense: self.dense}
        for feature, values, lengths in zip(
            inputs.features, self.values, self.lengths, strict=True
        ):
            feeds[feature.ids] = values
            if feature.lengths is not None:
                feeds[feature.lengths] = lengths
        return feeds


def flat_spec(model: str, rows: int) -> ModelSpec:
    """DLRM or DCNv2 as in MLPerf's training benchmark, all tables alike."""
    names = [f"f{i:02d}" for i in range(FEATURES)]
    if model == "dcn":
        interaction = InteractionSpec(kind="dcn", cross_layers=3, cross_rank=512)
    else:
        interaction = InteractionSpec(kind="dot")
    width = interaction.output_width([DIM] * (1 + FEATURES))
    return ModelSpec(
        family="torchrec-dlrm",
        tables=tuple(TableSpec(name=f"t_{name}", rows=rows, dim=DIM) for name in names),
        features=tuple(FeatureSpec(name=name, table=f"t_{name}") for name in names),
        dense_arch=MlpSpec(widths=(NUM_DENSE, 512, 256, DIM), final_relu=True),
        interaction=interaction,
        over_arch=MlpSpec(widths=(width, 1024, 1024, 512, 256, 1), final_relu=False),
    )


def tower_spec(model: str, rows: int, function: str, towers: int) -> DmtSpec:
    """Towers of neighbouring features; the first ones get what is left over."""
    flat = flat_spec(model, rows)
    if function == "flat":
        module = TowerModuleSpec(kind="passthrough")
    else:
        module = module_spec(flat, "auto", num_towers=towers, compression=FUNCTIONS[function])
    parts = np.array_split(np.array(flat.feature_names), towers)
    return DmtSpec(
        flat=flat,
        towers=tuple(TowerSpec(features=tuple(map(str, p)), module=module) for p in parts),
    )


def graph_inputs(form: str) -> GraphInputs:
    """What our graphs take."""
    return GraphInputs(
        num_dense=NUM_DENSE,
        features=tuple(
            FeatureInput(feature=name, form=form)  # type: ignore[arg-type]
            for name in flat_spec("dlrm", 1).feature_names
        ),
    )


def bag_length(form: str) -> float:
    """Ids per bag on average."""
    return {"single": 1.0, "fixed": float(FIXED_LENGTH), "jagged": MAX_LENGTH / 2}[form]


def count_inputs(form: str, batch: int) -> int:
    """How many batches to take in turn, so that none finds its rows in the processor's cache."""
    touched = batch * FEATURES * bag_length(form) * DIM * 4
    return int(np.clip(np.ceil(_CACHE_BYTES / touched), 4, 2048))


def draw_inputs(case: Case, batch: int, index: int) -> Inputs:
    """Draw a batch; the same one for the same case, size and index, in every process."""
    rng = np.random.default_rng((case.seed, zlib.crc32(case.form.encode()), batch, index))
    dense = rng.standard_normal((batch, NUM_DENSE), dtype=np.float32)
    values, lengths = [], []
    for _ in range(FEATURES):
        if case.form == "jagged":
            length = rng.integers(0, MAX_LENGTH + 1, size=batch)
            shape: tuple[int, ...] = (int(length.sum()),)
        else:
            shape = (batch, int(bag_length(case.form)))
            length = np.full(batch, shape[1])
        values.append(_draw_ids(rng, shape, case))
        lengths.append(length.astype(np.int64))
    return Inputs(dense=dense, values=tuple(values), lengths=tuple(lengths))


def _draw_ids(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> IntArray:
    if case.ids == "uniform":
        return rng.integers(0, case.rows, size=shape, dtype=np.int64)
    # Zipf with exponent 1.05, cut off at the table's end; popular rows do not lie side by side
    power = -0.05
    rank = (1 + rng.random(shape) * (case.rows**power - 1)) ** (1 / power)
    spread = (rank.astype(np.int64) - 1) * 1_000_003 % case.rows
    return np.asarray(spread, dtype=np.int64)
