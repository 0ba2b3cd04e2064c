"""Who is still there, and who tells it. Oracle: what was done to the peer."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ltx_sp.errors import PeerLostError
from ltx_sp.parallel import liveness
from ltx_sp.parallel.liveness import Farewell, Liveness
from tests.support.ranks import RankError, run_ranks

Losses = queue.Queue[Farewell]


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(liveness, "_POLL_SECONDS", 0.01)


@contextlib.contextmanager
def watching(
    store: dist.Store, rank: int = 0, size: int = 2, timeout: float = 0.5
) -> Iterator[tuple[Liveness, Losses]]:
    losses: Losses = queue.Queue()
    watch = Liveness(store.clone(), rank, size, on_lost=losses.put)  # type: ignore[attr-defined]
    watch.start(timeout)
    try:
        yield watch, losses
    finally:
        watch._stopped.set()
        for thread in watch._threads:
            thread.join(5)


def pretend(store: dist.Store, rank: int, *, process: int | None = None, host: str | None = None) -> None:
    """Put into the store what a rank puts there when it starts."""
    store.set(f"beat/{rank}", "0")
    store.set(f"who/{rank}", json.dumps([host or liveness._host(), process or os.getpid()]))


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_ranks_that_beat_are_not_lost(store: dist.Store) -> None:
    with watching(store, 0) as (_, of_0), watching(store, 1) as (_, of_1):
        time.sleep(1.2)
        assert of_0.empty()
        assert of_1.empty()


def test_a_silent_rank_is_named_after_the_timeout(store: dist.Store) -> None:
    pretend(store, 1)
    pretend(store, 2)
    began = time.monotonic()
    with watching(store, 0, 3) as (_, losses):
        while time.monotonic() - began < 0.4:  # rank 2 falls silent later
            store.set("beat/2", str(time.monotonic()))
            time.sleep(0.02)
        lost = losses.get(timeout=5)
    assert 0.5 <= time.monotonic() - began < 2
    assert lost.exit_code == PeerLostError.exit_code
    assert lost.message.startswith("Rank 1 has not answered for 0.5 s.")


def test_a_dead_process_is_named_at_once(store: dist.Store) -> None:
    pretend(store, 1, process=ended_process())
    with watching(store, timeout=60) as (_, losses):
        lost = losses.get(timeout=5)
    assert lost == Farewell(PeerLostError.exit_code, lost.message)
    assert lost.message.startswith("Rank 1 died without a word.")


def test_a_process_of_another_host_is_not_looked_for_here(store: dist.Store) -> None:
    pretend(store, 1, process=ended_process(), host="another boot of a host of the same name")
    with watching(store, timeout=60) as (_, losses), pytest.raises(queue.Empty):
        losses.get(timeout=0.5)


def test_a_rank_that_never_starts_gets_longer(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_START_FACTOR", 4)
    began = time.monotonic()
    with watching(store, timeout=0.2) as (_, losses):
        lost = losses.get(timeout=5)
    assert time.monotonic() - began >= 0.8
    assert lost.message.startswith("Rank 1 has not started within 0.8 s.")


def test_the_first_failure_is_every_ranks_reason(store: dist.Store) -> None:
    first, second = Farewell(4, "Rank 1: the weights"), Farewell(2, "Rank 2: the arguments")
    with watching(store, 0, 3) as (_, losses), watching(store, 1, 3) as (one, _), watching(store, 2, 3) as (two, _):
        one.announce(first)
        two.announce(second)
        assert losses.get(timeout=5) == Farewell(4, "Rank 1: the weights", rank=1)
        assert two.find_failed() == Farewell(4, "Rank 1: the weights", rank=1)
        assert two.wait_for_loss() == Farewell(4, "Rank 1: the weights", rank=1)
        assert one.find_failed() is None, "its own"


def test_a_rank_that_was_stopped_itself_blames_nobody(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        ahead = 0.0
        sleep = staticmethod(time.sleep)

        @classmethod
        def monotonic(cls) -> float:
            return time.monotonic() + cls.ahead

    pretend(store, 1)
    monkeypatch.setattr(liveness, "time", Clock)
    with watching(store, timeout=1) as (_, losses):
        time.sleep(0.3)
        Clock.ahead = 100.0
        with pytest.raises(queue.Empty):
            losses.get(timeout=0.4)
        assert losses.get(timeout=5).message.startswith("Rank 1 has not answered"), "and yet it watches on"


def test_waiting_for_a_rank_that_leaves(store: dist.Store) -> None:
    with watching(store, 0) as (zero, of_0), watching(store, 1) as (one, of_1):
        leaving = threading.Thread(target=zero.leave)
        threading.Timer(0.2, leaving.start).start()
        began = time.monotonic()
        one.wait_for(0)
        assert time.monotonic() - began >= 0.15
        assert leaving.is_alive(), "it hosts the store while others read from it"
        one.leave()
        leaving.join(1)
        assert not leaving.is_alive()
        time.sleep(0.7)
        assert of_0.empty()
        assert of_1.empty()


def test_waiting_for_a_rank_that_fails(store: dist.Store) -> None:
    with watching(store, 0) as (zero, _), watching(store, 1) as (one, of_1):
        zero.announce(Farewell(8, "the disk"))
        threading.Thread(target=zero.leave).start()
        with pytest.raises(PeerLostError):
            one.wait_for(0)
        assert of_1.get(timeout=5) == Farewell(8, "the disk", rank=0)


def test_rank_0_has_the_last_word(store: dist.Store) -> None:
    with watching(store, 0) as (zero, _), watching(store, 1) as (one, _):
        threading.Timer(0.2, zero.claim_last_word).start()
        assert not one.claim_last_word()
        assert not zero.claim_last_word(), "said already"


def test_one_of_the_others_has_it_where_rank_0_is_dead(store: dist.Store) -> None:
    pretend(store, 0, process=ended_process())
    with watching(store, 1, 3, 60) as (one, of_1), watching(store, 2, 3, 60) as (two, of_2):
        of_1.get(timeout=5)
        of_2.get(timeout=5)
        began = time.monotonic()
        assert [one.claim_last_word(), two.claim_last_word()] == [True, False]
        assert time.monotonic() - began < 2, "nobody waits for the dead"


def test_one_of_the_others_has_it_where_rank_0_never_comes(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_LAST_WORD_SECONDS", 0.3)
    with watching(store, 1) as (one, _):
        assert one.claim_last_word()


def test_alone_nothing_is_watched() -> None:
    watch = Liveness(None, 0, 1, on_lost=lambda lost: None)
    watch.start(1)
    watch.announce(Farewell(2, ""))
    watch.wait_for(0)
    watch.leave()
    assert watch.claim_last_word()
    assert watch.find_failed() is watch.wait_for_loss() is None
    assert not watch._threads


def _hosting(rank: int, num_ranks: int, folder: Path, number: signal.Signals) -> None:
    if rank == 0:
        host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "port.new").write_text(str(host.port))
        (folder / "port.new").rename(folder / "port")
        while not (folder / "watching").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)
    while not (folder / "port").exists():
        time.sleep(0.02)
    client: Any = dist.TCPStore(
        "127.0.0.1",
        int((folder / "port").read_text()),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=60),
    )
    losses: Losses = queue.Queue()
    watch = Liveness(client, 1, 2, on_lost=losses.put)
    watch.start(1)
    (folder / "watching").touch()
    (folder / "lost").write_text(losses.get(timeout=10).message)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "torchrun, which started this rank, is gone"),
        (signal.SIGSTOP, "The store of torchrun has not answered for 1 s."),
    ],
)
def test_the_store_goes_away(number: signal.Signals, message: str, tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(_hosting, 2, tmp_path, number, timeout=4, init_group=False)
    assert (tmp_path / "lost").read_text().startswith(message)
