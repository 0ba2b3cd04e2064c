"""Measure once what predictions rest on: matrix products, attention, memory, launches, exchanges between ranks.

    python profiling/calibrate.py
    torchrun --nproc_per_node=8 profiling/calibrate.py

Several ranks measure the exchanges among them, and all of them the rest, of which rank 0's figures are kept. Writes
JSON by which every run on such a device chooses layouts and batches and profiling/scaling.py predicts: by default
calibration-DEVICE.json in the cache folder (LTX_SP_CACHE, else ltx_sp in XDG_CACHE_HOME or ~/.cache). On an idle
machine: whatever else runs is measured too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.cost import Machine
from ltx_sp.errors import LtxSpError, RequestError
from ltx_sp.model.attention import Backend, choose_backend
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import calibration_path, device_name, resolve_device, start, start_store

# What the published 22B model multiplies: width 4096, feed-forward 4 times that, 32 heads of 128.
_GPU_PRODUCTS = ((15360, 4096, 4096), (15360, 16384, 4096), (15360, 4096, 16384))
_GPU_LENGTHS, _GPU_HEADS, _HEAD_WIDTH = (3840, 7680, 15360, 32640), 32, 128
_GPU_READ_BYTES, _CPU_READ_BYTES = 1 << 32, 1 << 30  # much more than caches hold
_GPU_BYTES = (1 << 16, 1 << 20, 1 << 24, 1 << 27)
_CPU_PRODUCTS = ((512, 1024, 1024),)
_CPU_LENGTHS, _CPU_HEADS = (256, 1024), 4
_CPU_BYTES = (1 << 12, 1 << 16, 1 << 20)
_NUM_LAUNCHES = 1000


@dataclasses.dataclass(frozen=True)
class Link:
    """What an exchange costs: ``latency + bytes received / bytes_per_second``."""

    latency: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What one machine does, measured.

    Args:
        device: its name.
        dtype: of products and attention.
        product_flops: operations per second of matrix products, the median of several shapes.
        attention_flops: operations per second of self-attention, by number of tokens.
        read_bytes_per_second: from the device's own memory.
        memory_bytes: of the device; 0 on a CPU, where passes are not to share their working memory.
        launch_seconds: of the host, per operation that it launches.
        num_ranks: that measured the exchanges.
        links: by operation, ``all_to_all`` and ``all_gather``; empty where one rank was alone.
    """

    device: str
    dtype: str
    torch_version: str
    product_flops: float
    attention_flops: Mapping[int, float]
    read_bytes_per_second: float
    memory_bytes: int
    launch_seconds: float
    num_ranks: int
    links: Mapping[str, Link]

    def attention_rate(self, num_tokens: int) -> float:
        """Operations per second of self-attention at a length: on a line between those measured, level beyond."""
        lengths = sorted(self.attention_flops)
        above = next((length for length in lengths if length >= num_tokens), lengths[-1])
        below = max((length for length in lengths if length <= num_tokens), default=lengths[0])
        if above <= below:
            return self.attention_flops[below]
        part = (num_tokens - below) / (above - below)
        return (1 - part) * self.attention_flops[below] + part * self.attention_flops[above]

    def machine(self, link: Link) -> Machine:
        """What ``ltx_sp.cost`` predicts with: everything at the rate of products."""
        return Machine(
            flops=self.product_flops,
            bytes_per_second=link.bytes_per_second,
            latency=link.latency,
            read_bytes_per_second=self.read_bytes_per_second,
            memory_bytes=self.memory_bytes,
        )

    def write(self, path: Path) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        unfinished.replace(path)


def read_calibration(path: Path) -> Calibration:
    """Read what ``Calibration.write`` wrote.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    try:
        content: Any = json.loads(path.read_text())
        found = Calibration(
            device=str(content["device"]),
            dtype=str(content["dtype"]),
            torch_version=str(content["torch_version"]),
            product_flops=_positive(content["product_flops"]),
            attention_flops={int(length): _positive(rate) for length, rate in content["attention_flops"].items()},
            read_bytes_per_second=_positive(content["read_bytes_per_second"]),
            memory_bytes=int(content["memory_bytes"]),
            launch_seconds=_positive(content["launch_seconds"]),
            num_ranks=int(content["num_ranks"]),
            links={
                str(name): Link(_positive(link["latency"]), _positive(link["bytes_per_second"]))
                for name, link in content["links"].items()
            },
        )
        if not found.attention_flops:
            raise ValueError("no attention was measured")
        if found.memory_bytes < 0:
            raise ValueError(f"{found.memory_bytes} bytes are no memory")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}. Measure first: profiling/calibrate.py.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{path} is no calibration ({type(error).__name__}: {error}). Measure anew: profiling/calibrate.py."
        ) from error
    return found


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{number} is no rate")
    return number


def seconds_of(call: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    """The median time of a call after two to warm up. Blocks the host."""
    times = []
    for number in range(rounds + 2):
        _synchronize(device)
        began = time.perf_counter()
        call()
        _synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_products(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device, *, rounds: int
) -> float:
    """Operations per second of ``[m, k] x [k, n]``: the median over the shapes (m, n, k). Blocks the host."""
    rates = []
    for m, n, k in shapes:
        a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
        rates.append(2 * m * n * k / seconds_of(partial(functional.linear, a, b), device, rounds=rounds))
    return statistics.median(rates)


def measure_attention(
    backend: Backend, lengths: Sequence[int], num_heads: int, dtype: torch.dtype, device: torch.device, *, rounds: int
) -> dict[int, float]:
    """Operations per second of self-attention over all tokens, by length, as steps call it. Blocks the host."""
    rates = {}
    for length in lengths:
        qkv = torch.randn(3, 1, length, num_heads, _HEAD_WIDTH, dtype=dtype, device=device)
        took = seconds_of(partial(backend.attend, *qkv), device, rounds=rounds)
        rates[length] = 4 * num_heads * length * length * _HEAD_WIDTH / took
    return rates


def measure_read(num_bytes: int, device: torch.device, *, rounds: int) -> float:
    """Bytes per second that the device reads from its own memory, in a sum over float32. Blocks the host.

    Args:
        num_bytes: of the tensor; many times what caches hold.
    """
    x = torch.ones(num_bytes // 4, device=device)  # zeros might be pages that are not there
    return x.nbytes / seconds_of(x.sum, device, rounds=rounds)


def measure_launch(device: torch.device) -> float:
    """Seconds of the host per launched operation, of so little work that the host is what is slow. Blocks the host."""
    x = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(_NUM_LAUNCHES):
            x.add_(1)

    return seconds_of(launch, device, rounds=5) / _NUM_LAUNCHES


def measure_links(axis: Axis, sizes: Sequence[int], device: torch.device, *, rounds: int) -> dict[str, Link]:
    """Latency and bandwidth of the exchanges along an axis; nothing on an axis of one. Collective. Blocks the host.

    Args:
        sizes: bytes that a rank receives from the others, smallest first; the smallest gives the latency, and what
            the largest takes beyond it the bandwidth.
    """
    if axis.size == 1:
        return {}
    times: dict[str, dict[int, float]] = {"all_to_all": {}, "all_gather": {}}
    for size in sizes:
        piece = max(1, size // (axis.size - 1))
        send = torch.zeros(piece * axis.size, dtype=torch.uint8, device=device)
        pieces = [piece] * axis.size
        calls = {
            "all_to_all": partial(axis.exchange, send, send_sizes=pieces, receive_sizes=pieces, label="calibrate"),
            "all_gather": partial(axis.gather, send[:piece].clone(), label="calibrate"),
        }
        for name, call in calls.items():
            times[name][piece * (axis.size - 1)] = seconds_of(call, device, rounds=rounds)
    return {name: fit_link(found) for name, found in times.items()}


def fit_link(times: Mapping[int, float]) -> Link:
    """The link that takes these seconds for these bytes, exactly at both ends."""
    smallest, largest = min(times), max(times)
    beyond = max(times[largest] - times[smallest], 1e-9)
    bytes_per_second = (largest - smallest) / beyond
    return Link(max(times[smallest] - smallest / bytes_per_second, 1e-9), bytes_per_second)


def calibrate(axis: Axis, device: torch.device, *, rounds: int) -> Calibration:
    """Measure this machine. Collective. Blocks the host."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    links = measure_links(axis, _GPU_BYTES if on_gpu else _CPU_BYTES, device, rounds=rounds)
    products = _GPU_PRODUCTS if on_gpu else _CPU_PRODUCTS
    lengths, heads = (_GPU_LENGTHS, _GPU_HEADS) if on_gpu else (_CPU_LENGTHS, _CPU_HEADS)
    backend, _ = choose_backend("auto", device, dtype)
    with torch.inference_mode():
        return Calibration(
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            torch_version=torch.__version__,
            product_flops=measure_products(products, dtype, device, rounds=rounds),
            attention_flops=measure_attention(backend, lengths, heads, dtype, device, rounds=rounds),
            read_bytes_per_second=measure_read(_GPU_READ_BYTES if on_gpu else _CPU_READ_BYTES, device, rounds=rounds),
            memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else 0,
            launch_seconds=measure_launch(device),
            num_ranks=axis.size,
            links=links,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the file, print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of the cache folder's")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="calls of each, the median counts (20)")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds} must be 1 or more")
    try:
        device = resolve_device(given.device)
        with start(device, start_store()) as mesh:
            found = calibrate(mesh.world, device, rounds=given.rounds)
            if mesh.is_main:
                path = given.output or calibration_path(found.device)
                found.write(path)
                print(json.dumps(dataclasses.asdict(found), indent=1))
                print(f"calibrate: written to {path}", file=sys.stderr)
    except LtxSpError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
