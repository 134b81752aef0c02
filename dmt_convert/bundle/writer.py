"""Write a bundle whole or not at all, its tables streamed while the rest is being computed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from dmt_convert.bundle.accumulators import AccumulatorSource, write_accumulators
from dmt_convert.bundle.bundle import PLAN_NAME, Bundle, open_bundle
from dmt_convert.bundle.manifest import SCHEMA_VERSION, Manifest
from dmt_convert.bundle.weights import SmallWeights
from dmt_convert.documents import WeightsFile, to_text
from dmt_convert.files import (
    MANIFEST_NAME,
    StreamedFile,
    TensorSource,
    digest_names,
    staged_folder,
)
from dmt_convert.placement import TowerPlan
from dmt_convert.progress import Progress, no_progress

_DOCUMENT_BYTES: Final = 8 << 20
_METADATA: Final = {"format": "pt", "dmt_schema": str(SCHEMA_VERSION)}

Weights = Mapping[str, WeightsFile]
Documents = Callable[[Manifest], Mapping[str, str]]
"""Makes further files of a bundle, by name, from the final manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedWeights:
    """The large tensors of a bundle, which are never in memory as a whole."""

    tables: Mapping[str, Sequence[TensorSource]]
    """Weights file -> its tables."""
    accumulators: Mapping[str, Sequence[AccumulatorSource]]
    """Weights file -> accumulators of its tables; a damaged one is left out and says so."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        tables = sum(s.nbytes for sources in self.tables.values() for s in sources)
        return tables + sum(s.nbytes for sources in self.accumulators.values() for s in sources)


class BundleWriter:
    """Writes a bundle beside its target, and puts it in place at the end.

    Entering the context starts a thread that streams the tables to the disk; `finish` adds what
    was computed meanwhile. Whatever goes wrong in the block, nothing is left behind.

    Args:
        out: Folder of the bundle.
        weights: What is streamed.
        force: Whether an existing bundle may be replaced.
        progress: Told of the bytes that are written.

    Raises:
        BundleError: The target is taken, or the disk is full.
    """

    def __init__(
        self,
        out: Path,
        weights: StreamedWeights,
        *,
        force: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        self._out, self._weights, self._force = out, weights, force
        self._progress, self._written = progress, 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._stream, name="dmt-tables", daemon=True)

    def __enter__(self) -> Self:
        """Make the staging folder and begin to stream."""
        needed = self._weights.nbytes + _DOCUMENT_BYTES
        with ExitStack() as stack:
            self._staging = stack.enter_context(
                staged_folder(self._out, force=self._force, needed_bytes=needed)
            )
            (self._staging / "weights").mkdir()
            self._thread.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Stop streaming; put the bundle in place, or remove what was written."""
        self._stop.set()
        self._thread.join()
        self._stack.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raise what went wrong in the thread, so that no work is spent on a bundle that fails.

        Raises:
            CheckpointError: A table holds NaN or Inf, or its bytes are not what they were.
            OSError: The disk is full, or fails.
        """
        if self._failure is not None:
            raise self._failure

    def finish(
        self, small: SmallWeights, manifest: Manifest, plan: TowerPlan, documents: Documents
    ) -> None:
        """Add all that is not streamed, once the tables are written.

        Args:
            small: Every other weight.
            manifest: The manifest; weights and digests are filled in, that of the source if it has
                none.
            plan: Where the towers go.
            documents: Makes reports and figures from the final manifest.

        Raises:
            CheckpointError: A table or an accumulator is damaged.
            OSError: The disk is full, or fails.
        """
        self.wait()
        weights = self._finish_files(small)
        # a bundle that was made from another one keeps the digest of the flat model
        digest = manifest.source.digest or self._source_digest(weights)
        source = replace(manifest.source, digest=digest)
        manifest = replace(manifest, weights=weights, source=source)
        _write_text(self._staging / PLAN_NAME, to_text(plan.to_json()))
        for name, text in documents(manifest).items():
            _write_text(self._staging / name, text)
        _write_text(self._staging / MANIFEST_NAME, to_text(manifest.to_json()))

    def wait(self) -> None:
        """Wait until the tables are on the disk; accumulators know their damage from then on.

        Raises:
            CheckpointError: A table holds NaN or Inf, or its bytes are not what they were.
            OSError: The disk is full, or fails.
        """
        while self._thread.is_alive():
            self._thread.join(0.2)  # short waits: an interrupt is heard in between
        self.check()

    def _stream(self) -> None:
        try:
            self._files = {
                name: StreamedFile(self._staging / name, sources, metadata=_METADATA)
                for name, sources in self._weights.tables.items()
            }
            for file in self._files.values():
                file.write_large(self._count)
            self._summed = {
                name: write_accumulators(
                    self._staging / name, sources, metadata=_METADATA, on_bytes=self._count
                )
                for name, sources in self._weights.accumulators.items()
            }
        except BaseException as error:
            self._failure = error

    def _count(self, count: int) -> None:
        if self._stop.is_set():
            raise InterruptedError
        self._written += count
        self._progress("writing", self._written, self._weights.nbytes)

    def _finish_files(self, small: SmallWeights) -> Weights:
        late = small.sources()
        digests = {
            name: file.finish(late[name], with_blocks=bool(self._weights.tables[name]))
            for name, file in self._files.items()
        }
        digests |= {name: found for name, found in self._summed.items() if found}
        return {
            name: WeightsFile(bytes=(self._staging / name).stat().st_size, digests=found)
            for name, found in digests.items()
        }

    def _source_digest(self, weights: Weights) -> str:
        """Digest of the flat model's tables as they were read (recoded tables: as written)."""
        return digest_names(
            [
                (source.name, source.dtype, source.shape, weights[name].digests[source.name])
                for name, sources in self._weights.tables.items()
                for source in sources
            ]
        )


def write_bundle(
    out: Path,
    weights: StreamedWeights,
    *,
    small: SmallWeights,
    describe: Callable[[], tuple[Manifest, TowerPlan, Documents]],
    force: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Write a bundle whose small weights are known already; see `BundleWriter`.

    Args:
        out: Folder of the bundle.
        weights: What is streamed.
        small: Every other weight.
        describe: Gives the manifest, the plan and what makes further documents; asked once the
            tables are written.
        force: Whether an existing bundle may be replaced.
        progress: Told of the bytes that are written.
    """
    with BundleWriter(out, weights, force=force, progress=progress) as writer:
        writer.wait()
        writer.finish(small, *describe())
    return open_bundle(out)


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
