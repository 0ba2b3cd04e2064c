"""A module on meta + an index -> a module that holds its weights, with proof.

    files -> [ring of buffers | shared host memory | mapping] -> (exchange of stripes) -> parameters

All parameters of a component lie in one stretch of memory, in the order of the files; they are
filled there and never copied again. On the CPU what needs no conversion goes there at once, or stays
where it is mapped or was preloaded.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn

from ltx_sp.parallel.mesh import together
from ltx_sp.weights.assemble import Assembly, Origin, deliver
from ltx_sp.weights.fit import Slot, first_names, fit
from ltx_sp.weights.host import cached_share, huge_bytes, shared_bytes
from ltx_sp.weights.index import Index, TensorEntry, quote, without_gc
from ltx_sp.weights.keymap import KeyMap
from ltx_sp.weights.policy import Policy
from ltx_sp.weights.reader import (
    TORCH_DTYPES,
    Chunk,
    Ring,
    mapped,
    open_mapped,
    read_into,
    require_unchanged,
    stream,
)
from ltx_sp.weights.stripes import ByteStream
from ltx_sp.weights.transfer import lay_out

__all__ = ["LoadReport", "OnBytes", "check", "load", "read_tensors"]

_log = logging.getLogger("ltx_sp")

_BUCKET_BYTES = 16 * 2**20

OnBytes = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What one load did on this rank.

    Args:
        num_tensors, num_bytes: of the component, as stored.
        read_bytes: what this rank itself asked files for.
        cached: estimated share of the bytes that was in the page cache before; None where unknown.
        unexpected: checkpoint names that belong to the component and that its module has no place for.
    """

    component: str
    mode: str
    num_tensors: int
    num_bytes: int
    read_bytes: int
    cached: float | None
    seconds: float
    unexpected: tuple[str, ...]


def check(module: nn.Module, index: Index, keymap: KeyMap, *, component: str) -> None:
    """Prove from the headers alone that ``load`` will find every tensor of ``module``, in its shape.

    Raises:
        WeightsError: a tensor is absent, or has another shape or kind of number.
        UnsupportedError: the checkpoint stores fp8.
    """
    fit(module, index, keymap, component=component)


@without_gc()
def load(
    module: nn.Module,
    index: Index,
    keymap: KeyMap,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    component: str,
    policy: Policy | None = None,
    is_taker: bool = True,
    written: Collection[str] = (),
    on_bytes: OnBytes | None = None,
) -> LoadReport:
    """Give every parameter and persistent buffer of ``module`` its tensor from the checkpoint, on ``device``.

    In place. Collective along ``policy.crew``. Blocks the host. Parameters come out frozen, tied ones still tied.
    Non-persistent buffers are moved to ``device``. After an error the module is of no use.

    Args:
        module: with its parameters on meta.
        dtype: floating tensors are cast to it; None leaves them as stored.
        policy: None to read alone, through small buffers.
        is_taker: False on a rank that helps others of its host to load and needs nothing itself.
        written: parameters that will be changed in place, and so are not left in the files' own pages.
        on_bytes: called on this thread with the number of bytes that have come since the last call.

    Raises:
        WeightsError: a tensor is absent, has another shape or kind of number, or its file is damaged.
        UnsupportedError: the checkpoint stores fp8.
    """
    began = time.perf_counter()
    policy = (policy or Policy()).serving(index.files)
    # What fails on one rank must not leave the others waiting in an exchange.
    with together(policy.crew):
        fitted = fit(module, index, keymap, component=component, dtype=dtype)
    pairs = sorted(fitted.pairs, key=lambda pair: (str(pair[0].file), pair[0].start))
    cached = cached_share([entry for entry, _ in pairs])
    work = _Load(pairs, device, policy, frozenset(written), on_bytes)
    with together(policy.crew):
        tensors = work.run(is_taker)
        if is_taker:
            for (entry, slot), tensor in zip(pairs, tensors, strict=True):
                fitted.assign(entry, slot, tensor)
            fitted.finish(device)
        require_unchanged(entry for entry, _ in pairs)
    if fitted.unexpected and is_taker and policy.host.rank == 0:
        _log.warning(
            "%s: the checkpoint holds %d tensors that the model has no place for, and they are not used: %s",
            component,
            len(fitted.unexpected),
            first_names([quote(name) for name in fitted.unexpected]),
        )
    num_bytes = sum(entry.num_bytes for entry, _ in pairs)
    seconds = time.perf_counter() - began
    return LoadReport(
        component, policy.mode, len(pairs), num_bytes, work.read_bytes, cached, seconds, fitted.unexpected
    )


def read_tensors(
    entries: Sequence[TensorEntry],
    *,
    device: torch.device,
    policy: Policy | None = None,
    done: Callable[[TensorEntry, Tensor], None] | None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Hand every tensor to ``done`` as it comes, dtype as stored, on ``device``.

    Collective along ``policy.exchange``. Blocks the host. Alone the tensors come in the order of ``entries``, among
    others in as many orders as there are stripes.

    Args:
        done: None on a rank that helps others and needs nothing itself.

    Raises:
        WeightsError: a file is damaged.
    """
    policy = (policy or Policy()).serving({entry.file for entry in entries})
    source = ByteStream(entries)
    assembly = None
    if done is not None:
        for entry in entries:
            if not entry.num_bytes:
                done(entry, torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device=device))

        def target(index: int) -> Tensor:
            entry = source.entries[index]
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device=device)

        assembly = Assembly(source, target, lambda index, tensor: done(source.entries[index], tensor))
    origin = _origin(source, policy, device)
    deliver(source, origin, policy.exchange, assembly, device=device, bucket_bytes=_BUCKET_BYTES, on_bytes=on_bytes)
    require_unchanged(entries)


def _origin(source: ByteStream, policy: Policy, device: torch.device) -> Origin:
    """What brings parts of the stream to the host: through a ring, or mapped."""
    if policy.mode == "mmap":
        return lambda chunks: mapped(source, open_mapped(source), chunks, num_threads=policy.num_threads)
    return lambda chunks: stream(
        source, Ring(slot_bytes=_BUCKET_BYTES, pinned=device.type == "cuda"), chunks, num_threads=policy.num_threads
    )


class _Load:
    """One load under way.

    Args:
        pairs: in the order of the files.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[TensorEntry, Slot]],
        device: torch.device,
        policy: Policy,
        written: frozenset[str],
        on_bytes: OnBytes | None,
    ):
        self._pairs, self._device, self._policy, self._written = pairs, device, policy, written
        self._on_bytes = on_bytes
        self._is_on_host = device.type == "cpu" and policy.exchange.size == 1
        self._held: dict[TensorEntry, Tensor] = {}  # what preloading has brought
        self.read_bytes = 0

    def run(self, is_taker: bool) -> list[Tensor]:
        """Read everything, and return each pair's tensor; none where this rank takes none. Collective."""
        pairs, policy = self._pairs, self._policy
        if policy.mode == "preload":
            self._preload()
        stays = [self._is_on_host and self._may_stay(*pair) for pair in pairs]
        fresh = [pair for pair, stay in zip(pairs, stays, strict=True) if not stay]
        memory, offsets = None, list[int]()
        with together(policy.crew):
            if is_taker:
                offsets, num_bytes = lay_out([_num_bytes(*pair) for pair in fresh])
                memory = _allocate(num_bytes, self._device)
        if memory is None:
            if policy.exchange.size > 1:
                self._deliver(pairs, [])
            return []
        views = self._views([pair[0] for pair, stay in zip(pairs, stays, strict=True) if stay])
        tensors = _tensors(fresh, memory, offsets)
        straight = [self._is_on_host and policy.mode != "preload" and _is_stored(*pair) for pair in fresh]
        self._read(
            [(entry, offset) for (entry, _), offset, is_one in zip(fresh, offsets, straight, strict=True) if is_one],
            memory,
        )
        rest = [i for i, is_one in enumerate(straight) if not is_one and fresh[i][0].num_bytes]
        self._deliver([fresh[i] for i in rest], [tensors[i] for i in rest])
        kept, filled = iter(views), iter(tensors)
        return [next(kept) if stay else next(filled) for stay in stays]

    def _may_stay(self, entry: TensorEntry, slot: Slot) -> bool:
        """Whether a parameter can be a view of what its file, or the preloaded memory, holds."""
        if self._policy.mode == "stream" or not _is_stored(entry, slot) or not self._written.isdisjoint(slot.names):
            return False
        return self._policy.mode == "preload" or entry.start % TORCH_DTYPES[entry.dtype].itemsize == 0

    def _preload(self) -> None:
        """Read the whole component into memory that all ranks of the host share. Collective."""
        policy, host = self._policy, self._policy.host
        source = ByteStream([entry for entry, _ in self._pairs])
        offsets, num_bytes = lay_out([entry.num_bytes for entry in source.entries])
        begin, end = source.stripe(host.rank, host.size)
        with together(host):
            memory = shared_bytes(num_bytes, host)
            read_into(
                source,
                memory,
                offsets,
                [(begin, end)],
                num_threads=policy.num_threads,
                on_bytes=lambda count: self._tell(count * host.size),
            )
        self.read_bytes += end - begin
        for entry, offset in zip(source.entries, offsets, strict=True):
            self._held[entry] = memory[offset : offset + entry.num_bytes]

    def _views(self, entries: Sequence[TensorEntry]) -> list[Tensor]:
        """What stays where it is: in the preloaded memory, or in the files, whose pages are brought in.

        Each rank begins with its own stripe, so that together they read the files once.
        """
        source, policy = ByteStream(entries), self._policy
        if policy.mode == "preload":
            held = self._held
        else:
            maps = open_mapped(source)
            chunks = [chunk for part in _own_first(source, policy) for chunk in source.chunks(*part, _BUCKET_BYTES)]
            with closing(mapped(source, maps, chunks, num_threads=policy.num_threads)) as brought:
                for chunk in brought:
                    self._tell(chunk.end - chunk.begin)
            self.read_bytes += source.num_bytes
            held = {entry: maps[entry.file][entry.start : entry.end] for entry in source.entries}
        nothing = torch.empty(0, dtype=torch.uint8)
        return [held.get(entry, nothing).view(TORCH_DTYPES[entry.dtype]).view(entry.shape) for entry in entries]

    def _read(self, places: Sequence[tuple[TensorEntry, int]], memory: Tensor) -> None:
        """Read tensors as they are to their offsets in ``memory``."""
        filled = [(entry, offset) for entry, offset in places if entry.num_bytes]
        source, policy = ByteStream([entry for entry, _ in filled]), self._policy
        offsets = [offset for _, offset in filled]
        parts = _own_first(source, policy)
        count = read_into(source, memory, offsets, parts, num_threads=policy.num_threads, on_bytes=self._on_bytes)
        if count != source.num_bytes:
            raise RuntimeError(f"{count} bytes of {source.num_bytes} were read")
        self.read_bytes += count

    def _deliver(self, pairs: Sequence[tuple[TensorEntry, Slot]], tensors: Sequence[Tensor]) -> None:
        """Fill the tensors by way of buffers; without tensors, only give this rank's stripe. Collective."""
        policy, held = self._policy, self._held
        source = ByteStream([entry for entry, _ in pairs])
        if policy.mode != "preload":
            begin, end = source.stripe(policy.exchange.rank, policy.exchange.size)
            self.read_bytes += end - begin
        deliver(
            source,
            partial(_preloaded, source, held) if held else _origin(source, policy, self._device),
            policy.exchange,
            Assembly(source, tensors.__getitem__) if tensors else None,
            device=self._device,
            bucket_bytes=_BUCKET_BYTES,
            on_bytes=None if held else self._on_bytes,
        )

    def _tell(self, count: int) -> None:
        if self._on_bytes is not None:
            self._on_bytes(count)


def _own_first(source: ByteStream, policy: Policy) -> list[tuple[int, int]]:
    """The whole stream, from the beginning of this rank's stripe on, then the rest."""
    begin, _ = source.stripe(policy.host.rank, policy.host.size)
    return [(begin, source.num_bytes), (0, begin)]


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge_bytes(num_bytes)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _dtype(entry: TensorEntry, slot: Slot) -> torch.dtype:
    return slot.dtype or TORCH_DTYPES[entry.dtype]


def _tensors(pairs: Sequence[tuple[TensorEntry, Slot]], memory: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """The parameters at their offsets in ``memory``."""
    typed = {dtype: memory.view(dtype) for dtype in {_dtype(*pair) for pair in pairs}}
    tensors = []
    for (entry, slot), offset in zip(pairs, offsets, strict=True):
        dtype = _dtype(entry, slot)
        begin = offset // dtype.itemsize
        tensors.append(typed[dtype][begin : begin + math.prod(entry.shape)].view(entry.shape))
    return tensors


def _num_bytes(entry: TensorEntry, slot: Slot) -> int:
    """The size of the parameter, which a conversion changes."""
    return entry.num_bytes // TORCH_DTYPES[entry.dtype].itemsize * _dtype(entry, slot).itemsize


def _is_stored(entry: TensorEntry, slot: Slot) -> bool:
    """Whether the parameter has the dtype of the file."""
    return _dtype(entry, slot) == TORCH_DTYPES[entry.dtype]


def _preloaded(
    source: ByteStream, held: Mapping[TensorEntry, Tensor], chunks: Iterable[tuple[int, int]]
) -> Generator[Chunk]:
    for begin, end in chunks:
        pieces = source.pieces(begin, end)
        parts = [(piece.position, held[source.entries[piece.place]][piece.begin : piece.end]) for piece in pieces]
        yield Chunk(begin, end, parts)
