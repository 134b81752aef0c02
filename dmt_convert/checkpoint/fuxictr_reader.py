"""Folders of FuxiCTR: a `.model` file of torch.save, `feature_map.json`, `params.json`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.documents import read_document
from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint
from dmt_convert.checkpoint.torch_reader import TorchReader
from dmt_convert.errors import CheckpointError

_MAP: Final = "feature_map.json"
_PARAMS: Final = "params.json"


class FuxictrReader:
    """A folder that holds a `.model` file and the `feature_map.json` of its data, or that file."""

    format = "fuxictr"

    def can_read(self, path: Path) -> bool:
        """Tell by the names."""
        if path.is_dir():
            return (path / _MAP).is_file() and any(path.glob("*.model"))
        return (
            path.suffix == ".model"
            and (path.parent / _MAP).is_file()
            and TorchReader().can_read(path)
        )

    def read(self, path: Path) -> FlatCheckpoint:
        """Read headers and descriptions.

        Raises:
            CheckpointError: The folder holds several checkpoints, or a file is damaged.
        """
        folder = path if path.is_dir() else path.parent
        models = sorted(folder.glob("*.model")) if path.is_dir() else [path]
        if len(models) != 1:
            raise CheckpointError(
                f"{folder} holds {len(models)} checkpoints: "
                + ", ".join(model.name for model in models[:5]),
                expected="one .model file",
                hint="name the file itself",
            )
        if not TorchReader().can_read(models[0]):
            raise CheckpointError(
                f"{models[0]} is no file of torch.save",
                expected="a checkpoint of FuxiCTR",
                hint="the file is damaged; copy it again",
            )
        checkpoint = TorchReader().read(models[0])
        described = [folder / name for name in (_MAP, _PARAMS) if (folder / name).is_file()]
        return replace(
            checkpoint,
            source=path,
            format=self.format,
            files=(*checkpoint.files, *described),
            documents={
                **checkpoint.documents,
                **{file.name: read_document(file) for file in described},
            },
        )
