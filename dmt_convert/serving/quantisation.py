"""Quantised tables: writing them, and what they cost.

`write_coded` makes one pass over every table, with some rows in memory. The file holds first what
is read by id, tables of one kind side by side, so that tables of one width can be addressed as
one: all `tables.T.quantized`, all `tables.T.scale`, all `tables.T.zero_point` (or all
`tables.T.weight` in fp16), then the tower's module. `measure_quantisation` says before that what
is lost.

Letters: n rows of data, R rows of a table, N embedding dim, W bytes of a coded row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dmt_convert.arrays import AnyArray, Float32Array, IntArray
from dmt_convert.bundle import Bundle, open_bundle_model, read_rows
from dmt_convert.checkpoint import (
    ByteRows,
    TensorInfo,
    gather_rows,
    read_safetensors,
    stream_tensor,
)
from dmt_convert.config import TableCode
from dmt_convert.data import Batch, adapt_batches, open_data, open_inputs, take_rows
from dmt_convert.errors import DataError, ExportError
from dmt_convert.files import TreeDigest, safetensors_header
from dmt_convert.metrics import measure_accuracy, measure_agreement
from dmt_convert.model import RowCode, coded_width, encode_rows, recode_rows, to_half
from dmt_convert.progress import Progress, no_progress
from dmt_convert.serving.checks import generate_batch
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.spec import TableSpec

OnBytes = Callable[[int], None]
_KINDS: Final = ("quantized", "scale", "zero_point")
_MAX_CODERS: Final = 8
"""Threads that code rows; one thread reads for them and one writes."""
GENERATED_ROWS: Final = 4096
"""Rows that are generated where no data is given."""
_BATCH_ROWS: Final = 2048
_SAMPLED_ROWS: Final = 1 << 19
"""Rows of tables that are looked at in all; small tables are looked at whole."""
_LEAST_ROWS: Final = 1024
"""Rows that are looked at of every table, however many tables there are."""
_RUN_ROWS: Final = 64
"""Length of the runs in which rows are sampled: single rows would each cost a page of the disk."""


def coded_bytes(table: TableSpec, code: RowCode) -> int:
    """Bytes that a table takes in a code."""
    if code == "fp16":
        return table.rows * table.dim * 2
    return table.rows * (coded_width(table.dim, code) + 5)


def write_coded(
    target: Path,
    tensors: Mapping[str, TensorInfo],
    code: RowCode,
    on_bytes: OnBytes = lambda count: None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the weights of a tower, its tables coded.

    Args:
        target: Where to; must not exist.
        tensors: The tower's tensors in a bundle, by name.
        code: How to store its tables.
        on_bytes: Told of every piece of a table that was coded, in bytes as they were read.

    Returns:
        Digests of what was written, and of what was read, by tensor.

    Raises:
        ExportError: The code does not take a row.
        OSError: The disk is full, or fails.
    """
    layout = _layout(tensors, code)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        header = safetensors_header(layout, {"format": "pt", "dmt_code": code})
        _write_at(descriptor, memoryview(header), 0)
        os.ftruncate(descriptor, len(header) + sum(info.nbytes for info in layout))
        places = {info.name: info for info in read_safetensors(target).tensors}
        outputs = {name: _Output(descriptor, info) for name, info in places.items()}
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_CODERS)) as coders:
            read = {
                name: _copy(info, outputs[name])
                if _table_of(name) is None
                else _code(info, outputs, code, coders, on_bytes)
                for name, info in tensors.items()
            }
    finally:
        os.close(descriptor)
    return {name: output.finish() for name, output in outputs.items()}, read


def read_ahead(chunks: Iterator[ByteRows], digest: TreeDigest) -> Iterator[ByteRows]:
    """Read and digest the next chunk of a stream while one is worked on."""

    def read() -> ByteRows | None:
        chunk = next(chunks, None)
        if chunk is not None:
            digest.update(chunk)
        return chunk

    with ThreadPoolExecutor(1) as reader:
        ahead: Future[ByteRows | None] = reader.submit(read)
        while (chunk := ahead.result()) is not None:
            ahead = reader.submit(read)
            yield chunk


class _Output:
    """A tensor on its way to its place in the file; runs of zeros become holes."""

    def __init__(self, descriptor: int, info: TensorInfo) -> None:
        (piece,) = info.pieces
        self._descriptor, self._position = descriptor, piece.offset
        self._end = piece.offset + piece.length
        self._digest = TreeDigest()

    def write(self, array: AnyArray) -> None:
        """Append elements."""
        chunk = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._digest.update(chunk)
        if chunk.any():
            _write_at(self._descriptor, chunk.data, self._position)
        self._position += chunk.nbytes

    def finish(self) -> str:
        """Return the digest of the tensor."""
        assert self._position == self._end
        return self._digest.finish()


def _layout(tensors: Mapping[str, TensorInfo], code: RowCode) -> list[TensorInfo]:
    tables = {name: info for name, info in tensors.items() if _table_of(name) is not None}
    rest = [info for name, info in tensors.items() if name not in tables]
    if code == "fp16":
        return [_described(name, "fp16", info.shape) for name, info in tables.items()] + rest
    coded = []
    for kind in _KINDS:
        for name, (rows, dim) in ((name, info.shape) for name, info in tables.items()):
            shape = (rows, coded_width(dim, code)) if kind == "quantized" else (rows,)
            coded.append(
                _described(_coded_name(name, kind), "fp32" if kind == "scale" else "uint8", shape)
            )
    return coded + rest


def _described(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape, pieces=())


def _table_of(name: str) -> str | None:
    """Table whose weight bears a name; None for what is no table."""
    if not name.startswith("tables."):
        return None
    return name.removeprefix("tables.").removesuffix(".weight")


def _coded_name(name: str, kind: str) -> str:
    return f"{name.removesuffix('.weight')}.{kind}"


def _copy(info: TensorInfo, output: _Output) -> str:
    digest = TreeDigest()
    for chunk in read_ahead(stream_tensor(info), digest):
        output.write(chunk)
    return digest.finish()


def _code(
    info: TensorInfo,
    outputs: Mapping[str, _Output],
    code: RowCode,
    coders: ThreadPoolExecutor,
    on_bytes: OnBytes,
) -> str:
    """Code one table; returns the digest of what was read."""
    digest = TreeDigest()
    kinds = ("weight",) if code == "fp16" else _KINDS
    targets = [outputs[_coded_name(info.name, kind)] for kind in kinds]
    row_bytes = info.nbytes // max(1, info.shape[0])
    first = 0
    for rows in read_rows(info, read_ahead(stream_tensor(info), digest)):
        step = -(-len(rows) // _MAX_CODERS)
        parts = [
            coders.submit(_code_part, rows[begin : begin + step], code, info.name, first + begin)
            for begin in range(0, len(rows), step)
        ]
        # all of them, before their rows' buffer is filled anew
        for arrays in [part.result() for part in parts]:
            for target, array in zip(targets, arrays, strict=True):
                target.write(array)
        first += len(rows)
        on_bytes(len(rows) * row_bytes)
    return digest.finish()


def _code_part(rows: Float32Array, code: RowCode, name: str, first: int) -> Sequence[AnyArray]:
    name_row = partial(_name_row, name, first)
    if code == "fp16":
        return (to_half(rows, name_row),)
    coded = encode_rows(rows, code, name_row)
    return coded.quantized, coded.scale, coded.zero_point


def _name_row(name: str, first: int, row: int) -> str:
    return f"row {first + row} of table {_table_of(name)!r}"


def _write_at(descriptor: int, view: memoryview, position: int) -> None:
    while len(view):
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def measure_quantisation(
    bundle: Bundle,
    inputs: GraphInputs,
    code: TableCode,
    data: Path | None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Say how far quantised tables are from the stored ones, and what that does to the logits.

    Args:
        bundle: The bundle; nothing is written.
        inputs: The form of generated rows.
        code: How tables are to be stored.
        data: Rows to score; without, rows are generated.
        progress: Told of step, done and total.

    Returns:
        JSON-able: code; tables: name -> rows, rows_measured, relative_rms (root of squared errors
        over squared values) and max_abs_error; relative_rms over all tables; bytes_before and
        bytes_after of the tables; logits: data, rows, r2 and max_abs_diff. With labels also
        log_loss, and where both classes occur auc and ne, each before, after and lost. Empty
        where nothing is quantised.

    Raises:
        DataError: The data does not fit the model.
        ExportError: The code does not take a row that was looked at.
    """
    if code == "none":
        return {}
    tables = bundle.manifest.model.flat.tables
    return {
        "code": code,
        **_measure_tables(bundle, code, progress),
        "bytes_before": sum(table.nbytes for table in tables),
        "bytes_after": sum(coded_bytes(table, code) for table in tables),
        **_measure_logits(bundle, inputs, code, data, progress),
    }


def check_auc_limit(limit: float | None, code: TableCode, data: Path | None) -> None:
    """Refuse a limit for the lost AUC that cannot be checked.

    Raises:
        ExportError: The limit is not a number >= 0, or labelled data is missing.
        DataError: The data cannot be read.
    """
    if limit is None:
        return
    if not 0 <= limit < math.inf:
        raise ExportError(
            f"--max-auc-loss {limit}",
            expected="the AUC that may be lost: a number >= 0",
            hint="for example --max-auc-loss 0.0005",
        )
    if code != "none" and (data is None or not open_data(data).has_labels):
        raise ExportError(
            "--max-auc-loss without labelled data"
            + ("" if data is None else f": {data} has no labels"),
            expected="rows with labels of 0 or 1, to measure AUC on",
            hint="pass such rows with --data, or omit --max-auc-loss",
        )


def check_auc_lost(quality: Mapping[str, Any], limit: float | None) -> None:
    """Refuse what quantisation costs.

    Args:
        quality: What `measure_quantisation` returned.
        limit: Largest loss of AUC; None for any.

    Raises:
        ExportError: More is lost, or it cannot be told.
    """
    if limit is None or not quality:
        return
    if "auc" not in quality:
        raise ExportError(
            "--max-auc-loss, but all labels of the data are the same",
            expected="rows of both classes, to measure AUC on",
            hint="pass other rows with --data, or omit --max-auc-loss",
        )
    lost = quality["auc"]["lost"]
    if not lost <= limit:
        raise ExportError(
            f"--quantize {quality['code']} loses {lost:.6f} of the AUC "
            f"({quality['auc']['before']:.6f} -> {quality['auc']['after']:.6f})",
            expected=f"at most {limit:g} (--max-auc-loss)",
            hint="use a more exact code (int4 < int8 < fp16 < none), or raise --max-auc-loss",
        )


def _measure_tables(bundle: Bundle, code: RowCode, progress: Progress) -> dict[str, Any]:
    infos = {
        name.removeprefix("tables.").removesuffix(".weight"): info
        for tensors in bundle.towers
        for name, info in tensors.items()
        if name.startswith("tables.")
    }
    share = max(_LEAST_ROWS, _SAMPLED_ROWS // max(1, len(infos)))
    measured, squares, errors = {}, 0.0, 0.0
    for done, (table, info) in enumerate(infos.items()):
        progress("measuring tables", done, len(infos))
        values, square, error = _measure_table(table, info, code, share)
        measured[table] = values
        weight = values["rows"] / values["rows_measured"]
        squares, errors = squares + weight * square, errors + weight * error
    progress("measuring tables", len(infos), len(infos))
    return {"tables": measured, "relative_rms": _relative(errors, squares)}


def _measure_table(
    table: str, info: TensorInfo, code: RowCode, share: int
) -> tuple[dict[str, Any], float, float]:
    """Compare some rows with what their code gives back; returns also sums of squares."""
    square = error = largest = 0.0
    count = 0
    for index in _pick_rows(info.shape[0], share):
        rows = gather_rows(info, index)
        diff = recode_rows(rows, code, partial(_name_sampled_row, table, index)) - rows
        square += float(np.square(rows, dtype=np.float64).sum())
        error += float(np.square(diff, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(diff).max()))
        count += len(index)
    values = {
        "rows": info.shape[0],
        "rows_measured": count,
        "relative_rms": _relative(error, square),
        "max_abs_error": largest,
    }
    return values, square, error


def _name_sampled_row(table: str, index: IntArray, row: int) -> str:
    return f"row {index[row]} of table {table!r}"


def _pick_rows(rows: int, share: int) -> Iterator[IntArray]:
    """Yield the rows to look at: all, or runs of rows, the first and the last row among them."""
    if rows <= share:
        begins = np.arange(0, rows, _RUN_ROWS)
    else:
        # one run in every stretch of the table
        count = share // _RUN_ROWS
        edges = np.linspace(0, rows - _RUN_ROWS, count).astype(np.int64)
        jitter = np.random.default_rng(rows).random(count - 2)
        begins = edges.copy()
        begins[1:-1] += (jitter * (edges[2:] - edges[1:-1] - _RUN_ROWS).clip(0)).astype(np.int64)
    for first in range(0, len(begins), _BATCH_ROWS // _RUN_ROWS):
        some = begins[first : first + _BATCH_ROWS // _RUN_ROWS]
        index = np.unique((some[:, None] + np.arange(_RUN_ROWS)).reshape(-1))
        yield index[index < rows]


def _relative(error: float, square: float) -> float:
    return math.sqrt(error / square) if square > 0 else 0.0


def _measure_logits(
    bundle: Bundle, inputs: GraphInputs, code: RowCode, data: Path | None, progress: Progress
) -> dict[str, Any]:
    models = [open_bundle_model(bundle), open_bundle_model(bundle, code=code)]
    batches, total = _batches(bundle, inputs, data)
    parts: list[list[Float32Array]] = []
    labels: list[Float32Array | None] = []
    done = 0
    with torch.inference_mode():
        for batch in batches:
            parts.append([model(batch).numpy() for model in models])
            labels.append(batch.labels)
            done += batch.num_rows
            progress("measuring logits", done, total)
    if not parts:
        raise DataError(
            f"{data} has no rows",
            expected="at least one row to score",
            hint="pass a data set that has rows",
        )
    before, after = (np.concatenate(logits) for logits in zip(*parts, strict=True))
    agreement = measure_agreement(before, after)
    name = "generated rows" if data is None else data.name
    logits = {
        "data": name,
        "rows": len(before),
        # undefined if all logits are the same
        "r2": agreement.r2 if math.isfinite(agreement.r2) else None,
        "max_abs_diff": agreement.max_abs_diff,
    }
    known = [part for part in labels if part is not None]
    if len(known) < len(labels):
        return {"logits": logits}
    return {"logits": logits, **_compare_accuracy(before, after, np.concatenate(known))}


def _batches(bundle: Bundle, inputs: GraphInputs, data: Path | None) -> tuple[Iterator[Batch], int]:
    spec = bundle.manifest.model.flat
    if data is not None:
        dataset = open_inputs(data, spec, bundle.manifest.inputs)
        batches = dataset.batches(_BATCH_ROWS)
        return adapt_batches(dataset, spec, batches), dataset.num_rows
    every = replace(inputs, per_request=(), dense_per_request=False)
    batch = generate_batch(spec, every, GENERATED_ROWS, seed=0)
    slices = range(0, GENERATED_ROWS, _BATCH_ROWS)
    return (take_rows(batch, slice(a, a + _BATCH_ROWS)) for a in slices), GENERATED_ROWS


def _compare_accuracy(
    before: Float32Array, after: Float32Array, labels: Float32Array
) -> dict[str, Any]:
    old, new = measure_accuracy(before, labels), measure_accuracy(after, labels)
    pairs = {
        "auc": (old.auc, new.auc),
        "log_loss": (old.log_loss, new.log_loss),
        "ne": (old.ne, new.ne),
    }
    return {
        # of a loss, what is lost is what it grows by
        key: {"before": a, "after": b, "lost": a - b if key == "auc" else b - a}
        for key, (a, b) in pairs.items()
        if a is not None and b is not None
    }
