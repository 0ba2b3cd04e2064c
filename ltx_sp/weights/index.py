"""Which bytes of which file are which tensor.

No torch. Reads safetensors headers and JSON, never tensor data, and believes neither: whatever a
file says about itself is checked against the file before anybody reads or allocates by it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from ltx_sp.errors import WeightsError

__all__ = ["DTYPE_BYTES", "FileStamp", "Index", "TensorEntry", "parse_object", "quote", "read_index", "read_object"]

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

# The limit of the safetensors library, applied to every JSON text that is read here.
_MAX_JSON_BYTES = 100_000_000
_LENGTH_BYTES = 8
_MAX_SIZE = 2**63 - 1
_FETCH_AGAIN = "Fetch it again."


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
    """Index a safetensors file, or a folder of them with or without an index JSON.

    Blocks the host.

    Raises:
        WeightsError: a file is absent, unreadable, damaged, or contradicts another.
    """
    if stat.S_ISDIR(_status(path).st_mode):
        files, weight_map = _files_of(path)
    else:
        files, weight_map = (path,), {}
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        file_entries, file_metadata = _read_file(file)
        for name, entry in file_entries.items():
            if name in entries:
                raise WeightsError(
                    f"{entries[name].file} and {file} both hold tensor {quote(name)}; each tensor must be "
                    "in one file. Remove the file that does not belong to the checkpoint."
                )
            entries[name] = entry
        metadata = file_metadata | metadata
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file != shard:
            raise WeightsError(
                f"{shard} lacks tensor {quote(name)}, which the index JSON beside it says it holds. "
                "Fetch both again from one revision."
            )
    return Index(entries, metadata, files)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Blocks the host.

    Raises:
        WeightsError: absent, unreadable, over 100 MB, not JSON, or not an object.
    """
    size = _status(path).st_size
    if size > _MAX_JSON_BYTES:
        raise WeightsError(f"{path} has {size} bytes; a JSON file may have {_MAX_JSON_BYTES}. {_FETCH_AGAIN}")
    with _access(path), path.open("rb") as file:
        text = file.read(_MAX_JSON_BYTES)
    return parse_object(text, str(path))


def parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice; ``what`` names it in errors.

    Raises:
        WeightsError: it is something else.
    """
    try:
        # Explicitly UTF-8: json.loads would also accept UTF-16 and UTF-32.
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{what} is not a valid JSON object ({error}). {_FETCH_AGAIN}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{what} is a JSON {type(value).__name__}; it must be an object. {_FETCH_AGAIN}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {quote(key)} occurs twice")
        table[key] = value
    return table


def quote(value: object) -> str:
    """Quote something that a file says, for a message: escaped, and short enough for one line."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


@contextmanager
def _access(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path} does not exist; it must hold weights or their description. Check the path."
        ) from error
    except PermissionError as error:
        raise WeightsError(f"{path} may not be read by this user. Grant read access to it.") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{path} cannot be read ({reason}). Check the path and the disk.") from error


def _status(path: Path) -> os.stat_result:
    with _access(path):
        status = path.stat()
    # A pipe or a device would block or never end.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise WeightsError(f"{path} is neither a file nor a folder; it must be one of them. Check the path.")
    return status


def _files_of(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The safetensors files of a folder, and what its index JSON says, if there is one."""
    with _access(folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    index_names = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(index_names) > 1:
        raise WeightsError(
            f"{folder} has {len(index_names)} index files ({', '.join(index_names[:3])}); it must have at most one. "
            "Keep the one of the checkpoint that you mean."
        )
    if index_names:
        weight_map = _read_weight_map(folder / index_names[0])
        return tuple(sorted(set(weight_map.values()))), weight_map
    shards = [name for name in names if name.endswith(".safetensors")]
    # Some repositories hold a second, unsharded copy of the same weights.
    shards = [name for name in shards if not name.startswith("consolidated")] or shards
    if not shards:
        raise WeightsError(f"{folder} holds no .safetensors file; it must hold the weights. Check the path.")
    return tuple(folder / name for name in shards), {}


def _read_weight_map(path: Path) -> dict[str, Path]:
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{path} has no weight_map object, which must map tensors to files. {_FETCH_AGAIN}")
    weight_map: dict[str, Path] = {}
    for name, shard in names.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in "/\\\0"):
            raise WeightsError(
                f"{path} puts tensor {quote(name)} into {quote(shard)}; it must name a file beside itself. "
                f"{_FETCH_AGAIN}"
            )
        weight_map[name] = path.parent / shard
    return weight_map


def _read_file(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    stamp, header = _read_header(path)
    data_start = _LENGTH_BYTES + len(header)
    table = parse_object(header, f"The header of {path}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has metadata that does not map text to text, as it must. {_FETCH_AGAIN}")
    entries = [_parse_entry(name, value, path, data_start, stamp) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end, before = data_start, "the header"
    for entry in entries:
        if entry.start != end:
            kind = "overlaps" if entry.start < end else "leaves a gap after"
            raise WeightsError(
                f"{path}: tensor {quote(entry.name)} starts at byte {entry.start} and {kind} {before}, which ends at "
                f"{end}; tensors must follow each other. {_FETCH_AGAIN}"
            )
        end, before = entry.end, f"tensor {quote(entry.name)}"
    if stamp.size != end:
        raise WeightsError(f"{path} ends at byte {stamp.size}, its header promises {end}. {_FETCH_AGAIN}")
    return {entry.name: entry for entry in entries}, metadata


def _read_header(path: Path) -> tuple[FileStamp, bytes]:
    if stat.S_ISDIR(_status(path).st_mode):
        raise WeightsError(f"{path} is a folder; it must be a safetensors file. Fetch the file.")
    with _access(path), path.open("rb") as file:
        # The stamp is of the opened file, not of the name.
        stamp = FileStamp.of(os.fstat(file.fileno()))
        prefix = file.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        fits = len(prefix) == _LENGTH_BYTES and length <= min(_MAX_JSON_BYTES, stamp.size - _LENGTH_BYTES)
        header = file.read(length) if fits else b""
    if not prefix:
        raise WeightsError(f"{path} is empty; it must be a safetensors file. {_FETCH_AGAIN}")
    if len(prefix) < _LENGTH_BYTES:
        raise WeightsError(
            f"{path} has {len(prefix)} bytes; a safetensors file has {_LENGTH_BYTES} and a header. {_FETCH_AGAIN}"
        )
    if prefix == b"version ":
        raise WeightsError(f"{path} is a Git LFS pointer; it must be the file itself. Fetch it with `git lfs pull`.")
    if not fits:
        raise WeightsError(
            f"{path} promises a header of {length} bytes and has {stamp.size} bytes in all; a safetensors header lies "
            f"within its file and has at most {_MAX_JSON_BYTES} bytes. {_FETCH_AGAIN}"
        )
    if len(header) < length:
        raise WeightsError(f"{path} ended while its header was read; it must not change meanwhile. {_FETCH_AGAIN}")
    return stamp, header


def _parse_entry(name: str, value: Any, path: Path, data_start: int, stamp: FileStamp) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    tensor = f"{path}: tensor {quote(name)}"
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise WeightsError(
            f"{tensor} has dtype {quote(dtype)}; ltx_sp knows {', '.join(DTYPE_BYTES)}. "
            "Fetch the file again, or convert it to BF16."
        )
    # One dtype size below the limit, so that the bytes stay below it too.
    if not _are_sizes(shape) or (extent := _product(shape)) > _MAX_SIZE // 8:
        raise WeightsError(
            f"{tensor} has shape {quote(shape)}; it must be a list of sizes that an address can span. {_FETCH_AGAIN}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(
            f"{tensor} has data_offsets {quote(offsets)}; they must be a first and a last byte. {_FETCH_AGAIN}"
        )
    num_bytes = 0 if 0 in shape else extent * DTYPE_BYTES[dtype]
    if num_bytes != offsets[1] - offsets[0]:
        raise WeightsError(
            f"{tensor} has {offsets[1] - offsets[0]} bytes; {dtype} {quote(shape)} needs {num_bytes}. {_FETCH_AGAIN}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1], stamp)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # `type` and not `isinstance`: True is an int.
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _product(shape: list[int]) -> int:
    """Multiply the sizes, a 0 taken as 1 because strides are made so, up to the largest address."""
    extent = 1
    for size in shape:
        extent = min(extent * max(size, 1), _MAX_SIZE)  # else a long list makes a slow number
    return extent
