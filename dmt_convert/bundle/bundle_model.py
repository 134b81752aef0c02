"""The converted model of a bundle: dense parts in memory, tables on disk."""

from __future__ import annotations

import numpy as np
import torch

from dmt_convert.bundle.bundle import Bundle
from dmt_convert.bundle.weights import SmallWeights
from dmt_convert.checkpoint import read_tensor
from dmt_convert.errors import BundleError
from dmt_convert.model import DmtModel, MappedTables, RowCode, as_state, state_name


def open_bundle_model(bundle: Bundle, *, code: RowCode | None = None) -> DmtModel:
    """Build the model of a bundle, in eval mode.

    Args:
        bundle: The bundle.
        code: Look rows up as an export would that stores the tables in this code.

    Raises:
        BundleError: A tensor is missing, or has another shape than the manifest's model.
    """
    spec = bundle.manifest.model
    tables = []
    for tensors in bundle.towers:
        infos = {
            name.removeprefix("tables.").removesuffix(".weight"): info
            for name, info in tensors.items()
            if name.startswith("tables.")
        }
        tables.append(MappedTables(spec.flat, infos, code=code))
    with torch.device("meta"):
        model = DmtModel(spec, tables)
    stored = {state_name(name): info for name, info in bundle.dense.items()}
    for t, tensors in enumerate(bundle.towers):
        for name, info in tensors.items():
            if name.startswith("tower_module."):
                stored[f"towers.{t}.{name}"] = info
    own = model.state_dict()
    expected = {name: tuple(value.shape) for name, value in own.items()}
    problems = [f"missing: {_stored_name(name)}" for name in expected if name not in stored]
    problems += [f"extra: {_stored_name(name)}" for name in stored if name not in expected]
    problems += [
        f"{_stored_name(name)} has shape {list(info.shape)}, expected {list(expected[name])}"
        for name, info in stored.items()
        if name in expected and info.shape != expected[name]
    ]
    if problems:
        raise BundleError(
            f"the bundle {bundle.path} does not hold the model that its manifest describes",
            expected="the tensors of its towers and dense parts",
            hint="copy it again, or convert the checkpoint again",
            details=problems,
        )
    # every tensor is compared with its digest when it is read
    state = {name: as_state(read_tensor(info), own[name]) for name, info in stored.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def split_state(model: DmtModel) -> SmallWeights:
    """Split a model's weights as a bundle stores them: dense parts, and every tower's module."""
    dense = {}
    modules: tuple[dict[str, np.ndarray], ...] = tuple({} for _ in model.spec.towers)
    for name, value in model.state_dict().items():
        array = value.detach().numpy()
        if name.startswith("towers."):
            _, tower, kind, rest = name.split(".", maxsplit=3)
            if kind == "tower_module":
                modules[int(tower)][rest] = array
        else:
            dense[_stored_name(name)] = array
    return SmallWeights(dense=dense, modules=modules)


def _stored_name(name: str) -> str:
    """Return what a dense tensor of a state dict is called in a bundle."""
    return name.removeprefix("interaction.")
