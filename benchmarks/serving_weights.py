"""The one file of weights that all variants of the serving benchmark map, and its int8 copy.

Every process maps the same file, so that 13 GB of tables are in memory once. Random bytes, not
holes: holes are all the same page, which would lie in the processor's cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from serving_case import DIM, FEATURES, FUNCTIONS, MODELS, TOWERS, tower_spec
from torch import Tensor, nn

from dmt_convert.bundle.bundle_model import split_state
from dmt_convert.model import DmtModel, DmtSpec

WEIGHTS: Final = "weights.safetensors"
INT8_WEIGHTS: Final = "weights.int8"
_ALIGNMENT: Final = 4096
_BLOCK: Final = 1 << 24
_INT8_ROWS: Final = 1 << 17

Shapes = Mapping[str, tuple[int, ...]]


def table_name(index: int) -> str:
    """Name of a table's tensor."""
    return f"tables.t_f{index:02d}.weight"


def write_weights(path: Path, rows: int, seed: int) -> None:
    """Write random tables, and the weights of all models and compressions behind them."""
    small = small_weights(rows, seed)
    shapes: dict[str, tuple[int, ...]] = {table_name(i): (rows, DIM) for i in range(FEATURES)}
    shapes |= {name: array.shape for name, array in small.items()}
    text = _header(shapes)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(FEATURES):
            rng = np.random.Generator(np.random.SFC64([seed, i]))
            left = rows * DIM
            while left:
                block = rng.random(min(left, _BLOCK), dtype=np.float32)
                block -= np.float32(0.5)
                file.write(block.data)
                left -= len(block)
        for array in small.values():
            file.write(np.ascontiguousarray(array).tobytes())
    unfinished.rename(path)


def _header(shapes: Shapes) -> bytes:
    entries: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    return text + b" " * (-(8 + len(text)) % _ALIGNMENT)


def small_weights(rows: int, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Weights beside tables, by `model.function.name`; those of a tower after its name."""
    torch.manual_seed(seed)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for model in MODELS:
        for function in FUNCTIONS:
            spec = tower_spec(model, rows, function, TOWERS)
            built = DmtModel(spec, [nn.Identity() for _ in spec.towers])
            for layer in built.modules():
                if isinstance(layer, nn.Linear):  # so that no layer makes its input fade
                    nn.init.kaiming_normal_(layer.weight)
            split = split_state(built)
            found |= {f"{model}.{function}.{name}": array for name, array in split.dense.items()}
            for t, module in enumerate(split.modules):
                stem = f"{model}.{function}.tower_{t:03d}.tower_module"
                found |= {f"{stem}.{name}": array for name, array in module.items()}
    return found


class SharedWeights:
    """The file of weights, mapped.

    Args:
        folder: Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(length))
        self._begin = 8 + length
        self._map = np.memmap(self.path, dtype=np.uint8, mode="c")  # torch wants it writable

    @property
    def rows(self) -> int:
        """Rows of every table."""
        return int(self._entries[table_name(0)]["shape"][0])

    def tensor(self, name: str) -> Tensor:
        """Share a tensor's bytes."""
        entry = self._entries[name]
        begin, end = (self._begin + offset for offset in entry["data_offsets"])
        data = torch.from_numpy(self._map[begin:end])
        return data.view(torch.float32).reshape(entry["shape"])

    def all_tables(self) -> Tensor:
        """Share the bytes of all tables, which lie one behind the other."""
        end = self._begin + self._entries[table_name(FEATURES - 1)]["data_offsets"][1]
        return torch.from_numpy(self._map[self._begin : end])

    def names(self, prefix: str) -> list[str]:
        """What follows a prefix in the names of tensors that begin with it."""
        return [name.removeprefix(prefix) for name in self._entries if name.startswith(prefix)]

    def load(self, model: nn.Module, spec: DmtSpec, name: str, function: str) -> None:
        """Give a `DmtModel`, or a `FlatModel`, its weights beside tables."""
        state = {}
        prefix = f"{name}.{function}."
        for rest in self.names(prefix):
            tower, _, inner = rest.partition(".")
            if tower.startswith("tower_0"):
                key = f"towers.{int(tower.removeprefix('tower_'))}.{inner}"
            else:
                key = f"interaction.{rest}" if rest.startswith("cross.") else rest
            state[key] = self.tensor(prefix + rest)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        assert not unexpected, unexpected
        assert all(key.startswith(("tables.", "lookup.")) for key in missing), missing


def write_int8(folder: Path) -> None:
    """Write the tables as fbgemm's inference kernel takes them: int8, one scale per row."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_embedding_utils import quantize_embs
    from serving_tbe import build_tbe

    shared = SharedWeights(folder)
    tbe = build_tbe(shared.rows, "int8")
    unfinished = folder / f"{INT8_WEIGHTS}.part"
    with unfinished.open("wb") as file:
        file.truncate(tbe.host_size)
    mapped = np.memmap(unfinished, dtype=np.uint8, mode="r+")
    row_bytes = tbe.row_bytes
    for i, offset in enumerate(tbe.offsets):
        table = shared.tensor(table_name(i))
        for begin in range(0, shared.rows, _INT8_ROWS):
            part = table[begin : begin + _INT8_ROWS]
            values, scales = quantize_embs(part, SparseType.INT8)
            target = mapped[offset + begin * row_bytes :][: len(part) * row_bytes]
            stored = torch.from_numpy(target).reshape(len(part), row_bytes)
            assert scales is not None
            stored[:, : scales.shape[1]] = scales
            stored[:, scales.shape[1] : scales.shape[1] + DIM] = values
    mapped.flush()
    unfinished.rename(folder / INT8_WEIGHTS)
