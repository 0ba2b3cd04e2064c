"""What all residencies have in common: sets of a module's weights, made from clean weights and factors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ltx_sp.parallel.collectives import Axis
from ltx_sp.weights.backed import Spot, spots_of
from ltx_sp.weights.index import TensorEntry
from ltx_sp.weights.lora import LoraPlan, factors_of, switched_targets, union
from ltx_sp.weights.merge import merge
from ltx_sp.weights.transfer import Mover

__all__ = ["Residency", "Site"]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a residency is.

    Args:
        host: the ranks that share this host's memory.
        ranks: all ranks, which hold the same sets.
        room: bytes of the device that may be filled ahead of time.
        locks_pages: whether what is loaded to the host is page-locked; pages of files cannot be without a copy.
    """

    mover: Mover
    host: Axis
    ranks: Axis
    room: Callable[[], int]
    locks_pages: bool = True


class Residency(ABC):
    """The sets of one module's weights, one of which it uses.

    Args:
        shapes: of the module's parameters.
        dtype: theirs.
        plans: of each set, as they are without a request's LoRAs.
    """

    mode: ClassVar[str]
    loads_to_host: ClassVar[bool] = False
    """Whether the module is loaded to the host, not to the device."""
    shares_host: ClassVar[bool] = False
    """Whether ranks of a host fill memory for each other: they must meet before ``settle``."""

    def __init__(
        self, site: Site, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, plans: Sequence[LoraPlan]
    ):
        self._site, self._mover = site, site.mover
        self._kinds = {name: (shape, dtype) for name, shape in shapes.items()}
        self._switched = {name: place for place, name in enumerate(switched_targets(plans))}
        self._plans: tuple[LoraPlan, ...] = (LoraPlan({}),) * len(plans)
        self._changed: dict[str, int] = {}
        self._spots: dict[str, Spot] = {}
        self.active = 0

    @property
    def written(self) -> tuple[str, ...]:
        """Parameters that will be changed where the loader puts them."""
        return ()

    def prepare(self, plans: Sequence[LoraPlan], *, alone: bool) -> LoraPlan:
        """Take other LoRAs, and say which factors are to be read. Collective along the host axis.

        The module must be in set 0, or not be there yet.

        Args:
            alone: each rank reads for itself what it needs; False where all must read the same.
        """
        plans, before = tuple(plans), self._plans
        names = union([*before, *plans]).targets
        changed = [
            name
            for name in names
            if any(new.pairs.get(name) != old.pairs.get(name) for new, old in zip(plans, before, strict=True))
        ]
        self._changed = {name: place for place, name in enumerate(changed)}
        self._plans = plans
        self._begin(before)
        return union(plans, [name for name in self._changed if not alone or self._needs(name)])

    @abstractmethod
    def _begin(self, before: Sequence[LoraPlan]) -> None:
        """Take what memory ``self._changed`` needs. Collective along the host axis."""

    def _needs(self, name: str) -> bool:
        """Whether this rank takes part in making a weight."""
        return True

    def attach(self, module: nn.Module) -> None:
        """Take the module as it was loaded."""
        self._spots = spots_of(module, buffers=False)

    def stale(self) -> tuple[str, ...]:
        """What of the module's own weights must come from the checkpoint again; see ``clean``."""
        return ()

    def clean(self, name: str, tensor: Tensor) -> None:
        """Take a weight as the checkpoint has it, in any dtype. In place."""
        raise RuntimeError(f"{name} was read and is not awaited")

    @abstractmethod
    def merge(self, name: str, factors: Mapping[TensorEntry, Tensor]) -> None:
        """Make a weight of every set from the clean one; ``factors`` are on the device."""

    @abstractmethod
    def settle(self) -> None:
        """Let the module use set 0 as it is now. In place. Blocks the host."""

    @abstractmethod
    def enter(self, set_: int) -> None:
        """Let the module use a set; nothing happens if it does. In place. Collective where the mode is ``sharded``."""

    def prefetch(self, set_: int) -> None:
        """Bring a set nearer beside what the device does, as far as the mode and the memory allow."""
        self._require(set_)

    def rest(self) -> None:
        """Go back to set 0 beside what the device does; ``enter(0)`` must come before the module is used again."""
        self.enter(0)

    def forget(self) -> bool:
        """Let go of what was fetched ahead, and say whether anything was; the module uses what it did."""
        return False

    def evict(self) -> bool:
        """Free the device's memory if the mode has the weights on the host too, and say whether it has.

        ``enter`` brings them back.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Give back all that is held besides the module."""

    def _merge(self, weight: Tensor, name: str, set_: int, factors: Mapping[TensorEntry, Tensor]) -> None:
        if name in self._plans[set_].pairs:
            merge(weight, factors_of(self._plans[set_].pairs[name], factors))

    def _require(self, set_: int) -> None:
        if not 0 <= set_ < len(self._plans):
            raise RuntimeError(f"set {set_} of {len(self._plans)} is asked for")
