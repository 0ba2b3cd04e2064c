"""Where weights live: chosen from sizes and free memory alone, so that all ranks choose alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from ltx_sp.errors import PlanError

__all__ = ["Budget", "Need", "choose_residency", "place_components", "require_sense"]

# Of the device's memory: allocators round, kernels have workspaces, and the working set is an estimate.
_SPARE_SHARE = 0.05
# A host that ran full would push out whatever else runs there.
_HOST_SHARE = 0.9

# With one set these would be ``resident`` under another name.
_SWITCHES = ("sharded", "legacy")

_ORDER = ("resident", "sharded", "snapshot", "legacy")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Free memory as if nothing of the model were there, in bytes.

    Args:
        device: of the poorest rank.
        host: of the poorest host, for all of its ranks.
    """

    device: int
    host: int


@dataclasses.dataclass(frozen=True)
class Need:
    """What the sets of a transformer's weights take, in bytes.

    Args:
        transformer: one set.
        switched: what is not the same in all sets, once.
        num_sets: of weights.
        merged: what of all sets is not as in the checkpoint.
        factors: of the LoRAs, as stored.
        working: what must be free on the device besides.
        num_ranks: that hold the same sets.
        host_copies: of a transformer that is loaded to the host: 1 where the ranks of a host share it.
    """

    transformer: int
    switched: int = 0
    num_sets: int = 1
    merged: int = 0
    factors: int = 0
    working: int = 0
    num_ranks: int = 1
    host_copies: int = 1

    def device(self, mode: str) -> int:
        """What a mode holds on each device at rest."""
        extra = {
            "resident": (self.num_sets - 1) * self.switched,
            "sharded": -(-self.num_sets * self.switched // self.num_ranks),
        }
        return self.transformer + extra.get(mode, 0)

    def host(self, mode: str) -> int:
        """What a mode holds on each host."""
        if mode.startswith("snapshot"):
            return self.host_copies * self.transformer + self.merged
        return self.switched + self.factors if mode == "legacy" else 0

    def rest(self, mode: str, budget: Budget) -> Budget:
        """What a mode and the working set leave."""
        return Budget(
            int((1 - _SPARE_SHARE) * budget.device) - self.device(mode) - self.working,
            int(_HOST_SHARE * budget.host) - self.host(mode),
        )

    def fits(self, mode: str, budget: Budget) -> bool:
        """Whether a mode finds room, the working set included."""
        if mode in _SWITCHES and (self.num_sets == 1 or (mode == "sharded" and self.num_ranks == 1)):
            return False
        rest = self.rest(mode, budget)
        return rest.device >= 0 and rest.host >= 0


def choose_residency(asked: str, need: Need, budget: Budget) -> tuple[str, str]:
    """Choose where the sets of weights live: the mode, and the reason for the log.

    Where no mode fits, ``auto`` takes the one that needs least: the working set is an estimate.

    Args:
        asked: makes sense, see ``require_sense``.

    Raises:
        PlanError: the mode that is asked for does not fit.
    """
    fitting = [mode for mode in (*_ORDER, "snapshot-low-vram") if need.fits(mode, budget)]
    if asked == "auto":
        least = "snapshot" if need.rest("snapshot", budget).host >= 0 else "legacy" if need.num_sets > 1 else "resident"
        mode = fitting[0] if fitting else least
        reason = _account(mode, need, budget)
        return mode, reason if fitting else f"no mode fits, and this needs least; {reason}"
    if asked in fitting:
        return asked, f"as asked; {_account(asked, need, budget)}"
    others = f"--residency {fitting[0]} would fit" if fitting else "no other mode would fit either"
    raise PlanError(
        f"--residency {asked} does not fit: {_account(asked, need, budget)}; {others}. "
        f"{'Use that' if fitting else 'Make a smaller clip, or use more memory'}."
    )


def require_sense(asked: str, *, num_ranks: int, num_sets: int, pipeline: str) -> None:
    """Raise PlanError where a mode makes no sense with so few sets of weights, or ranks."""
    if asked in _SWITCHES and num_sets == 1:
        raise PlanError(
            f"--residency {asked} says how to change between two sets of weights, and the pipeline {pipeline} has one. "
            "Leave it out."
        )
    if asked == "sharded" and num_ranks == 1:
        raise PlanError(
            "--residency sharded divides the weights among the ranks, and there is one rank. Start more, or use "
            "--residency auto."
        )


def _account(mode: str, need: Need, budget: Budget) -> str:
    text = (
        f"{_size(need.device(mode))} of weights and {_size(need.working)} to work with on each device, of "
        f"{_size(budget.device)} free"
    )
    if need.host(mode):
        text += f"; {_size(need.host(mode))} on each host, of {_size(budget.host)} free"
    return text


def place_components(sizes: Mapping[str, int], budget: Budget, dropped: Collection[str]) -> dict[str, str]:
    """Choose where each component but the transformer is between its uses: ``gpu``, ``host`` or ``drop``.

    Args:
        sizes: bytes of each component, in the order in which they get room.
        budget: what the transformer and its working set leave.
        dropped: what is not kept however much room there is.
    """
    device, host = budget.device, budget.host
    places = {}
    for name, num_bytes in sizes.items():
        if name in dropped:
            places[name] = "drop"
        elif num_bytes <= device:
            places[name] = "gpu"
            device -= num_bytes
        elif num_bytes <= host:
            places[name] = "host"
            host -= num_bytes
        else:
            places[name] = "drop"
    return places


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
