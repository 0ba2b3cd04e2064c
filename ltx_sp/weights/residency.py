"""Where the sets of the transformer's weights live, and how the module gets from one to another.

Set k is the checkpoint with that set's LoRAs merged into it. In every mode a weight of set k is the clean weight with
all of the set's factors merged at once, on the device: all modes and all ranks hold the same bits.

    resident          both sets on the device           switch: other tensors in the module's tables
    sharded           one, and 1/N of each set          switch: all-gather
    snapshot          one, both on the host             switch: copy, ahead of time as far as there is room
    snapshot-low-vram one, both on the host             switch: free, then copy
    legacy            one, clean weights on the host    switch: copy the clean weights, and merge

A residency is made before the module is loaded, and goes through ``prepare`` (which may be collective), ``attach``,
``merge`` for each weight whose factors have come, and ``settle``; and from ``prepare`` on again for other LoRAs.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.parallel.mesh import together
from ltx_sp.weights.index import TensorEntry
from ltx_sp.weights.lora import LoraPlan, union
from ltx_sp.weights.reader import TORCH_DTYPES
from ltx_sp.weights.snapshot import LowMemorySnapshot, Snapshot
from ltx_sp.weights.transfer import ALIGNMENT, HostStores
from ltx_sp.weights.weight_sets import Residency, Site

__all__ = ["RESIDENCIES", "Residency", "Site"]

# Gathered at a time; twice this much is held while a set is gathered.
_BUCKET_BYTES = 64 * 2**20


class _Straight(Residency):
    """The module is loaded to the device, and what it has there is set 0 while it rests."""

    def __init__(
        self, site: Site, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, plans: Sequence[LoraPlan]
    ):
        super().__init__(site, shapes, dtype, plans)
        # On the CPU weights may lie in memory that others use too: a file, or what ranks share.
        self._shared: dict[str, Tensor] = {}
        self._own: set[str] = set()
        self._stale: tuple[str, ...] = ()

    @property
    def written(self) -> tuple[str, ...]:
        return self._plans[0].targets

    def _begin(self, before: Sequence[LoraPlan]) -> None:
        if not self._spots:
            return
        self._stale = tuple(n for n in self._changed if n in before[0].pairs and n not in self._shared)
        for name in self._changed:
            self._make_clean(name)

    def _make_clean(self, name: str) -> None:
        """Give a weight memory of its own with its clean value; without LoRAs, what it was loaded to. In place."""
        spot = self._spots[name]
        if name in self._shared and name not in self._plans[0].pairs:
            self._bind(name, self._shared.pop(name))
            self._mover.ledger.hold("device", -spot.tensor.nbytes)
        elif name in self._shared:
            self._mover.duplicate(spot.tensor, self._shared[name])
        elif self._mover.device.type == "cpu" and name not in self._own and name in self._plans[0].pairs:
            self._shared[name] = spot.tensor
            own = self._mover.empty(spot.tensor.shape, spot.tensor.dtype)
            self._mover.ledger.hold("device", own.nbytes)
            self._mover.duplicate(own, spot.tensor)
            self._bind(name, spot.wrap(own))

    def _bind(self, name: str, tensor: Tensor) -> None:
        self._spots[name].tensor = tensor
        self._spots[name].bind(tensor)

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        self._own = set(self.written)

    def stale(self) -> tuple[str, ...]:
        return self._stale

    def clean(self, name: str, tensor: Tensor) -> None:
        self._mover.duplicate(self._spots[name].tensor, tensor)

    def merge(self, name: str, factors: Mapping[TensorEntry, Tensor]) -> None:
        weight = self._spots[name].tensor
        if name in self._switched:
            self._keep(name, weight, factors)
        else:
            self._merge(weight, name, 0, factors)

    def close(self) -> None:
        self._mover.ledger.hold("device", -sum(tensor.nbytes for tensor in self._shared.values()))
        self._shared = {}

    @abstractmethod
    def _keep(self, name: str, weight: Tensor, factors: Mapping[TensorEntry, Tensor]) -> None:
        """Keep what a switched weight's sets are made of, and make ``weight``, which is clean, that of set 0."""


class Resident(_Straight):
    """All sets are on the device; what is the same in them is there once."""

    mode = "resident"

    def __init__(
        self, site: Site, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, plans: Sequence[LoraPlan]
    ):
        super().__init__(site, shapes, dtype, plans)
        self._others: list[dict[str, Tensor]] = [{} for _ in plans[1:]]
        self._bindings: list[list[tuple[MutableMapping[str, Any], str, Tensor]]] = []

    def _keep(self, name: str, weight: Tensor, factors: Mapping[TensorEntry, Tensor]) -> None:
        for set_, others in enumerate(self._others, 1):
            if name not in others:
                others[name] = self._spots[name].wrap(self._mover.empty(weight.shape, weight.dtype))
                self._mover.ledger.hold("device", weight.nbytes)
            self._mover.duplicate(others[name], weight)
            self._merge(others[name], name, set_, factors)
        self._merge(weight, name, 0, factors)

    def settle(self) -> None:
        sets = [{name: self._spots[name].tensor for name in self._switched}, *self._others]
        self._bindings = [
            [(table, leaf, tensor) for name, tensor in tensors.items() for table, leaf in self._spots[name].tables]
            for tensors in sets
        ]

    def enter(self, set_: int) -> None:
        self._require(set_)
        if set_ != self.active:
            for table, leaf, tensor in self._bindings[set_]:
                table[leaf] = tensor
            self.active = set_

    def close(self) -> None:
        for tensor in itertools.chain(*(others.values() for others in self._others)):
            self._mover.ledger.hold("device", -tensor.nbytes)
        self._others, self._bindings = [{} for _ in self._others], []
        super().close()


class Legacy(_Straight):
    """The host has the clean weights and the factors; at a switch they are merged anew."""

    mode = "legacy"
    shares_host = True

    def __init__(
        self, site: Site, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, plans: Sequence[LoraPlan]
    ):
        super().__init__(site, shapes, dtype, plans)
        self._clean = HostStores(site.host, site.mover)
        self._factors = HostStores(site.host, site.mover)

    @property
    def written(self) -> tuple[str, ...]:
        return union([self._plans[0], union(self._plans, self._switched)]).targets

    def _begin(self, before: Sequence[LoraPlan]) -> None:
        super()._begin(before)
        self._stale = tuple(name for name in self._stale if name not in self._switched)
        if self._spots:
            for name in self._changed.keys() & self._switched:
                self._mover.upload(self._spots[name].tensor, self._clean[name])
        self._clean.hold({name: self._kinds[name] for name in self._switched})
        entries = union(self._plans, self._switched).entries
        self._factors.hold({entry: (entry.shape, TORCH_DTYPES[entry.dtype]) for entry in entries})

    def _keep(self, name: str, weight: Tensor, factors: Mapping[TensorEntry, Tensor]) -> None:
        if self._switched[name] % self._site.host.size == self._site.host.rank:
            self._mover.download(self._clean[name], weight)
            for entry, factor in factors.items():
                self._mover.download(self._factors[entry], factor)
        self._merge(weight, name, 0, factors)

    def settle(self) -> None:
        pass

    def enter(self, set_: int) -> None:
        self._require(set_)
        if set_ == self.active:
            return
        for name in self._switched:
            weight = self._spots[name].tensor
            self._mover.upload(weight, self._clean[name])
            factors = {}
            for entry in union([self._plans[set_]], [name]).entries:
                place = self._factors[entry]
                factors[entry] = self._mover.empty(place.shape, place.dtype)
                self._mover.upload(factors[entry], place)
            self._merge(weight, name, set_, factors)
        self.active = set_

    def close(self) -> None:
        super().close()
        self._clean.close()
        self._factors.close()


class Sharded(_Straight):
    """Each rank has a share of the bytes of each set, and all ranks' shares are gathered at a switch."""

    mode = "sharded"

    def __init__(
        self, site: Site, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, plans: Sequence[LoraPlan]
    ):
        super().__init__(site, shapes, dtype, plans)
        sizes = [torch.Size(shapes[name]).numel() * dtype.itemsize for name in self._switched]
        begins = [0, *itertools.accumulate(-(-size // 16) * 16 for size in sizes)]
        self._begins = dict(zip(self._switched, begins, strict=False))
        num_buckets = -(-begins[-1] // _BUCKET_BYTES)
        self._share = -(-begins[-1] // (max(num_buckets, 1) * site.ranks.size * ALIGNMENT)) * ALIGNMENT
        self._num_buckets = num_buckets
        self._shards: list[Tensor] = []

    @property
    def written(self) -> tuple[str, ...]:
        return union([self._plans[0], union(self._plans, self._switched)]).targets

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        for _ in self._plans:
            self._shards.append(self._mover.empty([self._num_buckets, self._share], torch.uint8))
            self._mover.ledger.hold("device", self._shards[-1].nbytes)

    def _keep(self, name: str, weight: Tensor, factors: Mapping[TensorEntry, Tensor]) -> None:
        for set_ in range(1, len(self._plans)):
            other = weight.detach().clone()
            self._merge(other, name, set_, factors)
            self._put(set_, name, other)
        self._merge(weight, name, 0, factors)
        self._put(0, name, weight)

    def _put(self, set_: int, name: str, weight: Tensor) -> None:
        """Keep this rank's share of a weight. In place."""
        data, begin = weight.detach().reshape(-1).view(torch.uint8), self._begins[name]
        bucket_bytes = self._share * self._site.ranks.size
        for bucket in range(begin // bucket_bytes, -(-(begin + data.numel()) // bucket_bytes)):
            start = bucket * bucket_bytes + self._site.ranks.rank * self._share
            first, last = max(start, begin), min(start + self._share, begin + data.numel())
            if first < last:
                target = self._shards[set_][bucket, first - start : last - start]
                self._mover.duplicate(target, data[first - begin : last - begin])

    def settle(self) -> None:
        pass

    def enter(self, set_: int) -> None:
        self._require(set_)
        if set_ == self.active:
            return
        ranks, bucket_bytes = self._site.ranks, self._share * self._site.ranks.size
        with together(ranks):
            staged = [self._mover.empty([ranks.size, self._share], torch.uint8) for _ in range(2)]
            self._mover.ledger.hold("device", 2 * bucket_bytes)

        def start(bucket: int) -> Callable[[], Tensor]:
            return ranks.start_gather(self._shards[set_][bucket], label="weights", into=staged[bucket % 2])

        pending = [start(bucket) for bucket in range(min(1, self._num_buckets))]
        names, done = list(self._switched), 0
        for bucket in range(self._num_buckets):
            gathered = pending.pop()().view(-1)
            if bucket + 1 < self._num_buckets:
                pending.append(start(bucket + 1))
            self._mover.ledger.copied("exchanged", bucket_bytes - self._share)
            end = (bucket + 1) * bucket_bytes
            while done < len(names):
                begin, data = self._begins[names[done]], self._spots[names[done]].tensor.detach().view(-1)
                data = data.view(torch.uint8)
                first, last = max(begin, end - bucket_bytes), min(begin + data.numel(), end)
                if first < last:
                    source = gathered[first - end + bucket_bytes : last - end + bucket_bytes]
                    self._mover.duplicate(data[first - begin : last - begin], source)
                if begin + data.numel() > end:
                    break
                done += 1
        self._mover.ledger.hold("device", -2 * bucket_bytes)
        self.active = set_

    def close(self) -> None:
        self._mover.ledger.hold("device", -sum(shard.nbytes for shard in self._shards))
        self._shards = []
        super().close()


RESIDENCIES: Mapping[str, type[Residency]] = {
    kind.mode: kind for kind in (Resident, Sharded, Snapshot, LowMemorySnapshot, Legacy)
}
"""The modes, the best first."""
