"""Which bytes of which file are which tensor.

No torch. Reads headers, never tensor data, and believes none: whatever a file says about itself is
checked against the file before anybody reads or allocates by it.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltx_sp.errors import WeightsError
from ltx_sp.weights.files import (
    FETCH_AGAIN,
    MAX_TEXT_BYTES,
    PICKLED_SUFFIXES,
    access,
    parse_object,
    quote,
    read_object,
    require_content,
    status_of,
    weight_files,
)

__all__ = [
    "DTYPE_BYTES",
    "MAX_SIZE",
    "FileStamp",
    "Index",
    "TensorEntry",
    "count_elements",
    "opened",
    "parse_object",
    "quote",
    "read_index",
    "read_object",
]

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

MAX_SIZE = 2**63 - 1
_MAX_ELEMENTS = MAX_SIZE // 8  # so that the bytes stay below MAX_SIZE too
_MAX_DIMS = 64
_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells a file from a later one under the same name: size in bytes, and time of change."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_size, status.st_mtime_ns)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor.

    Args:
        dtype: a safetensors name, a key of ``DTYPE_BYTES``.
        start, end: byte offsets from the beginning of ``file``.
        stamp: the file as it was when its header was read; None where nobody looked.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stamp: FileStamp | None = None

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Index:
    """The tensors of one or more files, by name.

    Args:
        metadata: the headers' ``__metadata__``; the first file that has a key wins.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    def select(self, keep: Callable[[str], bool]) -> Index:
        """Narrow the index to the tensors whose name ``keep`` accepts."""
        entries = {name: entry for name, entry in self.entries.items() if keep(name)}
        used = {entry.file for entry in entries.values()}
        return Index(entries, self.metadata, tuple(file for file in self.files if file in used))


def read_index(path: Path) -> Index:
    """Index a file of weights, or a folder of them with or without an index JSON.

    Safetensors; pickled by PyTorch where the name ends in ``.bin``, ``.pth`` or ``.pt``. A single safetensors
    file may be remote. Blocks the host.

    Raises:
        WeightsError: a file is absent, unreadable, damaged, or contradicts another.
    """
    with without_gc():
        if not _is_remote(path) and stat.S_ISDIR(status_of(path).st_mode):
            return _read_files(*weight_files(path))
        return _read_files((path,), {})


@contextmanager
def without_gc() -> Iterator[None]:
    """Keep Python from searching for cycles meanwhile.

    Parsing makes many objects and no cycle. With torch imported, the searches take two thirds of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_files(files: tuple[Path, ...], weight_map: Mapping[str, Path]) -> Index:
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        file_entries, file_metadata = _read_file(file)
        for name in entries.keys() & file_entries.keys():
            raise WeightsError(
                f"{entries[name].file} and {file} both hold tensor {quote(name)}; each tensor must be "
                "in one file. Remove the file that does not belong to the checkpoint."
            )
        entries |= file_entries
        metadata = file_metadata | metadata
    for name, shard in weight_map.items():
        # Compared as objects first: comparing two paths is slow.
        if name not in entries or ((file := entries[name].file) is not shard and file != shard):
            raise WeightsError(
                f"{shard} lacks tensor {quote(name)}, which the index JSON beside it says it holds. "
                "Fetch both again from one revision."
            )
    return Index(entries, metadata, files)


def _read_file(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if path.suffix in PICKLED_SUFFIXES and not _is_remote(path):
        from ltx_sp.weights import pickled

        return pickled.read_entries(path), {}
    stamp, header = _read_header(path)
    data_start = _LENGTH_BYTES + len(header)
    table = parse_object(header, f"The header of {path}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has metadata that does not map text to text, as it must. {FETCH_AGAIN}")
    entries = [_parse_entry(name, value, path, data_start, stamp) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end, before = data_start, None
    for entry in entries:
        if entry.start != end:
            kind = "overlaps" if entry.start < end else "leaves a gap after"
            what = f"tensor {quote(before.name)}" if before else "the header"
            raise WeightsError(
                f"{path}: tensor {quote(entry.name)} starts at byte {entry.start} and {kind} {what}, which ends at "
                f"{end}; tensors must follow each other. {FETCH_AGAIN}"
            )
        end, before = entry.end, entry
    if stamp.size != end:
        raise WeightsError(f"{path} ends at byte {stamp.size}, its header promises {end}. {FETCH_AGAIN}")
    return {entry.name: entry for entry in entries}, metadata


def _read_header(path: Path) -> tuple[FileStamp, bytes]:
    with opened(path) as (stamp, read):
        prefix = read(0, min(_LENGTH_BYTES, stamp.size))
        length = int.from_bytes(prefix, "little")
        fits = len(prefix) == _LENGTH_BYTES and length <= min(MAX_TEXT_BYTES, stamp.size - _LENGTH_BYTES)
        header = read(_LENGTH_BYTES, length) if fits else b""
    require_content(path, prefix, "a safetensors file")
    if len(prefix) < _LENGTH_BYTES:
        raise WeightsError(
            f"{path} has {len(prefix)} bytes; a safetensors file has {_LENGTH_BYTES} and a header. {FETCH_AGAIN}"
        )
    if not fits:
        raise WeightsError(
            f"{path} promises a header of {length} bytes and has {stamp.size} bytes in all; a safetensors header lies "
            f"within its file and has at most {MAX_TEXT_BYTES} bytes. {FETCH_AGAIN}"
        )
    if len(header) < length:
        raise WeightsError(f"{path} ended while its header was read; it must not change meanwhile. {FETCH_AGAIN}")
    return stamp, header


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileStamp, Callable[[int, int], bytes]]]:
    """Open a file here or elsewhere: its stamp, and a function that reads bytes at an offset."""
    if _is_remote(path):
        from ltx_sp.weights import remote

        def fetch(offset: int, length: int) -> bytes:
            content = bytearray(length)
            remote.read_remote(path, offset, [memoryview(content)] if length else [])
            return bytes(content)

        yield remote.remote_stamp(path), fetch
        return
    if stat.S_ISDIR(status_of(path).st_mode):
        raise WeightsError(f"{path} is a folder; it must be a file of weights. Fetch the file.")
    with access(path), path.open("rb", buffering=0) as file:
        # The stamp is of the opened file, not of the name.
        yield FileStamp.of(os.fstat(file.fileno())), lambda offset, length: os.pread(file.fileno(), length, offset)


def _is_remote(path: Path) -> bool:
    if not path.parts or not path.parts[0].endswith(":"):
        return False
    from ltx_sp.weights import remote

    return remote.is_remote(path)


def _parse_entry(name: str, value: Any, path: Path, data_start: int, stamp: FileStamp) -> TensorEntry:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or (width := DTYPE_BYTES.get(dtype)) is None:
        raise WeightsError(
            f"{path}: tensor {quote(name)} has dtype {quote(dtype)}; ltx_sp knows {', '.join(DTYPE_BYTES)}. "
            "Fetch the file again, or convert it to BF16."
        )
    if not isinstance(shape, list) or (count := count_elements(shape)) is None:
        raise WeightsError(
            f"{path}: tensor {quote(name)} has shape {quote(shape)}; it must be a list of at most {_MAX_DIMS} sizes "
            f"that an address can span. {FETCH_AGAIN}"
        )
    match offsets:
        # `type` and not `isinstance`: True is an int.
        case [first, last] if type(first) is type(last) is int and 0 <= first <= last <= MAX_SIZE:
            pass
        case _:
            raise WeightsError(
                f"{path}: tensor {quote(name)} has data_offsets {quote(offsets)}; they must be a first and a last "
                f"byte. {FETCH_AGAIN}"
            )
    if count * width != last - first:
        raise WeightsError(
            f"{path}: tensor {quote(name)} has {last - first} bytes; {dtype} {quote(shape)} needs {count * width}. "
            f"{FETCH_AGAIN}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + first, data_start + last, stamp)


def count_elements(shape: list[Any] | tuple[Any, ...]) -> int | None:
    """Multiply sizes that a file states; None if they are not sizes, or more than an address can span."""
    if len(shape) > _MAX_DIMS:
        return None
    extent = 1
    for size in shape:
        # `type` and not `isinstance`: True is an int.
        if type(size) is not int or size < 0:
            return None
        extent *= size or 1  # a 0 taken as 1, because strides are made so
        if extent > _MAX_ELEMENTS:
            return None
    return 0 if 0 in shape else extent
