"""What a checkpoint file claims, checked before torch reads it.

torch.load(weights_only=True) runs no foreign code, but believes the sizes in a file: older releases read
memory that is not theirs where a storage is shorter than declared, and any release allocates what a few
bytes ask for. Here the file's instructions are followed without building anything. What passes holds plain
data, needs no more memory than the file is long, and has intact checksums where the format has any.

Both formats of torch.save are known: the zip archive, and the row of pickles of before torch 1.6.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

MAX_PICKLE = 2**23
"""Bytes of instructions, which may take eighty times that in memory; a training state of Focal-L has 1 MB."""

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_KINDS_BY_SIZE = {  # bytes per value -> kinds of storages
    1: ("Char", "Byte", "Bool"),
    2: ("Half", "BFloat16", "Short"),
    4: ("Float", "Int"),
    8: ("Double", "Long", "ComplexFloat"),
}
_STORAGES = {f"torch {kind}Storage": size for size, kinds in _KINDS_BY_SIZE.items() for kind in kinds}
_DICTS = ("collections OrderedDict", "collections Counter", "yacs.config CfgNode")
_DTYPES = tuple(
    f"torch {kind}{bits}" for kind in ("float", "bfloat", "int", "uint") for bits in (8, 16, 32, 64)
)
_ATTRIBUTES = {  # that the dicts may bring along; another could hide a method
    *("_metadata", "__immutable__", "__deprecated_keys__", "__renamed_keys__", "__new_allowed__"),
}
_OUTCOMES_OF_DAMAGE = (
    *(ValueError, LookupError, TypeError, OverflowError, EOFError, struct.error, NotImplementedError),
)
_KEYS = (str, int, float, bool, type(None))
_MAX_DIMS = 25


class CodeInFileError(ValueError):
    """The file asks for something other than plain data."""


class DamagedFileError(ValueError):
    """The file is not whole, or claims what it does not hold."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass
class _Container:
    """A list, a set, or a dict of a kind."""

    kind: str
    items: list[Any] = field(default_factory=list)  # of a list: its values; of a dict: its keys


@dataclass(frozen=True)
class _Storage:
    key: str
    size: int  # in bytes per value
    numel: int


@dataclass(frozen=True)
class _Tensor:
    pass


@dataclass(frozen=True)
class _Bytes:
    pass


def check_checkpoint(file: BinaryIO) -> None:
    """Follow a checkpoint's instructions without building anything.

    Args:
        file: at its start; left anywhere.

    Raises:
        CodeInFileError: it asks for something other than tensors, numbers, text, lists and dicts.
        DamagedFileError: not a checkpoint, or not whole.
        OSError: it cannot be read.
    """
    start = file.read(len(_ZIP_START))
    length = file.seek(0, 2)
    file.seek(0)
    try:
        (_check_archive if start == _ZIP_START else _check_pickles)(file, length)
    except (CodeInFileError, DamagedFileError):
        raise
    except _OUTCOMES_OF_DAMAGE as error:
        raise DamagedFileError(" ".join(str(error).split()) or type(error).__name__) from error


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise DamagedFileError(reason)


def _check_archive(file: BinaryIO, length: int) -> None:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise DamagedFileError(str(error)) from error
    records = archive.infolist()
    names = {record.filename for record in records}
    prefix = records[0].filename.partition("/")[0] if records else ""
    _expect(len(names) == len(records), "two records of one name")
    _expect(all(name.startswith(f"{prefix}/") for name in names), "records without a common folder")
    _expect(f"{prefix}/data.pkl" in names, "no record data.pkl")
    if f"{prefix}/constants.pkl" in names:
        raise CodeInFileError("a TorchScript program")
    for record in records:
        plain = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & 1
        _expect(plain and record.compress_size == record.file_size, "packed or encrypted records")
    _expect(sum(record.file_size for record in records) <= length, "records longer than the file")
    try:
        broken = archive.testzip()
    except zipfile.BadZipFile as error:
        raise DamagedFileError(str(error)) from error
    _expect(broken is None, f"record {broken!r} has a wrong checksum")
    _expect(archive.getinfo(f"{prefix}/data.pkl").file_size <= MAX_PICKLE, "an endless record data.pkl")
    machine = _Machine()
    machine.run(BytesIO(archive.read(f"{prefix}/data.pkl")))
    for storage in machine.storages.values():
        name = f"{prefix}/data/{storage.key}"
        held = archive.getinfo(name).file_size if name in names else -1
        claimed = storage.numel * storage.size
        _expect(held == claimed, f"record {name!r} should have {claimed} bytes")


def _check_pickles(file: BinaryIO, length: int) -> None:
    head = BytesIO(file.read(MAX_PICKLE))
    machine = _Machine()
    _expect(machine.run(head) == _LEGACY_MAGIC, "it does not begin like one")
    _expect(machine.run(head) == _LEGACY_PROTOCOL, "an unknown protocol")
    for _ in ("system", "content"):
        machine.run(head)
    keys = machine.run(head)
    _expect(isinstance(keys, _Container) and keys.kind == "list", "no list of storages")
    _expect(all(isinstance(key, str) for key in keys.items), "no list of storages")
    _expect(sorted(keys.items) == sorted(machine.storages), "storages are missing")
    place = head.tell()
    for key in keys.items:
        storage = machine.storages[key]
        file.seek(place)
        _expect(struct.unpack("<q", file.read(8))[0] == storage.numel, f"storage {key!r} has another size")
        place += 8 + storage.numel * storage.size
    _expect(place <= length, "it ends too early")


class _Machine:
    """Follows the instructions of a pickle, of which it knows those that torch.save writes."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks put aside by marks
        self._memo: dict[int, Any] = {}

    def run(self, stream: BytesIO) -> Any:
        """Follow one pickle to its end; what it makes."""
        self._stack, self._below, self._memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in _VALUES:
                self._stack.append(_VALUES[opcode.name](argument))
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise CodeInFileError(f"instruction {opcode.name}")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _tuple(self, _: Any) -> None:
        items = tuple(self._since_mark())
        self._stack.append(items)

    def _join(self, count: int) -> None:
        _expect(len(self._stack) >= count, "an empty stack")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _keep(self, place: Any) -> None:
        self._memo[place] = self._stack[-1]

    def _recall(self, place: Any) -> None:
        self._stack.append(self._memo[place])

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        _expect(isinstance(target, _Container) and target.kind == "list", "values appended to no list")
        target.items.extend(values)

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        _expect(_is_dict(target), "keys set in no dict")
        _expect(len(pairs) % 2 == 0, "a key without value")
        _expect(all(isinstance(key, _KEYS) for key in pairs[::2]), "a key that is neither text nor number")
        target.items.extend(pairs[::2])

    def _set_one(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _global(self, name: Any) -> None:
        if name not in (*_CALLS, *_STORAGES, *_DICTS, *_DTYPES):
            raise CodeInFileError(name.replace(" ", "."))
        self._stack.append(_Global(name))

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        name = function.name if isinstance(function, _Global) else "a value"
        if name not in _CALLS:
            raise CodeInFileError(f"a call of {name}")
        _expect(isinstance(arguments, tuple), "a call without arguments")
        self._stack.append(_CALLS[name](*arguments))

    def _create(self, _: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, _Global) or kind.name not in _DICTS or arguments != ():
            raise CodeInFileError("an object")
        self._stack.append(_Container(kind.name))

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        known = _is_dict(state) and set(state.items) <= _ATTRIBUTES
        if not known or not isinstance(target, _Container) or target.kind not in _DICTS:
            raise CodeInFileError("the state of an object")

    def _persistent(self, _: Any) -> None:
        word, kind, key, place, numel, *view = self._stack.pop()
        if word != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES:
            raise CodeInFileError("an object that is no storage")
        _expect(isinstance(key, str) and isinstance(place, str), "a storage without name")
        _expect(_is_count(numel) and view in ([], [None]), f"storage {key!r} has no size")
        storage = _Storage(key, _STORAGES[kind.name], numel)
        _expect(self.storages.setdefault(key, storage) == storage, f"storage {key!r} has two sizes")
        self._stack.append(storage)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, needs_gradient: Any = False, hooks: Any = None
) -> _Tensor:
    """A tensor must lie in its storage, and have no more values than that."""
    _expect(isinstance(storage, _Storage) and _is_count(offset), "a tensor without storage")
    _expect(isinstance(size, tuple) and isinstance(stride, tuple), "a tensor without shape")
    _expect(len(size) == len(stride) <= _MAX_DIMS, "a tensor without shape")
    _expect(all(map(_is_count, size + stride)), "a tensor without shape")
    _expect(isinstance(needs_gradient, bool) and _is_empty_dict(hooks), "a tensor with hooks")
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    outside = numel > 0 and last >= storage.numel
    fits = not outside and numel <= storage.numel
    _expect(fits, f"a tensor of {numel} values in a storage of {storage.numel}")
    return _Tensor()


def _is_dict(value: Any) -> bool:
    return isinstance(value, _Container) and value.kind in ("dict", *_DICTS)


def _is_empty_dict(value: Any) -> bool:
    return value is None or (_is_dict(value) and not value.items)


def _parameter(data: Any, needs_gradient: Any, hooks: Any) -> _Tensor:
    _expect(isinstance(data, _Tensor) and isinstance(needs_gradient, bool), "a parameter without values")
    _expect(_is_empty_dict(hooks), "a tensor with hooks")
    return _Tensor()


def _ordered_dict() -> _Container:
    return _Container("collections OrderedDict")


def _counter(counts: Any) -> _Container:
    _expect(isinstance(counts, _Container) and counts.kind == "dict", "a counter without counts")
    return _Container("collections Counter")


def _set(items: Any) -> _Container:
    _expect(isinstance(items, _Container) and items.kind == "list", "a set of nothing")
    _expect(all(isinstance(item, _KEYS) for item in items.items), "a set of neither text nor numbers")
    return _Container("set")


def _encoded(text: Any, encoding: Any) -> _Bytes:
    _expect(isinstance(text, str) and encoding == "latin1", "bytes in an unknown encoding")
    return _Bytes()


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": _ordered_dict,
    "collections Counter": _counter,
    "__builtin__ set": _set,
    "_codecs encode": _encoded,
}

_VALUES: dict[str, Callable[[Any], Any]] = {
    **{
        name: lambda argument: argument
        for name in ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING")
    },
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: _Container("list"),
    "EMPTY_DICT": lambda _: _Container("dict"),
}

_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: _expect(version == 2, f"protocol {version}, expected 2"),
    "STOP": lambda machine, _: None,
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._join(1),
    "TUPLE2": lambda machine, _: machine._join(2),
    "TUPLE3": lambda machine, _: machine._join(3),
    **{name: _Machine._keep for name in ("BINPUT", "LONG_BINPUT")},
    **{name: _Machine._recall for name in ("BINGET", "LONG_BINGET")},
    "APPEND": lambda machine, _: machine._append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._since_mark()),
    "SETITEM": _Machine._set_one,
    "SETITEMS": lambda machine, _: machine._set(machine._since_mark()),
    "GLOBAL": _Machine._global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._create,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}
