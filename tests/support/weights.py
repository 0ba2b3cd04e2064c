"""A small module with one of everything, checkpoints of it in many layouts, and a look at where memory comes from."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_sp.weights import reader
from ltx_sp.weights.keymap import KeyMap

__all__ = [
    "CPU",
    "KEYMAP",
    "PREFIX",
    "Part",
    "Region",
    "fail_reads",
    "mapping_of",
    "on_meta",
    "open_files",
    "same_bits",
    "saved_tensors",
    "write_part",
    "write_unaligned",
]

PREFIX = "part."
KEYMAP = KeyMap(
    "part", lambda parameter: PREFIX + parameter, lambda name: name[5:] if name.startswith(PREFIX) else None
)
CPU = torch.device("cpu")

_NAMES = {dtype: name for name, dtype in reader.TORCH_DTYPES.items()}


class Part(nn.Module):
    """Parameters of odd sizes, a tied one, both kinds of buffers, integers, a 0-d and an empty tensor."""

    mean: Tensor
    steps: Tensor
    mask: Tensor
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(161, 83)
        self.blocks = nn.ModuleList(nn.Linear(149, 151) for _ in range(3))
        self.head = nn.Linear(83, 161, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.ones(0, 4))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("steps", torch.zeros(1203, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


def on_meta() -> Part:
    """The module as builders leave it."""
    with torch.device("meta"):
        part = Part()
    part.frequencies = torch.arange(4.0)
    return part


def saved_tensors() -> dict[str, Tensor]:
    """What a checkpoint of ``Part`` holds: random, stored in float32 and bfloat16, the tied parameter once."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in Part().state_dict().items():
        if name == "head.weight":
            continue
        if tensor.is_floating_point():
            dtype = torch.bfloat16 if name.startswith("blocks.1") or name == "scale" else torch.float32
            tensors[PREFIX + name] = torch.randn(tensor.shape, generator=generator).to(dtype)
        else:
            tensors[PREFIX + name] = torch.randint(2, tensor.shape, generator=generator).to(tensor.dtype)
    return tensors


def write_part(folder: Path, tensors: Mapping[str, Tensor], layout: str = "shards") -> None:
    """Write a checkpoint into ``folder``.

    Args:
        layout: ``file``, ``shards`` (two, so that the order of reading is not the module's) or ``unaligned``.
    """
    names, other = sorted(tensors), {"other.weight": torch.ones(1)}
    if layout == "shards":
        save_file({name: tensors[name] for name in names[::2]}, folder / "b.safetensors")
        save_file({name: tensors[name] for name in names[1::2]} | other, folder / "a.safetensors")
    elif layout == "unaligned":
        write_unaligned(folder / "x.safetensors", {name: tensors[name] for name in names} | other)
    else:
        save_file(dict(tensors) | other, folder / "x.safetensors")


def write_unaligned(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file as the safetensors library does not: in the order of ``tensors``, from an odd byte on."""
    header: dict[str, Any] = {}
    payload = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(payload), len(payload) + len(raw)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        payload += raw
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that NaN and fp8 do not disturb."""
    raw = [tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(raw[0], raw[1])


@dataclasses.dataclass(frozen=True)
class Region:
    """One line of ``/proc/self/maps``: an inode of 0 is memory of this process alone."""

    inode: int
    name: str


def mapping_of(tensor: Tensor) -> Region:
    """What the memory of a tensor on the host is a mapping of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, end = (int(text, 16) for text in fields[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return Region(int(fields[4]), fields[5] if len(fields) > 5 else "")
    raise AssertionError("a tensor is not in the memory of this process")


def open_files() -> set[str]:
    """What the descriptors of this process lead to."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def fail_reads(monkeypatch: pytest.MonkeyPatch, *, after: int, fault: Callable[[], None] | None = None) -> None:
    """Let ``after`` reads of this process succeed, and every later one do ``fault``: a disk error if it is None."""
    real, count = os.preadv, iter(range(after))

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(count, None) is None:
            if fault is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fault()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
