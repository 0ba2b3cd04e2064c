"""Tensors of a module that have a place on the host, and come to the device and go again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.parallel.collectives import Axis
from ltx_sp.weights.transfer import ALIGNMENT, HostStores, Mover, lay_out

__all__ = ["Backed", "Spot", "spots_of"]

# Memory comes and goes in pieces of this size: few enough to allocate, small enough to fill what is left of a GPU.
_SEGMENT_BYTES = 2**30


@dataclasses.dataclass(slots=True)
class Spot:
    """One tensor of a module as it was loaded, and every table of the module that names it."""

    tensor: Tensor
    tables: list[tuple[MutableMapping[str, Any], str]]

    def wrap(self, tensor: Tensor) -> Tensor:
        """Make a tensor what this one is: a parameter or a buffer."""
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.tensor, nn.Parameter) else tensor

    def bind(self, tensor: Tensor) -> None:
        """Let the module use a wrapped tensor from now on."""
        for table, leaf in self.tables:
            table[leaf] = tensor


def spots_of(module: nn.Module, *, buffers: bool) -> dict[str, Spot]:
    """Every tensor of a module by its first name; what is tied is one."""
    by_identity: dict[int, Spot] = {}
    spots: dict[str, Spot] = {}
    for prefix, owner in module.named_modules():
        tables: tuple[MutableMapping[str, Any], ...] = (owner._parameters, owner._buffers)
        for table in tables[: 1 + buffers]:
            for leaf, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in by_identity:
                    by_identity[id(tensor)] = spots[f"{prefix}.{leaf}" if prefix else leaf] = Spot(tensor, [])
                by_identity[id(tensor)].tables.append((table, leaf))
    return spots


class Backed:
    """Tensors of a module that stay on the host, come to the device and go again; going copies nothing.

    Args:
        host: a tensor of each spot's shape and dtype, by its name.
        close: gives the host's memory back.
    """

    def __init__(
        self,
        spots: Mapping[str, Spot],
        host: Mapping[str, Tensor],
        mover: Mover,
        close: Callable[[], None] = lambda: None,
    ):
        self._spots, self._mover, self._close = spots, mover, close
        self._host = {name: spots[name].wrap(host[name]) for name in spots}
        self._pieces = [
            _Piece(names, {name: self._host[name] for name in names}) for names in _cut({n: host[n] for n in spots})
        ]
        self._mark: torch.cuda.Event | None = None

    @staticmethod
    def of_device(module: nn.Module, mover: Mover) -> Backed:
        """Make the host copy of a module that is on the device; it is bound to the device still. Blocks the host.

        Only the module keeps the device's memory, until ``leave``.
        """
        spots = spots_of(module, buffers=True)
        stores = HostStores(Axis.alone(), mover)
        stores.hold({name: (spot.tensor.shape, spot.tensor.dtype) for name, spot in spots.items()})
        for name, spot in spots.items():
            mover.download(stores[name], spot.tensor)
        backed = Backed(spots, {name: stores[name] for name in spots}, mover, close=stores.close)
        for name, spot in spots.items():  # one that kept its tensor would keep the stretch that all are views of
            spot.tensor = backed._host[name]
        return backed

    @property
    def num_missing_bytes(self) -> int:
        """What is not on the device, nor on its way."""
        return sum(piece.num_bytes for piece in self._pieces if piece.memory is None)

    def rehost(self, host: Mapping[str, Tensor]) -> None:
        """Take other host tensors for some names, whose values come to the device where the names are there."""
        for piece in self._pieces:
            for name in host.keys() & piece.offsets.keys():
                self._host[name] = self._spots[name].wrap(host[name])
                if piece.memory is not None:
                    with self._mover.aside():
                        self._mover.upload(piece.device[name], host[name])
        self._mark = self._mover.mark()

    def fetch(self, *, room: int | None = None, without: Collection[str] = ()) -> None:
        """Start to copy what is absent to the device, beside what it does.

        Args:
            room: bytes to fill at most; None for no limit.
            without: what shares a piece with one of these names stays away.
        """
        for piece in self._pieces:
            if piece.memory is not None or not piece.offsets.keys().isdisjoint(without):
                continue
            if room is not None and (room := room - piece.num_bytes) < 0:
                break
            with self._mover.aside():
                piece.fetch(self._host, self._spots, self._mover)
            self._mark = self._mover.mark()

    def bind(self) -> None:
        """Let the module use what is on the device; on the device it waits for what is on its way. In place."""
        self._mover.wait(self._mark, [piece.memory for piece in self._pieces if piece.memory is not None])
        for piece in self._pieces:
            for name, tensor in piece.device.items():
                self._spots[name].bind(tensor)

    def leave(self) -> None:
        """Let the module use the host's tensors, and free the device's: nothing is copied. In place."""
        for name, tensor in self._host.items():
            self._spots[name].bind(tensor)
        self.forget()

    def forget(self) -> bool:
        """Free the device's memory, which the module does not use, and say whether there was any."""
        pieces = [piece for piece in self._pieces if piece.memory is not None]
        for piece in pieces:
            piece.free(self._mover)
        return bool(pieces)

    def close(self) -> None:
        """Free the device's memory, and give the host's back once the module is gone."""
        self.leave()
        self._close()


class _Piece:
    """One stretch of device memory for neighbours on the host.

    Args:
        device: what lies there, wrapped; empty while there is no memory.
    """

    def __init__(self, names: Sequence[str], host: Mapping[str, Tensor]):
        offsets, self.num_bytes = lay_out([host[name].nbytes for name in names])
        self.offsets = dict(zip(names, offsets, strict=True))
        self.memory: Tensor | None = None
        self.device: dict[str, Tensor] = {}

    def fetch(self, host: Mapping[str, Tensor], spots: Mapping[str, Spot], mover: Mover) -> None:
        self.memory = memory = mover.empty([self.num_bytes], torch.uint8)
        mover.ledger.hold("device", self.num_bytes)
        for offset, source in self._runs(host):
            mover.upload(memory[offset : offset + source.numel()], source)
        for name, offset in self.offsets.items():
            like = host[name]
            tensor = memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
            self.device[name] = spots[name].wrap(tensor)

    def _runs(self, host: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """What can be copied at once: bytes on the host that lie to each other as they will on the device."""
        names = [name for name in self.offsets if host[name].nbytes]

        def place(name: str) -> tuple[int, int]:
            return host[name].untyped_storage().data_ptr(), host[name].data_ptr() - self.offsets[name]

        for _, group in itertools.groupby(names, key=place):
            run = list(group)
            first, last = host[run[0]], host[run[-1]]
            num_bytes = last.data_ptr() + last.nbytes - first.data_ptr()
            source = torch.empty(0, dtype=torch.uint8)
            begin = first.data_ptr() - first.untyped_storage().data_ptr()
            source.set_(first.untyped_storage(), begin, (num_bytes,))  # type: ignore[call-overload]
            yield self.offsets[run[0]], source

    def free(self, mover: Mover) -> None:
        self.memory, self.device = None, {}
        mover.ledger.hold("device", -self.num_bytes)


def _cut(host: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in the order in which their tensors lie on the host, in parts of one segment each."""

    def address(name: str) -> tuple[int, int]:
        return host[name].untyped_storage().data_ptr(), host[name].data_ptr()

    parts: list[list[str]] = []
    left = 0
    for name in sorted(host, key=address):
        num_bytes = -(-host[name].nbytes // ALIGNMENT) * ALIGNMENT
        if num_bytes > left:
            parts.append([])
            left = _SEGMENT_BYTES
        elif not parts:
            parts.append([])
        parts[-1].append(name)
        left -= num_bytes
    return parts
