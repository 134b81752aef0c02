"""DLRMs that are the plain one once a layer's columns stand in our order.

We have [dense, pairs], the pairs being the upper triangle with the dense vector as row 0, or for
cat [dense, features]. Others put the dense vector last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmt_convert.checkpoint import derived
from dmt_convert.families.trainer_tensors import Described, TrainerTensors
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


def describe_plain_dlrm(
    source: TrainerTensors,
    *,
    family: str,
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    bottom: Sequence[Mapping[str, Any]],
    top: Sequence[Mapping[str, Any]],
    pairs: bool,
    dense_first: bool,
    final_sigmoid: bool,
) -> Described:
    """Describe a DLRM with dense inputs, ReLU and no norm.

    Args:
        source: The tensors; the stacks `bottom` and `top` have been taken.
        family: Name of the family.
        tables: All tables.
        features: All features.
        bottom: Config of the stack over the dense inputs.
        top: Config of the stack that gives the logit.
        pairs: Whether its input is [pairs, dense], else the vectors side by side.
        dense_first: Whether the dense vector is the first vector, else the last.
        final_sigmoid: Whether the original model ends in a sigmoid.
    """
    dims = {table.name: table.dim for table in tables}
    widths = [dims[feature.table] for feature in features]
    dense = bottom[-1]["out"]
    if pairs:
        columns = _pair_columns(len(features), dense, dense_first=dense_first)
    else:
        before = 0 if dense_first else sum(widths)
        columns = [before + i for i in range(dense)]
        columns += [i + dense * dense_first for i in range(sum(widths))]
    tensors = {n: info for n, info in source.canonical.items() if n.startswith("tables.")}
    for target, stem in (("dense_arch", "bottom"), ("over_arch", "top")):
        for i in range(len(bottom if stem == "bottom" else top)):
            for kind in ("weight", "bias"):
                info = source.canonical[f"network.{stem}.{i}.linear.{kind}"]
                tensors[f"{target}.{i}.{kind}"] = info
    first = tensors["over_arch.0.weight"]
    tensors["over_arch.0.weight"] = derived.select_columns(first, columns)
    spec = ModelSpec(
        family=family,
        tables=tuple(tables),
        features=tuple(features),
        dense_arch=_mlp(bottom, final_relu=True),
        interaction=InteractionSpec(kind="dot" if pairs else "cat"),
        over_arch=_mlp(top, final_relu=False),
        final_sigmoid=final_sigmoid,
    )
    return Described(spec=spec, tensors=tensors, facts=source.facts)


def _mlp(layers: Sequence[Mapping[str, Any]], *, final_relu: bool) -> MlpSpec:
    widths = (layers[0]["in"], *(layer["out"] for layer in layers))
    return MlpSpec(widths=widths, final_relu=final_relu)


def _pair_columns(count: int, dense: int, *, dense_first: bool) -> list[int]:
    """Where each of our columns [dense, pairs] is among theirs [pairs, dense]."""
    total = count + 1
    number = {
        (i, j): k
        for k, (i, j) in enumerate((i, j) for i in range(total) for j in range(i + 1, total))
    }
    theirs = list(range(total)) if dense_first else [count, *range(count)]
    columns = [len(number) + i for i in range(dense)]
    for i in range(total):
        for j in range(i + 1, total):
            columns.append(number[min(theirs[i], theirs[j]), max(theirs[i], theirs[j])])
    return columns
