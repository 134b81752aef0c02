"""`dmt unshard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, QuietOption, grid, human_bytes, make_output

if TYPE_CHECKING:
    from dmt_convert.files import Unsharded

NAME = "unshard"
_LISTED = 20


def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    out: Annotated[Path, typer.Option("--out", help="The .safetensors file to write.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="Write tensors whose name or path fits; repeatable. * and ? as in a shell.",
            metavar="PATTERN",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the tensors of any checkpoint to one plain `.safetensors` file.

    Shards of all ranks are joined, names stay the trainer's, bytes stay as they are. Tables are
    streamed: memory stays small whatever their size. Nothing that the checkpoint pickles is run.

    For example:

    `dmt unshard snapshot/ --out model.safetensors`

    `dmt unshard ckpt.pt --out tables.safetensors --only '*embedding_bags*'`
    """
    from dmt_convert.files import unshard_checkpoint

    output = make_output(json_=json_, quiet=quiet)
    with output.progress() as progress:
        done = unshard_checkpoint(source, out, only=only or (), force=force, progress=progress)
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
