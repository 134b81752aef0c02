"""Files written by `torch.save`: state dicts, pickled modules, shards of one rank each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.checkpoint.inert_objects import TensorRef
from dmt_convert.checkpoint.rank_files import join_rank_files
from dmt_convert.checkpoint.safe_unpickler import refuse_global
from dmt_convert.checkpoint.sharded_tensor import ShardedRef
from dmt_convert.checkpoint.torch_file import is_torch_file, open_torch_file

_RUNNERS: Final = (
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "importlib.",
    "nt.",
    "os.",
    "posix.",
    "runpy.",
    "shutil.",
    "socket.",
    "subprocess.",
    "sys.",
)
"""Names that no trainer pickles, and that run commands or touch files."""

_log = logging.getLogger(__name__)


class TorchReader:
    """`.pt`, `.pth` and any other file that `torch.save` wrote; never runs what it reads.

    Where a file holds one rank's shards, the files of the other ranks are found beside it.
    """

    format = "torch"

    def can_read(self, path: Path) -> bool:
        """Tell by the first bytes: a zip archive, or a pickle."""
        return is_torch_file(path)

    def read(self, path: Path) -> FlatCheckpoint:
        """Read the pickle; storages stay on disk.

        Raises:
            CheckpointError: The file is damaged, holds nothing but objects that are not read, or
                is one of several ranks' and others are missing.
        """
        file = open_torch_file(path)
        content = file.content
        if not content.tensors and file.unknown:
            raise refuse_global(path, file.unknown[0])
        for name in file.unknown:
            if name.startswith(_RUNNERS):
                _log.warning(
                    "%s names %s, which torch.load would run and dmt does not: do not trust it",
                    path,
                    name[:200],
                )
        if any(isinstance(tensor, ShardedRef) for tensor in content.tensors.values()):
            return join_rank_files(file, format_name=self.format)
        tensors = tuple(
            TensorInfo(
                name=keys[-1] if keys else "",
                container=keys[:-1],
                dtype=tensor.dtype,
                shape=tensor.shape,
                pieces=(file.piece(tensor, name=".".join(keys)),),
            )
            for keys, tensor in content.tensors.items()
            if isinstance(tensor, TensorRef)
        )
        return FlatCheckpoint(
            source=path,
            format=self.format,
            tensors=tensors,
            ordered=True,
            files=(path,),
            scalars=content.scalars,
            unread=content.unread,
            table_configs=tuple(content.table_configs),
            documents=content.documents,
        )
