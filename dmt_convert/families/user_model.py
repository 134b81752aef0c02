"""A flat model as a user's adapter describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Final, cast

from dmt_convert.adapter import Feature, LoadedAdapter, build_user_network, run_network
from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.errors import ArchitectureError
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.facts import Fact
from dmt_convert.families.findings import FlatModelInfo
from dmt_convert.families.matching import Match
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.families.name_map import NameMap, strip_wrappers
from dmt_convert.families.optimizer_state import find_optimizer_state
from dmt_convert.spec import DTYPE_BYTES, Dtype, FeatureSpec, ModelSpec, TableSpec, network_model

_TABLES: Final = "tables."
_NETWORK: Final = "network."


def infer_user_model(
    checkpoint: FlatCheckpoint, loaded: LoadedAdapter, config: ModelConfig
) -> FlatModelInfo:
    """Understand a flat checkpoint by a user's adapter.

    Args:
        checkpoint: An opened checkpoint.
        loaded: The adapter.
        config: `container`, `ignore` and `final_sigmoid` count; the rest the adapter says.

    Raises:
        ArchitectureError: The checkpoint does not hold the tables or the network's tensors.
        ConfigError: The adapter's own code fails.
    """
    container = _container(checkpoint, loaded, config)
    held = [tensor for tensor in checkpoint.tensors if tensor.container == container]
    tensors, unknown = _name_tensors(held, loaded, config)
    tables = _tables(tensors)
    features = _features(checkpoint, loaded, tables)
    sigmoid = config.final_sigmoid
    spec = network_model(
        family=loaded.adapter.name,
        tables=tables,
        features=features,
        num_dense=loaded.adapter.num_dense,
        network=loaded.network,
        final_sigmoid=loaded.adapter.final_sigmoid if sigmoid is None else sigmoid,
    )
    _check_network(checkpoint, loaded, spec, tensors, unknown)
    match = Match(
        family=_FAMILY,
        container=container,
        prefix="",
        tensors=tensors,
        extra=(),
        unsupported=(),
        parameter_names=tuple(tensor.name for tensor in held),
    )
    others = {tensor.container for tensor in checkpoint.tensors} - {container}
    return FlatModelInfo(
        checkpoint=checkpoint,
        spec=spec,
        tensors=tensors,
        optimizer_state=find_optimizer_state(checkpoint, match),
        facts=_facts(loaded, spec),
        ignored=tuple(f"{'.'.join(other) or '(top level)'}" for other in sorted(others)),
    )


_FAMILY: Final = Architecture(
    name="user",
    trainer="the user's own",
    anchor="",
    names=NameMap({}),
    interactions=(),
    pair_order="triu",
    allows_self_pairs=False,
    final_sigmoid=False,
    positional=False,
)


def _facts(loaded: LoadedAdapter, spec: ModelSpec) -> tuple[Fact, ...]:
    reason = f"--model {loaded.path.name}"
    ordered = loaded.adapter.features is not None
    return (
        Fact(subject="family", value=spec.family, source="given", reason=reason),
        Fact(
            subject="features",
            value=f"{len(spec.features)}",
            source="given" if ordered else "read",
            reason=reason if ordered else "one per table, in the checkpoint's order",
        ),
        Fact(
            subject="dense part",
            value=f"a network of {spec.num_dense} dense inputs",
            source="given",
            reason=f"{reason}, sha256 {loaded.sha256[:12]}",
        ),
    )


def _container(
    checkpoint: FlatCheckpoint, loaded: LoadedAdapter, config: ModelConfig
) -> tuple[str, ...]:
    """Find the dict that holds the tables."""
    pattern = re.compile(loaded.adapter.tables)
    found = dict.fromkeys(
        tensor.container
        for tensor in checkpoint.tensors
        if len(tensor.shape) == 2 and pattern.fullmatch(strip_wrappers(tensor.name))
    )
    if config.container is not None:
        found = {key: None for key in found if ".".join(key) == config.container}
    if len(found) == 1:
        return next(iter(found))
    names = [tensor.path for tensor in checkpoint.tensors]
    raise ArchitectureError(
        f"{checkpoint.source} holds {len(found)} dicts with tables named {loaded.adapter.tables!r}",
        expected="one",
        hint="say which one with `container:` in --model-config"
        if found
        else f"set `tables` in {loaded.path.name}: a regular expression with a group `table`",
        details=[".".join(key) or "(top)" for key in found] or names[:10],
    )


def _name_tensors(
    held: Sequence[TensorInfo], loaded: LoadedAdapter, config: ModelConfig
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Give tensors canonical names; those without one are returned by their own."""
    adapter, pattern = loaded.adapter, re.compile(loaded.adapter.tables)
    tensors: dict[str, TensorInfo] = {}
    unknown = []
    for tensor in held:
        name = strip_wrappers(tensor.name)
        target: str | None = None
        if match := pattern.fullmatch(name):
            target = f"{_TABLES}{match.group('table')}.weight"
        elif any(fnmatch(tensor.name, glob) for glob in config.ignore):
            continue
        elif name.startswith(adapter.prefix):
            with loaded.blame(f"rename({name.removeprefix(adapter.prefix)!r})"):
                own = adapter.rename(name.removeprefix(adapter.prefix))
            if own is None:
                continue
            target = f"{_NETWORK}{own}"
        if target is None or target in tensors:
            unknown.append(tensor.path)
        else:
            tensors[target] = tensor
    return tensors, unknown


def _tables(tensors: Mapping[str, TensorInfo]) -> list[TableSpec]:
    named = {name: info for name, info in tensors.items() if name.startswith(_TABLES)}
    wrong = [
        f"{info.path} has shape {list(info.shape)} and dtype {info.dtype}"
        for info in named.values()
        if len(info.shape) != 2 or 0 in info.shape or info.dtype not in DTYPE_BYTES
    ]
    if wrong:
        raise ArchitectureError(
            f"{len(wrong)} tables cannot be used",
            expected="two dims, in fp32, fp16 or bf16",
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
    checkpoint: FlatCheckpoint, loaded: LoadedAdapter, tables: Sequence[TableSpec]
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
    if not checkpoint.ordered and len(tables) > 1:
        raise ArchitectureError(
            f"{checkpoint.source} ({checkpoint.format}) does not tell the order of its "
            f"{len(tables)} tables",
            expected="the features in the order in which the network takes them",
            hint=f"set `features` in {loaded.path.name}",
            details=[table.name for table in tables[:20]],
        )
    return [FeatureSpec(name=table.name, table=table.name) for table in tables]


def _check_network(
    checkpoint: FlatCheckpoint,
    loaded: LoadedAdapter,
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    unknown: Sequence[str],
) -> None:
    """Compare the network's state with the checkpoint's tensors, and run it once on zeros."""
    import torch

    network = build_user_network(loaded.network, spec.feature_dims, spec.num_dense)
    own = {f"{_NETWORK}{name}": tuple(t.shape) for name, t in network.state_dict().items()}
    held = {name: info for name, info in tensors.items() if name.startswith(_NETWORK)}
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
            f"{checkpoint.source} and the network of {loaded.path.name} do not fit: "
            f"{len(details)} tensors",
            expected="exactly the tensors of the network's state dict beside the tables",
            hint="mend the network, set `prefix` or `rename` in the adapter, or pass over tensors "
            "with `ignore: [pattern]` in --model-config",
            details=details,
        )
    pooled = [torch.zeros(2, dim) for dim in spec.feature_dims]
    with torch.no_grad():
        run_network(loaded.network, network.eval(), torch.zeros(2, spec.num_dense), pooled)
