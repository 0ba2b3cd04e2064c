"""How weights are loaded, here and by others, what plain reading costs, and the clock: all inside one rank."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import importlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx_sp.parallel.mesh import Mesh, resolve_device, start, start_store
from ltx_sp.weights.index import read_index
from ltx_sp.weights.keymap import KeyMap
from ltx_sp.weights.load import load
from ltx_sp.weights.policy import choose_policy
from ltx_sp.weights.reader import Ring, num_reader_threads, stream
from ltx_sp.weights.stripes import ByteStream
from profiling.load_checkpoints import checkpoint_bytes, checkpoint_files, digests, evict, read_header, residency
from profiling.load_clock import (
    Ticker,
    busy_seconds,
    fetched_bytes,
    reset_peak,
    status_bytes,
    take_memory,
    touch,
    wait_till_idle,
)

READ_BYTES = 16 * 2**20
STAGING_BYTES = 64 * 2**20
_MOST_TAKEN = 8 * 2**30

Piece = tuple[str, int, Tensor]
"""A file or a tensor by name, an offset in it, and the bytes from there: uint8, valid until the next piece."""
Work = Callable[[], Mapping[str, Tensor] | Iterator[Piece]]
"""What is timed. It returns whole files or tensors by name, or passes on all bytes piece by piece."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What one rank loads: a file or a folder of shards, onto ``device``.

    Args:
        mesh: this rank among those that load the same at the same time.
    """

    path: Path
    mesh: Mesh

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def files(self) -> list[str]:
        return checkpoint_files(self.path)


@dataclasses.dataclass(frozen=True)
class Case:
    """Under what conditions all contestants of a table run.

    Args:
        device: ``cpu`` or ``cuda``.
        keeps: the host's memory takes the whole checkpoint.
        cold: with nothing of the checkpoint in the page cache.
        ticking: beside a thread that notes for how long it stands still.
    """

    path: Path
    num_ranks: int = 1
    device: str = "cpu"
    keeps: bool = True
    cold: bool = False
    ticking: bool = False


Contestant = Callable[[Job], Work]
"""Does what shall not be timed (imports, a module on meta), and returns the rest."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run on one rank, ``began`` and ``ended`` by the clock that all processes share.

    Args:
        busy: seconds of work of all cores meanwhile.
        own: this process's part of it.
        stall: the longest time in seconds for which another Python thread stood still.
        peak_bytes: how far the resident memory rose above what it was.
        fetched_bytes: what the kernel read from storage for this process.
        resident: share of the checkpoint in the page cache before.
        digests: of every tensor, where asked for.
    """

    began: float
    ended: float
    busy: float
    own: float
    stall: float
    peak_bytes: int
    fetched_bytes: int
    resident: float
    digests: Mapping[str, int] | None


def measure(rank: int, num_ranks: int, contestant: Contestant, case: Case, verify: bool) -> Sample:
    """Run a contestant on this rank, till every page of what it loaded has been touched. Collective."""
    with start(resolve_device(case.device), start_store() if num_ranks > 1 else None) as mesh:
        if mesh.device.type == "cuda":
            torch.zeros(1, device=mesh.device)  # to make its context takes longer than many a load
        work = contestant(Job(case.path, mesh))
        mesh.world.gather_text("prepared", label="start")  # which may have read headers
        if case.cold and rank == 0:
            evict(case.path)
        resident = residency(case.path) if rank == 0 else 0.0
        gc.collect()
        if not verify:
            wait_till_idle()
        take_memory(min(checkpoint_bytes(case.path) * 5 // 4, _MOST_TAKEN if case.keeps else 4 * STAGING_BYTES))
        ticker = Ticker() if case.ticking else None
        mesh.world.gather_text("ready", label="start")
        before, fetched, busy, own = reset_peak(), fetched_bytes(), busy_seconds(), time.process_time()
        began = time.monotonic()
        result = work()
        found: Mapping[str, Tensor] | None = None
        if isinstance(result, Mapping):
            touch(tensor for tensor in result.values() if tensor.device.type == "cpu")
            found = result
        elif verify and num_ranks == 1:
            found = assemble(result)
        else:
            collections.deque(result, maxlen=0)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.monotonic()
        return Sample(
            began=began,
            ended=ended,
            busy=busy_seconds() - busy,
            own=time.process_time() - own,
            stall=ticker.stop() if ticker else 0.0,
            peak_bytes=status_bytes("VmHWM") - before,
            fetched_bytes=fetched_bytes() - fetched,
            resident=resident,
            digests=digests(found, case.path) if verify and found is not None else None,
        )


def assemble(pieces: Iterator[Piece]) -> dict[str, Tensor]:
    """Put pieces together, by name."""
    found: dict[str, bytearray] = {}
    for name, offset, data in pieces:
        whole = found.setdefault(name, bytearray())
        whole.extend(bytes(max(0, offset + data.numel() - len(whole))))
        whole[offset : offset + data.numel()] = data.numpy().data
    return {name: torch.frombuffer(whole, dtype=torch.uint8) for name, whole in found.items()}


def module_on_meta(path: Path) -> nn.Module:
    """A module whose parameters are the checkpoint's tensors, under their names."""
    root = nn.Module()
    for file in checkpoint_files(path):
        for name, (shape, _, _) in read_header(file).items():
            *parents, leaf = name.split(".")
            module = root
            for part in parents:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            empty = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
    return root


def load_and_clone(job: Job) -> Work:
    """``load_file``, which only maps, and a private copy of each tensor."""
    load_file = importlib.import_module("safetensors.torch").load_file
    return lambda: {name: tensor.clone() for file in job.files for name, tensor in load_file(file).items()}


def load_and_stage(job: Job) -> Work:
    """``load_file``, and every byte through one buffer, as a copy to a device without pinned memory does it."""
    load_file = importlib.import_module("safetensors.torch").load_file

    def work() -> Iterator[Piece]:
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        for file in job.files:
            for name, tensor in load_file(file).items():
                for offset, part in _parts(tensor.view(-1).view(torch.uint8)):
                    yield name, offset, staging[: part.numel()].copy_(part)

    return work


def load_and_move(job: Job) -> Work:
    """``load_file``, and each tensor to the device."""
    load_file = importlib.import_module("safetensors.torch").load_file
    return lambda: {name: tensor.to(job.device) for file in job.files for name, tensor in load_file(file).items()}


def load_and_assign(job: Job) -> Work:
    """``load_file`` and ``load_state_dict(assign=True)``, file by file."""
    load_file = importlib.import_module("safetensors.torch").load_file
    module = module_on_meta(job.path)

    def work() -> dict[str, Tensor]:
        for file in job.files:
            module.load_state_dict(load_file(file), strict=False, assign=True)
        return dict(module.named_parameters())

    return work


def accelerate_load(job: Job) -> Work:
    """``accelerate.load_checkpoint_in_model`` without a device map, which wants parameters that are not on meta."""
    load_checkpoint_in_model = importlib.import_module("accelerate").load_checkpoint_in_model
    module = module_on_meta(job.path).to_empty(device=job.device)

    def work() -> dict[str, Tensor]:
        load_checkpoint_in_model(module, str(job.path))
        return dict(module.named_parameters())

    return work


def fastsafetensors_load(job: Job) -> Work:
    """fastsafetensors without GPUDirect, through the page cache."""
    os.environ["FASTSAFETENSORS_ODIRECT"] = "0"
    library = importlib.import_module("fastsafetensors")

    def work() -> dict[str, Tensor]:
        loader = library.SafeTensorsFileLoader(library.SingleGroup(), str(job.device), nogds=True)
        loader.add_filenames({0: job.files})
        batch = loader.copy_files_to_device()
        return {name: batch.get_tensor(name) for name in batch.key_to_rank_lidx}

    return work


def runai_load(job: Job) -> Work:
    """runai-model-streamer through the page cache; each tensor is cloned, because its buffers are used again."""
    os.environ.setdefault("RUNAI_STREAMER_FS_STRATEGY", "sync_buffered")
    streamer_class = importlib.import_module("runai_model_streamer").SafetensorsStreamer

    def work() -> dict[str, Tensor]:
        with streamer_class() as streamer:
            streamer.stream_files(job.files)
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}

    return work


def read_huge(job: Job) -> Work:
    """Plain ``read`` into fresh memory in huge pages: the ceiling of whoever keeps what it loads."""

    def work() -> dict[str, Tensor]:
        files = {}
        for file in job.files:
            with open(file, "rb", buffering=0) as stream:
                memory = mmap.mmap(-1, os.fstat(stream.fileno()).st_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
                view = memoryview(memory)
                while view and (count := stream.readinto(view)):
                    view = view[count:]
            files[file] = torch.frombuffer(memory, dtype=torch.uint8)
        return files

    return work


def read_reused(job: Job) -> Work:
    """Plain ``read`` of this rank's share of the bytes into one buffer: the ceiling of whoever passes them on."""

    def work() -> Iterator[Piece]:
        buffer = torch.empty(READ_BYTES, dtype=torch.uint8)
        memory, ranks = buffer.numpy().data, job.mesh.world
        sizes = [os.stat(file).st_size for file in job.files]
        begin, end = (sum(sizes) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        for file, size in zip(job.files, sizes, strict=True):
            with open(file, "rb", buffering=0) as stream:
                at, stop = max(begin, 0), min(end, size)
                stream.seek(at)
                while at < stop and (count := stream.readinto(memory[: stop - at])):
                    yield file, at, buffer[:count]
                    at += count
            begin, end = begin - size, end - size

    return work


def copy_pinned(job: Job) -> Work:
    """Copy as many bytes from pinned memory to the device: the ceiling of whoever loads onto one."""
    num_bytes = checkpoint_bytes(job.path)
    source = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=job.device)

    def work() -> dict[str, Tensor]:
        for part in target.split(STAGING_BYTES):
            part.copy_(source[: part.numel()], non_blocking=True)
        return {}

    return work


def _parts(data: Tensor) -> Iterator[tuple[int, Tensor]]:
    return zip(range(0, data.numel(), STAGING_BYTES), data.split(STAGING_BYTES), strict=True)


def source_of(path: Path) -> ByteStream:
    """All bytes of a checkpoint, in the order of its files."""
    entries = read_index(path).entries.values()
    return ByteStream(sorted(entries, key=lambda entry: (str(entry.file), entry.start)))


def ours(job: Job, mode: str) -> Work:
    """The loader, from the path to a module that holds its weights."""
    module = module_on_meta(job.path)
    names = KeyMap("model", lambda parameter: parameter, lambda name: name)

    def work() -> Mapping[str, Tensor]:
        index = read_index(job.path)
        sample = ByteStream(list(index.entries.values()))
        policy = choose_policy(mode, job.device, job.mesh.host, sample, preload_bytes=index.num_bytes)
        load(module, index, names, device=job.device, dtype=None, component="model", policy=policy)
        return dict(module.named_parameters())

    return work


def ours_passing(job: Job) -> Work:
    """The reader, its ring of buffers alone: this rank's stripe."""

    def work() -> Iterator[Piece]:
        source, ranks = source_of(job.path), job.mesh.host
        ring = Ring()
        chunks = source.chunks(*source.stripe(ranks.rank, ranks.size), ring.slot_bytes)
        for chunk in stream(source, ring, chunks, num_threads=num_reader_threads(ranks.size)):
            for position, data in chunk.parts:
                for span in source.spans(position, position + data.numel()):
                    at = span.position - position
                    yield str(span.file), span.offset, data[at : at + span.num_bytes]

    return work
