"""Oracle: brute force, every byte of the line with its file, its place there, and its place in its tensor."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ltx_sp.weights.index import DTYPE_BYTES, TensorEntry
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream, Span

SEEDS = range(20)
WIDTHS = list(DTYPE_BYTES.items())


def entry(num_elements: int, dtype: str, start: int, file: str = "a") -> TensorEntry:
    return TensorEntry("x", Path(file), dtype, (num_elements,), start, start + num_elements * DTYPE_BYTES[dtype])


def layout(seed: int) -> list[TensorEntry]:
    """Tensors of any size at any byte of some files: neighbours and not, in the files' order and not."""
    rng = random.Random(seed)
    entries: list[TensorEntry] = []
    file, offset = 0, rng.randrange(9)
    for _ in range(rng.randrange(1, 14)):
        dtype, width = rng.choice(WIDTHS)
        largest = rng.choice([0, 1, 40, ALIGNMENT, 9 * ALIGNMENT]) // width
        new = entry(rng.randint(0, largest), dtype, offset, f"{file}.safetensors")
        entries.append(new)
        offset = new.end + rng.choice([0, 0, 0, 1, 77])
        if rng.random() < 0.15:
            file, offset = file + 1, rng.choice([offset, rng.randrange(9)])
    if rng.random() < 0.3:
        rng.shuffle(entries)
    return entries


class Line:
    """What a ``ByteStream`` of the same entries must agree with."""

    def __init__(self, entries: list[TensorEntry]):
        self.entries = [entry for entry in entries if entry.num_bytes]
        nothing: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        files = sorted({entry.file for entry in self.entries})
        self.index = np.concatenate(nothing + [np.full(e.num_bytes, i) for i, e in enumerate(self.entries)])
        self.place = np.concatenate(nothing + [np.arange(e.num_bytes) for e in self.entries])
        self.file = np.concatenate(nothing + [np.full(e.num_bytes, files.index(e.file)) for e in self.entries])
        self.offset = np.concatenate(nothing + [np.arange(e.start, e.end) for e in self.entries])
        self.num_bytes = len(self.index)

    def spans(self, begin: int, end: int) -> list[Span]:
        file, offset = self.file[begin:end], self.offset[begin:end]
        breaks = [int(i) + 1 for i in np.flatnonzero((np.diff(file) != 0) | (np.diff(offset) != 1))]
        edges = [0, *breaks, end - begin] if end > begin else []
        return [
            Span(self.entries[self.index[begin + a]].file, int(offset[a]), begin + a, b - a)
            for a, b in itertools.pairwise(edges)
        ]

    def may_be_cut(self, position: int) -> bool:
        """Between elements, and at most ``ALIGNMENT`` from where one would like it."""
        if position == self.num_bytes:
            return True
        return int(self.place[position]) % ALIGNMENT == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_stripes_cover_everything_once_and_divide_no_element(seed: int) -> None:
    entries = layout(seed)
    source, line = ByteStream(entries), Line(entries)
    assert source.num_bytes == line.num_bytes
    for size in range(1, 10):
        stripes = [source.stripe(rank, size) for rank in range(size)]
        assert stripes[0][0] == 0
        assert stripes[-1][1] == line.num_bytes
        assert all(left[1] == right[0] for left, right in itertools.pairwise(stripes))
        for begin, end in stripes:
            assert begin <= end <= begin + line.num_bytes / size + ALIGNMENT
            assert line.may_be_cut(begin)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_bytes", [2 * ALIGNMENT, 2 * ALIGNMENT + 1, 3 * ALIGNMENT - 1, 2**20])
def test_chunks_cover_a_stripe_once_in_parts_that_fit(seed: int, max_bytes: int) -> None:
    entries = layout(seed)
    source, line = ByteStream(entries), Line(entries)
    for rank in range(3):
        begin, end = source.stripe(rank, 3)
        chunks = source.chunks(begin, end, max_bytes)
        edges = [begin, *(stop for _, stop in chunks)]
        assert edges[-1] == end
        assert chunks == list(itertools.pairwise(edges))
        assert all(0 < stop - start <= max_bytes and line.may_be_cut(start) for start, stop in chunks)
        assert len(chunks) <= (end - begin) // (max_bytes - ALIGNMENT) + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_spans_and_pieces_equal_a_merge_byte_by_byte(seed: int) -> None:
    entries, rng = layout(seed), random.Random(seed)
    source, line = ByteStream(entries), Line(entries)
    ranges = [sorted((rng.randint(0, line.num_bytes), rng.randint(0, line.num_bytes))) for _ in range(20)]
    for begin, end in [[0, line.num_bytes], *ranges]:
        assert source.spans(begin, end) == line.spans(begin, end)
        position = begin
        for piece in source.pieces(begin, end):
            assert piece.position == position
            assert piece.end > piece.begin
            position += piece.end - piece.begin
            assert set(line.index[piece.position : position].tolist()) == {piece.place}
            assert line.place[piece.position] == piece.begin
        assert position == end


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("order", ["stored", "largest first"])
def test_realistic_stripes_are_balanced_within_two_percent(size: int, order: str) -> None:
    """The sizes of a transformer's block in bfloat16 (linears, biases, norms, tables), 8 times."""
    sizes = [4096 * 4096, 4096, 4096, 16384 * 4096, 16384, 4096 * 16384, 4096, 6 * 4096, 32] * 8 + [128 * 4096]
    if order == "largest first":
        sizes.sort(reverse=True)
    entries, offset = [], 8 + 30_001
    for num_elements in sizes:
        entries.append(entry(num_elements, "BF16", offset))
        offset = entries[-1].end
    source = ByteStream(entries)
    shares = [end - begin for begin, end in (source.stripe(rank, size) for rank in range(size))]
    assert max(shares) <= 1.02 * sum(shares) / size


def test_tensors_without_bytes_are_left_out() -> None:
    entries = [entry(0, "F32", 8), entry(3, "F32", 8), entry(0, "BF16", 20)]
    source = ByteStream(entries)
    assert source.entries == (entries[1],)
    assert source.num_bytes == 12
    assert [piece.place for piece in source.pieces(0, 12)] == [0]


def test_nothing_is_nothing() -> None:
    source = ByteStream([entry(0, "F32", 8)])
    assert source.num_bytes == 0
    assert [source.stripe(rank, 3) for rank in range(3)] == [(0, 0)] * 3
    assert source.chunks(0, 0, 2 * ALIGNMENT) == []
    assert source.spans(0, 0) == []
    assert list(source.pieces(0, 0)) == []
