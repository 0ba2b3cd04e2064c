"""Weights between the host and one device: what is copied and what is held, counted; copies beside other work.

On the CPU the host plays the device: what is "on the device" there is memory of its own all the same.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ltx_sp.observe import log
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import together
from ltx_sp.weights.host import shared_bytes

__all__ = ["ALIGNMENT", "HostStores", "Kind", "Ledger", "Mover", "lay_out"]

ALIGNMENT = 256
"""Of every tensor within a stretch of memory: what the widest loads of a GPU want."""

_PORTABLE = 1  # cudaHostRegisterPortable

Kind = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor that is not there yet."""


class Ledger:
    """What one rank has copied, and what it holds besides what the loader gave it. From any thread.

    Directions are ``host_to_device``, ``device_to_host``, ``device_to_device`` and ``exchanged`` (come from other
    ranks); places are ``host`` and ``device``. What ranks share on a host is counted in full by each.

    Args:
        on_move: told the bytes of every copy from the host to the device.
    """

    def __init__(self, on_move: Callable[[int], None] | None = None) -> None:
        self.copies = collections.Counter[str]()
        self.num_bytes = collections.Counter[str]()
        self.held = collections.Counter[str]()
        self.peak = collections.Counter[str]()
        self._on_move, self._lock = on_move, threading.Lock()

    def copied(self, direction: str, num_bytes: int, *, tells: bool = True) -> None:
        """Count one copy, and tell it on."""
        with self._lock:
            self.copies[direction] += 1
            self.num_bytes[direction] += num_bytes
        if tells and direction == "host_to_device" and self._on_move is not None:
            self._on_move(num_bytes)

    def hold(self, place: str, num_bytes: int) -> None:
        """Count memory that was taken, or with a negative number given back."""
        with self._lock:
            self.held[place] += num_bytes
            self.peak[place] = max(self.peak[place], self.held[place])


class Mover:
    """Copies between the host and one device; on CUDA also beside what the device computes, on a stream of its own."""

    def __init__(self, device: torch.device, ledger: Ledger):
        self.device, self.ledger = device, ledger
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate on the device."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host to the device. In place."""
        self._copy("host_to_device", target, source)

    def download(self, target: Tensor, source: Tensor) -> None:
        """Copy from the device to the host. In place. Blocks the host."""
        self._copy("device_to_host", target, source)
        self._finish()

    def duplicate(self, target: Tensor, source: Tensor) -> None:
        """Copy on the device. In place."""
        self._copy("device_to_device", target, source)

    def _copy(self, direction: str, target: Tensor, source: Tensor) -> None:
        with torch.inference_mode():
            target.copy_(source, non_blocking=True)
        self.ledger.copied(direction, target.nbytes)

    def _finish(self) -> None:
        if self._aside is not None:
            torch.cuda.current_stream(self.device).synchronize()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Allocate and copy beside the current stream."""
        if self._aside is None:
            yield
        else:
            with torch.cuda.stream(self._aside):
                yield

    def mark(self) -> torch.cuda.Event | None:
        """What has been asked for aside up to now."""
        return None if self._aside is None else self._aside.record_event()

    def wait(self, mark: torch.cuda.Event | None, memories: Iterable[Tensor]) -> None:
        """Let the current stream wait for a mark, and use memory that was allocated aside."""
        if mark is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(mark)
            for memory in memories:
                memory.record_stream(stream)

    def synchronize(self) -> None:
        """Wait for all copies, and for what the current stream still does. Blocks the host."""
        self._finish()
        if self._aside is not None:
            self._aside.synchronize()

    def lock_pages(self, tensors: Iterable[Tensor]) -> Callable[[], None]:
        """Page-lock the host memory that tensors lie in, without a copy, and return what undoes it.

        Where the driver refuses, copies are slower and right all the same.
        """
        if self._aside is None:
            return lambda: None
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        locked: dict[int, torch.UntypedStorage] = {}
        cudart = torch.cuda.cudart()
        for address, storage in storages.items():
            if storage.nbytes() and not storage.is_pinned():
                if int(cudart.cudaHostRegister(address, storage.nbytes(), _PORTABLE)) == 0:
                    locked[address] = storage
                    continue
                log.warning("%.1f GiB of host memory cannot be page-locked; copies are slow", storage.nbytes() / 2**30)
                with contextlib.suppress(RuntimeError):  # the next launch would report it once more
                    torch.zeros(1, device=self.device)

        def undo() -> None:
            self.synchronize()
            for address in locked:
                cudart.cudaHostUnregister(address)
            locked.clear()

        return undo


class HostStores:
    """Host memory for tensors under any names, the same memory for all ranks of a host, page-locked on CUDA.

    Args:
        host: the ranks that share it.
    """

    def __init__(self, host: Axis, mover: Mover):
        self._host, self._mover = host, mover
        self._stores: list[_HostStore] = []

    def __getitem__(self, key: Hashable) -> Tensor:
        for store in self._stores:
            if key in store.tensors:
                return store.tensors[key]
        raise KeyError(key)

    def hold(self, kinds: Mapping[Any, Kind]) -> None:
        """Have room for these tensors: those that are there stay as they are.

        Collective along ``host``. Blocks the host. Memory is given back where nothing of a stretch is wanted.

        Args:
            kinds: shape and dtype of each tensor.
        """
        for store in self._stores:
            if store.tensors.keys().isdisjoint(kinds):
                store.close()
        self._stores = [store for store in self._stores if store.tensors]
        missing = {key: kinds[key] for key in kinds if not any(key in store.tensors for store in self._stores)}
        if missing:
            self._stores.append(_HostStore(missing, self._host, self._mover))

    def close(self) -> None:
        """Give the memory back once nobody refers to its tensors."""
        for store in self._stores:
            store.close()
        self._stores = []


class _HostStore:
    """One stretch of shared memory. Making it is collective along ``host`` and blocks the host."""

    def __init__(self, kinds: Mapping[Any, Kind], host: Axis, mover: Mover):
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds.values()]
        offsets, self._num_bytes = lay_out(sizes)
        memory = shared_bytes(self._num_bytes, host)
        with together(host):
            self._unlock = mover.lock_pages([memory])
        self._ledger = mover.ledger
        self._ledger.hold("host", self._num_bytes)
        self.tensors: dict[Any, Tensor] = {
            key: memory[offset : offset + size].view(dtype).view(tuple(shape))
            for (key, (shape, dtype)), offset, size in zip(kinds.items(), offsets, sizes, strict=True)
        }

    def close(self) -> None:
        self._unlock()
        self._ledger.hold("host", -self._num_bytes)
        self.tensors = {}


def lay_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of several tensors of these bytes begins in one stretch of memory, and how long that is."""
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    ends = list(itertools.accumulate(rounded))
    return [end - size for end, size in zip(ends, rounded, strict=True)], ends[-1] if ends else 0
