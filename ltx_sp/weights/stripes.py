"""The bytes that a load reads, as one line of bytes, and how ranks and reads divide it. No torch.

The line holds the tensors in the order in which they are given; neighbours in a file that are
neighbours on the line are read together. Every cut falls on a multiple of ``ALIGNMENT`` from the
beginning of a tensor, so that no element is ever divided.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ltx_sp.weights.index import TensorEntry

__all__ = ["ALIGNMENT", "ByteStream", "Piece", "Span"]

ALIGNMENT = 4096


class Piece(NamedTuple):
    """Bytes ``begin`` to ``end`` of tensor number ``place``; the first is at ``position`` on the line."""

    place: int
    begin: int
    end: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Bytes that follow each other both in a file, from ``offset``, and on the line, from ``position``."""

    file: Path
    offset: int
    position: int
    num_bytes: int


class ByteStream:
    """The bytes of some tensors, one after the other; tensors without bytes are left out."""

    def __init__(self, entries: Sequence[TensorEntry]):
        self.entries = tuple(entry for entry in entries if entry.num_bytes)
        self._starts = [0, *accumulate(entry.num_bytes for entry in self.entries)]

    @property
    def num_bytes(self) -> int:
        return self._starts[-1]

    def stripe(self, rank: int, size: int) -> tuple[int, int]:
        """The contiguous share of one of ``size`` ranks: begin and end, equal to ``ALIGNMENT`` bytes or so."""
        return self._cut(self.num_bytes * rank // size), self._cut(self.num_bytes * (rank + 1) // size)

    def chunks(self, begin: int, end: int, max_bytes: int) -> list[tuple[int, int]]:
        """Divide a range into parts of at most ``max_bytes``, which must be 2 ``ALIGNMENT`` or more."""
        parts = []
        while begin < end:
            cut = end if end - begin <= max_bytes else self._cut(begin + max_bytes)
            parts.append((begin, cut))
            begin = cut
        return parts

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """What lies between two positions, in order."""
        at = bisect_right(self._starts, begin) - 1
        while begin < end:
            start, stop = self._starts[at], min(self._starts[at + 1], end)
            yield Piece(at, begin - start, stop - start, begin)
            begin, at = stop, at + 1

    def spans(self, begin: int, end: int) -> list[Span]:
        """The same as what a file holds in one stretch."""
        spans: list[Span] = []
        file, offset, position, num_bytes = Path(), 0, begin, 0
        for piece in self.pieces(begin, end):
            entry = self.entries[piece.place]
            start = entry.start + piece.begin
            if not num_bytes or start != offset + num_bytes or entry.file != file:
                if num_bytes:
                    spans.append(Span(file, offset, position, num_bytes))
                file, offset, position, num_bytes = entry.file, start, piece.position, 0
            num_bytes += piece.end - piece.begin
        return [*spans, Span(file, offset, position, num_bytes)] if num_bytes else spans

    def _cut(self, position: int) -> int:
        """The last place not after ``position`` where a tensor may be divided."""
        if position >= self.num_bytes:
            return self.num_bytes
        start = self._starts[bisect_right(self._starts, position) - 1]
        return position - (position - start) % ALIGNMENT
