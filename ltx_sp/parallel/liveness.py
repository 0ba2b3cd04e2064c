"""Who is still there: each rank beats in torchrun's store, so that a dead one is named instead of waited for.

A collective cannot say which rank is missing, and NCCL only waits. So every rank keeps writing a counter from a
thread of its own, and reads the others'. On one host a dead process is seen at once by its process id.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

_BEAT_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Farewell:
    """How a rank ended: its exit code (0 is well) and its one-sentence message."""

    exit_code: int
    message: str


class Liveness:
    """Beats for this rank and watches the others.

    Args:
        store: torchrun's; None watches nobody.
        timeout: seconds of silence after which a rank counts as lost.
        on_lost: called once, from the watching thread, with the first lost rank's farewell; it should end the process,
            whose main thread may be stuck in a collective.
    """

    def __init__(
        self, store: dist.Store | None, rank: int, size: int, *, timeout: float, on_lost: Callable[[Farewell], None]
    ):
        self._store = None if store is None or size == 1 else store
        self._rank, self._size, self._timeout, self._on_lost = rank, size, timeout, on_lost
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}

    def start(self) -> None:
        """Begin to beat and watch."""
        if self._store is None:
            return
        self._store.set(f"who/{self._rank}", json.dumps([socket.gethostname(), os.getpid()]))
        self._thread = threading.Thread(
            target=self._watch, args=(_second_client(self._store),), daemon=True, name="liveness"
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop beating and watching. Blocks the host, for a beat at most."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def leave(self, farewell: Farewell) -> None:
        """Say how this rank ended, and stop watching."""
        self.stop()
        if self._store is not None:
            self._store.set(f"left/{self._rank}", json.dumps(dataclasses.astuple(farewell)))

    def wait_for(self, rank: int) -> Farewell:
        """Wait until ``rank`` has left. Blocks the host. A rank that dies instead ends in ``on_lost``."""
        if self._store is None or rank == self._rank:
            return Farewell(0, "")
        while not self._store.check([f"left/{rank}"]):
            time.sleep(_BEAT_SECONDS / 5)
        return self._farewell(self._store, rank)

    def diagnose(self) -> Farewell | None:
        """Find out which rank is lost, after an exchange failed. Blocks the host for at most the timeout."""
        if self._store is None:
            return None
        deadline = time.monotonic() + self._timeout + 2 * _BEAT_SECONDS
        while time.monotonic() < deadline:
            lost = self._find_lost(self._store)
            if lost is not None:
                return lost
            time.sleep(_BEAT_SECONDS / 5)
        return None

    def _watch(self, store: dist.Store) -> None:
        beat = 0
        while not self._stopped.wait(_BEAT_SECONDS):
            beat += 1
            try:
                store.set(f"beat/{self._rank}", str(beat))
                lost = self._find_lost(store)
            except RuntimeError:
                # The store itself is gone: torchrun has ended, and ends this process too.
                return
            if lost is not None and not self._stopped.is_set():
                self._on_lost(lost)
                return

    def _find_lost(self, store: dist.Store) -> Farewell | None:
        for rank in range(self._size):
            if rank == self._rank:
                continue
            if store.check([f"left/{rank}"]):
                farewell = self._farewell(store, rank)
                if farewell.exit_code != 0:
                    return farewell
                continue
            if self._is_dead(store, rank):
                # It may have said farewell between the two looks.
                if not store.check([f"left/{rank}"]):
                    return Farewell(7, f"Rank {rank} died. See its own output for the reason, then start again.")
            elif self._is_silent(store, rank):
                return Farewell(
                    7,
                    f"Rank {rank} has not answered for {self._timeout:g} s. Look at its host, then start again; "
                    "--peer-timeout sets how long to wait.",
                )
        return None

    def _farewell(self, store: dist.Store, rank: int) -> Farewell:
        exit_code, message = json.loads(store.get(f"left/{rank}"))
        return Farewell(exit_code, message)

    def _is_dead(self, store: dist.Store, rank: int) -> bool:
        if not store.check([f"who/{rank}"]):
            return False
        host, process = json.loads(store.get(f"who/{rank}"))
        return host == socket.gethostname() and _has_ended(process)

    def _is_silent(self, store: dist.Store, rank: int) -> bool:
        now = time.monotonic()
        beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
        last, since = self._seen.get(rank, (None, now))
        if beat != last:
            self._seen[rank] = (beat, now)
            return False
        return now - since > self._timeout


def _second_client(store: dist.Store) -> dist.Store:
    """A connection of its own: a client serves one thread at a time."""
    clone: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    return clone


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
