"""`dmt unshard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dmt_convert as dmt
from dmt_convert.config import UnshardConfig

from .console import Output, grid, human_bytes
from .options import command

if TYPE_CHECKING:
    from dmt_convert.files import Unsharded

NAME = "unshard"
_LISTED = 20


@command(UnshardConfig)
def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    *,
    config: UnshardConfig,
    output: Output,
) -> None:
    """Write the tensors of any checkpoint to one plain `.safetensors` file.

    Shards of all ranks are joined, names stay the trainer's, bytes stay as they are. Tables are
    streamed, so memory does not grow with their size. No code in the checkpoint is run.

    For example:

    `dmt unshard snapshot/ --out model.safetensors`

    `dmt unshard ckpt.pt --out tables.safetensors --only '*embedding_bags*'`
    """
    with output.progress() as progress:
        done = dmt.unshard(source, config=config, progress=progress)
    output.result(_as_json(done), grid(_rows(done)))


def _as_json(done: Unsharded) -> dict[str, Any]:
    return {
        "path": str(done.path),
        "format": done.format,
        "bytes": done.nbytes,
        "tensors": {
            tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape)}
            for tensor in done.tensors
        },
        "left_out": {
            "tensors": list(done.passed_over),
            "scalars": done.scalars,
            "objects": dict(done.unread),
        },
    }


def _rows(done: Unsharded) -> list[tuple[str, str]]:
    unread = [f"{path}: {what}" for path, what in done.unread.items()]
    more = len(unread) - _LISTED
    return [
        ("written", f"{done.path} ({len(done.tensors)} tensors, {human_bytes(done.nbytes)})"),
        ("read", f"a checkpoint of the container {done.format}"),
        ("left out", f"{len(done.passed_over)} tensors, {done.scalars} plain values"),
        *(("left out", line) for line in unread[:_LISTED]),
        *((("left out", f"{more} more objects"),) if more > 0 else ()),
    ]
