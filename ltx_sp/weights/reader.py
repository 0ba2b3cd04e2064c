"""Bytes on disk -> tensors on the host.

Files are mapped, and pages are brought in by a pool of threads, some runs of neighbouring tensors
ahead of the caller. A mapping has one weakness: when a file is cut short while a tensor of it is in
use, the kernel kills the process. Whoever keeps a tensor copies it.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from ltx_sp.errors import WeightsError
from ltx_sp.weights.index import FileStamp, TensorEntry

__all__ = ["TORCH_DTYPES", "read"]

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Long enough that opening and mapping cost nothing, short enough to bound what is mapped at a time
# and to let the caller's copies overlap with reading inside one large file.
_RUN_BYTES = 64 * 2**20
_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 does not name it

_Run = list[TensorEntry]


def read(
    entries: Sequence[TensorEntry], *, num_threads: int = 4, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Yield every entry with its tensor on the host, dtype as stored, in the order in which reads complete.

    Blocks the host. The tensors are views of mapped files: copy what shall outlive the next step.

    Args:
        on_bytes: called on the caller's thread with the number of bytes that have become ready.

    Raises:
        WeightsError: a file cannot be read, or has changed since it was indexed, also while it was read.
    """
    stamps: dict[Path, FileStamp] = {}
    runs = iter(_runs(entries))
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ltx_sp-read")
    try:
        pending = {pool.submit(_read_run, run) for run in itertools.islice(runs, 2 * num_threads)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            while done:
                stamp, tensors = done.pop().result()
                pending |= {pool.submit(_read_run, run) for run in itertools.islice(runs, 1)}
                _require_same(tensors[0][0].file, stamps.setdefault(tensors[0][0].file, stamp), stamp)
                if on_bytes is not None:
                    on_bytes(sum(entry.num_bytes for entry, _ in tensors))
                yield from tensors
    finally:
        pool.shutdown(cancel_futures=True)
    for file, stamp in stamps.items():
        try:
            status = os.stat(file)
        except OSError as error:
            raise _unreadable(file, error) from error
        _require_same(file, stamp, FileStamp.of(status))


def _runs(entries: Sequence[TensorEntry]) -> Iterator[_Run]:
    """Split the entries into neighbours within one file, in the order of their bytes."""
    run: _Run = []
    for entry in sorted(entries, key=lambda entry: (entry.file, entry.start)):
        if run and (entry.file != run[0].file or entry.end - run[0].start > _RUN_BYTES):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _read_run(run: _Run) -> tuple[FileStamp, list[tuple[TensorEntry, Tensor]]]:
    file, end = run[0].file, max(entry.end for entry in run)
    origin = run[0].start - run[0].start % mmap.ALLOCATIONGRANULARITY
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            stamp = FileStamp.of(os.fstat(descriptor))
            _require_same(file, run[0].stamp or stamp, stamp)
            if end > stamp.size:
                raise WeightsError(
                    f"{file} ends at byte {stamp.size}, tensor {run[-1].name!r} at {end}. Fetch it again."
                )
            data = _map(descriptor, origin, end - origin) if end > run[0].start else torch.empty(0, dtype=torch.uint8)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(file, error) from error
    return stamp, [(entry, _view(data, entry, origin)) for entry in run]


def _map(descriptor: int, origin: int, length: int) -> Tensor:
    """Map a range of a file and bring its pages in: uint8 ``[length]``."""
    # Copy-on-write, because torch wants writable memory. Small mappings keep the kernel's accounting of it small.
    data = torch.frombuffer(mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=origin), dtype=torch.uint8)
    # Through ctypes, which lets other threads run meanwhile; mmap.madvise does not.
    if _MADVISE(data.data_ptr(), length, _MADV_POPULATE_READ) != 0:
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # EINVAL: an older kernel, where pages come in when they are touched
            raise OSError(code, os.strerror(code))
    return data


def _view(data: Tensor, entry: TensorEntry, origin: int) -> Tensor:
    dtype = TORCH_DTYPES[entry.dtype]
    if entry.num_bytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    stored = data[entry.start - origin : entry.end - origin]
    if entry.start % dtype.itemsize != 0:  # the format allows it, torch does not
        stored = stored.clone()
    return stored.view(dtype).view(entry.shape)


def _require_same(file: Path, before: FileStamp, now: FileStamp) -> None:
    if before != now:
        raise WeightsError(
            f"{file} has changed since its header was read ({before.size} bytes then, {now.size} now); it must not "
            "while it is loaded. Start again when it is complete."
        )


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file} cannot be read ({error.strerror}). Check the file and the disk.")


_MADVISE = ctypes.CDLL(None, use_errno=True).madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
