"""What goes wrong on one rank while all load: each says so in one line, within seconds, and all stay in step."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_sp.errors import PeerLostError, RequestError, WeightsError
from ltx_sp.model.attention import Pending
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.weights import load as loading
from ltx_sp.weights import reader
from ltx_sp.weights.index import FileStamp, TensorEntry, read_index
from ltx_sp.weights.load import load, read_tensors
from ltx_sp.weights.policy import Policy
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from tests.support.ranks import run_ranks
from tests.support.weights import CPU, KEYMAP, fail_reads, on_meta, same_bits, saved_tensors, write_part

BUCKET = 2 * ALIGNMENT
SECONDS = 15.0  # far less than any timeout, far more than it takes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a load ended on one rank, and whether the ranks still meet in the same exchanges after it.

    Args:
        num_buckets, num_open: how many were sent, and of how many nobody waited for the end.
    """

    error: str
    message: str
    seconds: float
    num_buckets: int
    num_open: int
    in_step: bool
    threads_left: int
    loads_again: bool


def _disk(after: int) -> Callable[[pytest.MonkeyPatch, Path], None]:
    return lambda patch, folder: fail_reads(patch, after=after)


def _no_memory(name: str) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("there is none")

    return lambda patch, folder: patch.setattr(name, refuse)


def _stale_stamps(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Only this rank sees that a file has changed."""
    patch.setattr(reader, "_stamps", lambda source: {entry.file: FileStamp(7, 7) for entry in source.entries})


def _changed_at_the_end(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse(*_: Any) -> None:
        raise WeightsError(f"{folder / 'a.safetensors'} has changed since its header was read.")

    patch.setattr("ltx_sp.weights.load.require_unchanged", refuse)


def _pages(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    patch.setattr(reader, "populate", fail)


def _no_file(patch: pytest.MonkeyPatch, folder: Path) -> None:
    real = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(path, *rest, **options)

    patch.setattr(os, "open", refuse)


def _no_mappings(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "there is none")

    patch.setattr(mmap, "mmap", refuse)


# What may happen, until the patch is undone. In the last bucket: how many reads there are only a load can tell.
FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "disk, first bucket": _disk(0),
    "disk, in the middle": _disk(3),
    "memory for the model": _no_memory("ltx_sp.weights.load._allocate"),
    "memory for the ring": _no_memory("ltx_sp.weights.reader.huge_bytes"),
    "memory for the buckets": _no_memory("ltx_sp.weights.assemble._Buckets"),
    "memory to share": _no_mappings,
    "changed": _stale_stamps,
    "changed at the end": _changed_at_the_end,
    "pages": _pages,
    "no file": _no_file,
}


def _count_reads(policy: Policy, folder: Path) -> int:
    """How many reads this rank's stripe takes. Collective."""
    patch, count = pytest.MonkeyPatch(), list[int]()
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        count.append(1)
        return real(*arguments)

    patch.setattr(os, "preadv", preadv)
    load(on_meta(), read_index(folder), KEYMAP, device=CPU, dtype=None, component="part", policy=policy)
    patch.undo()
    return len(count)


def _settle(axis: Axis, work: Callable[[], object], again: Callable[[], bool]) -> Outcome:
    """Do what may fail, and see in what state it leaves the ranks."""
    patch, states = pytest.MonkeyPatch(), list[str]()
    real = Axis.start_gather

    def start_gather(axis: Axis, x: Tensor, *, label: str, into: Tensor | None = None) -> Pending:
        if label != "weights":
            return real(axis, x, label=label, into=into)
        assert into is not None, "memory that is taken between two collectives may be short on one rank"
        pending, place = real(axis, x, label=label, into=into), len(states)
        states.append("open")

        def finish() -> Tensor:
            states[place] = "finished"
            return pending()

        return finish

    patch.setattr(Axis, "start_gather", start_gather)
    threads, began = threading.active_count(), time.monotonic()
    error, message = "", ""
    try:
        work()
    except Exception as failure:
        error, message = type(failure).__name__, str(failure)
    seconds = time.monotonic() - began
    patch.undo()
    left = threading.active_count() - threads
    in_step = axis.gather_text(f"{axis.rank}", label="after") == [f"{rank}" for rank in range(axis.size)]
    return Outcome(error, message, seconds, len(states), states.count("open"), in_step, left, again())


def _small_buckets() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(loading, "_BUCKET_BYTES", BUCKET)
    patch.setattr(reader, "SLOT_BYTES", BUCKET)


def _load(rank: int, num_ranks: int, name: str, mode: str, faults: dict[int, str]) -> Outcome:
    _small_buckets()
    folder, host = Path(name), Mesh.of_group(None, CPU).host
    policy = Policy(mode, host, host)
    index, patch = read_index(folder), pytest.MonkeyPatch()
    fault = faults.get(rank)
    num_reads = _count_reads(policy, folder)
    if fault == "disk, last bucket":
        fail_reads(patch, after=num_reads - 1)
    elif fault is not None:
        FAULTS[fault](patch, folder)

    def go() -> bool:
        module = on_meta()
        load(module, index, KEYMAP, device=CPU, dtype=None, component="part", policy=policy)
        return all(
            same_bits(tensor, saved_tensors()["part." + name.replace("head.", "embed.")])
            for name, tensor in module.state_dict().items()
        )

    def again() -> bool:
        patch.undo()
        return go()

    return _settle(host, go, again)


def outcomes(folder: Path, num_ranks: int, mode: str, faults: dict[int, str]) -> list[Outcome]:
    write_part(folder, saved_tensors())
    found: list[Outcome] = run_ranks(_load, num_ranks, str(folder), mode, faults, timeout=60)
    for outcome in found:
        assert_recovered(outcome)
    return found


def assert_recovered(outcome: Outcome) -> None:
    assert outcome.seconds < SECONDS
    assert outcome.num_open == 0
    assert outcome.in_step
    assert outcome.threads_left == 0
    assert outcome.loads_again
    assert "\n" not in outcome.message


def assert_told(found: list[Outcome], bad: int, own: str) -> None:
    """The rank itself says ``own``, the others say whose it is."""
    for rank, outcome in enumerate(found):
        told = outcome.message.removeprefix(f"Rank {bad}: ") if rank != bad else outcome.message
        assert rank == bad or outcome.message.startswith(f"Rank {bad}: ")
        assert outcome.error == WeightsError.__name__
        assert own in told
        assert ".safetensors" in told


IN_STREAMS = (
    "disk, first bucket",
    "disk, in the middle",
    "disk, last bucket",
    "changed",
    "changed at the end",
    "no file",
)


@pytest.mark.parametrize("fault", IN_STREAMS)
@pytest.mark.parametrize(("num_ranks", "bad"), [(2, 0), (3, 1)])
def test_reading_fails_on_one_rank(tmp_path: Path, num_ranks: int, bad: int, fault: str) -> None:
    found = outcomes(tmp_path, num_ranks, "stream", {bad: fault})
    own = "cannot be read (" if fault.startswith("disk") or fault == "no file" else "has changed since"
    assert_told(found, bad, own)


@pytest.mark.parametrize("fault", ["pages", "changed", "changed at the end", "no file"])
@pytest.mark.parametrize(("num_ranks", "bad"), [(2, 0), (3, 2)])
def test_mapping_fails_on_one_rank(tmp_path: Path, num_ranks: int, bad: int, fault: str) -> None:
    found = outcomes(tmp_path, num_ranks, "mmap", {bad: fault})
    assert_told(found, bad, "has changed since" if fault.startswith("changed") else "cannot be read (")


@pytest.mark.parametrize("fault", ["disk, first bucket", "disk, last bucket", "changed", "changed at the end"])
@pytest.mark.parametrize(("num_ranks", "bad"), [(2, 1), (3, 0)])
def test_preloading_fails_on_one_rank(tmp_path: Path, num_ranks: int, bad: int, fault: str) -> None:
    found = outcomes(tmp_path, num_ranks, "preload", {bad: fault})
    assert_told(found, bad, "has changed since" if fault.startswith("changed") else "cannot be read (")


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        ("stream", "memory for the model"),
        ("stream", "memory for the ring"),
        ("stream", "memory for the buckets"),
        ("preload", "memory for the model"),
        ("preload", "memory to share"),
    ],
)
@pytest.mark.parametrize(("num_ranks", "bad"), [(2, 0), (3, 1)])
def test_memory_is_short_on_one_rank(tmp_path: Path, num_ranks: int, bad: int, mode: str, fault: str) -> None:
    found = outcomes(tmp_path, num_ranks, mode, {bad: fault})
    own = found[bad]
    assert own.error == ("OSError" if fault == "memory to share" else "MemoryError")
    assert own.message.endswith("there is none")
    for outcome in found[:bad] + found[bad + 1 :]:
        assert outcome.error == PeerLostError.__name__
        assert outcome.message == f"Rank {bad} failed with {own.error}: {own.message}"


@pytest.mark.parametrize(
    "faults",
    [
        {0: "disk, first bucket", 1: "disk, last bucket"},
        {0: "disk, in the middle", 1: "disk, in the middle", 2: "disk, in the middle"},
        {1: "changed at the end", 2: "disk, last bucket"},
        {0: "disk, first bucket", 1: "memory for the ring"},
    ],
)
def test_ranks_fail_at_different_times(tmp_path: Path, faults: dict[int, str]) -> None:
    for outcome in outcomes(tmp_path, 3, "stream", faults):
        assert outcome.error in (WeightsError.__name__, PeerLostError.__name__, "MemoryError")
        assert outcome.message


def test_ranks_stop_soon_and_not_at_the_end(tmp_path: Path) -> None:
    """Two buckets are under way before the first can say that its sender has failed."""
    first, last = (outcomes(tmp_path, 2, "stream", {1: fault}) for fault in ("disk, first bucket", "disk, last bucket"))
    assert [outcome.num_buckets for outcome in first] == [3, 3]
    assert all(outcome.num_buckets > 10 for outcome in last)


def test_no_fault_is_no_fault(tmp_path: Path) -> None:
    """What the other tests are measured against."""
    assert [outcome.error for outcome in outcomes(tmp_path, 2, "stream", {})] == ["", ""]


def _truncate(rank: int, num_ranks: int, name: str, mode: str, how: str) -> Outcome:
    """A file is cut, or gone, for all ranks, after its header was read."""
    _small_buckets()
    host, path = Mesh.of_group(None, CPU).host, Path(name) / "a.safetensors"
    index = read_index(Path(name))
    host.gather_text("", label="indexed")
    if rank == 0 and how == "gone":
        path.unlink()
    elif rank == 0:
        os.truncate(path, 40)
    host.gather_text("", label="cut")

    def go() -> None:
        load(on_meta(), index, KEYMAP, device=CPU, dtype=None, component="part", policy=Policy(mode, host, host))

    return _settle(host, go, lambda: True)


@pytest.mark.parametrize("mode", ["stream", "mmap", "preload"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_file_is_cut_or_gone_after_its_header_was_read(tmp_path: Path, mode: str, how: str) -> None:
    write_part(tmp_path, saved_tensors())
    for outcome in run_ranks(_truncate, 2, str(tmp_path), mode, how, timeout=60):
        assert_recovered(outcome)
        assert outcome.error == WeightsError.__name__
        assert "a.safetensors" in outcome.message


def _stop(rank: int, num_ranks: int, name: str, mode: str, bad: int, after: int) -> Outcome:
    """``on_bytes`` raises on one rank, which is how a run that fails elsewhere stops its loads."""
    _small_buckets()
    index, host = read_index(Path(name)), Mesh.of_group(None, CPU).host
    calls: list[int] = []

    def on_bytes(count: int) -> None:
        calls.append(count)
        if rank == bad and len(calls) > after:
            raise RequestError("The run was stopped.")

    def go(**options: Any) -> bool:
        load(on_meta(), index, KEYMAP, device=CPU, dtype=torch.float64, component="part",
             policy=Policy(mode, host, host), **options)  # fmt: skip
        return True

    return _settle(host, lambda: go(on_bytes=on_bytes), go)


@pytest.mark.parametrize("after", [0, 5, "last"])
@pytest.mark.parametrize("mode", ["stream", "preload"])
@pytest.mark.parametrize(("num_ranks", "bad"), [(2, 1), (3, 0)])
def test_one_rank_stops(tmp_path: Path, num_ranks: int, bad: int, mode: str, after: int | str) -> None:
    write_part(tmp_path, saved_tensors())
    if after == "last":
        after = _num_calls(tmp_path, num_ranks, bad) - 1
    for rank, outcome in enumerate(run_ranks(_stop, num_ranks, str(tmp_path), mode, bad, after, timeout=60)):
        assert_recovered(outcome)
        assert outcome.error == RequestError.__name__
        assert outcome.message == ("" if rank == bad else f"Rank {bad}: ") + "The run was stopped."


def _num_calls(folder: Path, num_ranks: int, rank: int) -> int:
    """How often a rank hears of bytes: once per round of an exchange, as often as there are parts of its stripe."""
    entries = [entry for entry in read_index(folder).entries.values() if entry.name.startswith("part.")]
    source = ByteStream(sorted(entries, key=lambda entry: (str(entry.file), entry.start)))
    return len(source.chunks(*source.stripe(rank, num_ranks), BUCKET))


def _take(rank: int, num_ranks: int, name: str, bad: int, at: int) -> Outcome:
    """What tensors are handed to fails on one rank: no memory for the next, or whoever takes them does not want it."""
    _small_buckets()
    entries, host = list(read_index(Path(name)).entries.values()), Mesh.of_group(None, CPU).host

    def read(limit: int | None) -> bool:
        taken: list[str] = []

        def done(entry: TensorEntry, tensor: Tensor) -> None:
            taken.append(entry.name)
            if len(taken) == limit:
                raise MemoryError("there is none")

        read_tensors(entries, device=CPU, done=done, policy=Policy("stream", host, host))
        return sorted(taken) == sorted(entry.name for entry in entries)

    return _settle(host, lambda: read(at if rank == bad else None), lambda: read(None))


@pytest.mark.parametrize("at", [2, 5, len(saved_tensors()) + 1])
@pytest.mark.parametrize(("num_ranks", "bad"), [(2, 1), (3, 0)])
def test_one_rank_cannot_take_a_tensor(tmp_path: Path, num_ranks: int, bad: int, at: int) -> None:
    """The last is one that comes with the last bucket: all the others, and the file's own other tensor."""
    write_part(tmp_path, saved_tensors())
    for rank, outcome in enumerate(run_ranks(_take, num_ranks, str(tmp_path), bad, at, timeout=60)):
        assert_recovered(outcome)
        if rank == bad:
            assert (outcome.error, outcome.message) == ("MemoryError", "there is none")
        else:
            assert outcome.message == f"Rank {bad} failed with MemoryError: there is none"
