"""A model's tables into memory, where they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, stream_tensor, to_fp32
from dmt_convert.errors import ConfigError
from dmt_convert.model import DmtModel, FlatModel
from dmt_convert.spec import ModelSpec
from dmt_convert.training.finetune_config import FinetuneConfig
from dmt_convert.training.optimizers import state_bytes
from dmt_convert.training.table_store import TableStore
from dmt_convert.training.trainable_model import TrainableModel

_SCRATCH_BYTES: Final = 5
"""Per row: a slot and a flag of the store."""
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def load_bundle(
    bundle: Bundle, on_bytes: Callable[[int], None] = lambda count: None
) -> TrainableModel:
    """Read a bundle into memory; fp16 and bf16 tables become fp32.

    Where the bundle holds accumulators of squared gradients, Adagrad will go on from them.

    Args:
        bundle: The bundle.
        on_bytes: Told of every piece read, for progress.

    Raises:
        BundleError: The bundle is not what its manifest says.
    """
    module, infos = open_bundle_model(bundle), table_infos(bundle)
    return load_tables(module, infos, on_bytes, accumulators=bundle.accumulators)


def load_tables(
    module: DmtModel | FlatModel,
    infos: Mapping[str, TensorInfo],
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    accumulators: Mapping[str, TensorInfo] | None = None,
) -> TrainableModel:
    """Read tables into memory, for a model that looks them up on disk.

    Args:
        module: The model. It keeps its lookups, and shares its other weights with the result.
        infos: Table -> its tensor in a file; fp16 and bf16 become fp32.
        on_bytes: Told of every piece read, for progress.
        accumulators: Table -> its accumulator in a file, shape (rows, 1). Adagrad goes on from
            it, and reads it when training begins.
    """
    spec = module.spec.flat if isinstance(module, DmtModel) else module.spec
    store = TableStore(spec, accumulators)
    for name, info in infos.items():
        target = store.table(name).view(-1)
        done = 0
        for chunk in stream_tensor(info):
            values = np.array(to_fp32(chunk.reshape(1, -1), info.dtype)).reshape(-1)
            target[done : done + len(values)] = torch.from_numpy(values)
            done += len(values)
            on_bytes(chunk.nbytes)
        assert done == len(target), (name, done, len(target))
    return TrainableModel(module=module, store=store)


def table_infos(bundle: Bundle) -> dict[str, TensorInfo]:
    """Table -> its tensor in the bundle's files."""
    return {
        name.removeprefix("tables.").removesuffix(".weight"): info
        for tensors in bundle.towers
        for name, info in tensors.items()
        if name.startswith("tables.")
    }


def needed_bytes(spec: ModelSpec, config: FinetuneConfig, num_rows: int) -> dict[str, int]:
    """Estimate what training keeps in memory, by purpose.

    Args:
        spec: The flat model's spec.
        config: What training is asked for.
        num_rows: Training rows.

    Returns:
        tables; optimizer state; best rows: what a row held in the best state, for rows that
        changed since (at most one per id trained on, taking one id per feature and row), with
        Adagrad's sums.
    """
    rows = sum(table.rows for table in spec.tables)
    elements = sum(table.rows * table.dim for table in spec.tables)
    looked_up = config.total_steps(num_rows) * config.batch_size
    changed = 0
    for table in spec.tables:
        features = sum(feature.table == table.name for feature in spec.features)
        touched = min(table.rows, features * looked_up)
        changed += touched * table.dim * 4
        if config.table_optimizer in ("rowwise-adagrad", "adagrad"):
            changed += state_bytes(config, touched, touched * table.dim)
    return {
        "tables": elements * 4 + rows * _SCRATCH_BYTES,
        "optimizer state": state_bytes(config, rows, elements),
        "best rows": changed if config.table_lr > 0 else 0,
    }


def check_memory(spec: ModelSpec, config: FinetuneConfig, num_rows: int) -> None:
    """Refuse a model whose tables and their optimizer state do not fit into memory.

    Args:
        spec: The flat model's spec.
        config: What training is asked for.
        num_rows: Training rows.

    Raises:
        ConfigError: They do not.
    """
    needed, available = needed_bytes(spec, config, num_rows), available_bytes()
    total = sum(needed.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.items())
    raise ConfigError(
        f"training needs {_gib(total)} of memory ({parts})",
        expected=f"at most the {_gib(available)} that are free",
        hint="use --table-optimizer sgd or rowwise-adagrad, which keep least, or a machine with "
        "more memory",
    )


def available_bytes() -> int | None:
    """Memory that can still be had, in bytes: the machine's, and the control group's if limited."""
    found = []
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
