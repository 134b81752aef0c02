"""`dmt.json`: what a bundle is, where it came from, how it was made, how well it agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dmt_convert.data import check_inputs
from dmt_convert.documents import (
    OMITTED_IF_EMPTY,
    OMITTED_IF_NONE,
    Frontier,
    Initialisation,
    InputRecord,
    Layout,
    OptimizerState,
    PartitionRecord,
    Quality,
    Source,
    Tool,
    WeightsFile,
    digest_document,
    from_json,
    to_json,
)
from dmt_convert.errors import BundleError
from dmt_convert.families import Fact, IgnoredTensor
from dmt_convert.files import MANIFEST_NAME
from dmt_convert.model import DmtSpec

SCHEMA_VERSION: Final = 1
"""Raised when older versions would misread a bundle; not for a part that they can ignore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `dmt.json`."""

    schema_version: int = SCHEMA_VERSION
    """Layout of the bundle."""
    tool: Tool = field(default_factory=Tool)
    """What wrote the bundle."""
    config: Mapping[str, Any] | None = field(default=None, metadata=OMITTED_IF_NONE)
    """The settings that made the bundle: `command`, and what the command was given. None in
    bundles of versions that did not record them."""
    source: Source
    """The checkpoint that was converted."""
    model: DmtSpec
    """The converted model."""
    facts: tuple[Fact, ...] = ()
    """How the flat model was understood."""
    ignored_tensors: tuple[IgnoredTensor, ...] = field(default=(), metadata=OMITTED_IF_EMPTY)
    """Tensors of the model's dict, beside its own, that were passed over."""
    other_dicts: tuple[str, ...] = field(default=(), metadata=OMITTED_IF_EMPTY)
    """What the checkpoint holds in other dicts than the model's, one line each."""
    inputs: InputRecord | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Which columns of the data feed the model. None if no data was given when it was made."""
    partition: PartitionRecord = field(default_factory=PartitionRecord)
    """How the towers were chosen."""
    initialisation: Initialisation = field(default_factory=Initialisation)
    """How the weights outside the tables were set, and how they were fine-tuned."""
    optimizer_state: OptimizerState = field(default_factory=OptimizerState)
    """What became of the optimizer state of the tables."""
    quality: Quality = field(default_factory=Quality)
    """How well the converted model agrees with the flat one."""
    frontier: Frontier | None = field(default=None, metadata=OMITTED_IF_NONE)
    """What other compressions would have cost. None if that was not measured."""
    weights: Mapping[str, WeightsFile] = field(default_factory=dict)
    """File below the bundle -> its size and digests."""

    def __post_init__(self) -> None:
        if self.inputs is not None:
            check_inputs(self.inputs, self.model.flat)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `dmt.json`, which also states what follows from the model.

        That is its compression, and its digest, by which damage is found.
        """
        value = to_json(self)
        order = [*list(value)[: list(value).index("model")], "compression", *value]
        value["compression"] = self.model.compression
        signed = {"model_digest": digest_document(value["model"])}
        return {key: value[key] for key in order} | signed

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            BundleError: A part is missing or damaged.
        """
        return from_json(cls, value)


MANIFEST: Final = Layout(
    content=Manifest,
    version=SCHEMA_VERSION,
    error=BundleError,
    writer="dmt convert",
    remedy="copy the bundle again, or convert the checkpoint again",
)


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's `dmt.json`.

    Raises:
        BundleError: It is missing, damaged, or has a newer schema version.
    """
    return MANIFEST.read(
        folder / MANIFEST_NAME,
        absent=BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME}",
            expected="a bundle, as `dmt convert` writes it",
            hint="convert a checkpoint first: dmt convert ckpt.pt --towers 4",
        ),
    )
