"""Oracles: the safetensors library for the bytes, a plain read for everything else."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_sp.errors import WeightsError
from ltx_sp.weights import reader
from ltx_sp.weights.host import huge_bytes
from ltx_sp.weights.index import DTYPE_BYTES, Index, read_index
from ltx_sp.weights.reader import (
    TORCH_DTYPES,
    Chunk,
    Ring,
    mapped,
    num_reader_threads,
    open_mapped,
    read_into,
    require_unchanged,
    stream,
)
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from tests.support.weights import fail_reads, mapping_of, open_files, same_bits, write_unaligned

SLOT = 2 * ALIGNMENT
WAYS = ("stream", "read_into", "mapped")


def write_files(folder: Path, num_files: int = 3) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(num_files):
        generator = torch.Generator().manual_seed(i)
        part = {f"{i}.{j}": torch.randn(j * 40, 3, generator=generator) for j in range(20)}
        part |= {f"{i}.scalar": torch.tensor(i + 0.5, dtype=torch.float64), f"{i}.large": torch.arange(5000 + i)}
        save_file(part, folder / f"{i}.safetensors")
        tensors |= part
    return tensors


def source_of(index: Index) -> ByteStream:
    return ByteStream(list(index.entries.values()))


def chunks_of(source: ByteStream) -> list[tuple[int, int]]:
    return source.chunks(0, source.num_bytes, SLOT)


def expected(source: ByteStream) -> bytes:
    return b"".join(entry.file.read_bytes()[entry.start : entry.end] for entry in source.entries)


def start(way: str, source: ByteStream, num_threads: int = 2) -> Generator[Chunk]:
    """One of the two that yield chunks, with slots of the smallest size."""
    if way == "stream":
        return stream(source, Ring(3, SLOT), chunks_of(source), num_threads=num_threads)
    return mapped(source, open_mapped(source), chunks_of(source), num_threads=num_threads)


def read_all(way: str, source: ByteStream, num_threads: int = 2) -> bytes:
    """The whole line, by way of whatever is asked for."""
    if way == "read_into":
        memory = huge_bytes(source.num_bytes)
        offsets = [0, *itertools.accumulate(entry.num_bytes for entry in source.entries)][:-1]
        read_into(source, memory, offsets, [(0, source.num_bytes)], num_threads=num_threads)
        return memory.numpy().tobytes()
    found = b""
    for chunk in start(way, source, num_threads):
        assert chunk.begin == len(found)
        for position, data in chunk.parts:
            assert position == len(found)
            found += data.numpy().tobytes()
        assert chunk.end == len(found)
    return found


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small files take many reads."""
    monkeypatch.setattr(reader, "SLOT_BYTES", SLOT)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Neither a thread nor a descriptor, whatever a test does."""
    threads, files = threading.active_count(), open_files()
    yield
    if not open_files() <= files:
        gc.collect()  # an error holds on to where it came from
    assert threading.active_count() == threads
    assert open_files() <= files


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_files", [1, 3])
def test_the_whole_line_comes_in_order(tmp_path: Path, way: str, num_threads: int, num_files: int) -> None:
    write_files(tmp_path, num_files)
    source = source_of(read_index(tmp_path))
    assert len(chunks_of(source)) > 10 * num_files
    assert read_all(way, source, num_threads) == expected(source)


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_asked_for_is_read(tmp_path: Path, way: str) -> None:
    """Every third tensor, backward: hardly any of them neighbours."""
    tensors = write_files(tmp_path)
    entries = list(read_index(tmp_path).entries.values())[::-3]
    source = ByteStream(entries)
    found = read_all(way, source)
    assert found == b"".join(tensors[entry.name].view(-1).view(torch.uint8).numpy().tobytes() for entry in entries)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_is_the_librarys(tmp_path: Path, dtype: str) -> None:
    assert TORCH_DTYPES[dtype].itemsize == DTYPE_BYTES[dtype]
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (6 * DTYPE_BYTES[dtype],), dtype=torch.uint8)
    path = tmp_path / "x.safetensors"
    save_file({"x": raw.view(TORCH_DTYPES[dtype]).view(2, 3)}, path)
    found = bytearray(read_all("stream", source_of(read_index(path))))
    assert same_bits(torch.frombuffer(found, dtype=TORCH_DTYPES[dtype]).view(2, 3), load_file(path)["x"])


@pytest.mark.parametrize("way", WAYS)
def test_tensors_need_not_be_aligned(tmp_path: Path, way: str) -> None:
    """Other writers than the safetensors library put tensors at odd bytes."""
    tensors = {"byte": torch.tensor(7, dtype=torch.uint8), "empty": torch.empty(3, 0), "double": torch.randn(5000)}
    write_unaligned(tmp_path / "x.safetensors", tensors)
    source = source_of(read_index(tmp_path))
    assert source.entries[1].start % 4 == 2
    assert read_all(way, source) == b"\x07" + tensors["double"].numpy().tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_nothing(tmp_path: Path, way: str) -> None:
    save_file({"x": torch.empty(2, 0, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert read_all(way, source_of(read_index(tmp_path))) == b""
    assert read_all(way, ByteStream([])) == b""


@pytest.mark.parametrize("way", ["stream", "read_into"])
@pytest.mark.parametrize("most", [1, 1000])
def test_the_kernel_may_give_less_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, most: int
) -> None:
    """Also ends within one of several buffers, and at its end."""
    real = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        left, fewer = most, []
        for buffer in buffers:
            fewer.append(buffer[:left])
            left -= len(fewer[-1])
        return real(descriptor, [buffer for buffer in fewer if buffer], offset)

    tensors = {f"{i}": torch.randn(7) for i in range(200)}
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "preadv", short)
    source = source_of(read_index(tmp_path))
    assert read_all(way, source) == expected(source)
    assert read_with_gaps(source) == expected(source)


def read_with_gaps(source: ByteStream, gap: int = 3) -> bytes:
    """To places that are no neighbours, so that each tensor is a buffer of its own; the gaps must stay."""
    sizes = [entry.num_bytes for entry in source.entries]
    offsets = [gap + start + i * gap for i, start in enumerate([0, *itertools.accumulate(sizes)][:-1])]
    memory = torch.full((sum(sizes) + gap * (len(sizes) + 1),), 255, dtype=torch.uint8)
    read_into(source, memory, offsets, [(0, source.num_bytes)])
    edges = [0, *(edge for pair in zip(offsets, sizes, strict=True) for edge in (pair[0], sum(pair))), len(memory)]
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        assert memory[begin:end].tolist() == [255] * (end - begin)
    return b"".join(memory[at : at + size].numpy().tobytes() for at, size in zip(offsets, sizes, strict=True))


def test_one_read_may_fill_more_places_than_the_kernel_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SLOT_BYTES", 2**20)
    sizes, real = [], os.preadv

    def spy(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        sizes.append(len(buffers))
        return real(descriptor, buffers, offset)

    save_file(
        {f"{i:04}": torch.full((5,), i % 251, dtype=torch.uint8) for i in range(2500)}, tmp_path / "x.safetensors"
    )
    monkeypatch.setattr(os, "preadv", spy)
    source = source_of(read_index(tmp_path))
    assert read_with_gaps(source) == expected(source)
    assert sizes == [1024, 1024, 2500 - 2048]


def test_neighbours_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of many small tensors takes as many reads as slots, and each file is a read of its own."""
    write_files(tmp_path)
    reads, real = [], os.preadv

    def spy(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        reads.append(sum(map(len, buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    source = source_of(read_index(tmp_path))
    for way in ("stream", "read_into"):
        reads.clear()
        read_all(way, source)
        assert sum(reads) == source.num_bytes
        assert len(reads) == sum(len(source.spans(*chunk)) for chunk in chunks_of(source))
        assert len(reads) <= len(chunks_of(source)) + 2


def test_ranges_are_read_to_their_places_in_any_order(tmp_path: Path) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    offsets = [0, *itertools.accumulate(entry.num_bytes for entry in source.entries)][:-1]
    middle, _ = source.stripe(1, 2)
    memory = huge_bytes(source.num_bytes)
    read_into(source, memory, offsets, [(middle, source.num_bytes)])
    assert memory.numpy().tobytes() == bytes(middle) + expected(source)[middle:]
    read_into(source, memory, offsets, [(0, middle), (middle, middle)])
    assert memory.numpy().tobytes() == expected(source)


def test_bytes_are_reported_as_they_come_on_the_callers_thread(tmp_path: Path) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    steps: list[tuple[int, int]] = []
    offsets = [0, *itertools.accumulate(entry.num_bytes for entry in source.entries)][:-1]
    read_into(
        source,
        huge_bytes(source.num_bytes),
        offsets,
        [(0, source.num_bytes)],
        on_bytes=lambda count: steps.append((count, threading.get_ident())),
    )
    assert [count for count, _ in steps] == [end - begin for begin, end in chunks_of(source)]
    assert {thread for _, thread in steps} == {threading.get_ident()}


@pytest.mark.parametrize("slow", [0, 1])
def test_chunks_keep_their_order_when_reads_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: int) -> None:
    turns, real = itertools.count(), os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(turns) % 2 == slow:
            time.sleep(0.002)
        return real(descriptor, buffers, offset)

    write_files(tmp_path)
    monkeypatch.setattr(os, "preadv", preadv)
    source = source_of(read_index(tmp_path))
    assert read_all("stream", source, num_threads=3) == expected(source)


def test_no_more_buffers_than_slots_and_none_before_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a chunk on the device keeps it busy; nothing may be read into it meanwhile."""
    write_files(tmp_path)
    source, ring = source_of(read_index(tmp_path)), Ring(3, SLOT)
    held: set[int] = set()  # addresses of slots that a device still reads
    overwritten: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        address = torch.frombuffer(buffers[0], dtype=torch.uint8).data_ptr()
        overwritten.extend(slot for slot in held if slot <= address < slot + SLOT)
        return real(descriptor, buffers, offset)

    def release_later(address: int) -> Callable[[], None]:
        def wait() -> None:
            time.sleep(0.002)
            held.discard(address)

        return wait

    monkeypatch.setattr(os, "preadv", preadv)
    addresses, found = set(), b""
    for chunk in stream(source, ring, chunks_of(source), num_threads=2):
        ((_, data),) = chunk.parts
        addresses.add(data.data_ptr())
        found += data.numpy().tobytes()
        held.add(data.data_ptr())
        chunk.busy = release_later(data.data_ptr())
    assert overwritten == []
    assert addresses == {slot.data_ptr() for slot in ring.slots}
    assert found == expected(source)


@pytest.mark.parametrize("way", ["stream", "mapped"])
def test_a_chunk_stays_as_it_is_until_the_next_is_asked_for(tmp_path: Path, way: str) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    whole = expected(source)
    for chunk in start(way, source):
        time.sleep(0.001)  # for readers that are ahead too far
        assert b"".join(data.numpy().tobytes() for _, data in chunk.parts) == whole[chunk.begin : chunk.end]


@pytest.mark.parametrize("way", ["stream", "mapped"])
def test_stopping_early_leaves_no_thread(tmp_path: Path, way: str) -> None:
    write_files(tmp_path)
    before = threading.active_count()
    with closing(start(way, source_of(read_index(tmp_path)))) as chunks:
        next(chunks)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize("way", ["stream", "mapped"])
def test_a_reader_that_nobody_asks_does_nothing(tmp_path: Path, way: str) -> None:
    write_files(tmp_path)
    before = threading.active_count()
    start(way, source_of(read_index(tmp_path)))
    assert threading.active_count() == before


def test_mapped_chunks_are_the_files_themselves(tmp_path: Path) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    inodes = {path.stat().st_ino for path in tmp_path.iterdir()}
    found = set()
    for chunk in start("mapped", source):
        for _, data in chunk.parts:
            found.add(mapping_of(data).inode)
            data.zero_()
    assert found == inodes
    assert read_all("stream", source) == expected(source)
    assert any(expected(source))


def change(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "newer":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(content + b"\0" if how == "longer" else content[:-1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["longer", "shorter", "newer"])
def test_a_file_that_changed_after_its_index_is_refused(tmp_path: Path, way: str, how: str) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    change(tmp_path / "1.safetensors", how)
    with pytest.raises(WeightsError, match=r"1\.safetensors has changed since its header was read \(\d+ bytes then"):
        read_all(way, source)


@pytest.mark.parametrize("how", ["longer", "shorter", "newer", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, how: str) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    chunks = start("stream", source, num_threads=1)
    next(chunks)
    change(tmp_path / "2.safetensors", how)
    with pytest.raises(WeightsError, match=r"2\.safetensors (has changed|cannot be read \(No such file)"):
        list(chunks)


@pytest.mark.parametrize("how", ["longer", "shorter", "newer", "gone"])
def test_a_file_that_changed_after_it_was_read_is_refused(tmp_path: Path, how: str) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    require_unchanged(source.entries)
    change(tmp_path / "2.safetensors", how)
    with pytest.raises(WeightsError, match=r"2\.safetensors (has changed|cannot be read \(No such file)"):
        require_unchanged(source.entries)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_gone_is_named_and_the_cause_is_kept(tmp_path: Path, way: str) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1\.safetensors cannot be read") as caught:
        read_all(way, source)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("way", ["stream", "read_into"])
@pytest.mark.parametrize("after", [0, 7])
def test_a_failing_disk_is_named_and_the_cause_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, after: int
) -> None:
    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    fail_reads(monkeypatch, after=after)
    with pytest.raises(WeightsError, match=r"\.safetensors cannot be read \(Input/output error\)\.") as caught:
        read_all(way, source)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_failing_disk_behind_a_mapping_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_files(tmp_path)
    monkeypatch.setattr(reader, "populate", fail)
    with pytest.raises(WeightsError, match=r"0\.safetensors cannot be read \(Input/output error\)\."):
        read_all("mapped", source_of(read_index(tmp_path)))


@pytest.mark.parametrize("way", ["stream", "read_into"])
def test_a_file_that_ends_early_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Cut after it was opened, so that no stamp could tell."""
    write_files(tmp_path, 1)
    source, path = source_of(read_index(tmp_path)), tmp_path / "0.safetensors"
    fail_reads(monkeypatch, after=3, fault=lambda: os.truncate(path, 100))
    with pytest.raises(WeightsError, match=r"0\.safetensors (ends at byte \d+, in the middle|has changed)"):
        read_all(way, source, num_threads=1)


def test_what_the_caller_raises_stops_the_threads(tmp_path: Path) -> None:
    def refuse(count: int) -> None:
        raise KeyError(count)

    write_files(tmp_path)
    source = source_of(read_index(tmp_path))
    memory = huge_bytes(source.num_bytes)
    before = threading.active_count()
    with pytest.raises(KeyError):
        read_into(source, memory, [0] * len(source.entries), [(0, source.num_bytes)], on_bytes=refuse)
    assert threading.active_count() == before


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (8, 4, 2), (2, 8, 1)])
def test_ranks_divide_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert num_reader_threads(ranks) == threads
