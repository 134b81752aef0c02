"""A model of the user's own: the file that describes it, run only where it is named. No torch.

The file sets `ADAPTER`, see `Adapter` and docs/adapters.md. It is Python and is run as it is:
nothing here looks for one, loads one from a bundle, or follows a name in a checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from dmt_convert.errors import ConfigError, DmtError
from dmt_convert.spec import ModelSpec, NetworkSpec, Pooling

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "USER",
    "Adapter",
    "Feature",
    "LoadedAdapter",
    "LoadedBuilder",
    "build_user_network",
    "find_adapter",
    "load_adapter",
    "run_network",
    "user_file",
]

USER: Final = "user"
"""Name of the networks that adapters define."""
_MODULE: Final = "dmt_user_model"
_HINT: Final = "docs/adapters.md has a complete example"


@dataclass(frozen=True, slots=True)
class Feature:
    """One categorical feature."""

    name: str
    """Its name, as the data calls it."""
    table: str | None = None
    """Its table; None: the table of that name."""
    pooling: Pooling = "sum"
    """How the rows of a bag become one vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How to make a flat model of a checkpoint: what a user's file sets `ADAPTER` to."""

    network: Callable[[Sequence[int], int], nn.Module]
    """Called with the features' embedding dims and `num_dense`; returns the dense part, whose
    `forward(dense, pooled)` takes (B, num_dense) and one tensor (B, dim) per feature, and returns
    the logits before any sigmoid, shape (B,). Its state dict has the checkpoint's names, after
    `prefix` and `rename`."""
    num_dense: int
    """Number of dense inputs; may be 0."""
    features: Sequence[Feature | str] | None = None
    """The features in the order in which the network takes them; None: one per table, in the
    checkpoint's order."""
    tables: str = r"(?:.*\.)?embedding_bags\.(?P<table>.+)\.weight"
    """Regular expression of a table's tensor; its group `table` is the table's name."""
    prefix: str = ""
    """What stands before the names of the network's tensors in the checkpoint."""
    rename: Callable[[str], str | None] = field(default=lambda name: name)
    """From such a name, without the prefix, to the network's own; None: not of the network."""
    final_sigmoid: bool = False
    """Whether the original model ends in a sigmoid."""
    name: str = "user"
    """What to call the family of such models."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedFile:
    """A user's file that has been run."""

    path: Path
    """The file."""
    sha256: str
    """Hex digest of its bytes."""

    @contextmanager
    def blame(self, what: str) -> Iterator[None]:
        """Report errors of the file's own code as the user's.

        Args:
            what: What of the file is being run.

        Raises:
            ConfigError: It failed.
        """
        try:
            yield
        except DmtError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(self.path, what, error) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedAdapter(LoadedFile):
    """An adapter, and the file that it came from."""

    adapter: Adapter
    """What the file says."""

    @property
    def network(self) -> NetworkSpec:
        """The network, as a spec names it."""
        return NetworkSpec(name=USER, file=self.path.name, sha256=self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedBuilder(LoadedFile):
    """A file that builds the whole model, which is then captured."""

    build: Callable[[], nn.Module]
    """Returns the model; its weights are then loaded from the checkpoint."""
    example: Callable[[], object]
    """Returns what the model is called with, for a few rows."""


_loaded: dict[str, LoadedAdapter | LoadedBuilder] = {}


def load_adapter(path: Path) -> LoadedAdapter | LoadedBuilder:
    """Run a user's file, and keep its adapter: bundles of its models can be opened from then on.

    Args:
        path: The file. Its folder can be imported from.

    Returns:
        The adapter; or the builder, if the file defines `build()` and sets no `ADAPTER`.

    Raises:
        ConfigError: It cannot be read, fails, or has neither.
    """
    try:
        content = path.read_bytes()
        source = importlib.util.decode_source(content)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"--model {path} cannot be read ({reason})",
            expected="a Python file that sets ADAPTER, or defines build() and example()",
            hint=_HINT,
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest in _loaded:
        return _loaded[digest]
    try:
        module = _run_file(path, source)
    except (Exception, SystemExit) as error:
        raise _failed(path, "it", error) from error
    adapter = getattr(module, "ADAPTER", None)
    if adapter is None and callable(getattr(module, "build", None)):
        _loaded[digest] = _read_builder(path, digest, module)
        return _loaded[digest]
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"{path} sets "
            + ("no ADAPTER" if adapter is None else f"ADAPTER to a {type(adapter).__name__}"),
            expected="ADAPTER = dmt_convert.adapter.Adapter(...), or functions build() and "
            "example()",
            hint=_HINT,
        )
    _check(path, adapter)
    _loaded[digest] = LoadedAdapter(adapter=adapter, path=path, sha256=digest)
    return _loaded[digest]


def _read_builder(path: Path, digest: str, module: ModuleType) -> LoadedBuilder:
    """Return the functions of a file that builds the model.

    Raises:
        ConfigError: It has no `example()`.
    """
    example = getattr(module, "example", None)
    if not callable(example):
        raise ConfigError(
            f"{path} defines build(), but no function example()",
            expected="example() that returns what the model is called with, for a few rows",
            hint="docs/capture.md has a complete example",
        )
    return LoadedBuilder(path=path, sha256=digest, build=module.build, example=example)


def find_adapter(spec: NetworkSpec) -> LoadedAdapter:
    """Return the adapter of a user's network.

    Raises:
        ConfigError: Its file was not given, or is another one.
    """
    if isinstance(found := _loaded.get(spec.sha256), LoadedAdapter):
        return found
    given = ", ".join(f"{known.path} (sha256 {known.sha256[:12]})" for known in _loaded.values())
    wanted = f"{spec.file} (sha256 {spec.sha256[:12]})"
    if given:
        raise ConfigError(
            f"the model was converted with {wanted}, --model gives {given}",
            expected="the same file, to the byte",
            hint="give the file that it was converted with, or convert the checkpoint again",
        )
    raise ConfigError(
        f"the model's dense part is defined by a file of the user's: {wanted}",
        expected="that file, given by --model: it is run only on your word",
        hint=f"add --model {spec.file}",
    )


def user_file(spec: ModelSpec) -> Path | None:
    """Return the user's file that defines a model, if one does.

    Raises:
        ConfigError: It was not given, or is another one.
    """
    network = spec.interaction.network
    return find_adapter(network).path if network is not None and network.name == USER else None


def model_option(spec: ModelSpec) -> str:
    """Return what commands that compute with a model have to be told of the user's file.

    Returns:
        ` --model xlrm.py`, to be put behind the command; empty for other models.
    """
    network = spec.interaction.network
    return f" --model {shlex.quote(network.file)}" if network is not None and network.file else ""


def build_user_network(spec: NetworkSpec, dims: Sequence[int], num_dense: int) -> nn.Module:
    """Build the network of a user's model.

    Raises:
        ConfigError: Its file was not given, is another one, or fails.
    """
    from torch import nn

    loaded = find_adapter(spec)
    with loaded.blame("network"):
        built = loaded.adapter.network(tuple(dims), num_dense)
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"network() of {loaded.path} returned a {type(built).__name__}",
            expected="an nn.Module with forward(dense, pooled)",
            hint=_HINT,
        )
    return built.float()


def run_network(
    spec: NetworkSpec, network: nn.Module, dense: Tensor, pooled: list[Tensor]
) -> Tensor:
    """Return a network's logits, shape (B,).

    Raises:
        ConfigError: A user's network fails, or returns something else.
    """
    if spec.name != USER:
        logits: Tensor = network(dense, pooled)
        return logits
    loaded = find_adapter(spec)
    with loaded.blame("the network's forward()"):
        logits = network(dense, pooled)
    if getattr(logits, "ndim", None) != 1 or not logits.is_floating_point():
        shape = getattr(logits, "shape", None)
        found = type(logits).__name__ if shape is None else f"a tensor of shape {list(shape)}"
        raise ConfigError(
            f"the network of {loaded.path} returned {found}",
            expected="one logit per row, shape (B,)",
            hint="end forward() with .squeeze(1) where it gives (B, 1)",
        )
    return logits


class _TextLoader(importlib.abc.InspectLoader):
    """Runs the very text that was digested, and leaves no compiled file behind."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        return self.source_to_code(self._source, str(self._path))


def _run_file(path: Path, source: str) -> ModuleType:
    loader = _TextLoader(path, source)
    spec = importlib.util.spec_from_loader(_MODULE, loader, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[_MODULE] = module  # dataclasses and pickle look modules up by name
    loader.exec_module(module)
    return module


def _check(path: Path, adapter: Adapter) -> None:
    problems = []
    network: object = adapter.network
    prefix: object = adapter.prefix
    features: object = () if adapter.features is None else adapter.features
    if isinstance(features, str) or not isinstance(features, Sequence):
        problems.append(f"features is a {type(features).__name__}, not a list")
        features = ()
    if not isinstance(prefix, str):
        problems.append(f"prefix is a {type(prefix).__name__}, not a string")
    if type(adapter.num_dense) is not int or adapter.num_dense < 0:
        problems.append(f"num_dense is {adapter.num_dense!r}, not a number of dense inputs")
    if not callable(network):
        problems.append("network is not callable")
    try:
        if "table" not in re.compile(adapter.tables).groupindex:
            problems.append(f"tables {adapter.tables!r} has no group (?P<table>...)")
    except (re.error, TypeError) as error:
        problems.append(f"tables is no regular expression ({error})")
    for feature in features:
        if not isinstance(feature, Feature | str):
            problems.append(f"features holds a {type(feature).__name__}")
        elif isinstance(feature, Feature) and feature.pooling not in ("sum", "mean"):
            problems.append(f"feature {feature.name!r} has pooling {feature.pooling!r}")
    if problems:
        raise ConfigError(
            f"ADAPTER of {path} is wrong",
            expected="the types that dmt_convert.adapter.Adapter documents",
            hint=_HINT,
            details=problems,
        )


def _failed(path: Path, what: str, error: BaseException) -> ConfigError:
    """Say where in the user's file an error comes from."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    text = (str(error).splitlines() or [""])[0]
    where = str(path) if line is None else f"{path}, line {line}"
    return ConfigError(
        f"{where}: {what} failed: {type(error).__name__}{f': {text}' if text else ''}",
        expected="a file that runs",
        hint=f"mend it; {_HINT}",
    )
