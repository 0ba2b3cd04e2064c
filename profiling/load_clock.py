"""The machine, and what a run costs on it: memory, bytes from storage, standstill, and who else was at work."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import mmap
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def header(device: str) -> str:
    """On what, of what, how and with what."""
    cores, size = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    commit, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain")
    versions = [f"{name} {_version(name)}" for name in ("torch", "safetensors", "accelerate")]
    return "\n".join(
        (
            f"hardware:  {cores} cores of {model[1] if model else platform.machine()}, {size:.0f} GiB, {gpu}",
            f"commit:    {commit}{' and changes' if changes else ''}",
            f"command:   python {' '.join(sys.argv)}",
            f"versions:  Python {platform.python_version()}, {', '.join(versions)}",
            f"system:    Linux {platform.release()}, huge pages {huge_page_mode()}, one torch thread per rank",
            "columns:   median, least and most seconds; rate of the median; largest growth of a rank's resident memory",
        )
    )


def _git(*command: str) -> str:
    folder = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def huge_page_mode() -> str:
    """``always``, ``madvise`` or ``never``."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "never"
    return text.partition("[")[2].partition("]")[0]


def touch(tensors: Iterable[Tensor]) -> int:
    """Read a byte of every page that some tensors on the host lie in, and return how many pages that are."""
    spans: list[tuple[int, int]] = []
    for begin, num_bytes in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.nbytes):
        first, last = begin // PAGE, -(-(begin + num_bytes) // PAGE)
        if spans and first <= spans[-1][1]:
            before = spans.pop()
            first, last = before[0], max(before[1], last)
        spans.append((first, last))
    for first, last in spans:
        memory = (ctypes.c_ubyte * ((last - first) * PAGE)).from_address(first * PAGE)
        torch.frombuffer(memory, dtype=torch.uint8)[::PAGE].max()
    return sum(last - first for first, last in spans)


class Ticker:
    """A thread that looks at the clock all the time, and notes for how long it could not."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        before = time.perf_counter()
        while not self._over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            self._longest, before = max(self._longest, now - before), now

    def stop(self) -> float:
        """Return the longest time between two looks, in seconds. Blocks the host."""
        self._over.set()
        self._thread.join()
        return self._longest


def reset_peak() -> int:
    """Let the peak of resident memory begin anew, and return what is resident, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    """A line of this process's memory figures, such as ``VmHWM``."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:", 1)[1].split(None, 1)[0]) * 1024


def fetched_bytes() -> int:
    """What the kernel has read from storage for this process so far."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:", 1)[1].split(None, 1)[0])


def take_memory(num_bytes: int) -> None:
    """Take host memory and give it back at once.

    A virtual machine that has left memory unused for some seconds may have to get it from its host again, which costs
    ten times what the page itself does and would hide everything else.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8)[::PAGE] = 1


def busy_seconds() -> float:
    """Seconds of work of all cores so far, whoever's; what a virtual machine was denied counts as work."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def wait_till_idle(timeout: float = 1.0) -> None:
    """Wait till all use less than a fifth of a core together, but not for ever. Blocks the host."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(0.2)
        if busy_seconds() - before < 0.2 / 5:
            return
