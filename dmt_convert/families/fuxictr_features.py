"""The features of a FuxiCTR model, from `feature_map.json` and from its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dmt_convert.checkpoint import derived
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.facts import Fact
from dmt_convert.families.feature_order import infer_features
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, Pooling, TableSpec

_STEMS: Final = (
    "embedding_layer.embedding_layer.embedding_layers",
    "embedding_layer.embedding_layer.embedding_layer",
)
_POOLINGS: Final[Mapping[str, Pooling]] = {
    "layers.MaskedAveragePooling()": "mean",
    "layers.MaskedSumPooling()": "sum",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What the model takes."""

    tables: tuple[TableSpec, ...]
    """All tables."""
    features: tuple[FeatureSpec, ...]
    """Categorical features and sequences, in the model's order."""
    dims: tuple[int, ...]
    """Their embedding dims."""
    numeric: tuple[str, ...] | None
    """Numeric features, in the order of the dense inputs; None where nothing says."""
    inputs: list[list[Any]]
    """All fields that are embedded, as the network `deep-cross` wants them."""
    params: Mapping[str, Any] | None
    """What params.json says, None where there is none."""

    @property
    def num_dense(self) -> int:
        """Number of numeric features that are embedded."""
        return sum(entry[0] == "scaled" for entry in self.inputs)

    @property
    def width(self) -> int:
        """Width of all embeddings side by side."""
        scaled = sum(entry[2] for entry in self.inputs if entry[0] == "scaled")
        return sum(self.dims) + int(scaled)


def read_fields(source: TrainerTensors, family: Architecture) -> Fields:
    """Take the tables and the vectors of numeric features.

    Raises:
        ArchitectureError: feature_map.json describes features that cannot be converted.
        ConfigError: The user's features do not fit the tables.
    """
    stem = next(s for s in _STEMS if source.keys_of(f"{s}.{{}}.weight"))
    stored = source.keys_of(f"{stem}.{{}}.weight")
    described = _described(source)
    if described is not None:
        _check_order(source, stored, described)
    numeric = _numeric(source, stem, stored, described)
    scaled = [name for name in numeric if name in stored]
    shared = _shared(described or {}, stored)
    # a shared table is saved once more under every feature's name
    source.skip(*(f"{stem}.{name}.weight" for name in shared))
    names = [name for name in stored if name not in scaled and name not in shared]
    tables = {
        name: source.table(name, source.take(f"{stem}.{name}.weight", None, None)) for name in names
    }
    features = _features(source, family, names, described, shared)
    order = _input_order(source, stored, described, features, scaled)
    return Fields(
        tables=tuple(tables.values()),
        features=features,
        dims=tuple(tables[f.table].dim for f in features),
        numeric=tuple(numeric) if described is not None else None,
        inputs=_inputs(source, stem, order, [f.name for f in features], numeric),
        params=_document(source, "params.json"),
    )


def _shared(described: Mapping[str, Mapping[str, Any]], stored: list[str]) -> dict[str, str]:
    """Map features to the tables of others: of those before them, as the trainer builds them."""
    shared: dict[str, str] = {}
    seen: set[str] = set()
    for name, spec in described.items():
        owner = spec.get("share_embedding")
        if isinstance(owner, str) and owner in seen:
            shared[name] = shared.get(owner, owner)
        if name in stored:
            seen.add(name)
    return shared


def _input_order(
    source: TrainerTensors,
    stored: list[str],
    described: Mapping[str, Mapping[str, Any]] | None,
    features: tuple[FeatureSpec, ...],
    scaled: list[str],
) -> list[str]:
    """Put features and embedded numeric features in the order in which the network takes them."""
    names = [feature.name for feature in features]
    if source.config.features is not None:
        # the user lists features alone: numeric ones keep their places among them
        rest = iter(names)
        slots = [n if n in scaled else next(rest, "") for n in described or stored]
        return [*(name for name in slots if name), *rest]
    places = [n for n in described or stored if n in names or n in scaled]
    return [*places, *(name for name in names if name not in places)]


def _document(source: TrainerTensors, name: str) -> Mapping[str, Any] | None:
    value = source.checkpoint.documents.get(name)
    return value if isinstance(value, dict) else None


def _described(source: TrainerTensors) -> dict[str, Mapping[str, Any]] | None:
    """Return what feature_map.json says of every feature, in its order."""
    document = _document(source, "feature_map.json")
    if document is None:
        return None
    entries = document.get("features", document.get("feature_specs"))
    listed = entries if isinstance(entries, list) else [entries]
    found: dict[str, Mapping[str, Any]] = {}
    for entry in listed:
        if not isinstance(entry, dict) or not all(isinstance(v, dict) for v in entry.values()):
            raise source.refuse(
                "feature_map.json does not list features",
                expected='`"features": [{"name": {"type": ...}}, ...]`',
                hint="the file is damaged, or of a version that is not known yet",
            )
        found.update(entry)
    found = _as_the_model_has_them(source, found)
    known = ("numeric", "categorical", "sequence", "meta")
    odd = [name for name, spec in found.items() if spec.get("type") not in known]
    odd += [name for name, spec in found.items() if "pretrained_emb" in spec]
    odd += [
        name
        for name, spec in found.items()
        if spec.get("type") in known[:2] and spec.get("feature_encoder")
    ]
    if odd:
        raise source.refuse(
            f"features {', '.join(odd[:5])} of a kind that cannot be converted",
            expected=f"types {', '.join(known)}, no pretrained embeddings, encoders of sequences "
            "alone",
            hint="such features have parts beside a table",
        )
    return {name: spec for name, spec in found.items() if spec["type"] != "meta"}


def _as_the_model_has_them(
    source: TrainerTensors, found: dict[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Choose and change features as `use_features` and `feature_specs` of params.json say."""
    params = _document(source, "params.json") or {}
    used, changes = params.get("use_features"), params.get("feature_specs")
    if isinstance(used, list) and used:
        found = {name: found[name] for name in used if isinstance(name, str) and name in found}
    for change in changes if isinstance(changes, list) else ():
        names = change.get("name") if isinstance(change, dict) else None
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and name in found:
                own = {key: value for key, value in change.items() if key != "name"}
                found[name] = {**found[name], **own}
    return found


def _check_order(
    source: TrainerTensors, stored: list[str], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse features that the file has in another order than the description."""
    listed = [name for name in described if name in stored]
    if source.checkpoint.ordered and listed != [name for name in stored if name in described]:
        raise source.refuse(
            "its tables stand in another order than feature_map.json lists them",
            expected="the feature_map.json of this model",
            hint="a model that was given `use_features` says so in params.json beside it",
        )


def _numeric(
    source: TrainerTensors,
    stem: str,
    stored: list[str],
    described: Mapping[str, Mapping[str, Any]] | None,
) -> list[str]:
    """Names of the numeric features, in order; those that are embedded have a vector (dim, 1)."""
    if described is not None:
        return [name for name, spec in described.items() if spec["type"] == "numeric"]
    shapes = {name: source.tensors[f"{stem}.{name}.weight"].shape for name in stored}
    dims = {shape[1] for shape in shapes.values() if len(shape) == 2 and shape[1] > 1}
    found = [name for name in stored if dims and shapes[name] in {(dim, 1) for dim in dims}]
    if found:
        source.fact("numeric features", ", ".join(found), "inferred", "vectors of shape (dim, 1)")
    return found


def _features(
    source: TrainerTensors,
    family: Architecture,
    names: list[str],
    described: Mapping[str, Mapping[str, Any]] | None,
    shared: Mapping[str, str],
) -> tuple[FeatureSpec, ...]:
    """Put the categorical features in order, with their tables and pooling."""
    config = source.config
    if described is None or config.features is not None:
        # the trainer sorts no names: an order that the file keeps is the model's
        order = Fact(
            subject="feature order",
            value=", ".join(names[:3]),
            source="read",
            reason="order of the file",
        )
        features, facts = infer_features(
            names,
            ordered=source.checkpoint.ordered,
            family=family,
            config=config,
            known_order=order if source.checkpoint.ordered else None,
        )
        source.facts += facts
    else:
        known = [name for name, spec in described.items() if spec["type"] != "numeric"]
        source.missing += [f"table of {n}" for n in known if shared.get(n, n) not in names]
        listed = tuple(
            FeatureSpec(
                name=name, table=shared.get(name, name), pooling=_pooling(source, name, spec)
            )
            for name, spec in described.items()
            if name in known and shared.get(name, name) in names
        )
        used = {feature.table for feature in listed}
        features = (
            *listed,
            *(FeatureSpec(name=name, table=name) for name in names if name not in used),
        )
        source.wrong += [f"{name} is not in feature_map.json" for name in names if name not in used]
        source.fact("features", f"{len(features)} features", "read", "feature_map.json")
    reason = "the trainer's ids begin at 1, row 0 is the padding"
    source.fact("padding", "id 0", "assumed" if described is None else "read", reason)
    return features


def _pooling(source: TrainerTensors, name: str, spec: Mapping[str, Any]) -> Pooling:
    """Pooling of a feature: one id under both for a categorical one, by its encoder for others."""
    given = source.config.pooling
    encoder = spec.get("feature_encoder")
    if spec["type"] != "sequence":
        return "sum"
    if isinstance(given, Mapping):
        given = given.get(name)
    if given is not None:
        return given
    if not isinstance(encoder, str) or encoder not in _POOLINGS:
        raise source.refuse(
            f"a sequence with the encoder {encoder!r}",
            expected="one of " + ", ".join(_POOLINGS),
            hint="say `pooling: sum` or `pooling: mean` in --model-config if that is what it does",
        )
    return _POOLINGS[encoder]


def _inputs(
    source: TrainerTensors, stem: str, order: list[str], features: list[str], numeric: list[str]
) -> list[list[Any]]:
    """List what the network takes, and take the vectors of numeric features."""
    inputs: list[list[Any]] = []
    place = {name: i for i, name in enumerate(features)}
    for name in order:
        if name in place:
            inputs.append(["feature", place[name]])
            continue
        vector = source.take(f"{stem}.{name}.weight", None, 1)
        index = numeric.index(name)
        source.put(f"scales.{index}", derived.reshape(vector, (vector.shape[0],)))
        inputs.append(["scaled", index, vector.shape[0]])
    return inputs
