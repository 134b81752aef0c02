"""A bundle on disk: written whole or not at all, opened by its headers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmt_convert.bundle.accumulators import (
    AccumulatorSource,
    accumulated_table,
    accumulator_file,
    accumulator_name,
    write_accumulators,
)
from dmt_convert.bundle.manifest import SCHEMA_VERSION, Manifest, read_manifest
from dmt_convert.bundle.weights import DENSE_FILE, SmallWeights, tower_file
from dmt_convert.checkpoint import SafetensorsReader, TensorInfo
from dmt_convert.documents import WeightsFile
from dmt_convert.errors import BundleError, CheckpointError
from dmt_convert.files import (
    MANIFEST_NAME,
    StreamedFile,
    TensorSource,
    digest_names,
    digest_of,
    make_folder,
    staged_folder,
)
from dmt_convert.placement import TowerPlan, read_plan

PLAN_NAME: Final = "plan.json"
_DOCUMENT_BYTES: Final = 8 << 20

Documents = Callable[[Manifest], Mapping[str, str]]
"""Given the final manifest, further files of a bundle by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle: manifest and headers are read, weights are not."""

    path: Path
    """Its folder."""
    manifest: Manifest
    """Its `dmt.json`."""
    dense: Mapping[str, TensorInfo]
    """Tensors outside towers, by canonical name."""
    towers: tuple[Mapping[str, TensorInfo], ...]
    """Tensors of every tower: `tables.{table}.weight` and `tower_module.*`."""
    accumulator_files: Mapping[str, Mapping[str, TensorInfo]]
    """Weights file -> Adagrad's accumulators of a tower's tables: `tables.{table}.accumulator`."""

    @property
    def accumulators(self) -> dict[str, TensorInfo]:
        """Table -> its accumulator of squared gradients, shape (rows, 1), where there is one."""
        return {
            accumulated_table(name): info
            for tensors in self.accumulator_files.values()
            for name, info in tensors.items()
        }

    @property
    def plan(self) -> TowerPlan:
        """The plan that lies in the bundle.

        Raises:
            PlanError: It is missing, damaged, or has a newer schema version.
        """
        return read_plan(self.path / PLAN_NAME)


def is_bundle(path: Path) -> bool:
    """Tell whether a path is a bundle's folder."""
    return (path / MANIFEST_NAME).is_file()


def write_bundle(
    out: Path,
    tables: Mapping[str, list[TensorSource]],
    *,
    small: Callable[[], SmallWeights],
    describe: Callable[[], tuple[Manifest, TowerPlan, Documents]],
    accumulators: Mapping[str, Sequence[AccumulatorSource]] | None = None,
    force: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Bundle:
    """Stream the weights beside the target, add the documents, put the bundle in place.

    Args:
        out: The bundle's folder.
        tables: Weights file -> its tables, which are streamed first.
        small: Gives all other weights, once the tables are written.
        describe: Gives the manifest (weights and digests are filled in, that of the source where
            it has none), the plan, and what makes further documents. Asked once all is written.
        accumulators: Weights file -> accumulators of its tables; one that is damaged is left out,
            and says so.
        force: Replace a bundle that is there.
        on_bytes: Told of every written piece, for progress.

    Raises:
        BundleError: The target is taken, or the disk is full.
        CheckpointError: A table holds NaN or Inf, or its bytes are not what they were.
    """
    accumulators = accumulators or {}
    needed = sum(source.nbytes for sources in tables.values() for source in sources)
    needed += sum(source.nbytes for sources in accumulators.values() for source in sources)
    with staged_folder(out, force=force, needed_bytes=needed + _DOCUMENT_BYTES) as staging:
        make_folder(staging / "weights")
        weights = _write_weights(staging, tables, accumulators, small, on_bytes)
        manifest, plan, documents = describe()
        # a bundle made of another one keeps the digest of the flat model
        digest = manifest.source.digest or _source_digest(tables, weights)
        source = replace(manifest.source, digest=digest)
        manifest = replace(manifest, weights=weights, source=source)
        _write_text(staging / PLAN_NAME, _dump(plan.to_json()))
        for name, text in documents(manifest).items():
            _write_text(staging / name, text)
        _write_text(staging / MANIFEST_NAME, _dump(manifest.to_json()))
    return open_bundle(out)


def _write_weights(
    staging: Path,
    tables: Mapping[str, list[TensorSource]],
    accumulators: Mapping[str, Sequence[AccumulatorSource]],
    small: Callable[[], SmallWeights],
    on_bytes: Callable[[int], None],
) -> dict[str, WeightsFile]:
    metadata = {"format": "pt", "dmt_schema": str(SCHEMA_VERSION)}
    files = {
        name: StreamedFile(staging / name, sources, metadata=metadata)
        for name, sources in tables.items()
    }
    for file in files.values():
        file.write_large(on_bytes)
    summed = {
        name: write_accumulators(staging / name, sources, metadata=metadata, on_bytes=on_bytes)
        for name, sources in accumulators.items()
    }
    late = small().sources()
    digests = {name: file.finish(late[name]) for name, file in files.items()}
    digests |= {name: found for name, found in summed.items() if found}
    return {
        name: WeightsFile(bytes=(staging / name).stat().st_size, digests=found)
        for name, found in digests.items()
    }


def _source_digest(
    tables: Mapping[str, list[TensorSource]], weights: Mapping[str, WeightsFile]
) -> str:
    """Digest of the flat model's tables as they were read (recoded tables: as written)."""
    entries = []
    for name, sources in tables.items():
        digests = weights[name].digests
        entries += [
            (source.name, source.dtype, source.shape, digests[source.name]) for source in sources
        ]
    return digest_names(entries)


def _dump(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())


def open_bundle(path: Path) -> Bundle:
    """Open a bundle by its manifest and the headers of its weights.

    Raises:
        BundleError: A file is missing, damaged, cut short, or not what the manifest says.
    """
    if not path.exists():
        raise BundleError(
            f"{path} does not exist",
            expected="a bundle, as `dmt convert` writes it",
            hint="check the path",
        )
    manifest = read_manifest(path)
    dense = _read_headers(path, DENSE_FILE, manifest)
    towers = tuple(
        _read_headers(path, tower_file(t), manifest) for t in range(len(manifest.model.towers))
    )
    _check_tables(path, manifest, towers)
    return Bundle(
        path=path,
        manifest=manifest,
        dense=dense,
        towers=towers,
        accumulator_files=_read_accumulators(path, manifest),
    )


def _read_headers(folder: Path, name: str, manifest: Manifest) -> dict[str, TensorInfo]:
    path = folder / name
    entry = manifest.weights.get(name)
    if entry is None or not path.is_file():
        raise _broken(folder, f"{name} is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise _broken(folder, f"{name} has {size} bytes, the manifest says {entry.bytes}")
    try:
        tensors = SafetensorsReader().read(path).tensors
    except CheckpointError as error:
        raise _broken(folder, error.found) from None
    if {tensor.name for tensor in tensors} != set(entry.digests):
        raise _broken(folder, f"{name} does not hold the tensors that the manifest lists")
    return {tensor.name: tensor for tensor in tensors}


def _check_tables(
    folder: Path, manifest: Manifest, towers: tuple[Mapping[str, TensorInfo], ...]
) -> None:
    tables = manifest.model.flat.tables_by_feature
    for t, tower in enumerate(manifest.model.towers):
        for feature in tower.features:
            table = tables[feature]
            info = towers[t].get(f"tables.{table.name}.weight")
            if info is None or info.shape != (table.rows, table.dim):
                found = "missing" if info is None else f"of shape {list(info.shape)}"
                raise _broken(folder, f"table {table.name!r} of tower {t} is {found}")


def _read_accumulators(folder: Path, manifest: Manifest) -> dict[str, dict[str, TensorInfo]]:
    """Read the headers of accumulators, where the manifest lists any: older bundles have none."""
    tables, files = manifest.model.flat.tables_by_feature, {}
    for t, tower in enumerate(manifest.model.towers):
        name = accumulator_file(t)
        if name not in manifest.weights:
            continue
        files[name] = _read_headers(folder, name, manifest)
        own = [tables[feature] for feature in tower.features]
        shapes = {accumulator_name(table.name): (table.rows, 1) for table in own}
        for tensor, info in files[name].items():
            if info.dtype != "fp32" or info.shape != shapes.get(tensor):
                found = f"{info.dtype} of shape {list(info.shape)}"
                raise _broken(folder, f"{tensor} of tower {t} in {name} is {found}")
    return files


def _broken(folder: Path, what: str) -> BundleError:
    return BundleError(
        f"the bundle {folder} is damaged: {what}",
        expected="the files that `dmt convert` wrote, unchanged",
        hint="copy it again, or convert the checkpoint again",
    )


def check_digests(
    bundle: Bundle,
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    wanted: Callable[[str], bool] = lambda tensor: True,
) -> None:
    """Read the weights of a bundle and compare their digests with the manifest.

    Args:
        bundle: The bundle.
        on_bytes: Told of every piece that was read, for progress.
        wanted: Which tensors to check, by name; all by default.

    Raises:
        BundleError: Bytes changed since the bundle was written; every such tensor is named.
    """
    groups = {DENSE_FILE: bundle.dense}
    groups |= {tower_file(t): tensors for t, tensors in enumerate(bundle.towers)}
    groups |= bundle.accumulator_files
    changed = []
    for file, tensors in groups.items():
        expected = bundle.manifest.weights[file].digests
        for name, tensor in tensors.items():
            if wanted(name) and digest_of(tensor, on_bytes) != expected[name]:
                changed.append(f"{file}: {name}")
    if changed:
        raise BundleError(
            f"the bundle {bundle.path} changed on disk: {len(changed)} tensors have other bytes",
            expected="the digests in its manifest",
            hint="copy it again, or convert the checkpoint again",
            details=changed,
        )
