"""Stand-ins for the objects of a pickle: inert records and references. Nothing here runs.

Every global that a checkpoint may name has a stand-in here. What a pickle can do with one is
bounded: no large value is copied, and no number is kept that cannot be a size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Final

import numpy as np

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES

MAX_SIZE: Final = 1 << 62
"""Numbers from here on cannot be a size, an offset or a length."""
_MAX_COPY: Final = 64
"""Longest byte string that is decoded; only numbers are read from such strings."""


_MAX_ARGS: Final = 16
NUMPY_ARRAY: Final = "numpy.ndarray"
"""Origin of the records that stand for numpy's arrays."""


def call(function: object, args: tuple[object, ...]) -> object:
    """Do what a pickle asks for by a call: listed stand-ins are called, other calls are recorded.

    Raises:
        TypeError: A stand-in is called with more arguments than any trainer gives it.
    """
    if isinstance(function, UnknownGlobal):
        return Record.of(function.name, args, {})
    if function is Record:
        return Record.of("", args, {})
    if isinstance(function, FunctionType):
        if len(args) > _MAX_ARGS:
            raise TypeError(f"a call with {len(args)} arguments")
        return function(*args)
    return Record.of(
        "?", args, {}
    )  # the result of another call, or a plain value: not callable here


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
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Elements of the storage that the view reaches from its offset."""
        if self.numel == 0:
            return 0
        return 1 + sum((s - 1) * t for s, t in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class UnknownGlobal:
    """A class or function that a pickle names and that is not on the list: only its name."""

    name: str


class Record:
    """An inert object: keeps the arguments, the state and the items that a pickle gives it."""

    args: tuple[object, ...]
    fields: dict[str, Any]
    origin: str
    """The class or function that was named, empty for those on the list."""
    items: list[Any] | InertDict | None
    """What was appended to it, or set in it as in a dict."""
    _built: bool

    def __new__(cls, *args: object, **kwargs: object) -> Record:
        """Keep the arguments; pickles make objects by __new__ alone as well as by a call."""
        return cls.of("", args, dict(kwargs))

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    @classmethod
    def of(cls, origin: str, args: tuple[object, ...], fields: dict[str, Any]) -> Record:
        """Make a record; nothing is copied, so that a pickle that repeats this gains nothing."""
        record = super().__new__(cls)
        record.args, record.fields, record.origin = args, fields, origin
        record.items, record._built = None, False
        return record

    def __setstate__(self, state: object) -> None:
        if self._built or (self.fields and isinstance(state, dict)):
            raise TypeError("an object whose state is set twice")
        self._built = True
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            # how objects with __slots__ are pickled: (None or their dict, their slots)
            state = state[1] if not state[0] else state[0]
        if isinstance(state, dict):
            self.fields = state
        elif len(self.args) <= _MAX_ARGS:
            self.args = (*self.args, state)
        else:
            raise TypeError(f"an object of {len(self.args)} arguments")

    def __setitem__(self, key: object, value: object) -> None:
        if self.items is None:
            self.items = InertDict()
        if not isinstance(self.items, InertDict):
            raise TypeError("an object that is both a list and a dict")
        self.items[key] = value

    def append(self, value: object) -> None:
        """Take an item of an object that is a list."""
        if self.items is None:
            self.items = []
        if not isinstance(self.items, list):
            raise TypeError("an object that is both a list and a dict")
        self.items.append(value)

    def extend(self, values: list[object]) -> None:
        """Take several items."""
        for value in values:
            self.append(value)

    def get(self, name: str) -> Any:
        """Return a field; KeyError if the pickle did not set it."""
        return self.fields[name]


class InertDict(dict[Any, Any]):
    """Stands for OrderedDict, Counter and defaultdict.

    Of the attributes that pickles set, only the modules of a state dict are kept.
    """

    modules: tuple[str, ...] = ()
    """Of a state dict: the names of all modules, in the order in which they were registered."""

    def __setstate__(self, state: object) -> None:
        metadata = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(metadata, dict):
            self.modules = tuple(name for name in metadata if isinstance(name, str))


def inert_key(key: object) -> object:
    """Return a dict key that can be hashed safely, or what stands for it and is never looked up.

    To hash tuples nested deeply overflows the stack, and numbers and tuples can be chosen so that
    all have one hash.
    """
    if key is None or isinstance(key, str | bytes | Record | UnknownGlobal):
        return key
    if isinstance(key, int) and abs(key) < MAX_SIZE:
        return key
    return Record.of("", (key,), {})


def _make_dict(*args: Any) -> InertDict:
    pairs = args[0] if args else None
    if isinstance(pairs, InertDict):
        return pairs
    made = InertDict()
    if isinstance(pairs, list):
        for key, value in pairs:
            made[inert_key(key)] = value
        # moved, not copied: a pickle that repeats the call gains nothing
        pairs.clear()
    return made


def _make_list(*args: Any) -> list[Any]:
    # sets become lists too: nothing needs to look a member up, and nothing need be hashed
    return args[0] if args and isinstance(args[0], list) else []


def _make_size(*args: Any) -> tuple[int, ...]:
    return _int_tuple(args[0] if args else ())


def is_size(value: object) -> bool:
    """Tell whether a value can be a size, an offset or a length."""
    return type(value) is int and 0 <= value < MAX_SIZE


def read_sizes(values: object) -> tuple[int, ...]:
    """Return a shape or an offset that a header states.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(values, tuple | list) or not all(is_size(value) for value in values):
        raise TypeError("not a shape or an offset")
    return tuple(values)


def _int_tuple(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > 16:
        raise TypeError(f"a shape is a {type(values).__name__}, or has over 16 dims")
    if not all(is_size(value) for value in values):
        raise ValueError("a shape or a stride holds a value that cannot be a size")
    return tuple(values)


def _rebuild_tensor(
    storage: object, offset: int, size: object, stride: object, *_: object
) -> TensorRef | Record:
    if isinstance(storage, Record):
        return Record.of(storage.origin, (size,), {})  # of a type that is not read
    if not isinstance(storage, StorageRef) or not is_size(offset):
        raise TypeError("a tensor without a storage")
    if storage.dtype is None:
        raise TypeError("a tensor over an untyped storage without a dtype")
    return _tensor(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    storage: object,
    offset: int,
    size: object,
    stride: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    *_: object,
) -> TensorRef | Record:
    if isinstance(dtype, UnknownGlobal):
        return Record.of(dtype.name, (size,), {})
    if not isinstance(storage, StorageRef) or not is_size(offset):
        raise TypeError("a tensor without a storage")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TypeError("a tensor without a dtype")
    return _tensor(storage, dtype, offset, size, stride)


def _tensor(
    storage: StorageRef, dtype: str, offset: int, size: object, stride: object
) -> TensorRef:
    shape, strides = _int_tuple(size), _int_tuple(stride)
    if len(shape) != len(strides):
        raise ValueError(f"shape {shape} with strides {strides}")
    return TensorRef(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _rebuild_from_type(build: object, kind: object, args: object, state: object = None) -> object:
    if isinstance(build, UnknownGlobal):
        # a subclass that holds its data in its state, as ShardedTensor and DTensor do
        return Record.of(kind.name if isinstance(kind, UnknownGlobal) else "", (args, state), {})
    # a tensor with attributes of its own; they do not matter here
    if build not in (_rebuild_tensor, _rebuild_tensor_v3) or not isinstance(args, tuple):
        raise TypeError("a tensor that is built in an unknown way")
    return build(*args[:_MAX_ARGS])


def _encode(text: str, encoding: str = "latin1") -> object:
    if len(text) > _MAX_COPY:
        return Record()
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError(f"encoding {encoding!r:.40}")
    return text.encode(encoding)


def _numpy_array(*_: object) -> Record:
    """Stand for an array, whose state follows: (version, shape, dtype, order, bytes)."""
    return Record.of(NUMPY_ARRAY, (), {})


def _numpy_from_buffer(_data: object, dtype: object, shape: object, *_: object) -> Record:
    return Record.of(NUMPY_ARRAY, ((None, shape, dtype),), {})


def _sparse_tensor(*_: object) -> Record:
    return Record.of("torch._utils._rebuild_sparse_tensor", (), {})


def _numpy_scalar(dtype: object, data: object = b"") -> object:
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
class StorageType:
    """A storage class of torch: its element type, or None for bytes."""

    dtype: str | None


TENSOR_GLOBALS: Final[Mapping[tuple[str, str], object]] = {
    ("collections", "OrderedDict"): _make_dict,
    ("collections", "defaultdict"): lambda *args: InertDict(),
    ("collections", "Counter"): _make_dict,
    ("builtins", "dict"): _make_dict,
    ("builtins", "list"): _make_list,
    ("builtins", "set"): _make_list,
    ("builtins", "frozenset"): _make_list,
    **{
        ("builtins", name): name
        for name in ("int", "long", "float", "str", "unicode", "bool", "bytes", "tuple")
    },
    ("argparse", "Namespace"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "PurePosixPath"): Record,
    ("pathlib", "Path"): Record,
    ("torch", "Size"): _make_size,
    ("torch", "device"): Record,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Tensor"): "Tensor",
    ("torch.nn.parameter", "Parameter"): "Parameter",
    ("torch.torch_version", "TorchVersion"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): Record,
    ("numpy", "ndarray"): "ndarray",
    ("numpy.core.multiarray", "_reconstruct"): _numpy_array,
    ("numpy._core.multiarray", "_reconstruct"): _numpy_array,
    ("numpy.core.numeric", "_frombuffer"): _numpy_from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _numpy_from_buffer,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): StorageType(None),
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
}
"""Globals of the `.metadata` file of torch.distributed.checkpoint."""
