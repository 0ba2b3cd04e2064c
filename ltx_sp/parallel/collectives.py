"""The exchanges between ranks: every one goes through here, and is counted.

Shapes: P ranks of an axis.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_sp.errors import PeerLostError
from ltx_sp.model.attention import Pending

# torch 2.13 calls this all_gather_single and warns about the old name, which older versions alone have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective as this rank saw it: what for, by which operation, and the bytes that came from others."""

    label: str
    operation: str
    num_bytes: int


class Ledger:
    """The collectives of one rank, in order, while it is recording."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.recording = False

    def add(self, label: str, operation: str, num_bytes: int) -> None:
        if self.recording:
            self.exchanges.append(Exchange(label, operation, num_bytes))


class Axis:
    """One axis of the mesh: this rank's place on it, and the collectives along it.

    On an axis of one rank every collective is the identity and counts nothing.

    Args:
        names: what its ranks are called in messages; None for their places.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        ledger: Ledger,
        names: Sequence[int] | None = None,
    ):
        self.rank, self.size, self._group, self.ledger = rank, size, group, ledger
        self.names = range(size) if names is None else names

    @staticmethod
    def alone() -> Axis:
        """An axis of one rank, with a ledger of its own."""
        return Axis(0, 1, None, Ledger())

    def exchange(self, send: Tensor, *, send_sizes: Sequence[int], receive_sizes: Sequence[int], label: str) -> Tensor:
        """Trade pieces with every rank: piece i of ``send`` goes to rank i, piece i of the result is from rank i.

        Collective. Capturable.

        Args:
            send: one dimension, the pieces one after the other.
            send_sizes, receive_sizes: elements per piece, known on the host.
        """
        if self.size == 1:
            return send
        received = send.new_empty(sum(receive_sizes))
        foreign = received.numel() - receive_sizes[self.rank]
        self.ledger.add(label, "all_to_all", foreign * received.element_size())
        try:
            dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=self._group)
        except RuntimeError as error:
            raise _explained(label, error) from error
        return received

    def start_gather(self, x: Tensor, *, label: str, into: Tensor | None = None) -> Pending:
        """Start to collect equally shaped tensors of all ranks: ``[...] -> [P, ...]``, in rank order.

        Collective. Capturable. The call of the result waits, on the device's stream, not on the host; whoever may wait
        on a stream of its own keeps what was returned until that stream has been joined.

        Args:
            into: memory for the result; None to allocate it. On an axis of one rank it is not used.
        """
        if self.size == 1:
            return lambda: x.unsqueeze(0)
        x = x.contiguous()
        gathered = x.new_empty((self.size, *x.shape)) if into is None else into
        self.ledger.add(label, "all_gather", (self.size - 1) * x.numel() * x.element_size())
        try:
            work = _all_gather(gathered.view(-1), x.view(-1), group=self._group, async_op=True)
        except RuntimeError as error:
            raise _explained(label, error) from error

        # With `x`: the work lets go of it once any stream waits, and that may not be the one whose memory it is.
        return partial(_finish, work, x, gathered, label)

    def gather(self, x: Tensor, *, label: str, into: Tensor | None = None) -> Tensor:
        """Collect equally shaped tensors of all ranks: ``[...] -> [P, ...]``. Collective. Capturable."""
        return self.start_gather(x, label=label, into=into)()

    def sum(self, x: Tensor, *, label: str) -> Tensor:
        """Add the ranks' tensors in rank order, so that all ranks get equal bits. Collective. Capturable."""
        return self.gather(x, label=label).sum(dim=0)

    def broadcast(self, x: Tensor, *, source: int = 0, label: str) -> Tensor:
        """Give every rank ``source``'s tensor. Collective. In place."""
        if self.size == 1:
            return x
        self.ledger.add(label, "broadcast", 0 if self.rank == source else x.numel() * x.element_size())
        try:
            dist.broadcast(x, group=self._group, group_src=source)
        except RuntimeError as error:
            raise _explained(label, error) from error
        return x

    def gather_text(self, text: str, *, label: str) -> list[str]:
        """Collect one short text per rank. Collective. Blocks the host."""
        if self.size == 1:
            return [text]
        texts: list[str | None] = [None] * self.size
        self.ledger.add(label, "all_gather_object", 0)
        try:
            dist.all_gather_object(texts, text, group=self._group)
        except RuntimeError as error:
            raise _explained(label, error) from error
        return [received or "" for received in texts]

    def split(self, size: int) -> tuple[Axis, Axis]:
        """Cut into (across, along): runs of ``size`` neighbouring ranks, and the ranks of equal place in them.

        Collective. Blocks the host.
        """
        runs = [range(start, start + size) for start in range(0, self.size, size)]
        return self.partition([range(place, self.size, size) for place in range(size)]), self.partition(runs)

    def partition(self, parts: Sequence[Sequence[int]]) -> Axis:
        """Cut into axes of the given ranks, and give the one that this rank is in. Collective. Blocks the host."""
        own = next(part for part in parts if self.rank in part)
        if len(own) == self.size:
            return self
        if max(map(len, parts)) == 1:
            return Axis(0, 1, None, self.ledger, [self.names[self.rank]])
        members = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        # NCCL may make groups by splitting the default one, where every rank has to take part in all; ranks outside
        # this axis cannot, and then only the members come together.
        is_whole = len(members) == dist.get_world_size()
        group = None
        for part in parts:
            if is_whole or part is own:
                made = dist.new_group([members[rank] for rank in part], use_local_synchronization=not is_whole)
                group = made if part is own else group
        names = [self.names[rank] for rank in own]
        return Axis(list(own).index(self.rank), len(own), group if len(own) > 1 else None, self.ledger, names)


def _finish(work: dist.Work, sent: Tensor, received: Tensor, label: str) -> Tensor:
    try:
        work.wait()
    except RuntimeError as error:
        raise _explained(label, error) from error
    return received


def _explained(label: str, error: RuntimeError) -> RuntimeError:
    """What a failed exchange is raised as: this rank's own lack of memory stays that, the rest is a lost peer."""
    if isinstance(error, torch.OutOfMemoryError):
        return error
    reason = str(error).strip().partition("\n")[0]
    return PeerLostError(f"The exchange {label!r} failed; another rank died or stopped answering ({reason}).")


COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)
"""Long on purpose: one rank may load or encode for minutes. A rank that dies is found by its silence."""
