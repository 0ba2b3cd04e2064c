"""Modules by name: on the device, on the host only, or not there."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ltx_sp.weights.backed import Backed, spots_of
from ltx_sp.weights.transfer import Mover

__all__ = ["Shelf"]


class Shelf:
    """Keeps modules, and moves them as a whole; the copy on the host is made once, and leaving again copies nothing."""

    def __init__(self, mover: Mover):
        self._mover = mover
        self._modules: dict[str, nn.Module] = {}
        self._backed: dict[str, Backed] = {}
        self._away: set[str] = set()

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def is_away(self, name: str) -> bool:
        """Whether a module is on the host only."""
        return name in self._away

    def put_on_host(self, name: str) -> None:
        """Free the device's memory of a module. In place. Blocks the host."""
        if name not in self._backed:
            self._backed[name] = Backed.of_device(self._modules[name], self._mover)
        self._backed[name].leave()
        self._away.add(name)

    def bring(self, name: str) -> None:
        """Have a module on the device; nothing happens if it is there. In place."""
        if name in self._away:
            self._backed[name].fetch()
            self._backed[name].bind()
            self._away.remove(name)

    def free(self, name: str) -> None:
        """Let go of a module."""
        if name in self._backed:
            self._backed.pop(name).close()
        self._modules.pop(name, None)
        self._away.discard(name)

    def held_bytes(self, device: torch.device, besides: Collection[str] = ()) -> int:
        """What modules hold on a device, without those named and what the ledger counts."""
        own = [module for name, module in self._modules.items() if name not in {*self._backed, *besides}]
        spots = [spot for module in own for spot in spots_of(module, buffers=True).values()]
        return sum(spot.tensor.nbytes for spot in spots if spot.tensor.device == device)
