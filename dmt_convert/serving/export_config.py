"""What the graphs of an export take, from the settings of `dmt export`."""

from __future__ import annotations

from dmt_convert.bundle import Bundle
from dmt_convert.config import ExportConfig
from dmt_convert.errors import ExportError
from dmt_convert.model import DmtSpec
from dmt_convert.serving.graph_inputs import FeatureInput, GraphInputs


def request_features(bundle: Bundle, config: ExportConfig) -> tuple[str, ...]:
    """Return the features that come once per request; empty without request batching.

    Raises:
        ExportError: The bundle has no such group of features.
    """
    if config.per_request or not config.request_batching:
        return config.per_request
    groups = bundle.manifest.partition.groups
    if config.request_group not in groups:
        raise ExportError(
            f"the bundle has no group {config.request_group!r} (groups: "
            f"{', '.join(groups) or 'none'})",
            expected="a group of features that shares no tower with others",
            hint="convert with --group user=f1,f2 --group item=f3,f4, or name another group with "
            "--request-group",
        )
    return tuple(groups[config.request_group])


def plan_inputs(
    spec: DmtSpec, config: ExportConfig, per_request: tuple[str, ...] | None = None
) -> GraphInputs:
    """Say what the graphs of an export take.

    Args:
        spec: The model.
        config: What is asked for.
        per_request: Features that come once per request; by default those that `config` lists.

    Raises:
        ExportError: An option names a feature, or dense inputs, that the model does not have.
    """
    if config.dense_per_request and not spec.flat.num_dense:
        raise ExportError(
            "--dense-per-request for a model without dense inputs",
            expected="a model that has some",
            hint="leave it out",
        )
    names = spec.flat.feature_names
    once = config.per_request if per_request is None else per_request
    forms = {name: form for name, form in config.pooling_input.items() if name}
    usual = config.pooling_input.get("", "padded" if config.format == "triton" else "jagged")
    asked = [*forms, *(name for name in config.weighted if name != "*"), *once]
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise ExportError(
            f"features that the model does not have: {', '.join(unknown)}",
            expected="features of the bundle",
            hint=f"its features are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}",
        )
    single = {feature.name for feature in spec.flat.features if feature.max_ids == 1}
    longer = [name for name in sorted(single & set(forms)) if forms[name] != "single"]
    if longer:
        raise ExportError(
            f"{', '.join(longer)} may have at most one id per row, and are asked for in bags",
            expected="the form single: their tables were multiplied quotient-remainder tables",
            hint="leave out --pooling-input for these features",
        )
    forms |= dict.fromkeys(single, "single")
    everything = "*" in config.weighted
    return GraphInputs(
        num_dense=spec.flat.num_dense,
        features=tuple(
            FeatureInput(
                feature=name,
                form=forms.get(name, usual),
                weighted=everything or name in config.weighted,
            )
            for name in names
        ),
        per_request=once,
        dense_per_request=config.dense_per_request,
    )
