"""Who is still there: each rank beats in torchrun's store, so that a dead one is named instead of waited for.

A collective cannot say which rank is missing, and NCCL only waits. So every rank keeps writing a counter from a
thread of its own, and reads the others'. On one host a dead process is seen at once by its process id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from ltx_sp.errors import PeerLostError

_BEAT_SECONDS = 0.5
_POLL_SECONDS = 0.1
# How much longer than a started rank's silence a rank's start may take: hosts read Python and torch at unequal speed.
_START_FACTOR = 10
# How long the other ranks leave it to rank 0 to tell the user.
_LAST_WORD_SECONDS = 10.0
_LINGER_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Farewell:
    """How a rank ended: its exit code (0 is well) and its one-sentence message.

    Args:
        rank: who says so of itself; None where another rank found out.
    """

    exit_code: int
    message: str
    rank: int | None = None


@dataclasses.dataclass
class _Peer:
    """Another rank that has started: its process, if it is on this host, and how long it has been silent."""

    process: int | None
    beat: bytes = b""
    silence: float = 0.0


class Liveness:
    """Beats for this rank and watches the others.

    Args:
        store: torchrun's; None watches nobody.
        on_lost: called once, from a watching thread, when another rank has failed, died or fallen silent; it should
            end the process, whose main thread may be stuck in a collective.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int, *, on_lost: Callable[[Farewell], None]):
        self._store = None if store is None or size == 1 else store
        self._rank, self._size, self._on_lost = rank, size, on_lost
        self._timeout = 0.0
        self._stopped, self._found = threading.Event(), threading.Event()
        self._lost: Farewell | None = None
        self._peers: dict[int, _Peer] = {}
        self._absent = {other for other in range(size) if other != rank}
        self._looks = 0
        self._threads: list[threading.Thread] = []

    def start(self, timeout: float) -> None:
        """Begin to beat and watch.

        Args:
            timeout: seconds of silence after which a rank counts as lost.
        """
        if self._store is None:
            return
        self._timeout = timeout
        self._store.set(f"beat/{self._rank}", "0")
        self._store.set(f"who/{self._rank}", json.dumps([_host(), os.getpid()]))
        # A connection of its own: one that waits for an answer keeps the main thread waiting too.
        store: dist.Store = self._store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._threads = [
            threading.Thread(target=self._watch, args=(store,), daemon=True, name="liveness"),
            threading.Thread(target=self._watch_store, daemon=True, name="liveness-store"),
        ]
        for thread in self._threads:
            thread.start()

    def announce(self, farewell: Farewell) -> None:
        """Tell the other ranks that this one ends badly, and why. The first that does is every rank's reason."""
        if self._store is not None:
            own = dataclasses.replace(farewell, rank=self._rank)
            with contextlib.suppress(RuntimeError):  # the store is gone: nobody is left to be told
                self._store.compare_set("failed", "", json.dumps(dataclasses.astuple(own)))

    def leave(self) -> None:
        """Stop watching, after a good end or an announced bad one. Blocks the host.

        Without torchrun the store lives in rank 0, which therefore waits a moment for the others to leave.
        """
        self._stopped.set()  # first, or a rank that leaves earlier would look lost
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_POLL_SECONDS)
        deadline = time.monotonic() + _LINGER_SECONDS
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{self._rank}", "")
                while self._rank == 0 and time.monotonic() < deadline and not self._have_all_left(self._store):
                    time.sleep(_POLL_SECONDS)

    def wait_for(self, rank: int) -> None:
        """Wait until ``rank`` has left. Blocks the host.

        Raises:
            PeerLostError: it did not end well, or the store is gone; ``on_lost`` has been or will be told.
        """
        if self._store is None or rank == self._rank:
            return
        try:
            while not self._store.check([f"left/{rank}"]):
                time.sleep(_POLL_SECONDS)
            ended_well = not self._store.check(["failed"])
        except RuntimeError:
            ended_well = False
        if not ended_well:
            raise PeerLostError(f"Rank {rank} ended before its work was done. See its own output for the reason.")

    def claim_last_word(self) -> bool:
        """Decide whether this rank tells the user why all ranks end: rank 0, or else the first that sees it missing.

        Blocks the host for some seconds where rank 0 is not there to do it.
        """
        store = self._store
        # Where nobody can be asked, whoever is on rank 0's host counts on it.
        unasked = self._rank == 0 or (0 in self._peers and self._peers[0].process is None)
        if store is None:
            return unasked or not self._found.is_set()
        try:
            deadline = time.monotonic() + _LAST_WORD_SECONDS
            while self._rank != 0 and time.monotonic() < deadline and not self._is_missing(0):
                if store.check(["last word"]):
                    return False
                time.sleep(_POLL_SECONDS)
            return store.add("last word", 1) == 1
        except RuntimeError:
            return unasked

    def find_failed(self) -> Farewell | None:
        """Look once whether another rank has failed or died, without regard to silence."""
        if self._store is None or self._stopped.is_set():
            return None
        try:
            self._meet(self._store)
            return self._find_failed(self._store) or self._find_dead(self._store)
        except RuntimeError:
            return None

    def wait_for_loss(self) -> Farewell | None:
        """After an exchange has failed, wait until the watch has found out why. Blocks the host.

        Returns None where it finds nothing within the timeout.
        """
        if self._store is not None:
            self._found.wait(self._timeout + 4 * _BEAT_SECONDS)
        return self._lost

    def _watch(self, store: dist.Store) -> None:
        for waited in self._pulse():
            self._looks += 1
            try:
                store.set(f"beat/{self._rank}", str(self._looks))
                self._meet(store)
                lost = self._find_failed(store) or self._find_dead(store) or self._find_silent(store, waited)
            except RuntimeError:
                lost = Farewell(
                    PeerLostError.exit_code,
                    "torchrun, which started this rank, is gone (its store does not answer). Start again.",
                )
            if lost is not None:
                self._lose(lost)
                return

    def _watch_store(self) -> None:
        """End the run when the store neither answers nor fails: its host, which is rank 0's, may have vanished."""
        seen, silence = 0, 0.0
        for waited in self._pulse():
            seen, silence = (seen, silence + waited) if self._looks == seen else (self._looks, 0.0)
            if silence > self._timeout:
                self._store = None
                self._lose(
                    Farewell(
                        PeerLostError.exit_code,
                        f"The store of torchrun has not answered for {self._timeout:g} s. See whether torchrun on the "
                        "first host was stopped or its host lost, then start again.",
                    )
                )
                return

    def _pulse(self) -> Iterator[float]:
        """Yield at every beat, until this rank leaves, the seconds that have passed.

        A rank that was itself stopped for a while, or had no time to look, counts one long beat and blames nobody.
        """
        before = time.monotonic()
        while not self._stopped.wait(_BEAT_SECONDS):
            now = time.monotonic()
            yield min(now - before, 2 * _BEAT_SECONDS)
            before = now

    def _lose(self, lost: Farewell) -> None:
        if not (self._stopped.is_set() or self._found.is_set()):
            self._lost = lost
            self._found.set()
            self._on_lost(lost)

    def _find_failed(self, store: dist.Store) -> Farewell | None:
        if not store.check(["failed"]):
            return None
        farewell = Farewell(*json.loads(store.get("failed")))
        return None if farewell.rank == self._rank else farewell

    def _find_dead(self, store: dist.Store) -> Farewell | None:
        for rank in list(self._peers):
            if self._is_gone(rank) and not self._has_left(store, rank):
                # It may have told its reason between the two looks.
                return self._find_failed(store) or Farewell(
                    PeerLostError.exit_code,
                    f"Rank {rank} died without a word. See the system's log (out of memory?) and its own output, then "
                    "start again.",
                )
        return None

    def _find_silent(self, store: dist.Store, waited: float) -> Farewell | None:
        if self._absent and self._looks * _BEAT_SECONDS > _START_FACTOR * self._timeout:
            return Farewell(
                PeerLostError.exit_code,
                f"Rank {min(self._absent)} has not started within {_START_FACTOR * self._timeout:g} s. Look at its "
                "host, then start again; --peer-timeout is a tenth of that time.",
            )
        peers = list(self._peers.items())
        beats = store.multi_get([f"beat/{rank}" for rank, _ in peers]) if peers else []
        for (rank, peer), beat in zip(peers, beats, strict=True):
            peer.silence = peer.silence + waited if beat == peer.beat else 0.0
            peer.beat = beat
            if peer.silence > self._timeout and not self._has_left(store, rank):
                return Farewell(
                    PeerLostError.exit_code,
                    f"Rank {rank} has not answered for {self._timeout:g} s. Look at its host, then start again; "
                    "--peer-timeout sets how long to wait.",
                )
        return None

    def _meet(self, store: dist.Store) -> None:
        """Get to know the ranks that have started since the last look."""
        for rank in list(self._absent):
            if store.check([f"who/{rank}"]):
                host, process = json.loads(store.get(f"who/{rank}"))
                self._peers[rank] = _Peer(process if host == _host() else None)
                self._absent.discard(rank)

    def _is_gone(self, rank: int) -> bool:
        peer = self._peers.get(rank)
        return peer is not None and peer.process is not None and _has_ended(peer.process)

    def _is_missing(self, rank: int) -> bool:
        return self._is_gone(rank) or (rank in self._peers and self._peers[rank].silence > self._timeout)

    def _have_all_left(self, store: dist.Store) -> bool:
        return all(self._is_missing(rank) or self._has_left(store, rank) for rank in range(1, self._size))

    def _has_left(self, store: dist.Store, rank: int) -> bool:
        return store.check([f"left/{rank}"])


def _host() -> str:
    """What tells hosts, and containers with processes of their own, apart; names may be equal."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _has_ended(process: int) -> bool:
    """Whether the process is gone, or a zombie that its parent has not collected yet."""
    try:
        with open(f"/proc/{process}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return os.path.isdir("/proc/self")
    except OSError:
        return False
    return state in ("Z", "X")
