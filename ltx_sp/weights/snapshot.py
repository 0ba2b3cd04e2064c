"""Residencies whose weights lie on the host, and come to the device as they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.weights.backed import Backed
from ltx_sp.weights.index import TensorEntry
from ltx_sp.weights.lora import LoraPlan
from ltx_sp.weights.transfer import HostStores, Kind
from ltx_sp.weights.weight_sets import Residency, Site

__all__ = ["LowMemorySnapshot", "Snapshot"]


class LowMemorySnapshot(Residency):
    """Both sets lie on the host; the device has what is the same in them, and of the rest one set at a time."""

    mode = "snapshot-low-vram"
    loads_to_host = True
    shares_host = True

    def __init__(
        self, site: Site, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, plans: Sequence[LoraPlan]
    ):
        super().__init__(site, shapes, dtype, plans)
        self._snapshot: dict[str, Tensor] = {}
        self._merged = HostStores(site.host, site.mover)
        self._common: Backed | None = None
        self._sets: list[Backed] = []
        self._unlock: Callable[[], None] = lambda: None
        self._is_bound = False

    def _needs(self, name: str) -> bool:
        return self._changed[name] % self._site.host.size == self._site.host.rank

    def _versions(self, name: str) -> range:
        """The sets that have a tensor of their own for a weight; set 0's is everybody's where they do not differ."""
        return range(len(self._plans) if name in self._switched else 1)

    def _begin(self, before: Sequence[LoraPlan]) -> None:
        wanted: dict[Any, Kind] = {
            (name, k): self._kinds[name]
            for k, plan in enumerate(self._plans)
            for name in plan.targets
            if k in self._versions(name)
        }
        self._merged.hold(wanted)

    def _host(self, name: str, set_: int) -> Tensor:
        """A weight of a set on the host."""
        return self._merged[name, set_] if name in self._plans[set_].pairs else self._snapshot[name]

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        for owner in module.modules():
            for leaf, buffer in owner._buffers.items():
                owner._buffers[leaf] = None if buffer is None else buffer.to(self._mover.device)
        self._snapshot = {name: spot.tensor.detach() for name, spot in self._spots.items()}
        if self._site.locks_pages:
            self._unlock = self._mover.lock_pages(self._snapshot.values())
        common = {name: spot for name, spot in self._spots.items() if name not in self._switched}
        switched = {name: self._spots[name] for name in self._switched}
        self._common = Backed(common, {name: self._host(name, 0) for name in common}, self._mover)
        self._sets = [
            Backed(switched, {name: self._host(name, k) for name in switched}, self._mover)
            for k in range(len(self._plans))
        ]
        self._common.fetch(without=self._plans[0].targets)
        self._sets[0].fetch(without=self._plans[0].targets)

    def merge(self, name: str, factors: Mapping[TensorEntry, Tensor]) -> None:
        if not self._needs(name):
            return
        snapshot = self._snapshot[name]
        for set_ in self._versions(name):
            if name in self._plans[set_].pairs:
                weight = self._mover.empty(snapshot.shape, snapshot.dtype)
                self._mover.upload(weight, snapshot)
                self._merge(weight, name, set_, factors)
                self._mover.download(self._host(name, set_), weight)

    def settle(self) -> None:
        assert self._common is not None
        changed = [name for name in self._changed if name in self._switched]
        self._common.rehost({name: self._host(name, 0) for name in self._changed if name not in self._switched})
        for k, backed in enumerate(self._sets):
            backed.rehost({name: self._host(name, k) for name in changed})
        self._is_bound = False
        self.enter(0)
        self._mover.synchronize()

    def enter(self, set_: int) -> None:
        self._require(set_)
        if self._is_bound and set_ == self.active:
            return
        self._bring(set_)
        assert self._common is not None
        self._common.bind()
        self._sets[set_].bind()
        self._is_bound = True

    def _bring(self, set_: int) -> None:
        """Start to copy what the device lacks of a set, in the place of the other. In place. Blocks the host."""
        assert self._common is not None
        if set_ != self.active:
            self._is_bound = False
            self._sets[self.active].leave()
            self.active = set_
        if self._common.num_missing_bytes or self._sets[set_].num_missing_bytes:
            self._mover.synchronize()  # or what was freed could not be used again yet
            self._common.fetch()
            self._sets[set_].fetch()

    def rest(self) -> None:
        if self.active != 0:
            self._bring(0)

    def forget(self) -> bool:
        forgotten = [backed.forget() for set_, backed in enumerate(self._sets) if set_ != self.active]
        return any(forgotten)

    def evict(self) -> bool:
        assert self._common is not None
        self._common.leave()
        self._sets[self.active].leave()
        self.forget()
        self._is_bound = False
        return True

    def close(self) -> None:
        if self._common is not None:
            self.evict()
        self._unlock()
        self._merged.close()
        self._common, self._sets, self._snapshot = None, [], {}


class Snapshot(LowMemorySnapshot):
    """The same, with the next set copied ahead of time as far as there is room."""

    mode = "snapshot"

    def prefetch(self, set_: int) -> None:
        self._require(set_)
        if set_ != self.active:
            with contextlib.suppress(torch.OutOfMemoryError):  # what is measured as free may be in too small pieces
                self._sets[set_].fetch(room=self._site.room())
