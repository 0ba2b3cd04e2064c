"""Oracle: the tensors that the bytes were made of."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_sp.errors import WeightsError
from ltx_sp.parallel.collectives import Axis
from ltx_sp.weights import assemble
from ltx_sp.weights.assemble import Assembly, deliver
from ltx_sp.weights.index import read_index
from ltx_sp.weights.reader import TORCH_DTYPES, Chunk, Ring, stream
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from tests.support.weights import CPU, fail_reads, same_bits, saved_tensors, write_part

BUCKET = 2 * ALIGNMENT


@pytest.fixture
def source(tmp_path: Path) -> ByteStream:
    """Tensors at any byte, in their files' order."""
    write_part(tmp_path, saved_tensors(), "unaligned")
    return ByteStream([entry for entry in read_index(tmp_path).entries.values() if entry.name.startswith("part.")])


class Targets:
    """What an assembly fills, and what it says of it."""

    def __init__(self, source: ByteStream, dtype: torch.dtype | None = None):
        self.source, self.dtype = source, dtype
        self.asked: list[int] = []
        self.whole: dict[str, Tensor] = {}

    def target(self, index: int) -> Tensor:
        self.asked.append(index)
        entry = self.source.entries[index]
        dtype = TORCH_DTYPES[entry.dtype]
        return torch.empty(entry.shape, dtype=self.dtype if self.dtype and dtype.is_floating_point else dtype)

    def done(self, index: int, tensor: Tensor) -> None:
        assert index in self.asked
        self.whole[self.source.entries[index].name] = tensor


def parts_of(source: ByteStream, max_bytes: int = BUCKET) -> list[tuple[int, Tensor]]:
    """The whole line in pieces that may be delivered one by one."""
    data = b"".join(entry.file.read_bytes()[entry.start : entry.end] for entry in source.entries)
    line = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [(begin, line[begin:end]) for begin, end in source.chunks(0, source.num_bytes, max_bytes)]


def origin(chunks: Sequence[tuple[int, int]], source: ByteStream) -> Generator[Chunk]:
    return stream(source, Ring(2, BUCKET), chunks)


def deliver_alone(source: ByteStream, assembly: Assembly, *, num_lost: int = 0, on_bytes: Any = None) -> None:
    """The way to the host: one rank, which is not given the last chunks."""

    def give(chunks: Sequence[tuple[int, int]]) -> Generator[Chunk]:
        return origin(chunks[: len(chunks) - num_lost], source)

    deliver(source, give, Axis.alone(), assembly, device=CPU, bucket_bytes=BUCKET, on_bytes=on_bytes)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", ["in order", "backward", "any"])
def test_tensors_come_out_whole_whatever_the_order(source: ByteStream, dtype: torch.dtype | None, order: str) -> None:
    targets, tensors, parts = Targets(source, dtype), saved_tensors(), parts_of(source)
    if order == "backward":
        parts.reverse()
    elif order == "any":
        random.shuffle(parts)
    assembly = Assembly(source, targets.target, targets.done)
    for position, data in parts:
        assembly.put(position, data)
    assembly.finish()
    assert sorted(targets.asked) == list(range(len(source.entries)))
    for name, tensor in targets.whole.items():
        want = tensors[name].to(dtype) if dtype and tensors[name].is_floating_point() else tensors[name]
        assert same_bits(tensor, want), name
    assert len(targets.whole) == len(source.entries)


def test_a_tensor_is_done_with_its_last_byte_and_not_before(source: ByteStream) -> None:
    targets = Targets(source)
    assembly = Assembly(source, targets.target, targets.done)
    end = 0
    for position, data in parts_of(source):
        assembly.put(position, data)
        end = position + data.numel()
        names, at = [], 0
        for entry in source.entries:
            at += entry.num_bytes
            if at <= end:
                names.append(entry.name)
        assert list(targets.whole) == names


@pytest.mark.parametrize("lost", [0, 5, -1])
def test_what_never_came_is_noticed(source: ByteStream, lost: int) -> None:
    parts = parts_of(source)
    del parts[lost]
    targets = Targets(source)
    assembly = Assembly(source, targets.target, targets.done)
    for position, data in parts:
        assembly.put(position, data)
    with pytest.raises(RuntimeError, match=r"\d+ tensors came in part or not at all, among them 'part\."):
        assembly.finish()


def test_a_tensor_of_which_nothing_came_is_noticed(source: ByteStream) -> None:
    targets = Targets(source)
    with pytest.raises(RuntimeError, match=f"^{len(source.entries)} tensors came in part or not at all"):
        Assembly(source, targets.target).finish()
    assert targets.asked == []


def test_what_comes_twice_is_noticed(source: ByteStream) -> None:
    (position, data), *_ = parts_of(source, source.num_bytes)
    targets = Targets(source)
    assembly = Assembly(source, targets.target, targets.done)
    assembly.put(position, data)
    with pytest.raises(RuntimeError, match=r"tensor 'part\..*' came twice"):
        assembly.put(position, data[: source.entries[0].num_bytes])


def test_alone_a_stream_comes_in_the_order_of_its_tensors(source: ByteStream) -> None:
    targets, counts = Targets(source), list[int]()
    assembly = Assembly(source, targets.target, targets.done)
    deliver_alone(source, assembly, on_bytes=counts.append)
    assert list(targets.whole) == [entry.name for entry in source.entries]
    assert all(same_bits(tensor, saved_tensors()[name]) for name, tensor in targets.whole.items())
    assert sum(counts) == source.num_bytes
    assert len(counts) == len(source.chunks(0, source.num_bytes, BUCKET))


def test_an_origin_that_gives_too_little_is_noticed(source: ByteStream) -> None:
    assembly = Assembly(source, Targets(source).target)
    with pytest.raises(RuntimeError, match="came in part or not at all"):
        deliver_alone(source, assembly, num_lost=1)


def test_what_the_caller_raises_ends_the_reading(source: ByteStream) -> None:
    def refuse(index: int, tensor: Tensor) -> None:
        raise KeyError(index)

    before = threading.active_count()
    assembly = Assembly(source, Targets(source).target, refuse)
    with pytest.raises(KeyError):
        deliver_alone(source, assembly)
    assert threading.active_count() == before


def exchange_alone(source: ByteStream, assembly: Assembly, chunks: Generator[Chunk], on_bytes: Any = None) -> None:
    """The way to a device, on the host: one rank, through two buckets."""
    buckets = assemble._Buckets(1, 256 + BUCKET, CPU)
    plans = [source.chunks(0, source.num_bytes, BUCKET)]
    with closing(chunks):
        assemble._exchange(plans, chunks, buckets, Axis.alone(), assembly, CPU, on_bytes)


def test_one_rank_goes_through_buckets_to_a_device(source: ByteStream) -> None:
    targets, counts = Targets(source), list[int]()
    assembly = Assembly(source, targets.target, targets.done)
    exchange_alone(source, assembly, origin(source.chunks(0, source.num_bytes, BUCKET), source), counts.append)
    assembly.finish()
    assert all(same_bits(tensor, saved_tensors()[name]) for name, tensor in targets.whole.items())
    assert sum(counts) == source.num_bytes


@pytest.mark.parametrize("failing", ["disk", "on_bytes", "target"])
@pytest.mark.parametrize("after", [0, 4])
def test_one_rank_says_what_fails_on_the_way_to_a_device(
    source: ByteStream, monkeypatch: pytest.MonkeyPatch, failing: str, after: int
) -> None:
    turns = itertools.count()

    def refuse(_: int) -> None:
        if next(turns) == after:
            raise MemoryError(failing)

    def target(index: int) -> Tensor:
        refuse(index)
        return Targets(source).target(index)

    if failing == "disk":
        fail_reads(monkeypatch, after=after)
    before = threading.active_count()
    assembly = Assembly(source, target if failing == "target" else Targets(source).target)
    chunks = origin(source.chunks(0, source.num_bytes, BUCKET), source)
    with pytest.raises(WeightsError if failing == "disk" else MemoryError):
        exchange_alone(source, assembly, chunks, refuse if failing == "on_bytes" else None)
    assert threading.active_count() == before
