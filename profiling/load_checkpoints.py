"""Checkpoints to measure loads with: random tensors in files, what they must contain, and their place in memory."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import math
import mmap
import os
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
UNEVEN = (5, 18, 9, 14, 22, 7, 15, 10)
"""Per cent of the bytes in each of eight shards."""

Shapes = Mapping[str, tuple[int, ...]]


def model_shapes(num_bytes: int) -> dict[str, tuple[int, ...]]:
    """About a thousand bf16 tensors of sizes as in a transformer, shuffled, together close below ``num_bytes``."""
    large = num_bytes // 2**28
    middle = max(0, (num_bytes - large * 2**27) // 2**25 - 1)
    shapes: list[tuple[int, ...]] = [(16384, 4096)] * large + [(4096, 4096)] * middle + [(4096,)] * 961
    random.Random(0).shuffle(shapes)
    return {f"blocks.{i}.weight": shape for i, shape in enumerate(shapes)}


def small_shapes(num_tensors: int) -> dict[str, tuple[int, ...]]:
    """Small parameters, two to a layer and two hundred layers to a block."""
    layers = [f"blocks.{i // 200}.layers.{i % 200}" for i in range(num_tensors // 2)]
    leaves: dict[str, tuple[int, ...]] = {"weight": (8, 8), "bias": (8,)}
    return {f"{layer}.{leaf}": shape for layer in layers for leaf, shape in leaves.items()}


def write_checkpoint(folder: Path, shapes: Shapes, shares: Sequence[int]) -> Path:
    """Write random bf16 tensors, one file per share of the bytes; return the file, or the folder if there are several.

    Blocks the host, until the disk has them. A folder that is there from an earlier run is taken as it is.
    """
    path = folder if len(shares) > 1 else folder / "model.safetensors"
    if folder.exists():
        return path
    unfinished = folder.with_name(f"{folder.name}.part")
    unfinished.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(2**64, size=BLOCK_BYTES // 8, dtype=np.uint64)
    files = [f"model-{number:05}.safetensors" for number in range(len(shares))] if len(shares) > 1 else [path.name]
    weight_map: dict[str, str] = {}
    for file, names in zip(files, _share(shapes, shares), strict=True):
        _write_file(unfinished / file, {name: shapes[name] for name in names}, noise)
        weight_map |= dict.fromkeys(names, file)
    if len(shares) > 1:
        (unfinished / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    unfinished.rename(folder)
    return path


def _share(shapes: Shapes, shares: Sequence[int]) -> list[list[str]]:
    """Divide the names, in their order, so that each part has its share of the bytes or a tensor more."""
    num_bytes = sum(map(_num_bytes, shapes.values()))
    ends = [end * num_bytes / sum(shares) for end in itertools.accumulate(shares)]
    parts: list[list[str]] = [[] for _ in shares]
    position = 0
    for name, shape in shapes.items():
        parts[next(i for i, end in enumerate(ends) if position < end)].append(name)
        position += _num_bytes(shape)
    return parts


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _write_file(file: Path, shapes: Shapes, noise: NDArray[np.uint64]) -> None:
    ends = list(itertools.accumulate(map(_num_bytes, shapes.values())))
    table: dict[str, Any] = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [end - _num_bytes(shape), end]}
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    header = json.dumps(table | {"__metadata__": {"format": "pt"}}).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, size in zip(shapes, map(_num_bytes, shapes.values()), strict=True):
            for offset in range(0, size, BLOCK_BYTES):
                # Another key for every part, or a tensor in the wrong place would have the right digest.
                key = np.uint64(zlib.crc32(f"{name} {offset}".encode()) * 0x100000001)
                stream.write((noise[: min(size - offset, BLOCK_BYTES) // 8] ^ key).data)
        stream.flush()
        os.fsync(stream.fileno())


def write_sparse(file: Path, num_bytes: int) -> Path:
    """Write a file of tensors that are holes, which no disk has to hold and reading still brings in."""
    count = num_bytes // 2**27
    table = {
        f"blocks.{i}.weight": {"dtype": "BF16", "shape": [16384, 4096], "data_offsets": [i * 2**27, (i + 1) * 2**27]}
        for i in range(count)
    }
    with file.open("wb") as stream:
        header = json.dumps(table).encode()
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(stream.tell() + count * 2**27)
    return file


def checkpoint_files(path: Path) -> list[str]:
    """The safetensors files at a path."""
    return [str(path)] if path.is_file() else sorted(map(str, path.glob("*.safetensors")))


def checkpoint_bytes(path: Path) -> int:
    """What its files have together."""
    return sum(os.stat(file).st_size for file in checkpoint_files(path))


def read_header(file: str) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Shape, begin and end in the file of every tensor. Independent of ltx_sp, to check it against."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(length))
    return {
        name: (tuple(entry["shape"]), 8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in table.items()
        if name != "__metadata__"
    }


@functools.cache
def file_digests(path: Path) -> dict[str, int]:
    """The CRC of every tensor of a checkpoint, by its headers. Blocks the host, once."""
    whole = {file: torch.from_numpy(np.memmap(file, np.uint8, "c")) for file in checkpoint_files(path)}
    return digests(whole, path)


def digests(found: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """The CRC of every tensor, also of those that came as a file."""
    table: dict[str, int] = {}
    names = checkpoint_files(path)
    for name, tensor in found.items():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if name in names:
            table |= {key: zlib.crc32(data[begin:end].data) for key, (_, begin, end) in read_header(name).items()}
        else:
            table[name] = zlib.crc32(data.data)
    return table


def residency(path: Path) -> float:
    """The share of a checkpoint's pages that is in the page cache."""
    resident = total = 0
    for file in checkpoint_files(path):
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            pages = np.empty(-(-len(view) // mmap.PAGESIZE), dtype=np.uint8)
            address = np.frombuffer(view, dtype=np.uint8).ctypes.data
            _call("mincore", address, len(view), pages.ctypes.data)
            resident += int((pages & 1).sum())
            total += len(pages)
    return resident / total


def evict(path: Path) -> None:
    """Drop a checkpoint from the page cache. Blocks the host."""
    for file in checkpoint_files(path):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Bring a checkpoint into the page cache. Blocks the host."""
    for file in checkpoint_files(path):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(BLOCK_BYTES):
                pass


def _call(function: str, address: int, num_bytes: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_void_p(argument)) != 0:
        raise OSError(ctypes.get_errno(), f"{function} failed")
