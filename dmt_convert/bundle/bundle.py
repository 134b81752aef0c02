"""A bundle on disk: written whole or not at all, opened by its headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmt_convert.bundle.accumulators import (
    accumulated_table,
    accumulator_file,
    accumulator_name,
)
from dmt_convert.bundle.manifest import Manifest, read_manifest
from dmt_convert.bundle.weights import DENSE_FILE, tower_file
from dmt_convert.capture import CAPTURED, read_graph
from dmt_convert.checkpoint import TensorInfo, holding, read_safetensors
from dmt_convert.documents import Quality, shorten
from dmt_convert.errors import ArchitectureError, BundleError, CheckpointError, DmtError
from dmt_convert.files import (
    MANIFEST_NAME,
    digest_of,
    guarded,
)
from dmt_convert.model import DmtSpec
from dmt_convert.placement import TowerPlan, read_plan

if TYPE_CHECKING:
    from dmt_convert.bundle.plain_model import PlainModel

PLAN_NAME: Final = "plan.json"
FolderIdentity = tuple[int, int]
"""Device and inode."""
_WIDEST: Final = 1 << 31
"""A layer that torch could still describe."""
_TRIES: Final = 5
"""Attempts to open a bundle that others replace meanwhile: what is half old and half new is not
damaged."""
_REMEDY: Final = "copy it again, or convert the checkpoint again"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
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
    folder: FolderIdentity
    """What tells its folder from another one under the same path."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        model = self.manifest.model
        return (
            f"<Bundle {self.path}: {len(model.towers)} towers, {len(model.flat.features)} "
            f"features, compression {model.compression:.2f}>"
        )

    def model(self, *, in_memory: bool = False) -> PlainModel:
        """Return the converted model: an `nn.Module` called as `model(dense, features)`.

        Args:
            in_memory: Load the tables, as parameters that can be trained. By default they stay on
                disk, and a batch reads the rows that it touches.

        Raises:
            BundleError: A tensor is missing, or has the wrong shape.
        """
        from dmt_convert.bundle.plain_model import open_plain_model

        return open_plain_model(self, in_memory=in_memory)

    @property
    def quality(self) -> Quality:
        """How well the model agreed with the flat one when it was made."""
        return self.manifest.quality

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
            BundleError: The bundle was replaced since it was opened.
        """
        plan = read_plan(self.path / PLAN_NAME)
        self._check_folder()
        return plan

    def check_in_place(self) -> None:
        """Refuse a bundle that was replaced or written to since it was opened.

        Tensors can be read on from a bundle that was replaced; call this if its files are also
        used by their names.

        Raises:
            BundleError: It was replaced.
            CheckpointError: A file was written to.
        """
        self._check_folder()
        groups = (self.dense, *self.towers, *self.accumulator_files.values())
        pieces = [piece for group in groups for info in group.values() for piece in info.pieces]
        for file in {id(piece.file): piece.file for piece in pieces}.values():
            if file is not None:
                file.check_unchanged(by_name=True)

    def _check_folder(self) -> None:
        if not self.path.exists() or _identity(self.path) != self.folder:
            raise BundleError(
                f"the bundle {self.path} was replaced since it was opened",
                expected="the bundle that was opened",
                hint="open it again, or run the command again",
            )


def is_bundle(path: Path) -> bool:
    """Tell whether a path is a bundle's folder."""
    return (path / MANIFEST_NAME).is_file()


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
    for turn in range(_TRIES):
        folder = _identity(path)
        try:
            with holding(path):
                bundle = _open(path, folder)
        except (DmtError, OSError):
            if turn == _TRIES - 1 or _identity(path) == folder:
                raise
        else:
            if _identity(path) == folder:
                return bundle
    raise BundleError(
        f"the bundle {path} was replaced {_TRIES} times while it was opened",
        expected="a bundle that stays as it is for a moment",
        hint="open it again",
    )


def _identity(folder: Path) -> FolderIdentity:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _open(path: Path, folder: FolderIdentity) -> Bundle:
    manifest = read_manifest(path)
    dense = _read_headers(path, DENSE_FILE, manifest)
    towers = tuple(
        _read_headers(path, tower_file(t), manifest) for t in range(len(manifest.model.towers))
    )
    _check_tables(path, manifest, towers)
    _check_captured(path, manifest.model, dense)
    _check_sizes(path, manifest.model, dense, towers)
    return Bundle(
        path=path,
        manifest=manifest,
        dense=dense,
        towers=towers,
        accumulator_files=_read_accumulators(path, manifest),
        folder=folder,
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
        tensors = read_safetensors(path).tensors
    except CheckpointError as error:
        raise _broken(folder, error.found) from None
    if {tensor.name for tensor in tensors} != set(entry.digests):
        raise _broken(folder, f"{name} does not hold the tensors that the manifest lists")
    return guarded(
        {tensor.name: tensor for tensor in tensors},
        entry.digests,
        error=BundleError,
        what=f"the bundle {folder}",
        hint=_REMEDY,
    )


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


def _check_captured(folder: Path, model: DmtSpec, dense: Mapping[str, TensorInfo]) -> None:
    """Refuse a captured dense part that may not be run, or whose weights are others.

    Raises:
        BundleError: It is one.
    """
    network = model.flat.interaction.network
    if network is None or network.name != CAPTURED:
        return
    own = "network."
    stored = {name.removeprefix(own): i.shape for name, i in dense.items() if name.startswith(own)}
    try:
        read_graph(network.config, len(model.flat.features), stored)
    except ArchitectureError as error:
        raise BundleError(
            f"the bundle {folder}: {error.found}",
            expected=error.expected,
            hint=_REMEDY,
            details=error.details,
        ) from None


def _check_sizes(
    folder: Path,
    model: DmtSpec,
    dense: Mapping[str, TensorInfo],
    towers: tuple[Mapping[str, TensorInfo], ...],
) -> None:
    """Refuse numbers that the stored weights cannot have, before anything is made as large.

    Raises:
        BundleError: A tower emits more, or a network is deeper, than its tensors allow.
    """
    head = _widest(dense.values(), 1)
    flat = model.flat
    problems = _beyond(
        head,
        "the interaction",
        layers=flat.interaction.cross_layers,
        rank=flat.interaction.cross_rank,
    )
    for mlp in (
        flat.dense_arch,
        flat.over_arch,
        flat.interaction.branch1,
        flat.interaction.branch2,
    ):
        problems += _beyond(_WIDEST, "an MLP", width=0 if mlp is None else max(mlp.widths))
    for t, (tower, dims) in enumerate(zip(model.towers, model.dims_by_tower, strict=True)):
        module, own = (
            tower.module,
            [info for name, info in towers[t].items() if name.startswith("tower_module.")],
        )
        # what a module emits is the output of a layer, or at most all that goes into it
        most = _widest(own, sum(dims))
        problems += _beyond(
            most,
            f"tower {t}",
            c=module.c,
            p=module.p,
            D=module.dim,
            layers=module.cross_layers,
            rank=module.cross_rank,
        )
        width = module.num_vectors(len(dims)) * module.dim
        if width > most * (len(dims) + 1):
            problems.append(f"tower {t} emits {width} numbers per row")
    if problems:
        raise BundleError(
            f"the bundle {folder} describes a larger model than its weights hold",
            expected="the model whose weights lie beside the manifest",
            hint=_REMEDY,
            details=shorten(problems),
        )


def _widest(tensors: Iterable[TensorInfo], at_least: int) -> int:
    return max([at_least, *(size for info in tensors for size in info.shape)])


def _beyond(most: int, what: str, **numbers: int) -> list[str]:
    return [f"{what} has {name}={n}" for name, n in numbers.items() if not 0 <= n <= most]


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
        hint=_REMEDY,
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
            if not wanted(name):
                continue
            try:
                found = digest_of(tensor, on_bytes)
            except BundleError:
                found = ""
            if found != expected[name]:
                changed.append(f"{file}: {name}")
    if changed:
        raise BundleError(
            f"the bundle {bundle.path} changed on disk: {len(changed)} tensors have other bytes",
            expected="the digests in its manifest",
            hint=_REMEDY,
            details=changed,
        )
