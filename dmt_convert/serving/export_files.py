"""The files of an export against their digests, before anything is done with them.

A digest in the same folder shows damage: a flipped bit, a file that was copied in part, graphs and
weights of different exports. It does not show an attack, because whoever changes a file can change
its digest too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from dmt_convert.checkpoint import read_safetensors
from dmt_convert.errors import DmtError, ExportError
from dmt_convert.files import digest_of

if TYPE_CHECKING:
    from dmt_convert.serving.export_manifest import ExportManifest

_log = logging.getLogger(__name__)
_AGAIN: Final = "copy the export again, or export the bundle again"
_MAX_READERS: Final = 4
"""Threads that read weights: CRC-32 takes 3 GB/s of one core, and disks are faster than that."""
_NOTED_BYTES: Final = 2 << 30
"""Weights of this size take seconds to read, so that users should know what they wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file of an export that holds no weights: a graph, a config, a loader."""

    bytes: int
    """Its size."""
    sha256: str
    """SHA-256 of its content, in hex."""


def digest_file(path: Path) -> FileDigest:
    """Read a file and return its digest."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(bytes=file.tell(), sha256=sha256)


def digest_files(folder: Path, others: Mapping[str, Any]) -> dict[str, FileDigest]:
    """Return the digest of every file below a folder but `others`, by its path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [(path.relative_to(folder).as_posix(), path) for path in found]
    return {name: digest_file(path) for name, path in names if name not in others}


class ExportFiles:
    """The files of an opened export; each is checked before it is first used, and once.

    Args:
        folder: The export.
        manifest: Its `export.json`.
    """

    def __init__(self, folder: Path, manifest: ExportManifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._checked: set[str] = set()
        if not manifest.files:
            _log.info(
                "%s was exported by dmt-convert %s, which recorded no digests of graphs: damaged "
                "graphs will not be noticed",
                folder,
                manifest.tool.version,
            )

    @property
    def has_digests(self) -> bool:
        """Whether graphs can be checked; exports of early versions have digests of weights only."""
        return bool(self._manifest.files)

    def check_graph(self, name: str) -> None:
        """Check a graph, and the weights that it may point to: those beside it and below.

        Args:
            name: Its path below the export.

        Raises:
            ExportError: A file is not what was exported.
        """
        beside = PurePosixPath(name).parent
        weights = [file for file in self._manifest.weights if _is_below(file, beside)]
        self._check([name] if self.has_digests else [], weights)

    def check_all(self) -> None:
        """Check every file; a config or a README that was edited is only remarked.

        Raises:
            ExportError: A file is not what was exported.
        """
        names = list(self._manifest.files)
        for line in self._changed_files([name for name in names if _may_be_edited(name)]):
            _log.info("%s: %s", self._folder, line)
        files = [name for name in names if not _may_be_edited(name)]
        self._check(files, list(self._manifest.weights))

    def _check(self, files: list[str], weights: list[str]) -> None:
        files = [name for name in files if name not in self._checked]
        weights = [name for name in weights if name not in self._checked]
        size = sum(self._manifest.weights[name].bytes for name in weights)
        if size >= _NOTED_BYTES:
            _log.info("comparing %.1f GiB of weights with their digests", size / 2**30)
        changed = [*self._changed_files(files), *self._changed_weights(weights)]
        if changed:
            raise ExportError(
                f"the export {self._folder} changed on disk: {changed[0]}"
                + (f", and {len(changed) - 1} more" if len(changed) > 1 else ""),
                expected="the digests in its export.json",
                hint=_AGAIN,
                details=changed,
            )
        self._checked.update(files, weights)

    def _changed_files(self, names: list[str]) -> Iterator[str]:
        for name in names:
            expected = self._manifest.files.get(name)
            if expected is None:
                yield f"{name} is not among the files of its export.json"
                continue
            try:
                found = digest_file(self._folder / name)
            except OSError as error:
                yield f"{name} cannot be read ({error.strerror or error})"
                continue
            if found.bytes != expected.bytes:
                yield f"{name} has {found.bytes} bytes, not {expected.bytes}"
            elif found != expected:
                yield f"{name} has other bytes (another SHA-256)"

    def _changed_weights(self, names: list[str]) -> Iterator[str]:
        jobs = [
            (file, tensor, digest)
            for file in names
            for tensor, digest in self._manifest.weights[file].digests.items()
        ]
        tensors = {
            (file, info.name): info
            for file in names
            for info in read_safetensors(self._folder / file).tensors
        }

        def find(job: tuple[str, str, str]) -> str | None:
            file, tensor, digest = job
            info = tensors.get((file, tensor))
            if info is None:
                return f"{file}: {tensor} is missing"
            return None if digest_of(info) == digest else f"{file}: {tensor} has other bytes"

        readers = min(_MAX_READERS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(readers) as pool:
            yield from filter(None, pool.map(find, jobs))


def check_names(folder: Path, manifest: ExportManifest) -> None:
    """Check that graphs and weights are there, in the folder, and as large as they were.

    Files may be symbolic links, as in the caches of model hubs; their names may not lead out of the
    folder.

    Raises:
        ExportError: A file is missing, or has another size.
    """
    sizes = {
        name: manifest.files[name].bytes if name in manifest.files else None
        for name in manifest.parts.values()
    }
    sizes |= {name: entry.bytes for name, entry in manifest.weights.items()}
    details = [line for name, size in sizes.items() for line in _problems(folder, name, size)]
    if details:
        raise ExportError(
            f"the export {folder} is damaged: {details[0]}",
            expected="the files that `dmt export` wrote, unchanged",
            hint=_AGAIN,
            details=details,
        )


def _problems(folder: Path, name: str, size: int | None) -> Iterator[str]:
    place, path = PurePosixPath(name), folder / name
    if place.is_absolute() or ".." in place.parts or "\0" in name or place == PurePosixPath():
        yield f"{name!r} is not the path of a file below the export"
    elif not path.is_file():
        yield f"{name} is {'no file' if path.exists() else 'missing'}"
    elif size is not None and (found := path.stat().st_size) != size:
        yield f"{name} has {found} bytes, expected {size}"


def _may_be_edited(name: str) -> bool:
    """Tell whether users tune a file, or another generation's takes its place."""
    return PurePosixPath(name).suffix in (".pbtxt", ".md", ".sh")


def _is_below(name: str, folder: PurePosixPath) -> bool:
    return PurePosixPath(name).is_relative_to(folder)


def consent_error(path: Path, *, has_digest: bool) -> DmtError:
    """Return the refusal of machine code that the user has not allowed to run."""
    unknown = "" if has_digest else ", and no digest of it was recorded when it was exported"
    return ExportError(
        f"{path} is machine code, which runs when it is loaded{unknown}",
        expected="--trust-code: your word that you exported it, or trust who did",
        hint="add --trust-code (in Python: trust_code=True), or use an export of format onnx, "
        "which runs no code of its own; `dmt inspect` never loads a graph",
    )
