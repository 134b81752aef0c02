"""`dmt.json`: what a bundle is, where it came from, how it was made, how well it agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dmt_convert import __version__
from dmt_convert.errors import BundleError
from dmt_convert.files import MANIFEST_NAME, read_versioned
from dmt_convert.model import DmtSpec

SCHEMA_VERSION: Final = 1
"""Raised when a bundle can no longer be read as before; a part that may be passed over does not."""
_KINDS: Final[Mapping[str, type]] = {
    "tool": dict,
    "source": dict,
    "model": dict,
    "facts": list,
    "partition": dict,
    "initialisation": dict,
    "optimizer_state": dict,
    "quality": dict,
    "weights": dict,
    "config": dict,
}
"""What the parts of `dmt.json` are; bundles that lack `optimizer_state` came before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `dmt.json`."""

    model: DmtSpec
    """The converted model."""
    source: Mapping[str, Any]
    """format, name, files [{name, bytes}], bytes, digest of the model's tensors."""
    facts: tuple[Mapping[str, str], ...] = ()
    """How the flat model was understood: subject, value, source, reason."""
    partition: Mapping[str, Any] = field(default_factory=dict)
    """Strategy, affinity, mean affinity within and between towers, loads; the groups of features
    that share no tower, by name."""
    initialisation: Mapping[str, Any] = field(default_factory=dict)
    """method, sample, notes; in a fine-tuned bundle also finetune: parent, data, settings, steps,
    best_step, before, after, history, notes, previous (the parent's own record)."""
    optimizer_state: Mapping[str, Any] = field(default_factory=dict)
    """What became of the state of the tables' optimizer: accumulators and averaged (numbers of
    tables), notes. Empty in bundles that were written before there was any."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """How well the converted model agrees with the flat one."""
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """File below the bundle -> {bytes, digests: {tensor: digest}}."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The command and the settings that made the bundle; empty in older bundles."""
    tool_version: str = __version__
    """Version of dmt-convert that wrote the bundle."""
    schema_version: int = SCHEMA_VERSION
    """Layout of the bundle."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `dmt.json`; `from_json` reads it back."""
        return {
            "schema_version": self.schema_version,
            "tool": {"name": "dmt-convert", "version": self.tool_version},
            "source": dict(self.source),
            "compression": self.model.compression,
            "model": self.model.to_json(),
            "facts": [dict(fact) for fact in self.facts],
            "partition": dict(self.partition),
            "initialisation": dict(self.initialisation),
            "optimizer_state": dict(self.optimizer_state),
            "quality": dict(self.quality),
            "weights": {name: dict(entry) for name, entry in self.weights.items()},
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            TypeError: A part is of another kind than it should be; likewise KeyError, ValueError
                and AttributeError.
        """
        value = {"optimizer_state": {}, "config": {}, **value}
        for name, kind in _KINDS.items():
            if not isinstance(value[name], kind):
                raise TypeError(f"{name} is {type(value[name]).__name__}")
        for name, entry in value["weights"].items():
            digests = entry["digests"]
            if type(entry["bytes"]) is not int or not isinstance(digests, dict):
                raise TypeError(f"the entry of {name} lacks its size or its digests")
        return cls(
            model=DmtSpec.from_json(value["model"]),
            source=value["source"],
            facts=tuple(value["facts"]),
            partition=value["partition"],
            initialisation=value["initialisation"],
            optimizer_state=value["optimizer_state"],
            quality=value["quality"],
            weights=value["weights"],
            config=value["config"],
            tool_version=value["tool"]["version"],
            schema_version=value["schema_version"],
        )


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's `dmt.json`.

    Raises:
        BundleError: It is missing, damaged, or of a newer layout.
    """
    path = folder / MANIFEST_NAME
    return read_versioned(
        path,
        Manifest.from_json,
        version=SCHEMA_VERSION,
        absent=BundleError(
            f"{folder} is no bundle: it has no {MANIFEST_NAME}",
            expected="a bundle, as `dmt convert` writes it",
            hint="convert a checkpoint first: dmt convert ckpt.pt --towers 4",
        ),
        damaged=lambda why: _damaged(path, why),
        other_version=lambda found: BundleError(
            f"{path} has schema version {found}",
            expected=f"schema version {SCHEMA_VERSION}",
            hint="use the version of dmt-convert that wrote it, or convert again",
        ),
    )


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(
        f"{path} cannot be read ({why})",
        expected="the JSON that `dmt convert` wrote",
        hint="copy the bundle again, or convert the checkpoint again",
    )
