"""Read pickles as data: a short list of known globals, nothing that runs code.

`torch.load(weights_only=True)` follows the same principle; this reader needs no torch, keeps
storages as references (so that a 100 GB file opens in milliseconds), and also reads the
metadata of torch.distributed.checkpoint, which torch itself unpickles without any guard.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Final

from dmt_convert.checkpoint.inert.objects import (
    TENSOR_GLOBALS,
    InertDict,
    Record,
    StorageRef,
    StorageType,
    UnknownGlobal,
    call,
    inert_key,
    is_size,
)
from dmt_convert.errors import CheckpointError


class ForbiddenGlobalError(Exception):
    """A pickle names a global that is not on the list."""


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
    struct.error,
)
"""What the unpickler raises on damaged input."""


_MAX_PICKLE_BYTES: Final = 1 << 30
"""Longest pickle that is read; tensors' bytes lie outside it."""
_MAX_GLOBAL_LENGTH: Final = 1000
"""Longest name of a module, a class or a function."""


class _BoundedFile:
    """Reads no more than the file holds and a pickle takes: it may claim any length."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        position = file.tell()
        self._end = min(file.seek(0, 2), position + _MAX_PICKLE_BYTES)
        file.seek(position)

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._left()))

    def readinto(self, buffer: bytearray) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readline(self) -> bytes:
        return self._file.readline(self._left())

    def _left(self) -> int:
        return max(0, self._end - self._file.tell())


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python, not the one in C.

    The C one allocates its memo for any index that a pickle names, and none of its steps can be
    overridden: an object's state would be set behind the checks of its constructor.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: IO[bytes],
        allowed: Mapping[tuple[str, str], object],
        unknown: dict[str, UnknownGlobal] | None,
    ) -> None:
        super().__init__(_BoundedFile(file), encoding="utf-8")
        self._allowed = allowed
        self._unknown = unknown
        self.stack: list[Any] = []
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > _MAX_GLOBAL_LENGTH:
            raise pickle.UnpicklingError(f"a global of {len(module) + len(name)} characters")
        key = ("builtins" if module == "__builtin__" else module, name)
        if key in self._allowed:
            return self._allowed[key]
        full = f"{module}.{name}"
        if self._unknown is None:
            raise ForbiddenGlobalError(full)
        return self._unknown.setdefault(full, UnknownGlobal(full))

    def persistent_load(self, pid: Any) -> object:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class beside its source, as files before torch 1.6 hold modules
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if isinstance(kind, UnknownGlobal):
            return Record.of(kind.name, (), {})
        if not isinstance(kind, StorageType) or not is_size(numel):
            raise pickle.UnpicklingError("a storage of unknown type")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, as torch before 0.4 saved it")
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage without a name")
        storage = StorageRef(key, kind.dtype, numel)
        return self.storages.setdefault(key, storage)

    def load_build(self) -> None:
        """Set an object's state, if the object is made for it."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Record | InertDict):
            raise pickle.UnpicklingError(f"state for a {type(target).__name__}")
        target.__setstate__(state)

    def load_reduce(self) -> None:
        """Call a function, if it is a stand-in of ours."""
        args = self.stack.pop()
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call without a tuple of arguments")
        self.stack[-1] = call(self.stack[-1], args)

    def load_newobj(self) -> None:
        """Make an object of a class: the same as a call of it."""
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        """Make an object with keyword arguments, which are kept as its fields."""
        fields = self.stack.pop()
        self.load_reduce()
        made = self.stack[-1]
        if isinstance(made, Record) and isinstance(fields, dict) and not made.fields:
            made.fields = fields

    def load_inst(self) -> None:
        """Make an object the way of protocol 0."""
        module = self.readline()[:-1].decode("ascii")  # type: ignore[attr-defined]
        name = self.readline()[:-1].decode("ascii")  # type: ignore[attr-defined]
        args = tuple(self.pop_mark())  # type: ignore[attr-defined]
        self.stack.append(call(self.find_class(module, name), args))

    def load_obj(self) -> None:
        """Make an object whose class lies behind the mark."""
        args = self.pop_mark()  # type: ignore[attr-defined]
        function = args.pop(0)
        self.stack.append(call(function, tuple(args)))

    def load_empty_set(self) -> None:
        """Make a list for a set: nothing need be hashed."""
        self.stack.append([])

    def load_additems(self) -> None:
        """Add what lies above the mark to a set."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        target = self.stack[-1]
        if not isinstance(target, list | Record):
            raise pickle.UnpicklingError(f"members for a {type(target).__name__}")
        target.extend(items)

    def load_frozenset(self) -> None:
        """Make a list of what lies above the mark."""
        members = self.pop_mark()  # type: ignore[attr-defined]  # it changes what the stack is
        self.stack.append(members)

    def load_bytearray8(self) -> None:
        """Pass over a bytearray: it may claim any length, and nothing is read from one."""
        (length,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        if len(self.read(length)) < length:  # type: ignore[attr-defined]
            raise EOFError
        self.stack.append(Record())

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        self.stack[-2] = inert_key(self.stack[-2])
        self._base(pickle.SETITEM)

    def load_setitems(self) -> None:
        """Set items of a dict, which lies on the stack below the mark."""
        self.stack[0::2] = map(inert_key, self.stack[0::2])
        self._base(pickle.SETITEMS)

    def load_dict(self) -> None:
        """Make a dict of what lies above the mark."""
        self.stack[0::2] = map(inert_key, self.stack[0::2])
        self._base(pickle.DICT)

    def _base(self, opcode: bytes) -> None:
        base: Mapping[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
        base[opcode[0]](self)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.INST[0]] = load_inst
    dispatch[pickle.OBJ[0]] = load_obj
    dispatch[pickle.EMPTY_SET[0]] = load_empty_set
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def read_pickle(
    file: IO[bytes],
    *,
    source: Path,
    allowed: Mapping[tuple[str, str], object] = TENSOR_GLOBALS,
    storages: dict[str, StorageRef] | None = None,
    unknown: dict[str, UnknownGlobal] | None = None,
) -> Any:
    """Unpickle one object, building inert data only.

    Args:
        file: Where to read from; left just behind the pickle.
        source: The file to name in errors.
        allowed: The globals that the pickle may name, and what stands for them.
        storages: Takes all storages that the pickle refers to, by key.
        unknown: Takes all other globals that the pickle names; what is made of them are inert
            `Record`s. Without it such a pickle is refused.

    Raises:
        CheckpointError: The pickle is damaged, or names a global that is not allowed.
    """
    try:
        unpickler = _Unpickler(file, allowed, unknown)
        value = unpickler.load()
    except ForbiddenGlobalError as error:
        raise refuse_global(source, str(error)) from None
    except _CORRUPT as error:
        raise CheckpointError(
            f"{source} holds a damaged pickle ({type(error).__name__}: {str(error)[:120]})",
            expected="a file that the trainer wrote whole",
            hint="copy the checkpoint again and compare sizes or checksums with the original",
        ) from None
    if storages is not None:
        storages.update(unpickler.storages)
    return value


_SHARDED: Final = (
    "torch._utils._rebuild_wrapper_subclass",
    "torch.distributed._shard.",
    "torch.distributed.tensor.",
    "torchrec.distributed.",
)

_OTHER_TENSORS: Final = (
    "torch.float8_",
    "torch.float4_",
    "torch.complex",
    "torch.Complex",
    "torch.q",
    "torch.Q",
    "torch.uint",
    "torch.UInt",
    "torch._utils._rebuild_",
)
"""How the names of dtypes, storages and layouts begin that flat models never have."""


def refuse_global(source: Path, name: str) -> CheckpointError:
    """Say why a global is not read, and what to do about the commonest ones."""
    if name.startswith(_SHARDED):
        return CheckpointError(
            f"{source} holds one rank's shards of a sharded model: it names {name}",
            expected="whole tensors",
            hint="save the model of all ranks with torch.distributed.checkpoint.save, and give "
            "that directory",
        )
    if name.startswith(("torchrec.models.", "torchrec.modules.", "torch.nn.modules.")):
        return CheckpointError(
            f"{source} holds a pickled module, not its weights: it names {name}",
            expected="a state dict",
            hint="load it in the trainer's own environment and save only the weights: "
            "torch.save(model.state_dict(), 'weights.pt')",
        )
    if name.startswith("__torch__."):
        return CheckpointError(
            f"{source} holds a scripted module without weights of its own: {name[:200]}",
            expected="a module whose weights are its attributes",
            hint="torch.jit.freeze and torch.jit.optimize_for_inference make constants of them: "
            "save the module as it was before, or its state_dict()",
        )
    if name.startswith(_OTHER_TENSORS):
        return CheckpointError(
            f"{source} holds a tensor of a type that is not read: it names {name[:200]}",
            expected="plain dense tensors of fp64, fp32, fp16, bf16 or integers",
            hint="load it in the trainer's own environment, convert such tensors (or leave them "
            "out), and save the weights: torch.save(model.state_dict(), 'weights.pt')",
        )
    return CheckpointError(
        f"{source} asks to run code while loading: it names {name[:200]}",
        expected="tensors and plain values only (what torch.load(weights_only=True) accepts)",
        hint="if you trust the file, load it in the trainer's own environment and save "
        "only the weights: torch.save(model.state_dict(), 'weights.pt')",
    )
