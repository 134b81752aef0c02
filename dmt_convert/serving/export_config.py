"""What is asked of an export, as data; refuses itself where it cannot be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dmt_convert.errors import ExportError
from dmt_convert.model import DmtSpec
from dmt_convert.serving.export_manifest import (
    EXPORT_FORMATS,
    TABLE_CODES,
    ExportFormat,
    OutOfRange,
    TableCode,
)
from dmt_convert.serving.graph_inputs import INPUT_FORMS, FeatureInput, GraphInputs, InputForm


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Options of `dmt export`."""

    format: ExportFormat
    """onnx, pt2 or triton."""
    form: InputForm | None = None
    """Form of all inputs; by default padded for triton, jagged otherwise."""
    forms: Mapping[str, InputForm] = field(default_factory=dict)
    """Form of single features, where it differs."""
    weighted: tuple[str, ...] = ()
    """Features whose ids come with weights; `*` for all."""
    quantize: TableCode = "none"
    """How tables are stored."""
    max_auc_loss: float | None = None
    """Largest loss of AUC by quantisation, on labelled data; None: any."""
    out_of_range: OutOfRange = "refuse"
    """What becomes of ids outside their table."""
    per_request: tuple[str, ...] = ()
    """Request batching: features that come once per request; empty without it."""
    dense_per_request: bool = False
    """Request batching: whether the dense inputs come once per request as well."""
    model_name: str = "dmt"
    """triton: name of the ensemble, and what the names of its parts begin with."""
    gpu: bool = False
    """triton, pt2: serve on a GPU."""

    def __post_init__(self) -> None:
        if self.dense_per_request and not self.per_request:
            raise ExportError(
                "--dense-per-request without --request-batching",
                expected="request batching, for features of one group",
                hint="add --request-batching",
            )
        if self.max_auc_loss is not None and self.quantize == "none":
            raise ExportError(
                f"--max-auc-loss {self.max_auc_loss:g} without quantisation",
                expected="tables that are quantised, which may lose AUC",
                hint="add --quantize int8, or leave it out",
            )
        if self.per_request and self.format != "onnx":
            raise ExportError(
                f"--request-batching for {self.format}",
                expected="--format onnx",
                hint="export ONNX graphs, and serve them with a runtime of your own: batches of "
                "two sizes in one request cannot be told to Triton's batcher",
            )
        for value, known, option in (
            (self.format, EXPORT_FORMATS, "--format"),
            (self.quantize, TABLE_CODES, "--quantize"),
            (self.out_of_range, ("refuse", "clip"), "--out-of-range"),
            *((form, INPUT_FORMS, "--pooling-input") for form in self.forms.values()),
            *(((self.form, INPUT_FORMS, "--pooling-input"),) if self.form else ()),
        ):
            if value not in known:
                raise ExportError(
                    f"{option} {value}",
                    expected="one of " + ", ".join(known),
                    hint="see dmt export --help",
                )

    @property
    def default_form(self) -> InputForm:
        """Form of the features that `forms` does not name."""
        return self.form or ("padded" if self.format == "triton" else "jagged")


def plan_inputs(spec: DmtSpec, config: ExportConfig) -> GraphInputs:
    """Say what the graphs of an export take.

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
    asked = [*config.forms, *(name for name in config.weighted if name != "*"), *config.per_request]
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise ExportError(
            f"features that the model does not have: {', '.join(unknown)}",
            expected="features of the bundle",
            hint=f"its features are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}",
        )
    everything = "*" in config.weighted
    return GraphInputs(
        num_dense=spec.flat.num_dense,
        features=tuple(
            FeatureInput(
                feature=name,
                form=config.forms.get(name, config.default_form),
                weighted=everything or name in config.weighted,
            )
            for name in names
        ),
        per_request=config.per_request,
        dense_per_request=config.dense_per_request,
    )
