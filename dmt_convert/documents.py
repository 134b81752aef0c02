"""What commands hand on to each other, as typed data: `dmt.json`, `plan.json`, `export.json`.

A document is a frozen dataclass whose fields are the keys of a JSON object. `to_json` writes one.
`Layout.read` reads one: pydantic checks every value in the file, because the file may come from
anywhere. The dataclass then checks in `__post_init__` how its values fit together.

Each kind of document has a schema version. A version may add keys that older readers can ignore;
a change that older readers would misunderstand raises it. Hence:

- a key that is missing gets the default of its field, if it has one;
- an unknown key is ignored, except in the description of a model, which must be understood whole;
- a document with a newer schema version is refused;
- a document may have a `digest` of all its other keys, or a `model_digest` of its key `model`: then
  one that was damaged or edited there is refused.

The three documents themselves live with what they describe: `bundle.Manifest`,
`placement.TowerPlan`, `serving.ExportManifest`. Their parts are here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from dmt_convert import __version__
from dmt_convert.errors import BundleError, DmtError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

Content = TypeVar("Content")

OMITTED_IF_NONE: Final[Mapping[str, bool]] = {"omitted_if_none": True}
"""Metadata of a field whose key is left out while its value is None."""
OMITTED_IF_EMPTY: Final[Mapping[str, bool]] = {"omitted_if_empty": True}
"""Metadata of a field whose key is left out while its value is empty."""
MODEL_CONFIG: Final[Mapping[str, str]] = {"extra": "forbid"}
"""`__pydantic_config__` of data in which an unknown key cannot be ignored."""

FAIR_R2: Final = 0.98
"""R^2 of logits from which a converted model is a fair start; a poorer one is announced first."""

MAX_SETTINGS_BYTES: Final = 16 << 20
"""Largest JSON that people write: settings, towers."""
MAX_YAML_BYTES: Final = 2 << 20
"""Largest YAML; a parser takes a second per megabyte."""
_MAX_BYTES: Final = 512 << 20
_MAX_DETAILS: Final = 20
_MAX_SHOWN: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """What wrote a document."""

    name: str = "dmt-convert"
    """Name of the distribution."""
    version: str = __version__
    """Its version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file of a checkpoint."""

    name: str
    """Its name, without folders."""
    bytes: int
    """Its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The flat checkpoint that a bundle was made of."""

    format: str = "unknown"
    """Format of the checkpoint, such as `torch`."""
    name: str = ""
    """Name of its file or folder."""
    files: tuple[SourceFile, ...] = ()
    """Its files."""
    bytes: int = 0
    """Size of its tensors."""
    digest: str = ""
    """Digest of the flat model's tables; empty until they have been read."""
    dense_digest: str = field(default="", metadata=OMITTED_IF_EMPTY)
    """Digest of its other weights; empty in bundles of versions that did not record it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLoadRecord:
    """What one tower costs."""

    features: int
    """Number of features."""
    table_bytes: int
    """Size of its tables as stored."""
    lookups: float | None = None
    """Ids looked up per sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRecord:
    """How the towers were chosen."""

    strategy: str = "file"
    """loss, coherent, diverse, round-robin or file."""
    search: str = ""
    """loss: what was computed, and from what rows."""
    lost: float | None = None
    """loss: the part of the logits' variance that linear codes lose, to first order."""
    elements: int | None = None
    """loss: elements that all towers were planned to emit together."""
    affinity: str | None = None
    """How affinity was measured; None if it was not."""
    within_affinity: float | None = None
    """Mean affinity of two features of one tower."""
    between_affinity: float | None = None
    """Mean affinity of two features of different towers."""
    loads: tuple[TowerLoadRecord, ...] = ()
    """What each tower costs."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Group -> its features; features of different groups share no tower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRecord:
    """Which columns of a data set feed a model, and what is done to their values."""

    data: str = ""
    """Name of the data set; empty if the user named the columns."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Feature -> the column that feeds it; empty if that is not known."""
    dense: tuple[str, ...] | None = None
    """Columns that feed the dense inputs, in their order; none of them if the model's one input is
    the constant 1.0. None if they are not known."""
    dense_form: str | None = None
    """In which form dense inputs are fed: none, log3, log1p; or stored, if all that is known is
    that they are fed as the files hold them. None if not even that is known."""
    hashed: bool | None = None
    """Whether ids are taken modulo the tables' rows. None if that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentRecord:
    """The bundle that was fine-tuned."""

    name: str
    """Name of its folder."""
    digest: str
    """Digest of all its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingDataRecord:
    """The rows of a fine-tuning run."""

    train: str
    """Description of the training rows."""
    train_rows: int
    """Number of training rows."""
    valid: str
    """Description of the validation rows."""
    valid_rows: int
    """Number of validation rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """How good a model was on the validation rows. None stands for a value that is not finite."""

    step: int
    """Steps taken; 0 is the start."""
    auc: float | None
    """Area under the ROC curve; None if the labels have one class only."""
    ne: float | None
    """Normalised entropy; None if the labels have one class only."""
    log_loss: float | None
    """Mean negative log likelihood, in nats."""
    train_loss: float | None = None
    """Mean training loss since the evaluation before, in nats; None at the start."""
    gain: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    """The start's log loss less this one, in nats; None at the start."""
    gain_error: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Standard error of `gain`, from the differences row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """The flat model that taught beside the labels."""

    name: str
    """Name of its file or folder."""
    digest: str
    """Digest of its tables."""
    dense_digest: str = field(default="", metadata=OMITTED_IF_EMPTY)
    """Digest of its other weights; empty in bundles of versions that did not record it."""
    weight: float
    """Its weight; the labels have the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRecord:
    """How a bundle was fine-tuned."""

    parent: ParentRecord
    """The bundle that was fine-tuned."""
    data: TrainingDataRecord
    """The rows."""
    teacher: TeacherRecord | None = field(default=None, metadata=OMITTED_IF_NONE)
    """What taught beside the labels; None: nothing did."""
    settings: Mapping[str, Any]
    """Every setting of the run."""
    steps: int
    """Steps taken."""
    best_step: int
    """The step whose weights were written."""
    before: EvaluationRecord
    """The parent."""
    after: EvaluationRecord
    """The new bundle, as stored."""
    history: tuple[EvaluationRecord, ...] = ()
    """All evaluations of the run."""
    notes: tuple[str, ...] = ()
    """What a user should know."""
    previous: FinetuneRecord | None = None
    """The parent's own record, if it was fine-tuned too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialisation:
    """How the weights outside the tables were set."""

    method: str = "unknown"
    """Name of the method."""
    sample: str = "unknown"
    """Description of the sample that it was fitted to."""
    notes: tuple[str, ...] = ()
    """One line for each part of the model."""
    finetune: FinetuneRecord | None = field(default=None, metadata=OMITTED_IF_NONE)
    """How the bundle was fine-tuned afterwards; None if it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """What became of the optimizer state of the tables."""

    accumulators: int = 0
    """Tables whose accumulator is in the bundle."""
    averaged: int = 0
    """Tables of these whose checkpoint had an accumulator per element, not per row."""
    notes: tuple[str, ...] = ()
    """What a user should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One model on the held-out rows. None stands for a value that is unknown or not finite."""

    name: str
    """flat, passthrough, rounded, closed form, distilled, random initialisation; fine-tuned, which
    was measured on the validation rows of its training instead."""
    r2: float | None = None
    """1 - squared error of the logits / their variance in the flat model."""
    max_abs_diff: float | None = None
    """Largest absolute difference of logits from the flat model."""
    rank_correlation: float | None = None
    """Spearman's rho with the flat model's logits."""
    auc: float | None = None
    """Area under the ROC curve, if labels are known."""
    log_loss: float | None = None
    """Mean negative log likelihood in nats, if labels are known."""
    ne: float | None = None
    """Normalised entropy, if labels are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a converted model agrees with the flat one."""

    rows: tuple[QualityRow, ...] = ()
    """The flat model, the converted one, then yardsticks."""
    data: str = ""
    """Description of the held-out rows."""
    count: int = 0
    """Number of held-out rows."""
    labelled: bool = False
    """Whether they have labels."""

    @property
    def converted(self) -> QualityRow:
        """The row of the model that was written: the last one before the yardstick."""
        own = [row for row in self.rows[1:] if row.name != "random initialisation"]
        return own[-1]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return to_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """What some bytes between hosts buy, on held-out rows."""

    name: str
    """Tower modules and the precision of what they send; `flat` and a precision."""
    compression: float
    """Bytes as float32, over bytes: what was asked of `--compression`."""
    bytes: int
    """Bytes that cross hosts per sample."""
    r2: float | None
    """R^2 of the logits with the flat model's; None if it is not finite."""
    auc_lost: float | None = None
    """AUC of the flat model, minus its own; None without labels."""
    auc_bound: float | None = None
    """What is lost at most, with 95 % confidence: DeLong's paired comparison."""
    flops: float = 0.0
    """What its dense parts compute per sample."""

    @property
    def is_fair(self) -> bool:
        """Whether it is a fair start."""
        return self.r2 is not None and self.r2 >= FAIR_R2

    @property
    def advice(self) -> str:
        """Say how it is had, and how good it is."""
        r2 = "unknown" if self.r2 is None else f"{self.r2:.3f}"
        return (
            f"--compression {self.compression:g} has R^2 {r2} with {self.bytes:,} bytes per sample"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """What fewer bytes between hosts cost: the closed form at several compressions."""

    points: tuple[FrontierPoint, ...] = ()
    """Towers, most bytes first; the first one is exact."""
    flat: tuple[FrontierPoint, ...] = ()
    """The flat model, its embeddings sent in fp32, bf16 and int8."""
    data: str = ""
    """Description of the held-out rows."""
    count: int = 0
    """Number of held-out rows."""
    judged: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Rows by which AUC was compared, the held-out ones among them; None: by these alone."""
    labelled: bool = False
    """Whether AUC is known."""
    chosen: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Compression of the point that `--max-auc-loss` or `--min-r2` chose; None: not asked for."""
    reason: str = ""
    """Why that one."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<Frontier of {len(self.points)} points on {self.count} held-out rows>"

    @property
    def rows(self) -> str:
        """Say how many rows were measured."""
        text = f"{self.count:,} held-out rows"
        return text if self.judged is None else f"{text} (AUC: {self.judged:,} rows)"

    @property
    def chosen_point(self) -> FrontierPoint | None:
        """The point that was chosen."""
        return next((each for each in self.points if each.compression == self.chosen), None)

    @property
    def fewest_fair(self) -> FrontierPoint | None:
        """The point with the fewest bytes that is a fair start."""
        fair = [each for each in self.points if each.is_fair]
        return min(fair, key=lambda each: each.bytes, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return to_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCheck:
    """One check of one graph."""

    part: str
    """`whole`, `tower_000`, ..., `over_arch`, or `joined`: the towers' outputs into over_arch."""
    what: str
    """What it ran on, or what it must refuse."""
    rows: int
    """Rows compared."""
    max_abs_diff: float | None
    """Largest absolute difference from the model; None for a refusal."""
    limit: float | None
    """Largest difference allowed; None for a refusal."""
    passed: bool
    """Whether it held."""
    found: str = ""
    """What went wrong, if something did."""
    ran_on: str = field(default="", metadata=OMITTED_IF_EMPTY)
    """What ran the graphs: cpu, cuda:0, or ONNX Runtime's provider; empty in early versions."""

    @property
    def line(self) -> str:
        """One line for people."""
        verdict = "ok" if self.passed else f"FAILED {self.found}".rstrip()
        if self.max_abs_diff is None:
            return f"{self.part}, {self.what}: {verdict}"
        return (
            f"{self.part}, {self.what}: max |diff| {self.max_abs_diff:.2g} of {self.limit:.2g} "
            f"allowed, {self.rows} rows: {verdict}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A weights file of a bundle or an export."""

    bytes: int
    """Size of the file."""
    digests: Mapping[str, str]
    """Tensor -> its digest."""


def read_whole(path: Path, most_bytes: int) -> bytes:
    """Read a file that must fit in memory; a pipe is not waited for, unless it is an open one.

    Args:
        path: The file.
        most_bytes: How large it may be.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger, or no file.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        # `--config <(make-settings)` of a shell
        piped = stat.S_ISFIFO(found.st_mode) and path.parent in (Path("/dev/fd"), Path("/dev"))
        if not stat.S_ISREG(found.st_mode) and not piped:
            raise ValueError("not a regular file")
        os.set_blocking(file.fileno(), True)
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes >> 20} MiB")
    return content


def read_json(path: Path, most_bytes: int = MAX_SETTINGS_BYTES) -> Any:
    """Read JSON that people may have written.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON, too large, or nested too deeply.
    """
    try:
        return json.loads(read_whole(path, most_bytes))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def to_text(value: object) -> str:
    """Write a document as JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def digest_document(value: Mapping[str, Any]) -> str:
    """Return the digest of a JSON object without its own key `digest`, however it is laid out."""
    content = {key: part for key, part in value.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def to_json(document: object) -> dict[str, Any]:
    """Return the JSON-able form of a dataclass: its fields by name.

    JSON has no NaN and no infinity: a number that is not finite becomes None.
    """
    value: dict[str, Any] = _plain(document)
    return value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {
            part.name: _plain(found)
            for part in fields(value)
            if not _is_omitted(found := getattr(value, part.name), part.metadata)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_omitted(value: object, metadata: Mapping[Any, Any]) -> bool:
    return (value is None and "omitted_if_none" in metadata) or (
        not value and "omitted_if_empty" in metadata
    )


def from_json(
    kind: type[Content], value: object, *, error: type[DmtError] = BundleError
) -> Content:
    """Read what `to_json` made of a dataclass.

    Args:
        kind: The dataclass.
        value: Parsed JSON.
        error: Kind of error to raise.

    Raises:
        DmtError: A value is missing, has the wrong type, or contradicts others. All that pydantic
            finds wrong is listed.
    """
    try:
        return _validate(kind, json.dumps(value))
    except _InvalidError as found:
        raise error(
            f"the description of a {kind.__name__} is damaged",
            expected="the keys that this version of dmt-convert writes",
            hint="make it again with dmt-convert",
            details=shorten(found.problems),
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Generic[Content]):
    """One kind of document: what it holds, and what is said when it cannot be read."""

    content: type[Content]
    """The dataclass."""
    version: int
    """The newest schema version that can be read."""
    error: type[DmtError]
    """Kind of error to raise."""
    writer: str
    """The command that writes such documents."""
    remedy: str
    """What to do about a damaged one."""

    def read(self, path: Path, *, absent: DmtError | None = None) -> Content:
        """Read a document.

        Args:
            path: The file.
            absent: What to raise if there is no file.

        Raises:
            DmtError: The file cannot be read, is damaged, or has a newer schema version.
        """
        try:
            text = read_whole(path, _MAX_BYTES)
        except OSError as error:
            if absent is not None and isinstance(error, FileNotFoundError | NotADirectoryError):
                raise absent from None
            raise self._damaged(str(path), [error.strerror or str(error)]) from None
        except ValueError as error:
            raise self._damaged(str(path), [str(error)]) from None
        return self.parse(text, str(path))

    def parse(self, text: str | bytes, name: str) -> Content:
        """Read the text of a document.

        Args:
            text: JSON.
            name: What to call it in errors.

        Raises:
            DmtError: It is damaged, or has a newer schema version.
        """
        try:
            self._check_version(_validate(_Versioned, text).schema_version, name)
            content = _validate(self.content, text)
        except _InvalidError as error:
            raise self._damaged(name, error.problems) from None
        self._check_digest(text, name)
        return content

    def _check_digest(self, text: str | bytes, name: str) -> None:
        try:
            value = json.loads(text)
            stated = {"digest": value, "model_digest": value.get("model", {})}
            wrong = [
                key
                for key, part in stated.items()
                if value.get(key) and digest_document(part) != value[key]
            ]
        except (ValueError, RecursionError):  # such as numbers of thousands of digits
            wrong = ["digest"]
        if wrong:
            raise self.error(
                f"{name} was changed since it was written: it does not fit its own {wrong[0]}",
                expected="the document as it was written",
                hint=f"{self.remedy}; if you edited it on purpose, remove its key `{wrong[0]}`",
            )

    def _check_version(self, found: int, name: str) -> None:
        if found > self.version:
            raise self.error(
                f"{name} has schema version {found}, which is newer than this dmt-convert",
                expected=f"schema version {self.version} or older",
                hint="upgrade dmt-convert to the version that wrote it, or a newer one",
            )
        if found < 1:
            raise _InvalidError([f"schema_version is {found}, not at least 1"])

    def _damaged(self, name: str, problems: Sequence[str]) -> DmtError:
        return self.error(
            f"{name} cannot be read",
            expected=f"the JSON that `{self.writer}` writes",
            hint=self.remedy,
            details=shorten(problems),
        )


def shorten(problems: Sequence[str]) -> list[str]:
    """Keep the first problems, and count the rest."""
    rest = len(problems) - _MAX_DETAILS
    return [*problems[:_MAX_DETAILS], *([f"and {rest} more"] if rest > 0 else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Versioned:
    """Any document, before anything but its version is known."""

    schema_version: int


class _InvalidError(Exception):
    """A text that is not what it should be."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(*problems)
        self.problems = problems


def _validate(kind: type[Content], text: str | bytes) -> Content:
    from pydantic import ValidationError

    adapter: TypeAdapter[Content] = _adapter(kind)  # type: ignore[arg-type]  # is hashable
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise _InvalidError([_problem(problem) for problem in found]) from None
    except DmtError as error:
        raise _InvalidError([error.found, *error.details]) from None
    # `__post_init__` computes with values that may be absurd, such as widths of 0
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise _InvalidError([f"values do not fit together: {error!r}"]) from None


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _problem(error: ErrorDetails) -> str:
    """Say what pydantic found wrong: where, what is there, what should be."""
    kind, place, message = error["type"], _place(error["loc"]), error["msg"]
    if kind == "missing":
        return f"{place} is missing"
    if kind == "unexpected_keyword_argument":
        return f"{place} is not known"
    if not message.startswith("Input should be "):
        return f"{place}: {message}" if error["loc"] else message
    shown = json.dumps(error["input"], default=repr)
    if len(shown) > _MAX_SHOWN:
        shown = shown[: _MAX_SHOWN - 3] + "..."
    return f"{place} is {shown}, not {message.removeprefix('Input should be ')}"


def _place(parts: Sequence[int | str]) -> str:
    """Write the place of a value as JavaScript would: `tables[3].shards[0].rank`."""
    text = ""
    for part in parts:
        if isinstance(part, str) and part.isidentifier():
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text or "the document"
