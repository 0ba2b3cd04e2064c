"""Bytes as they come -> tensors, on any device, read by one rank or by all ranks of a host together."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from ltx_sp.model.attention import Pending
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import together
from ltx_sp.weights.reader import TORCH_DTYPES, Chunk
from ltx_sp.weights.stripes import ByteStream

__all__ = ["Assembly", "Origin", "deliver"]

Origin = Callable[[Sequence[tuple[int, int]]], Generator[Chunk]]
"""What brings the given parts of a stream to the host, in their order."""

# In front of every bucket: whether the rank that sends it has failed. As long as a copy's best alignment.
_HEAD_BYTES = 256


class Assembly:
    """Puts ranges of a stream, in any order, into the tensors that they are.

    Args:
        target: gives the tensor for the ``index``-th entry of the stream, contiguous, of the entry's shape and any
            dtype; called when the first bytes come.
        done: takes it when the last have.
    """

    def __init__(
        self,
        source: ByteStream,
        target: Callable[[int], Tensor],
        done: Callable[[int, Tensor], None] | None = None,
    ):
        self._source, self._target, self._done = source, target, done
        self._flat: dict[int, Tensor] = {}
        self._left = {index: entry.num_bytes for index, entry in enumerate(source.entries)}

    def put(self, begin: int, data: Tensor) -> None:
        """Take bytes from position ``begin`` on, converting where the target has another dtype. In place.

        Args:
            data: uint8, on the targets' device or on the host.

        Raises:
            RuntimeError: a whole tensor comes again. A fault of this package.
        """
        for piece in self._source.pieces(begin, begin + data.numel()):
            entry, index = self._source.entries[piece.place], piece.place
            if index not in self._left:
                raise RuntimeError(f"tensor {entry.name!r} came twice")
            if index not in self._flat:
                self._flat[index] = self._target(index).view(-1)
            dtype = TORCH_DTYPES[entry.dtype]
            place = piece.position - begin
            stored = data[place : place + piece.end - piece.begin]
            if stored.storage_offset() % dtype.itemsize:  # a file may begin a tensor anywhere, torch may not
                stored = stored.clone()
            flat = self._flat[index]
            elements = slice(piece.begin // dtype.itemsize, piece.end // dtype.itemsize)
            flat[elements].copy_(stored.view(dtype), non_blocking=True)
            self._left[index] -= piece.end - piece.begin
            if not self._left[index]:
                del self._left[index], self._flat[index]
                if self._done is not None:
                    self._done(index, flat.view(entry.shape))

    def finish(self) -> None:
        """Raise RuntimeError where a tensor came in part or not at all. A fault of this package."""
        if self._left:
            first = self._source.entries[next(iter(self._left))].name
            raise RuntimeError(f"{len(self._left)} tensors came in part or not at all, among them {first!r}")


def deliver(
    source: ByteStream,
    origin: Origin,
    axis: Axis,
    assembly: Assembly | None,
    *,
    device: torch.device,
    bucket_bytes: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Bring a whole stream to this rank: its own stripe from ``origin``, the others' from the ranks of ``axis``.

    Collective along ``axis``. Blocks the host. All ranks send their stripes bucket by bucket. Each bucket says whether
    its sender has failed, so that all stop after the same one.

    Args:
        assembly: None on a rank that gives its stripe and keeps nothing.
        bucket_bytes: how many bytes of each rank are exchanged at a time.
        on_bytes: called with the number of bytes that have come; what it raises counts as a failure of this rank.

    Raises:
        LtxSpError: on every rank of the axis, where reading failed on any.
    """
    plans = [source.chunks(*source.stripe(rank, axis.size), bucket_bytes) for rank in range(axis.size)]
    if axis.size == 1 and device.type == "cpu":
        with closing(origin(plans[0])) as chunks:
            for chunk in chunks:
                for position, data in chunk.parts:
                    if assembly is not None:
                        assembly.put(position, data)
                if on_bytes is not None:
                    on_bytes(chunk.end - chunk.begin)
    else:
        with together(axis):
            chunks = origin(plans[axis.rank])
            buckets = _Buckets(axis.size, _HEAD_BYTES + bucket_bytes, device)
        with together(axis), _side_stream(device), closing(chunks):
            _exchange(plans, chunks, buckets, axis, assembly, device, on_bytes)
    if assembly is not None:
        assembly.finish()


class _Buckets:
    """All the memory of an exchange, twice: while one bucket is put in place, the next is under way.

    Taken beforehand, because a rank that ran out of memory between two collectives would be missed in the second.
    """

    def __init__(self, size: int, num_bytes: int, device: torch.device):
        def bytes_of(*shape: int) -> list[Tensor]:
            return [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2)]

        self.sent = bytes_of(num_bytes)
        self.gathered = bytes_of(size, num_bytes) if size > 1 else self.sent
        self.flags = [torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]


def _exchange(
    plans: Sequence[Sequence[tuple[int, int]]],
    chunks: Iterator[Chunk],
    buckets: _Buckets,
    axis: Axis,
    assembly: Assembly | None,
    device: torch.device,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Three rounds are under way at once: one is staged and sent, one is put in place, one is asked for failures."""
    num_rounds = max(map(len, plans))
    sent: deque[Pending] = deque()
    told: deque[tuple[Tensor, Callable[[], None]]] = deque()
    error: Exception | None = None
    for i in range(num_rounds + 2):
        if i < num_rounds:
            bucket = buckets.sent[i % 2]
            try:
                if error is None and i < len(plans[axis.rank]):
                    _stage(next(chunks), bucket, device)
            except Exception as failure:
                if axis.size == 1:
                    raise
                error = failure
            bucket[0] = error is not None
            sent.append(axis.start_gather(bucket, label="weights", into=buckets.gathered[i % 2]))
        if 0 < i <= num_rounds:
            gathered = sent.popleft()()
            flags = buckets.flags[i % 2].copy_(gathered[:, 0], non_blocking=True)
            told.append((flags, _mark(device)))
            parts = [(plan[i - 1], rank) for rank, plan in enumerate(plans) if i <= len(plan)]
            try:
                if assembly is not None and error is None:
                    for (begin, end), rank in parts:
                        assembly.put(begin, gathered[rank, _HEAD_BYTES : _HEAD_BYTES + end - begin])
                if on_bytes is not None and error is None:
                    on_bytes(sum(end - begin for (begin, end), _ in parts))
            except Exception as failure:
                error = failure
        if i > 1:
            flags, wait = told.popleft()
            wait()
            if flags.any():
                break
    for finish in sent:
        finish()
    if error is not None:
        raise error


def _stage(chunk: Chunk, bucket: Tensor, device: torch.device) -> None:
    for position, data in chunk.parts:
        place = _HEAD_BYTES + position - chunk.begin
        bucket[place : place + data.numel()].copy_(data, non_blocking=True)
    chunk.busy = _mark(device)


def _mark(device: torch.device) -> Callable[[], None]:
    """A wait for what was asked of the device up to now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()

    def wait() -> None:
        with torch.cuda.device(device):  # on a thread that has used none, CUDA would start on the first device too
            event.synchronize()

    return wait


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all loads: memory that was used on a stream is not given to another."""
    return torch.cuda.Stream(device)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Let copies run beside whatever else the device computes, and wait for the last at the end. Blocks the host."""
    if device.type != "cuda":
        yield
        return
    side = _stream_of(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side):
            yield
    finally:  # after a failure too: what the copies write to will be used for something else
        side.synchronize()
