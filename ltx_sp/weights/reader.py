"""Bytes on disk -> bytes on the host, three ways.

``stream`` reads through a small ring of buffers that are used again and again, ``read_into`` reads
to where the tensors shall stay, ``open_mapped`` maps the files. Each brings the bytes in by several
threads, ahead of the caller, in an order that the caller can rely on, and none copies them once more.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ltx_sp.errors import WeightsError
from ltx_sp.weights.host import huge_bytes, map_file, populate
from ltx_sp.weights.index import FileStamp, TensorEntry
from ltx_sp.weights.remote import is_remote, read_remote, remote_stamp
from ltx_sp.weights.stripes import ByteStream

__all__ = [
    "TORCH_DTYPES",
    "Chunk",
    "Ring",
    "mapped",
    "num_reader_threads",
    "open_mapped",
    "read_into",
    "require_unchanged",
    "stream",
]

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# 16 to 64 MiB measured alike; the smallest of them keeps the ring small.
SLOT_BYTES = 16 * 2**20
_NUM_SLOTS = 4
_MAX_THREADS = 4
_IOV_MAX = 1024

_J = TypeVar("_J")
_T = TypeVar("_T")


class Chunk:
    """Bytes ``begin`` to ``end`` of a stream, on the host.

    Args:
        parts: (position, uint8 tensor), in order; valid until the next chunk is asked for.
        busy: called before the memory is used again: waits for whoever still reads it.
    """

    def __init__(self, begin: int, end: int, parts: Sequence[tuple[int, Tensor]]):
        self.begin, self.end, self.parts = begin, end, parts
        self.busy: Callable[[], None] | None = None


class Ring:
    """The buffers of one reader.

    Args:
        pinned: page-locked, so that a device copies from them while the host goes on.
    """

    def __init__(self, num_slots: int = _NUM_SLOTS, slot_bytes: int = SLOT_BYTES, *, pinned: bool = False):
        self.slot_bytes = slot_bytes
        self.slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=True) if pinned else huge_bytes(slot_bytes)
            for _ in range(num_slots)
        ]


def num_reader_threads(ranks_on_host: int) -> int:
    """How many threads of one rank shall read: two keep a disk busy, and more than there are cores gain nothing."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // ranks_on_host))


def stream(
    source: ByteStream, ring: Ring, chunks: Iterable[tuple[int, int]], *, num_threads: int = 2
) -> Generator[Chunk]:
    """Yield parts of the stream in the order of ``chunks``, each in a buffer of the ring. Blocks the host.

    Args:
        chunks: (begin, end), at most ``ring.slot_bytes`` each.

    Raises:
        WeightsError: a file cannot be read, or has changed since it was indexed.
    """
    last: list[Chunk | None] = [None] * len(ring.slots)
    stamps = _stamps(source)

    def fill(slot: int, begin: int, end: int) -> Chunk:
        before = last[slot]
        if before is not None and before.busy is not None:
            before.busy()
        data = ring.slots[slot][: end - begin]
        memory = data.numpy().data
        for span in source.spans(begin, end):
            place = span.position - begin
            _read_at(span.file, span.offset, [memory[place : place + span.num_bytes]], stamps[span.file])
        last[slot] = chunk = Chunk(begin, end, [(begin, data)])
        return chunk

    jobs = ((i % len(ring.slots), *part) for i, part in enumerate(chunks))
    yield from _ahead(lambda job: fill(*job), jobs, len(ring.slots), num_threads)


def read_into(
    source: ByteStream,
    memory: Tensor,
    offsets: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    *,
    num_threads: int = 2,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Read ranges of the stream, one after the other, to where their tensors shall stay, and count the bytes.

    Blocks the host.

    Args:
        memory: uint8, on the host.
        offsets: where in ``memory`` each of ``source.entries`` begins.
        on_bytes: called on the caller's thread with the number of bytes that have come.

    Raises:
        WeightsError: a file cannot be read, or has changed since it was indexed.
    """
    view, stamps = memory.numpy().data, _stamps(source)

    def fill(begin: int, end: int) -> int:
        for file, offset, places in _scattered(source, offsets, begin, end):
            _read_at(file, offset, [view[start:stop] for start, stop in places], stamps[file])
        return end - begin

    parts = [part for begin, end in ranges for part in source.chunks(begin, end, SLOT_BYTES)]
    total = 0
    for count in _ahead(lambda part: fill(*part), parts, 2 * num_threads, num_threads):
        total += count
        if on_bytes is not None:
            on_bytes(count)
    return total


def _scattered(
    source: ByteStream, offsets: Sequence[int], begin: int, end: int
) -> Iterator[tuple[Path, int, list[tuple[int, int]]]]:
    """Stretches of files, and for each the places in memory where it goes, one after the other."""
    file, first, offset = Path(), 0, -1
    places: list[tuple[int, int]] = []
    for index, start, stop, _ in source.pieces(begin, end):
        entry, place = source.entries[index], offsets[index]
        if entry.start + start != offset or entry.file != file:
            if places:
                yield file, first, places
            file, first, places = entry.file, entry.start + start, []
        offset = entry.start + stop
        if places and places[-1][1] == place + start:
            places[-1] = (places[-1][0], place + stop)
        else:
            places.append((place + start, place + stop))
    if places:
        yield file, first, places


def open_mapped(source: ByteStream) -> dict[Path, Tensor]:
    """Map the files that a stream is in, as uint8 tensors, without reading them. Blocks the host.

    A file that is cut short later kills the process that touches it: the kernel knows no other answer.

    Raises:
        WeightsError: a file cannot be read, or has changed since it was indexed.
    """
    maps = {}
    for file, stamp in _stamps(source).items():
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                now = FileStamp.of(os.fstat(descriptor))
                _require_same(file, stamp, now)
                maps[file] = map_file(descriptor, now.size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(file, error) from error
    return maps


def mapped(
    source: ByteStream, maps: Mapping[Path, Tensor], chunks: Iterable[tuple[int, int]], *, num_threads: int = 2
) -> Generator[Chunk]:
    """Yield parts of the stream in the order of ``chunks``, as views of mapped files that are in memory.

    Blocks the host.

    Raises:
        WeightsError: the disk failed.
    """

    def bring(begin: int, end: int) -> Chunk:
        parts = []
        for span in source.spans(begin, end):
            whole, stop = maps[span.file], span.offset + span.num_bytes
            try:
                populate(whole, span.offset, stop)
            except OSError as error:
                raise _unreadable(span.file, error) from error
            parts.append((span.position, whole[span.offset : stop]))
        return Chunk(begin, end, parts)

    yield from _ahead(lambda part: bring(*part), chunks, 2 * num_threads, num_threads)


def require_unchanged(entries: Iterable[TensorEntry]) -> None:
    """Raise WeightsError where a file is no longer what it was when it was indexed. Blocks the host."""
    for file, stamp in {entry.file: entry.stamp for entry in entries}.items():
        try:
            now = remote_stamp(file) if is_remote(file) else FileStamp.of(os.stat(file))
        except OSError as error:
            raise _unreadable(file, error) from error
        _require_same(file, stamp, now)


def _ahead(work: Callable[[_J], _T], jobs: Iterable[_J], depth: int, num_threads: int) -> Generator[_T]:
    """Run the jobs in threads and yield what they return, in order, no more than ``depth`` of them alive."""
    waiting = iter(jobs)
    pending: deque[Future[_T]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ltx_sp-read")
    try:
        for job in waiting:
            pending.append(pool.submit(work, job))
            if len(pending) == depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stamps(source: ByteStream) -> dict[Path, FileStamp | None]:
    return {entry.file: entry.stamp for entry in source.entries}


def _read_at(file: Path, offset: int, buffers: list[memoryview], stamp: FileStamp | None) -> None:
    """Fill the buffers with what a file holds from ``offset`` on. Blocks the host, not other threads."""
    if is_remote(file):
        read_remote(file, offset, buffers)
        return
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            _require_same(file, stamp, FileStamp.of(os.fstat(descriptor)))
            while buffers:
                count = os.preadv(descriptor, buffers[:_IOV_MAX], offset)
                if count == 0:
                    raise WeightsError(f"{file} ends at byte {offset}, in the middle of a tensor. Fetch it again.")
                offset += count
                buffers = _rest(buffers, count)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(file, error) from error


def _rest(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill after ``count`` bytes."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


def _require_same(file: Path, before: FileStamp | None, now: FileStamp) -> None:
    if before is not None and before != now:
        raise WeightsError(
            f"{file} has changed since its header was read ({before.size} bytes then, {now.size} now); it must not "
            "while it is loaded. Start again when it is complete."
        )


def _unreadable(file: Path, error: OSError) -> WeightsError:
    if error.errno == errno.ENOMEM:
        return WeightsError(f"{file} cannot be mapped ({error.strerror}). Load it with --load-mode stream.")
    return WeightsError(f"{file} cannot be read ({error.strerror}). Check the file and the disk.")
