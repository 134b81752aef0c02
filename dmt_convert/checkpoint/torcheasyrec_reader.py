"""Folders of TorchEasyRec: `pipeline.config` beside `model.ckpt-<step>/{model,optimizer}`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.dcp_reader import DcpPairReader, DcpReader
from dmt_convert.checkpoint.documents import read_document
from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint

_CONFIG: Final = "pipeline.config"
_STEP: Final = re.compile(r"model\.ckpt-(\d{1,18})")


class TorchEasyRecReader:
    """A model folder, of which the newest checkpoint is taken, or one checkpoint in it."""

    format = "torcheasyrec"

    def can_read(self, path: Path) -> bool:
        """Tell by the names."""
        return path.is_dir() and (_newest(path) is not None or _inside(path) is not None)

    def read(self, path: Path) -> FlatCheckpoint:
        """Read the metadata of the weights and of the optimizer, and `pipeline.config`.

        Raises:
            CheckpointError: The checkpoint is incomplete or damaged.
        """
        step = _newest(path) or _inside(path)
        assert step is not None
        # without its .metadata the save did not finish, which the reader of DCP says
        whole = (step / "model" / ".metadata").is_file()
        checkpoint = DcpPairReader().read(step) if whole else DcpReader().read(step / "model")
        config = step.parent / _CONFIG
        described = [config] if config.is_file() else []
        return replace(
            checkpoint,
            source=step,
            format=self.format,
            files=(*checkpoint.files, *described),
            documents={file.name: read_document(file) for file in described},
        )


def _newest(path: Path) -> Path | None:
    """Return the checkpoint with the largest step in a model folder."""
    steps = {
        int(match[1]): folder
        for folder in path.glob("model.ckpt-*")
        if (match := _STEP.fullmatch(folder.name)) and (folder / "model").is_dir()
    }
    return steps[max(steps)] if steps else None


def _inside(path: Path) -> Path | None:
    """Return the checkpoint that a folder is, or whose weights it holds."""
    path = path.resolve()
    for folder in (path, path.parent) if path.name == "model" else (path,):
        if _STEP.fullmatch(folder.name) and (folder / "model").is_dir():
            return folder
    return None
