"""Which bytes of a checkpoint that ``torch.save`` wrote are which tensor.

Such a file is a zip archive: one pickle that describes the tensors, and one uncompressed record per
storage. Nothing of the pickle is ever called or imported here: the instructions of which a state
dict is made are interpreted into plain records, and anything else is refused. That is narrower than
``torch.load(weights_only=True)``, which runs no foreign code either, but which a file of a kilobyte can
hang (a key that is a tuple of tuples), crash (one nested a million deep) or fill the memory with
(``bytearray(size)``). Nor does it need torch, or tensors on the host: the result is byte ranges.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ltx_sp.errors import WeightsError
from ltx_sp.weights.archive import Archive, RefusedError
from ltx_sp.weights.files import quote, require_content
from ltx_sp.weights.index import DTYPE_BYTES, FileStamp, TensorEntry, count_elements, opened

__all__ = ["read_entries"]

_MAX_STACK = 100_000  # torch.save puts down some thousands at a time
_CONVERT = "Fetch it again, or save its plain state dict as safetensors."


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """Something that the pickle refers to by module and name; it stays a name."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """A record of the archive, as the pickle describes it; no dtype if it is of untyped bytes."""

    key: str
    dtype: str | None
    num_elements: int


@dataclasses.dataclass(frozen=True, slots=True, repr=False)  # a repr of what is not checked may never end
class _Tensor:
    """A view of a storage; none of its fields is checked."""

    storage: _Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


_UNTYPED_STORAGE = "torch.storage UntypedStorage"
_STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
_DTYPES = {
    "torch float64": "F64",
    "torch float32": "F32",
    "torch float16": "F16",
    "torch bfloat16": "BF16",
    "torch float8_e4m3fn": "F8_E4M3",
    "torch float8_e5m2": "F8_E5M2",
    "torch int64": "I64",
    "torch int32": "I32",
    "torch int16": "I16",
    "torch int8": "I8",
    "torch uint8": "U8",
    "torch bool": "BOOL",
}
_KNOWN = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        _UNTYPED_STORAGE,
        *_STORAGES,
        *_DTYPES,
    }
)


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Index the state dict in a file of ``torch.save``: at its top, or under ``state_dict`` there.

    Values that are not tensors are no weights and are passed over. Names that share a storage have equal byte
    ranges. Blocks the host.

    Raises:
        WeightsError: the file is unreadable, damaged, of another kind, or holds anything but plain tensors.
    """
    with opened(path) as (stamp, read):
        require_content(path, read(0, 8), "a file of torch.save")
        try:
            records = Archive(read, stamp.size)
            state = _state_dict(_interpret(records.text("data.pkl")))
            entries = [
                _entry(name, tensor, records, path, stamp)
                for name, tensor in state.items()
                if isinstance(tensor, _Tensor)
            ]
            _require_apart(entries)
        except RefusedError as error:
            raise WeightsError(f"{path} is not a plain state dict of torch.save: {error}. {_CONVERT}") from error
    return {entry.name: entry for entry in entries}


def _state_dict(value: object) -> dict[str, object]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise RefusedError(f"it holds a {type(value).__name__.strip('_').lower()} and must hold a dict")
    if not any(isinstance(tensor, _Tensor) for tensor in value.values()):
        keys = ", ".join(quote(key) for key in list(value)[:3]) or "nothing"
        raise RefusedError(f"no value of its dict is a tensor (it has {keys})")
    return value


def _entry(name: str, tensor: _Tensor, records: Archive, path: Path, stamp: FileStamp) -> TensorEntry:
    storage, what = tensor.storage, f"tensor {quote(name)}"
    start, end = records.span(f"data/{storage.key}")
    stated = storage.num_elements * (DTYPE_BYTES[storage.dtype] if storage.dtype else 1)
    if end - start != stated:
        raise RefusedError(
            f"{what} lies in storage {quote(storage.key)} of {quote(stated)} bytes, which has {end - start}"
        )
    shape, strides = tensor.shape, tensor.strides
    count = count_elements(shape) if isinstance(shape, tuple) else None
    if count is None:
        raise RefusedError(f"{what} has shape {quote(shape)}, which is none")
    if count and not _is_contiguous(shape, strides):
        raise RefusedError(f"{what} of shape {quote(shape)} has strides {quote(strides)} and must be contiguous")
    width = DTYPE_BYTES[tensor.dtype]
    if type(tensor.offset) is not int or not 0 <= tensor.offset * width <= end - start - count * width:
        raise RefusedError(
            f"{what} has {count * width} bytes from element {quote(tensor.offset)} of a storage of {end - start} bytes"
        )
    start += tensor.offset * width
    return TensorEntry(name, path, tensor.dtype, shape, start, start + count * width, stamp)


def _is_contiguous(shape: tuple[int, ...], strides: object) -> bool:
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        return False
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if type(stride) is not int or stride != step:
                return False
            step *= size
    return True


def _require_apart(entries: list[TensorEntry]) -> None:
    """Raise where two tensors share some bytes; tied ones share all."""
    before: TensorEntry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.num_bytes == 0:
            continue
        if before is not None and entry.start < before.end and (entry.start, entry.end) != (before.start, before.end):
            raise RefusedError(f"tensors {quote(before.name)} and {quote(entry.name)} share a part of their bytes")
        before = entry


def _interpret(text: bytes) -> object:
    """Interpret a pickle as ``torch.save`` writes it, without importing or calling what it names."""
    machine = _Machine(text)
    while (code := machine.take(1)) != b".":
        step = _STEPS.get(code)
        if step is None:
            raise RefusedError(f"its pickle has instruction {code!r}, which a state dict does not need")
        step(machine)
        if len(machine.stack) > _MAX_STACK:
            raise RefusedError(f"its pickle puts down more than {_MAX_STACK} things at a time")
    return machine.pop()


class _Machine:
    """The stack, marks and memo of a pickle, and the bytes of it that are still to come."""

    def __init__(self, text: bytes):
        self._text, self._at = text, 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def take(self, length: int) -> bytes:
        taken = self._text[self._at : self._at + length]
        if len(taken) != length:
            raise RefusedError("its pickle is cut short")
        self._at += length
        return taken

    def number(self, length: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(length), "little", signed=signed)

    def word(self, length: int) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise RefusedError("its pickle has text that is not UTF-8") from error

    def line(self) -> str:
        end = self._text.find(b"\n", self._at, self._at + 1000)
        if end < 0:
            raise RefusedError("its pickle is cut short")
        line = self.word(end - self._at)
        self._at += 1
        return line

    def top(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise RefusedError("its pickle takes more than it has put down")
        return self.stack[-1]

    def pop(self) -> object:
        self.top()
        return self.stack.pop()

    def pop_marked(self) -> list[object]:
        if not self.marks:
            raise RefusedError("its pickle takes more than it has put down")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pack(self, count: int) -> None:
        self.stack.append(tuple(reversed([self.pop() for _ in range(count)])))

    def fill(self, items: list[object]) -> None:
        """Put keys and values into the dict on top; only under text can there be tensors."""
        table = self.top()
        if not isinstance(table, dict) or len(items) % 2:
            raise RefusedError("its pickle fills something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                if key in table:
                    raise RefusedError(f"key {quote(key)} occurs twice")
                table[key] = value

    def extend(self, items: list[object]) -> None:
        values = self.top()
        if not isinstance(values, list):
            raise RefusedError("its pickle extends something that is no list")
        values += items

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise RefusedError("its pickle takes more than it has put down")
        self.stack.append(self.memo[index])

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def name(self) -> None:
        text = f"{self.line()} {self.line()}"
        if text not in _KNOWN:
            raise RefusedError(f"it asks for {quote(text)}, and nothing but plain tensors is loaded from a pickle")
        self.stack.append(_Name(text))

    def call(self) -> None:
        arguments = self.pop()
        match self.pop(), arguments:
            case _Name("collections OrderedDict"), ():
                self.stack.append({})
            case _Name("torch._utils _rebuild_parameter"), (_Tensor() as tensor, _, _):
                self.stack.append(tensor)
            # After the strides: whether gradients are wanted, hooks, and flags such as conjugation.
            case (
                _Name("torch._utils _rebuild_tensor_v2"),
                (_Storage(dtype=str(dtype)) as storage, offset, shape, strides, _, _, *flags),
            ) if not any(flags):
                self.stack.append(_Tensor(storage, dtype, offset, shape, strides))
            case (
                _Name("torch._utils _rebuild_tensor_v3"),
                (_Storage() as storage, offset, shape, strides, _, _, _Name(kind), *flags),
            ) if kind in _DTYPES and not any(flags):
                self.stack.append(_Tensor(storage, _DTYPES[kind], offset, shape, strides))
            case _:
                raise RefusedError("it rebuilds something that is no plain tensor")

    def build(self) -> None:
        """Drop what ``Module.state_dict`` hangs onto its dict."""
        self.pop()
        if not isinstance(self.top(), dict):
            raise RefusedError("its pickle gives a state to something that is no dict")

    def refer(self) -> None:
        match self.pop():
            case ("storage", _Name(kind), str(key), str(), int(count)) if count >= 0 and (
                kind in _STORAGES or kind == _UNTYPED_STORAGE
            ):
                self.stack.append(_Storage(key, _STORAGES.get(kind), count))
            case reference:
                raise RefusedError(f"its pickle refers to {quote(reference)}, which is no storage")


_STEPS: Mapping[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda machine: machine.take(1),  # the protocol
    b"(": lambda machine: machine.marks.append(len(machine.stack)),
    b"q": lambda machine: machine.remember(machine.number(1)),
    b"r": lambda machine: machine.remember(machine.number(4)),
    b"h": lambda machine: machine.recall(machine.number(1)),
    b"j": lambda machine: machine.recall(machine.number(4)),
    b"N": lambda machine: machine.stack.append(None),
    b"\x88": lambda machine: machine.stack.append(True),
    b"\x89": lambda machine: machine.stack.append(False),
    b"K": lambda machine: machine.stack.append(machine.number(1)),
    b"M": lambda machine: machine.stack.append(machine.number(2)),
    b"J": lambda machine: machine.stack.append(machine.number(4, signed=True)),
    b"\x8a": lambda machine: machine.stack.append(machine.number(machine.number(1), signed=True)),
    b"G": lambda machine: machine.stack.append(struct.unpack(">d", machine.take(8))[0]),
    b"X": lambda machine: machine.stack.append(machine.word(machine.number(4))),
    b")": lambda machine: machine.pack(0),
    b"\x85": lambda machine: machine.pack(1),
    b"\x86": lambda machine: machine.pack(2),
    b"\x87": lambda machine: machine.pack(3),
    b"t": lambda machine: machine.stack.append(tuple(machine.pop_marked())),
    b"]": lambda machine: machine.stack.append([]),
    b"a": lambda machine: machine.extend([machine.pop()]),
    b"e": lambda machine: machine.extend(machine.pop_marked()),
    b"}": lambda machine: machine.stack.append({}),
    b"s": lambda machine: machine.fill([*reversed((machine.pop(), machine.pop()))]),
    b"u": lambda machine: machine.fill(machine.pop_marked()),
    b"c": lambda machine: machine.name(),
    b"Q": lambda machine: machine.refer(),
    b"R": lambda machine: machine.call(),
    b"b": lambda machine: machine.build(),
}
