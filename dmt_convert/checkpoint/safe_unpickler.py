"""Read pickles as data: a short list of known globals, nothing that runs code.

`torch.load(weights_only=True)` follows the same principle; this reader needs no torch, keeps
storages as references (so that a 100 GB file opens in milliseconds), and also reads the
metadata of torch.distributed.checkpoint, which torch itself unpickles without any guard.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from dmt_convert.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that a pickle refers to: its key, element type (None: bytes) and length."""

    key: str
    dtype: str | None
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as a pickle describes it: a strided view of a storage, in elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the view is row-major without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """Elements of the storage that the view reaches from its offset."""
        if self.numel == 0:
            return 0
        return 1 + sum((s - 1) * t for s, t in zip(self.shape, self.strides, strict=True))


class Record:
    """An inert object: keeps the arguments and the state that a pickle gives it."""

    args: tuple[object, ...]
    fields: dict[str, Any]

    def __new__(cls, *args: object, **kwargs: object) -> Record:
        # pickles make objects by __new__ alone as well as by a call
        record = super().__new__(cls)
        record.args = args
        record.fields = dict(kwargs)
        return record

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.fields.update((key, value) for key, value in dict.items(state))
        else:
            self.args = (*self.args, state)

    def get(self, name: str) -> Any:
        """Return a field; KeyError where the pickle did not set it."""
        return self.fields[name]


class ForbiddenGlobalError(Exception):
    """A pickle names a global that is not on the list."""


class _Dict(dict[Any, Any]):
    """Stands for OrderedDict, Counter and defaultdict; attributes set by pickles are dropped."""

    def __setstate__(self, state: object) -> None:
        return None


def _make_dict(*args: Any) -> _Dict:
    return _Dict(args[0]) if args and isinstance(args[0], (list, dict)) else _Dict()


def _make_size(*args: Any) -> tuple[int, ...]:
    return _int_tuple(args[0] if args else ())


def _int_tuple(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"a shape is {type(values).__name__}")
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"a shape or stride holds {values!r:.60}")
    return tuple(values)


def _rebuild_tensor(
    storage: object, offset: int, size: object, stride: object, *_: object
) -> TensorRef:
    if not isinstance(storage, StorageRef) or type(offset) is not int or offset < 0:
        raise TypeError("a tensor without a storage")
    if storage.dtype is None:
        raise TypeError("a tensor over an untyped storage without a dtype")
    return _tensor(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    storage: object,
    offset: int,
    size: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> TensorRef:
    if not isinstance(storage, StorageRef) or type(offset) is not int or offset < 0:
        raise TypeError("a tensor without a storage")
    if not isinstance(dtype, str):
        raise TypeError("a tensor without a dtype")
    return _tensor(storage, dtype, offset, size, stride)


def _tensor(
    storage: StorageRef, dtype: str, offset: int, size: object, stride: object
) -> TensorRef:
    shape, strides = _int_tuple(size), _int_tuple(stride)
    if len(shape) != len(strides) or len(shape) > 16:
        raise ValueError(f"shape {shape} with strides {strides}")
    return TensorRef(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError(f"encoding {encoding!r:.40}")
    return text.encode(encoding)


def _numpy_scalar(dtype: Record, data: object = b"") -> object:
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    if code in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        if not isinstance(data, bytes):
            raise TypeError("a numpy scalar without bytes")
        return np.frombuffer(data, dtype=f"<{code}", count=1)[0].item()
    return Record(code, data)


_DTYPES: Final[Mapping[str, str]] = {
    "float64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "int64": "int64",
    "int32": "int32",
    "int16": "int16",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}
_STORAGES: Final[Mapping[str, str | None]] = {
    "DoubleStorage": "fp64",
    "FloatStorage": "fp32",
    "HalfStorage": "fp16",
    "BFloat16Storage": "bf16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": None,
}


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


TENSOR_GLOBALS: Final[Mapping[tuple[str, str], object]] = {
    ("collections", "OrderedDict"): _make_dict,
    ("collections", "defaultdict"): lambda *args: _Dict(),
    ("collections", "Counter"): _make_dict,
    ("builtins", "dict"): _make_dict,
    ("builtins", "list"): list,
    ("builtins", "set"): set,
    ("builtins", "int"): "int",
    ("builtins", "float"): "float",
    ("torch", "Size"): _make_size,
    ("torch", "device"): Record,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch.serialization", "_get_layout"): Record,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): Record,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _StorageType(None),
}
"""Globals of a state dict and of what trainers store beside it."""

DCP_GLOBALS: Final[Mapping[tuple[str, str], object]] = {
    **TENSOR_GLOBALS,
    **{
        ("torch.distributed.checkpoint.metadata", name): Record
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Record,
    ("torch.distributed.checkpoint.filesystem", "SerializationFormat"): Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Record,
    ("torch.distributed._shard.metadata", "ShardMetadata"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "PurePosixPath"): Record,
    ("pathlib", "Path"): Record,
}
"""Globals of the `.metadata` file of torch.distributed.checkpoint."""

_CORRUPT: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    UnicodeError,
    ValueError,
)
"""What the unpickler raises on damaged input."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], object]) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise ForbiddenGlobalError(f"{module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> StorageRef:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage of unknown type")
        return StorageRef(str(key), kind.dtype, numel)


def read_pickle(
    file: IO[bytes],
    *,
    source: Path,
    allowed: Mapping[tuple[str, str], object] = TENSOR_GLOBALS,
    on_forbidden: Callable[[str], CheckpointError] | None = None,
) -> Any:
    """Unpickle one object, building inert data only.

    Args:
        file: Where to read from; left just behind the pickle.
        source: The file to name in errors.
        allowed: The globals that the pickle may name, and what stands for them.
        on_forbidden: Makes the error for any other global, given its name.

    Raises:
        CheckpointError: The pickle is damaged, or names a global that is not allowed.
    """
    try:
        return _Unpickler(file, allowed).load()
    except ForbiddenGlobalError as error:
        raise (on_forbidden or _refusal(source))(str(error)) from None
    except _CORRUPT as error:
        raise CheckpointError(
            f"{source} holds a damaged pickle ({type(error).__name__}: {str(error)[:120]})",
            expected="a file that the trainer wrote whole",
            hint="copy the checkpoint again and compare sizes or checksums with the original",
        ) from None


def _refusal(source: Path) -> Callable[[str], CheckpointError]:
    def refuse(name: str) -> CheckpointError:
        return CheckpointError(
            f"{source} asks to run code while loading: it names {name}",
            expected="tensors and plain values only (what torch.load(weights_only=True) accepts)",
            hint="where the file is trusted, load it in the trainer's own environment and save "
            "only the weights: torch.save(model.state_dict(), 'weights.pt')",
        )

    return refuse
