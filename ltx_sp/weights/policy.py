"""How bytes get from files to parameters on this host: decided once, from what is there and what is measured."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import together
from ltx_sp.weights.host import available_bytes
from ltx_sp.weights.reader import Ring, num_reader_threads, stream
from ltx_sp.weights.remote import is_remote
from ltx_sp.weights.stripes import ByteStream

__all__ = ["Policy", "choose_policy"]

_PROBE_BYTES = 32 * 2**20
# A preload that left less would push out whatever else the host runs.
_PRELOAD_SHARE = 0.9
# The exchange has to gain something, or the plain way is the better one.
_WORTH_IT = 0.9


@dataclasses.dataclass(frozen=True)
class Policy:
    """How weights are loaded.

    Args:
        mode: ``stream`` through small buffers, ``preload`` into host memory that the host's ranks share, or ``mmap``.
        host: the ranks of this host.
        exchange: the ranks that read a stripe each and exchange; an axis of one where each rank reads everything.
        num_threads: that read, per rank.
        reason: why, for the log.
    """

    mode: str = "stream"
    host: Axis = dataclasses.field(default_factory=Axis.alone)
    exchange: Axis = dataclasses.field(default_factory=Axis.alone)
    num_threads: int = 2
    reason: str = ""

    @property
    def crew(self) -> Axis:
        """The ranks that load together: each must take part, whether it needs a component or not."""
        return self.host if self.mode == "preload" else self.exchange

    def serving(self, files: Iterable[Path]) -> Policy:
        """The policy for some files: what is in an object store cannot be mapped."""
        if self.mode == "mmap" and any(map(is_remote, files)):
            return dataclasses.replace(self, mode="stream")
        return self


def choose_policy(
    asked: str,
    device: torch.device,
    host: Axis,
    sample: ByteStream,
    *,
    preload_bytes: int,
    exchange: bool | None = None,
) -> Policy:
    """Decide how this host's ranks load. Collective along ``host``. Blocks the host.

    Args:
        asked: ``auto``, ``stream``, ``preload`` or ``mmap``.
        sample: some of what will be read, for measuring.
        preload_bytes: what ``preload`` would hold at a time.
        exchange: whether ranks exchange stripes; None to measure whether that is faster than each reading everything.

    Raises:
        WeightsError: a file of the sample cannot be read.
    """
    with together(host):
        mode, reason = _mode(asked, device, preload_bytes)
    is_far = any(is_remote(entry.file) for entry in sample.entries)
    if mode == "mmap" and is_far:
        mode, reason = "stream", "what is in an object store cannot be mapped"
    # Memory is measured a moment earlier here than there, so one rank decides for all.
    mode, reason = json.loads(host.gather_text(json.dumps([mode, reason]), label="load mode")[0])
    num_threads = num_reader_threads(host.size)
    if host.size == 1:
        return Policy(mode, host, Axis.alone(), num_threads, reason)
    if exchange is None and device.type == "cpu" and not is_far:
        # An exchange between processes takes the cores and the memory that reading takes, and more of both.
        exchange, why = False, f"{host.size} ranks share the page cache, nothing is exchanged"
    elif exchange is None:
        exchange, why = _measure(device, host, sample, num_threads)
    else:
        why = "stripes are exchanged" if exchange else "each rank reads everything"
    return Policy(mode, host, host if exchange else Axis.alone(), num_threads, f"{reason}; {why}")


def _mode(asked: str, device: torch.device, preload_bytes: int) -> tuple[str, str]:
    fallback = "mmap" if device.type == "cpu" else "stream"
    if asked == "preload":
        available = available_bytes()
        if preload_bytes > _PRELOAD_SHARE * available:
            return fallback, (
                f"preload needs {preload_bytes / 2**30:.1f} GiB of host memory and {available / 2**30:.1f} are left; "
                f"{fallback} instead"
            )
    if asked != "auto":
        return asked, "as asked"
    if device.type == "cpu":
        return "mmap", "parameters on the CPU can stay in the page cache, where all ranks share them"
    return "stream", "small buffers feed a GPU fastest, in bounded memory"


def _measure(device: torch.device, host: Axis, sample: ByteStream, num_threads: int) -> tuple[bool, str]:
    """Whether an exchange is faster than another pass over the page cache, and the rates that say so."""
    if sample.num_bytes < host.size * _PROBE_BYTES:
        return False, f"too little for {host.size} ranks to exchange"
    begin, end = sample.stripe(host.rank, host.size)
    end = min(end, begin + _PROBE_BYTES)

    def read() -> None:
        for _ in stream(sample, ring, sample.chunks(begin, end, ring.slot_bytes), num_threads=num_threads):
            pass

    def gather() -> None:
        host.gather(bucket, label="measure", into=gathered)
        gathered[:, :1].sum().item()  # waits until it is there

    # The first of each warms up: pages, connections. What an exchange saves is a second pass over the page cache.
    with together(host):
        ring = Ring(pinned=device.type == "cuda")
        bucket = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)
        gathered = torch.zeros((host.size, _PROBE_BYTES), dtype=torch.uint8, device=device)
        read()
    with together(host):
        reads = (end - begin) / _seconds(read)
    gather()
    gathers = (host.size - 1) * _PROBE_BYTES / _seconds(gather)
    alone, shared = 1 / reads, max(1 / (reads * host.size), (host.size - 1) / host.size / gathers)
    rates = f"{gathers / 2**30:.1f} GiB/s by exchange, {reads / 2**30:.1f} from the page cache"
    exchange = shared < _WORTH_IT * alone
    verdict = f"{host.size} ranks exchange stripes" if exchange else f"each of {host.size} ranks reads everything"
    decided = host.gather_text(json.dumps([exchange, f"{verdict} ({rates})"]), label="load mode")[0]
    answer: tuple[bool, str] = tuple(json.loads(decided))
    return answer


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)
