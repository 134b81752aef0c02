"""Settings of every command; those of fine-tuning are in `training`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import model_validator

from dmt_convert.config.base import Config
from dmt_convert.config.fields import option_name, setting
from dmt_convert.config.shared import BundleOptions, ClusterOptions, ModelOptions, ScoringOptions
from dmt_convert.config.training import FinetuneConfig
from dmt_convert.config.values import (
    AffinityKind,
    ExportFormat,
    Float,
    Forms,
    Groups,
    NameLists,
    Names,
    Outliers,
    OutOfRange,
    PathValue,
    Replicate,
    Strategy,
    StrategyValue,
    TableCode,
    Texts,
)
from dmt_convert.spec import CommDtype, Dtype, MatmulPrecision

_TOWERS: Final = "Which features share a tower"
_MODULES: Final = "What a tower emits"
_PREDICTION: Final = "Prediction (modelled)"
_INPUTS: Final = "Inputs of the graphs"
_REQUESTS: Final = "User side once per request"


class InspectConfig(ModelOptions):
    """Settings of `dmt inspect`."""

    command: ClassVar[str] = "inspect"


class PartitionOptions(Config):
    """How features become towers, as `dmt partition` and `dmt convert` take it."""

    towers: int | None = setting(
        None, "Number of towers, often the number of hosts.", ge=1, auto="as the file says"
    )
    partition: StrategyValue | None = setting(
        None,
        "loss makes a linear code of every tower lose as little as possible, coherent puts "
        "features that interact into one tower, diverse keeps them apart, round-robin deals them "
        "out; or a JSON file with the towers.",
        metavar="loss|coherent|diverse|round-robin|FILE",
        auto="loss if towers may be linear; else coherent, or diverse if a tower may emit "
        "combinations of its features (c = 0 with a dot interaction)",
        panel=_TOWERS,
    )
    affinity: AffinityKind = setting(
        "weights",
        "How close two features are. weights: how much the model uses the pair; cosine: how "
        "aligned their embeddings are.",
        panel=_TOWERS,
    )
    size_ratio: Float = setting(
        1.0,
        "Largest tower, as a multiple of the mean number of features. 1 keeps towers within one "
        "feature of each other.",
        ge=1,
        panel=_TOWERS,
    )
    load_ratio: Float | None = setting(
        None,
        "Largest load of a tower (table bytes, lookups, emitted values), as a multiple of the "
        "mean.",
        ge=1,
        auto="unlimited",
        panel=_TOWERS,
    )
    compression: Float | None = setting(
        None,
        "Compression to reach: bytes that would cross hosts as float32, over bytes that do. Towers "
        "by loss are planned for it.",
        gt=0,
        auto="4; 2 with --tower-module; 8 for `dmt partition`",
        panel=_MODULES,
    )
    together: NameLists = setting(
        (), "Features that share a tower. Repeatable.", metavar="f,g", panel=_TOWERS
    )
    apart: NameLists = setting(
        (), "Features in different towers. Repeatable.", metavar="f,g", panel=_TOWERS
    )
    group: Groups = setting(
        (),
        "Features of different groups never share a tower. Repeatable.",
        metavar="NAME=f,g",
        panel=_TOWERS,
    )
    calibration: PathValue | None = setting(
        None,
        "Sample data for fitting and measuring the towers. Labels are optional.",
        auto="rows drawn from the tables",
        metavar="DATA",
    )
    outliers: Outliers = setting(
        "refuse",
        "Whether weights may hold single values that are absurd beside all others, as a flipped "
        "bit leaves them.",
    )
    seed: int = setting(0, "Seed of all random choices.", ge=0)

    @property
    def strategy(self) -> Strategy | Path:
        """How towers are found, if nothing else is asked for."""
        return self.partition or "coherent"

    @model_validator(mode="after")
    def _check_constraints(self) -> Self:
        problems = list(_constraint_problems(self.together, self.apart, self.group))
        if self.towers is None and not isinstance(self.partition, Path):
            problems.append("towers is missing: give a number, or a file with `partition`")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _constraint_problems(together: NameLists, apart: NameLists, groups: Groups) -> Iterable[str]:
    for option, tuples in (("together", together), ("apart", apart)):
        for names in tuples:
            if len(names) < 2 or _repeated(names):
                yield f"{option} {','.join(names)}: needs two or more different features"
    for name in _repeated([name for name, _ in groups]):
        yield f"group {name} is given twice"
    for name, features in groups:
        if not features or _repeated(features):
            yield f"group {name}={','.join(features)}: needs different features"
    members = [feature for _, features in groups for feature in set(features)]
    for feature in _repeated(members):
        yield f"feature {feature} is in several groups"


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


class PartitionConfig(ModelOptions, PartitionOptions):
    """Settings of `dmt partition`."""

    command: ClassVar[str] = "partition"

    out: PathValue | None = setting(
        None, "Write the towers to this JSON file.", record=False, metavar="FILE"
    )
    plot: PathValue | None = setting(
        None, "Draw affinity and towers.", record=False, metavar="FILE.svg|png"
    )


class ConvertConfig(ModelOptions, ClusterOptions, PartitionOptions):
    """What a flat checkpoint is converted into: settings of `dmt convert`."""

    command: ClassVar[str] = "convert"
    alternatives: ClassVar[tuple[str, ...]] = ("dim", "compression", "max_auc_loss", "min_r2")

    tower_module: str = setting(
        "auto",
        "Kind of tower module. auto takes the one that loses least in the bytes that it may send; "
        "passthrough computes exactly what the flat model computes.",
        metavar="auto|passthrough|dlrm|dcn|linear",
        panel=_MODULES,
    )
    c: int | None = setting(None, "Vectors emitted per feature.", ge=0, auto="1", panel=_MODULES)
    p: int | None = setting(None, "Vectors emitted per tower.", ge=0, auto="0", panel=_MODULES)
    dim: int | None = setting(
        None,
        "Output dim D of an emitted vector.",
        ge=1,
        auto="half the embedding dim",
        panel=_MODULES,
    )
    max_auc_loss: Float | None = setting(
        None,
        "Instead of --compression: take the fewest bytes that lose at most this much AUC, with "
        "95 % confidence, on held-out rows of --calibration, which needs labels and rows that the "
        "flat model was not trained on.",
        ge=0,
        panel=_MODULES,
    )
    min_r2: Float | None = setting(
        None,
        "Instead of --compression: take the fewest bytes whose logits have at least this R^2 with "
        "the flat model's on held-out rows.",
        le=1,
        panel=_MODULES,
    )
    precision: Literal["auto", "fp32", "bf16", "int8", "mixed"] = setting(
        "auto",
        "How what towers emit crosses hosts. int8 has a range per element, fitted on the sample; "
        "mixed gives elements that matter less 4 bits; auto takes what loses least.",
        panel=_MODULES,
    )
    prefer: Literal["bytes", "compute"] = setting(
        "bytes",
        "What tower modules are chosen for, among those that send as little: bytes takes the one "
        "that agrees best with the flat model, compute the one that computes least.",
        panel=_MODULES,
    )
    replicate: Replicate = setting(
        "none",
        "Tables that every rank holds, so that their features never cross hosts: auto takes those "
        "whose gradients cost less than their features would send; a number takes all tables of "
        "up to as many rows.",
        metavar="none|auto|ROWS",
        panel=_MODULES,
    )
    batch: int | None = setting(
        None,
        "Samples per rank and step, by which --replicate auto decides.",
        ge=1,
        auto="1024",
        panel=_MODULES,
    )
    distill_steps: int | None = setting(
        None,
        "Distillation steps after the closed-form fit; 0 for none.",
        ge=0,
        auto="up to 500, fewer for large models",
        panel=_MODULES,
    )
    dtype: Dtype | None = setting(None, "Store tables in this type.", auto="as they are")
    optimizer_state: Literal["keep", "drop"] = setting(
        "keep", "Whether the bundle keeps the tables' Adagrad accumulators for fine-tuning."
    )
    out: PathValue | None = setting(
        None, "Folder of the bundle.", record=False, auto="CKPT-dmtT beside SOURCE", metavar="DIR"
    )
    force: bool = setting(False, "Replace an existing bundle.", record=False)

    @property
    def set_modules(self) -> tuple[str, ...]:
        """Options that say what towers emit, of those that were given."""
        names = ("tower_module", "c", "p", "dim", "compression", "precision", "prefer")
        defaults = {name: type(self).model_fields[name].default for name in names}
        return tuple(option_name(name) for name in names if getattr(self, name) != defaults[name])

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        given = [n for n in ("max_auc_loss", "min_r2") if getattr(self, n) is not None]
        asked = " and ".join(map(option_name, given))
        if given and (self.set_modules or len(given) > 1):
            both = ", ".join(self.set_modules)
            raise ValueError(
                f"{asked} {f'beside {both}' if both else 'together'}: each chooses module, "
                "precision and compression by itself"
            )
        if self.max_auc_loss is not None and self.calibration is None:
            raise ValueError(
                "--max-auc-loss without --calibration: AUC is known on labelled rows only; "
                "--min-r2 needs no labels"
            )
        return self


class PlanConfig(BundleOptions):
    """A cluster to place towers on, and what to predict for it: settings of `dmt plan`."""

    command: ClassVar[str] = "plan"

    hosts: int = setting(..., "Hosts of the cluster.", ge=1)
    ranks_per_host: int = setting(..., "Ranks (GPUs) per host.", ge=1)
    hbm_gib: Float | None = setting(
        None, "Memory per rank in GiB.", gt=0, auto="80, or the memory of --gpu"
    )
    intra_gbps: Float | None = setting(
        None,
        "Link speed of a rank inside its host, in Gbit/s.",
        gt=0,
        auto="3600, or the link of --gpu",
    )
    inter_gbps: Float | None = setting(
        None,
        "Link speed of a rank to other hosts, in Gbit/s.",
        gt=0,
        auto="200, or the link of --gpu",
    )
    out: PathValue | None = setting(
        None, "Write the plan to this JSON file.", record=False, metavar="FILE"
    )
    predict: bool = setting(
        False,
        "Predict the time of a step (flat, SPTT and this bundle), and suggest towers and "
        "compression.",
        panel=_PREDICTION,
    )
    predict_scaling: bool = setting(
        False, "Predict the same for 16 to 16,384 GPUs.", panel=_PREDICTION
    )
    plot: PathValue | None = setting(
        None, "Draw --predict-scaling.", panel=_PREDICTION, metavar="FILE.svg|png"
    )
    gpu: str | None = setting(
        None,
        "GPU whose memory, links and speed to assume: v100, a100, h100, h200, b200, gb200, gb300.",
        panel=_PREDICTION,
        auto="h100 for predictions",
    )
    hosts_per_pod: int = setting(
        1,
        "Hosts that share one NVLink domain; towers take them as one host (NVL72: 18 of 4 GPUs).",
        ge=1,
        panel=_PREDICTION,
    )
    matmul_precision: MatmulPrecision = setting(
        "high",
        "Precision of float32 matrix products: float32 (highest), TF32 or bf16 (medium).",
        panel=_PREDICTION,
    )
    batch: int | None = setting(
        None, "Samples per rank and step.", ge=1, panel=_PREDICTION, auto="1024"
    )
    comm_dtype: CommDtype | None = setting(
        None,
        "Precision of embeddings and their gradients between ranks.",
        panel=_PREDICTION,
        auto="fp32",
    )
    ids_per_bag: Float | None = setting(
        None, "Mean ids per sample and feature.", gt=0, panel=_PREDICTION, auto="1"
    )
    assume: Texts = setting(
        (),
        "Replace a constant of the cost model, for example scale_loss=0.05. Repeatable.",
        panel=_PREDICTION,
        metavar="NAME=VALUE",
    )

    @model_validator(mode="after")
    def _check_prediction(self) -> Self:
        asked = ("gpu", "batch", "comm_dtype", "ids_per_bag", "assume")
        idle = [option_name(name) for name in asked if getattr(self, name)]
        if self.hosts_per_pod > 1:
            idle.append(option_name("hosts_per_pod"))
        if self.matmul_precision != "high":
            idle.append(option_name("matmul_precision"))
        if idle and not (self.predict or self.predict_scaling):
            raise ValueError(f"{', '.join(idle)} without a prediction: add --predict")
        if self.hosts_per_pod > 1 and self.out is not None:
            raise ValueError(
                f"--hosts-per-pod {self.hosts_per_pod} with --out: ranks count hosts, and a plan "
                "of pods fits none of their clusters; it is for predictions"
            )
        if self.plot is not None and not self.predict_scaling:
            raise ValueError(
                f"--plot {self.plot.name} without sizes to draw: add --predict-scaling"
            )
        return self


class DataConfig(ModelOptions):
    """Settings of `dmt data`."""

    command: ClassVar[str] = "data"

    rows: int | None = setting(None, "Read at most this many rows.", ge=1, auto="all")


class ScoreConfig(ScoringOptions):
    """Settings of `dmt score`."""

    command: ClassVar[str] = "score"

    data: PathValue = setting(..., "Data set, or a probe npz.")
    out: PathValue | None = setting(
        None,
        "npz to write, with the array `logits`.",
        auto="nothing is written",
        metavar="FILE.npz",
        record=False,
    )


class EvaluateConfig(ScoringOptions):
    """Settings of `dmt evaluate`."""

    command: ClassVar[str] = "evaluate"

    data: PathValue = setting(..., "Data set with labels.")


class VerifyConfig(ScoringOptions):
    """Settings of `dmt verify`."""

    command: ClassVar[str] = "verify"

    data: PathValue | None = setting(None, "Rows to run both models on.", auto="generated rows")
    atol: Float = setting(1e-6, "Absolute tolerance.", ge=0)
    rtol: Float = setting(1e-5, "Tolerance relative to the largest value of a stage.", ge=0)
    checksums: bool = setting(
        False, "Also read every byte of a bundle or export, used or not, and check its digests."
    )


class ExportConfig(BundleOptions):
    """Settings of `dmt export`."""

    command: ClassVar[str] = "export"

    format: ExportFormat = setting(..., "What to write.")
    out: PathValue | None = setting(
        None, "Folder to write; it must not exist.", auto="required", metavar="DIR"
    )
    quantize: TableCode = setting(
        "none", "Storage type of the tables. Prints the cost in accuracy before writing."
    )
    max_auc_loss: Float | None = setting(
        None,
        "Refuse to quantise if more AUC than this is lost on --data.",
        ge=0,
        auto="unlimited",
    )
    data: PathValue | None = setting(
        None, "Rows to check the graphs on.", auto="generated rows only"
    )
    pooling_input: Forms = setting(
        {},
        "Shape of the ids: single (B, 1), fixed (B, L), padded (B, L) with -1, jagged (values and "
        "lengths); for all features, or for one as FEATURE=FORM. Repeatable.",
        metavar="[FEATURE=]single|fixed|padded|jagged",
        panel=_INPUTS,
        auto="jagged; padded for triton",
    )
    weighted: Names = setting(
        (),
        "Features whose ids come with weights; * for all. Repeatable.",
        metavar="f,g",
        panel=_INPUTS,
    )
    out_of_range: OutOfRange = setting(
        "refuse",
        "What happens to an id outside its table: the request fails, or the nearest row is used.",
        panel=_INPUTS,
    )
    request_batching: bool = setting(
        False,
        "Run the towers of one group once per request, for all candidates together.",
        panel=_REQUESTS,
    )
    request_group: str = setting(
        "user", "That group, as `dmt convert --group` named it.", panel=_REQUESTS
    )
    per_request: Names = setting(
        (),
        "Features that come once per request. Repeatable.",
        metavar="f,g",
        panel=_REQUESTS,
        auto="those of --request-group",
    )
    dense_per_request: bool = setting(
        False, "Dense inputs also come once per request.", panel=_REQUESTS
    )
    copy_weights: bool = setting(
        False,
        "Copy the weights instead of sharing them with the bundle by hard links, which the onnx "
        "package refuses.",
    )
    model_name: str = setting(
        "dmt", "triton: name of the ensemble, and prefix of its parts.", metavar="NAME"
    )
    gpu: bool = setting(False, "Serve on GPUs; onnx and triton also need --out-of-range clip.")
    gpus: int | None = setting(
        None,
        "triton: spread the towers over this many GPUs of a server, each tower on one.",
        ge=1,
        auto="every GPU holds all towers",
    )
    checksums: bool | None = setting(
        None, "Compare all tables with their digests.", auto="if they have up to 4 GiB in total"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        batching = self.request_batching or bool(self.per_request)
        if self.dense_per_request and not batching:
            raise ValueError("--dense-per-request needs --request-batching or --per-request")
        if self.max_auc_loss is not None and self.quantize == "none":
            raise ValueError("--max-auc-loss without quantisation: add --quantize int8")
        if self.gpu and self.format != "pt2" and self.out_of_range == "refuse":
            raise ValueError(
                f"--gpu for {self.format}: on a GPU, ONNX Runtime reads zeros for an id outside "
                "its table and refuses nothing: add --out-of-range clip, or use --format pt2, "
                "whose graphs check ids themselves"
            )
        if self.gpus is not None and not (self.gpu and self.format == "triton"):
            raise ValueError("--gpus: only for --format triton --gpu")
        if batching and self.format != "onnx":
            raise ValueError(
                f"--request-batching for {self.format}: only --format onnx can do it (Triton's "
                "batcher cannot take batches of two sizes in one request)"
            )
        return self


class SelftestConfig(Config):
    """Settings of `dmt selftest`."""

    command: ClassVar[str] = "selftest"

    nproc: int | None = setting(
        None, "Ranks to start on this host.", ge=1, auto="one per GPU, or 2 without GPUs"
    )
    quick: bool = setting(False, "Leave out checkpoints and exports.")
    out: PathValue | None = setting(
        None, "Folder for selftest.json.", metavar="DIR", auto="the current folder"
    )


class UnshardConfig(Config):
    """Settings of `dmt unshard`."""

    command: ClassVar[str] = "unshard"

    out: PathValue = setting(..., "The .safetensors file to write.", metavar="FILE")
    only: Texts = setting(
        (),
        "Write only tensors whose name or path matches; * and ? as in a shell. Repeatable.",
        metavar="PATTERN",
    )
    force: bool = setting(False, "Replace an existing file.")


COMMANDS: Final[tuple[type[Config], ...]] = (
    InspectConfig,
    ConvertConfig,
    PartitionConfig,
    PlanConfig,
    DataConfig,
    ScoreConfig,
    EvaluateConfig,
    VerifyConfig,
    FinetuneConfig,
    ExportConfig,
    UnshardConfig,
    SelftestConfig,
)
"""The settings of every command, in the order of the documentation."""
