"""Weights onto one CUDA device. Oracles: the safetensors library, the allocator's books, and a bare pinned copy."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ltx_sp.errors import WeightsError
from ltx_sp.parallel.collectives import Axis
from ltx_sp.weights import assemble
from ltx_sp.weights import load as loading
from ltx_sp.weights.index import TensorEntry, read_index
from ltx_sp.weights.load import load, read_tensors
from ltx_sp.weights.policy import Policy, choose_policy
from ltx_sp.weights.reader import Chunk, Ring
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from ltx_sp.weights.verify import digest, require_finite
from tests.support.weights import CPU, KEYMAP, fail_reads, on_meta, same_bits, saved_tensors, write_part

CUDA = torch.device("cuda", 0)
MIB = 2**20
WIDTH = 8192


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small checkpoint go several times round the ring."""
    monkeypatch.setattr(loading, "_BUCKET_BYTES", 2 * ALIGNMENT)


def load_part(folder: Path, dtype: torch.dtype | None = None, mode: str = "stream") -> nn.Module:
    module = on_meta()
    load(module, read_index(folder), KEYMAP, device=CUDA, dtype=dtype, component="part", policy=Policy(mode))
    return module


def assert_loaded(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    for name, tensor in module.state_dict().items():
        want = tensors["part." + name.replace("head.", "embed.")]
        assert tensor.device == CUDA
        assert same_bits(tensor, want.to(dtype) if dtype and want.is_floating_point() else want), name
    assert module.get_buffer("frequencies").device == CUDA


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["file", "shards", "unaligned"])
@pytest.mark.parametrize("mode", ["stream", "mmap", "preload"])
def test_every_tensor_arrives_as_the_library_reads_it(
    tmp_path: Path, mode: str, layout: str, dtype: torch.dtype | None
) -> None:
    tensors = saved_tensors()
    write_part(tmp_path, tensors, layout)
    if layout != "unaligned":
        tensors = {name: tensor for path in tmp_path.iterdir() for name, tensor in load_file(path).items()}
    module = load_part(tmp_path, dtype, mode)
    assert_loaded(module, tensors, dtype)
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")


def test_the_buffers_of_a_ring_are_pinned() -> None:
    assert all(slot.is_pinned() for slot in Ring(2, MIB, pinned=True).slots)
    assert not any(slot.is_pinned() for slot in Ring(2, MIB).slots)


@pytest.mark.usefixtures("small_buckets")
def test_a_slow_device_keeps_what_it_still_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy waits some milliseconds; a buffer that is filled again before would show."""
    real = assemble._stage

    def stage(chunk: Chunk, bucket: Tensor, device: torch.device) -> None:
        torch.cuda._sleep(5_000_000)
        real(chunk, bucket, device)

    write_part(tmp_path, saved_tensors())
    monkeypatch.setattr(assemble, "_stage", stage)
    assert_loaded(load_part(tmp_path), saved_tensors())


@pytest.mark.usefixtures("small_buckets")
def test_tensors_of_no_module_come_in_their_order(tmp_path: Path) -> None:
    write_part(tmp_path, saved_tensors(), "unaligned")
    entries = list(read_index(tmp_path).entries.values())
    found: dict[str, Tensor] = {}

    def done(entry: TensorEntry, tensor: Tensor) -> None:
        found[entry.name] = tensor

    read_tensors(entries, device=CUDA, done=done)
    assert [name for name in found if found[name].numel()] == [entry.name for entry in entries if entry.num_bytes]
    assert all(same_bits(found[name], tensor) for name, tensor in saved_tensors().items())


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("after", [0, 7])
def test_a_failing_disk_leaves_neither_memory_nor_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write_part(tmp_path, saved_tensors())
    load_part(tmp_path)
    gc.collect()
    before, threads = torch.cuda.memory_allocated(CUDA), threading.active_count()
    with monkeypatch.context() as patch:
        fail_reads(patch, after=after)
        message = ""
        try:
            load_part(tmp_path)
        except WeightsError as error:
            message = str(error)
    assert "cannot be read (Input/output error)" in message
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) == before
    assert threading.active_count() == threads
    assert_loaded(load_part(tmp_path), saved_tensors())


def write_zeros(path: Path, num_linears: int, dtype: str, width: int) -> int:
    """A large checkpoint that takes no disk, in the page cache. Returns the bytes of its tensors."""
    size = WIDTH * WIDTH * width
    ends = itertools.accumulate([size] * num_linears)
    header = {
        f"part.{i}.weight": {"dtype": dtype, "shape": [WIDTH, WIDTH], "data_offsets": [end - size, end]}
        for i, end in enumerate(ends)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num_linears * size)
    with path.open("rb", buffering=0) as file:
        while file.read(16 * MIB):
            pass
    return num_linears * size


def linears(num_linears: int) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_linears))


def load_linears(folder: Path, num_linears: int, dtype: torch.dtype | None = None) -> tuple[nn.Module, float]:
    module, index = linears(num_linears), read_index(folder)
    torch.cuda.synchronize()
    began = time.perf_counter()
    load(module, index, KEYMAP, device=CUDA, dtype=dtype, component="part")
    torch.cuda.synchronize()
    return module, time.perf_counter() - began


@pytest.mark.parametrize(("stored", "width", "dtype"), [("BF16", 2, None), ("F32", 4, torch.bfloat16)])
def test_the_device_holds_the_model_and_two_buckets(
    tmp_path: Path, stored: str, width: int, dtype: torch.dtype | None
) -> None:
    write_zeros(tmp_path / "x.safetensors", 4, stored, width)
    load_linears(tmp_path, 4, dtype)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    module, _ = load_linears(tmp_path, 4, dtype)
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    assert num_bytes == 4 * WIDTH * WIDTH * 2
    assert (
        num_bytes <= torch.cuda.max_memory_allocated(CUDA) - before <= num_bytes + 2 * loading._BUCKET_BYTES + 4 * MIB
    )
    assert torch.cuda.memory_allocated(CUDA) - before <= num_bytes + MIB


def test_loading_keeps_up_with_a_pinned_copy(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """2 GiB from the page cache. The aim is 0.8 of what pinned memory gives; less than 0.2 is a fault."""
    num_bytes = write_zeros(tmp_path / "x.safetensors", 16, "BF16", 2)
    pinned = torch.empty(16 * MIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(16 * MIB, dtype=torch.uint8, device=CUDA)

    def copy() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(num_bytes // pinned.numel()):
            target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    load_linears(tmp_path, 16)
    rounds = [(copy(), load_linears(tmp_path, 16)[1]) for _ in range(5)]
    copied, loaded = (min(seconds) for seconds in zip(*rounds, strict=True))
    rates = f"load {num_bytes / 2**30 / loaded:.1f} GiB/s, pinned copy {num_bytes / 2**30 / copied:.1f} GiB/s"
    record_property("rates", rates)
    print(f"\n{rates}, ratio {copied / loaded:.2f}")
    assert copied / loaded >= 0.2, rates


@pytest.mark.usefixtures("small_buckets")
def test_fingerprints_do_not_depend_on_the_device(tmp_path: Path) -> None:
    write_part(tmp_path, saved_tensors(), "unaligned")
    modules = []
    for device in (CPU, CUDA):
        modules.append(on_meta())
        load(modules[-1], read_index(tmp_path), KEYMAP, device=device, dtype=None, component="part")
    assert digest(modules[0]) == digest(modules[1])
    require_finite(modules[1], "part")
    modules[1].get_parameter("blocks.0.weight")[3, 4] = torch.nan
    with pytest.raises(WeightsError, match=r"blocks\.0\.weight of part holds 1 values that are not finite"):
        require_finite(modules[1], "part")


def test_a_gpu_streams() -> None:
    assert choose_policy("auto", CUDA, Axis.alone(), ByteStream([]), preload_bytes=0).mode == "stream"
