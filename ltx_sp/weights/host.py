"""Host memory as a load needs it: in huge pages, shared by the ranks of a host, and how much of it there is.

Fresh memory in 4 KiB pages costs more than reading does (measured: eight times), so what a load
fills it asks for in huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import together
from ltx_sp.weights.index import TensorEntry

__all__ = ["available_bytes", "cached_share", "free_bytes", "huge_bytes", "map_file", "populate", "shared_bytes"]

_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 does not name it
_MAP_NORESERVE = 0x4000  # nor this
_PROBES = 64
_PROBE_BYTES = 2**20
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_CONTROL_GROUP = Path("/proc/self/cgroup")

_LIBC = ctypes.CDLL(None, use_errno=True)
_MADVISE = _LIBC.madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MINCORE = _LIBC.mincore
_MINCORE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def huge_bytes(num_bytes: int) -> Tensor:
    """Allocate host memory in huge pages where the kernel has them: uint8 ``[num_bytes]``, zeros."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        return _huge(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError(f"{num_bytes / 2**30:.1f} GiB for weights") from error


def _huge(memory: mmap.mmap) -> Tensor:
    with contextlib.suppress(OSError):  # a kernel without them: slower, and right all the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def shared_bytes(num_bytes: int, host: Axis) -> Tensor:
    """Allocate memory that all ranks of a host see, once: uint8 ``[num_bytes]``, zeros.

    Collective. Blocks the host. It has no name and goes with the last rank that holds it.

    Args:
        host: the ranks of this host.
    """
    if host.size == 1 or num_bytes == 0:
        return huge_bytes(num_bytes)
    with contextlib.ExitStack() as stack:
        own = -1
        with together(host):
            if host.rank == 0:
                own = os.memfd_create("ltx_sp")
                stack.callback(os.close, own)
                os.ftruncate(own, num_bytes)
        place = host.gather_text(f"/proc/{os.getpid()}/fd/{own}", label="shared memory")[0]
        with together(host):  # till its end others may still have to open it
            descriptor = os.open(place, os.O_RDWR)
            stack.callback(os.close, descriptor)
            memory = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED)
    return _huge(memory)


def map_file(descriptor: int, num_bytes: int) -> Tensor:
    """Map a file, its pages shared with all that map it and never written back: uint8 ``[num_bytes]``."""
    # Writable, because torch wants that; without a reservation, because nobody writes much.
    memory = mmap.mmap(
        descriptor,
        num_bytes,
        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )
    return torch.frombuffer(memory, dtype=torch.uint8)


def populate(mapped: Tensor, begin: int, end: int) -> None:
    """Bring a range of a mapped file in. Blocks the host, not other threads.

    Raises:
        OSError: the disk failed.
    """
    address = mapped.data_ptr() + begin
    margin = address % mmap.PAGESIZE
    # Through ctypes, which lets other threads run meanwhile; mmap.madvise does not.
    if _MADVISE(address - margin, end - begin + margin, _MADV_POPULATE_READ) != 0:
        code = ctypes.get_errno()
        if code == errno.EFAULT:  # what a page that the disk cannot deliver is called here
            code = errno.EIO
        if code != errno.EINVAL:  # EINVAL: an older kernel, where pages come in when they are touched
            raise OSError(code, os.strerror(code))


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left, what torch keeps for later included."""
    if device.type == "cpu":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def available_bytes() -> int:
    """Host memory that a process may still take, within its control group: what the kernel reports, in bytes."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_group_rests()])


def _group_rests() -> Iterator[int]:
    """What the control group of this process and those around it leave; nothing where they are of the older kind."""
    relative = ""
    with contextlib.suppress(OSError):
        lines = _OWN_CONTROL_GROUP.read_text().splitlines()
        relative = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    folder = _CONTROL_GROUPS / relative
    for group in (folder, *folder.parents):
        # In a container some of them cannot be seen.
        with contextlib.suppress(OSError, ValueError):
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
                yield max(0, int(limit) - used)


def cached_share(entries: Sequence[TensorEntry]) -> float | None:
    """Estimate which share of some tensors is in the page cache, from a sample; None where that cannot be asked."""
    sizes = [entry.num_bytes for entry in entries]
    if not sum(sizes):
        return None
    chosen = random.Random(0).choices(list(entries), weights=sizes, k=_PROBES)
    found = total = 0
    for i, entry in enumerate(chosen):
        start = entry.start + int((entry.num_bytes - 1) * i / _PROBES)
        origin = start - start % mmap.PAGESIZE
        try:
            descriptor = os.open(entry.file, os.O_RDONLY)
            try:
                # To all but its owner and those who may write it, the kernel says that all of a file is there.
                if os.fstat(descriptor).st_uid != os.geteuid() and not os.access(entry.file, os.W_OK):
                    return None
                window = torch.frombuffer(
                    mmap.mmap(
                        descriptor,
                        min(_PROBE_BYTES, entry.end - origin),
                        flags=mmap.MAP_PRIVATE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,
                        offset=origin,
                    ),
                    dtype=torch.uint8,
                )
            finally:
                os.close(descriptor)
        except (OSError, ValueError):  # ValueError: it has become shorter
            return None
        num_pages = -(-window.numel() // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * num_pages)()
        if _MINCORE(window.data_ptr(), window.numel(), pages) != 0:
            return None
        found += sum(page & 1 for page in pages)
        total += num_pages
    return found / total
