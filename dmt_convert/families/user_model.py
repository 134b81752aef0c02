"""A model of the user's own, as an adapter file describes it (`--model`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from dmt_convert.adapter import Feature, LoadedAdapter, build_user_network, run_network
from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.family import Family
from dmt_convert.families.feature_order import order_tables
from dmt_convert.families.leftovers import check_remapping
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.model_info import FlatModelInfo, ModelPlace
from dmt_convert.families.name_map import strip_wrappers
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import DTYPE_BYTES, Dtype, FeatureSpec, ModelSpec, TableSpec, network_model

_TABLES: Final = "tables."
_NETWORK: Final = "network."


@dataclass(frozen=True, slots=True, kw_only=True)
class UserFamily(Family):
    """The family of the models that one adapter describes."""

    adapter: LoadedAdapter
    """The adapter, and its file."""

    def matches(self, checkpoint: FlatCheckpoint) -> list[ModelPlace]:
        """Return the dicts that hold tables."""
        found = dict.fromkeys(
            tensor.container
            for tensor in checkpoint.tensors
            if len(tensor.shape) == 2 and _match_table(self.anchor, tensor) is not None
        )
        return [ModelPlace(container=container, prefix="") for container in found]

    def find(self, checkpoint: FlatCheckpoint, config: ModelConfig) -> ModelPlace:
        """Find the dict that holds the tables.

        Raises:
            ArchitectureError: There is none, or there are several and the user does not choose.
        """
        found = self.matches(checkpoint)
        if config.container is not None:
            found = [place for place in found if ".".join(place.container) == config.container]
        if len(found) == 1:
            return found[0]
        names = [tensor.path for tensor in checkpoint.tensors]
        raise ArchitectureError(
            f"{checkpoint.source} holds {len(found)} dicts with tables named {self.anchor!r}",
            expected="one",
            hint="say which one with `container:` in --model-config"
            if found
            else f"set `tables` in {self.adapter.path.name}: a regular expression with a group "
            "`table`",
            details=[".".join(place.container) or "(top)" for place in found] or names[:10],
        )

    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a model by its adapter, and run its network once.

        Of the model config, `container`, `ignore` and `final_sigmoid` count; the adapter says the
        rest.
        """
        loaded, sigmoid = self.adapter, source.config.final_sigmoid
        unknown = _name_tensors(source, loaded)
        tables = _tables(source)
        spec = network_model(
            family=self.name,
            tables=tables,
            features=_features(source, loaded, tables),
            num_dense=loaded.adapter.num_dense,
            network=loaded.network,
            final_sigmoid=loaded.adapter.final_sigmoid if sigmoid is None else sigmoid,
        )
        _check_network(source, loaded, spec, unknown)
        _note_facts(source, loaded, spec)
        return source.finish(spec)


def user_family(loaded: LoadedAdapter) -> UserFamily:
    """Return the family of the models that an adapter describes."""
    adapter = loaded.adapter
    return UserFamily(
        name=adapter.name, trainer="the user's own", anchor=adapter.tables, adapter=loaded
    )


def _note_facts(source: TrainerTensors, loaded: LoadedAdapter, spec: ModelSpec) -> None:
    reason = f"--model {loaded.path.name}"
    source.fact("family", spec.family, "given", reason)
    if loaded.adapter.features is not None:
        source.fact("features", f"{len(spec.features)}", "given", reason)
    else:
        source.fact("features", f"{len(spec.features)}", "assumed", "one per table, summed")
    value = f"a network of {spec.num_dense} dense inputs"
    source.fact("dense part", value, "given", f"{reason}, sha256 {loaded.sha256[:12]}")


def _name_tensors(source: TrainerTensors, loaded: LoadedAdapter) -> list[str]:
    """Give tensors canonical names, and return the paths of those that have none.

    Raises:
        ArchitectureError: A tensor that neither the adapter nor its network takes remaps ids.
        ConfigError: A pattern of `ignore` matches nothing, or catches parts of the model.
    """
    source.own_prefix = loaded.adapter.prefix
    adapter, unknown, skipped = loaded.adapter, [*source.others], []
    for name, tensor in source.tensors.items():
        if match := _match_table(adapter.tables, tensor):
            target: str | None = f"{_TABLES}{match['table']}.weight"
        elif name.startswith(adapter.prefix):
            with loaded.blame(f"rename({name.removeprefix(adapter.prefix)!r})"):
                own = adapter.rename(name.removeprefix(adapter.prefix))
            target = None if own is None else f"{_NETWORK}{own}"
            if own is None:
                skipped.append(tensor)
                continue
        else:
            target = None
        if target is None or target in source.canonical:
            unknown.append(tensor)
        else:
            source.canonical[target] = tensor
    check_remapping(source.checkpoint, skipped)
    for tensor in skipped:
        source.ignore(tensor, f"`rename` of {loaded.path.name}")
    return [info.path for info in source.pass_over(unknown)]


def _match_table(pattern: str, tensor: TensorInfo) -> re.Match[str] | None:
    """Match a tensor's name as it is, or without what wrappers insert."""
    return re.fullmatch(pattern, strip_wrappers(tensor.name)) or re.fullmatch(pattern, tensor.name)


def _tables(source: TrainerTensors) -> list[TableSpec]:
    named = {
        name: source.as_table(info) if len(info.shape) == 2 else info
        for name, info in source.canonical.items()
        if name.startswith(_TABLES)
    }
    source.canonical |= named
    wrong = [
        f"{info.path} has shape {list(info.shape)} and dtype {info.dtype}"
        for info in named.values()
        if len(info.shape) != 2 or 0 in info.shape or info.dtype not in DTYPE_BYTES
    ]
    if wrong:
        raise ArchitectureError(
            f"{len(wrong)} tables cannot be used",
            expected="two dims, at least one row, in fp64, fp32, fp16 or bf16",
            hint="save them so, or narrow `tables` in the adapter",
            details=wrong,
        )
    return [
        TableSpec(
            name=name.removeprefix(_TABLES).removesuffix(".weight"),
            rows=info.shape[0],
            dim=info.shape[1],
            dtype=cast(Dtype, info.dtype),
        )
        for name, info in named.items()
    ]


def _features(
    source: TrainerTensors, loaded: LoadedAdapter, tables: Sequence[TableSpec]
) -> list[FeatureSpec]:
    given = loaded.adapter.features
    if given is not None:
        entries = [Feature(f) if isinstance(f, str) else f for f in given]
        return [
            FeatureSpec(
                name=f.name, table=f.name if f.table is None else f.table, pooling=f.pooling
            )
            for f in entries
        ]
    try:
        order, fact = order_tables(source, [table.name for table in tables])
    except ArchitectureError as error:
        raise ArchitectureError(
            error.found,
            expected="the features in the order in which the network takes them",
            hint=f"set `features` in {loaded.path.name}",
            details=error.details,
        ) from None
    source.facts.append(fact)
    return [FeatureSpec(name=name, table=name) for name in order]


def _check_network(
    source: TrainerTensors, loaded: LoadedAdapter, spec: ModelSpec, unknown: Sequence[str]
) -> None:
    """Compare the network's state with the checkpoint's tensors, and run it once on zeros."""
    import torch

    network = build_user_network(loaded.network, spec.feature_dims, spec.num_dense)
    own = {f"{_NETWORK}{name}": tuple(t.shape) for name, t in network.state_dict().items()}
    held = {name: info for name, info in source.canonical.items() if name.startswith(_NETWORK)}
    details = [f"missing: {name.removeprefix(_NETWORK)}" for name in own if name not in held]
    details += [f"unknown: {info.path}" for name, info in held.items() if name not in own]
    details += [f"unknown: {path}" for path in unknown]
    details += [
        f"wrong shape: {info.path} {list(info.shape)}, the network has {list(own[name])}"
        for name, info in held.items()
        if name in own and info.shape != own[name]
    ]
    if details:
        raise ArchitectureError(
            f"{source.checkpoint.source} and the network of {loaded.path.name} do not fit: "
            f"{len(details)} tensors",
            expected="exactly the tensors of the network's state dict beside the tables",
            hint="correct the network, or set `prefix` or `rename` in the adapter; `rename` "
            "returns None for a tensor that no logit depends on",
            details=details,
        )
    pooled = [torch.zeros(2, dim) for dim in spec.feature_dims]
    with torch.no_grad():
        run_network(loaded.network, network.eval(), torch.zeros(2, spec.num_dense), pooled)
