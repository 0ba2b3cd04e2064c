"""Where the records of an uncompressed zip archive are.

``zipfile`` would do for honest files. It builds objects for whatever the directory lists before
anybody can look at its size, and says nothing of where a record's bytes begin.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from ltx_sp.weights.files import MAX_TEXT_BYTES, quote

__all__ = ["Archive", "RefusedError"]


class RefusedError(ValueError):
    """Why a file is not what ``torch.save`` makes of a state dict."""


_DIRECTORY_END = struct.Struct("<4s4H2IH")
_DIRECTORY_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_RECORD_BYTES = 16_000_000  # 40 000 tensors are described in 7 MB
_IN_EXTRA = 2**32 - 1  # says of a 32-bit field that its value is in the 64-bit extra field


class Archive:
    """The records of a zip archive, all stored as they are, in the one folder that ``torch.save`` makes.

    Args:
        read: returns so many bytes from an offset, fewer at the end of the file.
        size: of the file.

    Raises:
        RefusedError: from here and from every method: it is damaged, or of another kind.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self._read, self._size = read, size
        self._end, length, count = self._find_directory()
        if length > MAX_TEXT_BYTES:
            raise RefusedError(f"its directory has {length} bytes, at most {MAX_TEXT_BYTES} are read")
        self._records: dict[bytes, tuple[int, int]] = {}  # name -> where its header is, its length
        for name, record in self._parse_directory(self._take(self._end, length)):
            if name in self._records:
                raise RefusedError(f"record {quote(name)} occurs twice")
            self._records[name] = record
        if len(self._records) != count:
            raise RefusedError(f"its directory has {len(self._records)} records and promises {count}")
        self._folder = next(iter(self._records), b"").partition(b"/")[0]
        order = self.text("byteorder") if self._path("byteorder") in self._records else b"little"
        if order != b"little":
            raise RefusedError(f"its byte order is {quote(order)}, not little")

    def _take(self, offset: int, length: int) -> bytes:
        content = self._read(offset, length) if 0 <= offset <= self._size - length else b""
        if len(content) != length:
            raise RefusedError("it is cut short")
        return content

    def _path(self, name: str) -> bytes:
        return self._folder + b"/" + name.encode(errors="surrogatepass")

    def _find_directory(self) -> tuple[int, int, int]:
        """Where the directory starts, its bytes and its records, from what the file ends with."""
        at = self._size - _DIRECTORY_END.size
        if at < 0 or (found := self._take(at, _DIRECTORY_END.size))[:4] != b"PK\5\6" or found[-2:] != b"\0\0":
            raise RefusedError(
                "it does not end with the directory of a zip archive (cut short, or in the format from before 2020)"
            )
        _, _, _, _, count, length, start, _ = _DIRECTORY_END.unpack(found)
        if at >= _LOCATOR_64.size and (found := self._take(at - _LOCATOR_64.size, _LOCATOR_64.size))[:4] == b"PK\6\7":
            at = _LOCATOR_64.unpack(found)[2]
            if (found := self._take(at, _DIRECTORY_END_64.size))[:4] != b"PK\6\6":
                raise RefusedError("its zip directory is damaged")
            *_, count, length, start = _DIRECTORY_END_64.unpack(found)
        if start + length != at:
            raise RefusedError(f"its zip directory ends at byte {start + length} and must end at {at}")
        return start, length, count

    @staticmethod
    def _parse_directory(text: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
        at = 0
        while at < len(text):
            fixed = text[at : at + _DIRECTORY_ENTRY.size]
            if len(fixed) != _DIRECTORY_ENTRY.size or fixed[:4] != b"PK\1\2":
                raise RefusedError("its zip directory is damaged")
            fields = _DIRECTORY_ENTRY.unpack(fixed)
            flags, method, packed, length, header = fields[3], fields[4], fields[8], fields[9], fields[16]
            name_end = at + _DIRECTORY_ENTRY.size + fields[10]
            name = text[at + _DIRECTORY_ENTRY.size : name_end]
            wide = _wide_values(text[name_end : name_end + fields[11]])
            at = name_end + fields[11] + fields[12]
            if at > len(text):
                raise RefusedError("its zip directory is damaged")
            # In this order, and only those that do not fit.
            length, packed, header = (
                next(wide, -1) if value == _IN_EXTRA else value for value in (length, packed, header)
            )
            if method != 0 or flags & 1 or packed != length or header < 0 or length < 0:
                raise RefusedError(f"record {quote(name)} is not stored as it is")
            yield name, (header, length)

    def span(self, name: str) -> tuple[int, int]:
        """Locate the bytes of a record."""
        path = self._path(name)
        if path not in self._records:
            raise RefusedError(f"it has no record {quote(name)}")
        header, length = self._records[path]
        found = self._take(header, _LOCAL_HEADER.size + len(path))
        signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(found)
        start = header + len(found) + extra_length
        named = name_length == len(path) and found.endswith(path)
        if signature != b"PK\3\4" or not named or start + length > self._end:
            raise RefusedError(f"record {quote(name)} is not where its directory says")
        return start, start + length

    def text(self, name: str) -> bytes:
        """Read a record that describes something."""
        start, end = self.span(name)
        if end - start > _MAX_RECORD_BYTES:
            raise RefusedError(f"record {quote(name)} has {end - start} bytes, at most {_MAX_RECORD_BYTES} are read")
        return self._take(start, end - start)


def _wide_values(extra: bytes) -> Iterator[int]:
    """The numbers of the 64-bit extra field, if there is one."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            content = extra[at + 4 : at + 4 + length]
            yield from (value for (value,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8]))
            return
        at += 4 + length
