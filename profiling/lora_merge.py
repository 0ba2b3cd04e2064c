"""Time how LoRA factors are added to a weight beside the usual ways, and count what each of them misrounds.

    python profiling/lora_merge.py

Random factors that change a random weight by a quarter of its own size. Contestants take turns, in a new order every
round; a ratio is the median of the ratios to the naive float32 formula within the rounds. Memory is the peak of the
resident size above what the weight and its factors take, in a fresh process. Returns 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.weights.merge import Factor, merge

MAX_RATIO = 0.15
MAX_MISROUNDED = 1e-4
MAX_MIB = 8.0

Way = Callable[[Tensor, Sequence[Factor]], Tensor]


def naive(weight_OI: Tensor, factors: Sequence[Factor]) -> Tensor:
    """All in float32."""
    total = weight_OI.float()
    for f in factors:
        total = total + f.scale * (f.up_OR.float() @ f.down_RI.float())
    return total.to(weight_OI.dtype)


def product_first(weight_OI: Tensor, factors: Sequence[Factor]) -> Tensor:
    """In the weight's dtype: the product, then the scale."""
    for f in factors:
        weight_OI = weight_OI + f.scale * (f.up_OR.to(weight_OI.dtype) @ f.down_RI.to(weight_OI.dtype))
    return weight_OI


def scale_first(weight_OI: Tensor, factors: Sequence[Factor]) -> Tensor:
    """In the weight's dtype, in the order of the published implementation: the scale, then the product."""
    for f in factors:
        scaled = f.up_OR.to(weight_OI.dtype) * f.scale
        weight_OI = (scaled @ f.down_RI.to(weight_OI.dtype)).add_(weight_OI)
    return weight_OI


def ours(weight_OI: Tensor, factors: Sequence[Factor]) -> Tensor:
    """In place."""
    merge(weight_OI, factors)
    return weight_OI


WAYS: dict[str, Way] = {"ours": ours, "naive": naive, "W + s*(B@A)": product_first, "W + (s*B)@A": scale_first}


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight and its factors."""

    out: int
    features: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dtype: torch.dtype = torch.bfloat16
    is_limited: bool = False

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        return f"{self.out}x{self.features}, rank {ranks}, scales {self.scales}, factors {str(self.dtype)[6:]}"

    def make(self) -> tuple[Tensor, list[Factor]]:
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(self.out, self.features, generator=generator) * 0.02).bfloat16()
        size = 0.005 / sum(scale**2 for scale in self.scales) ** 0.5
        factors = []
        for rank, scale in zip(self.ranks, self.scales, strict=True):
            down = torch.randn(rank, self.features, generator=generator) / rank**0.5
            up = torch.randn(self.out, rank, generator=generator) * size
            factors.append(Factor(down.to(self.dtype), up.to(self.dtype), scale))
        return weight, factors


CASES = (
    Case(16384, 4096, (384,), (0.8,), is_limited=True),
    Case(4096, 4096, (384,), (0.8,)),
    Case(4096, 4096, (384, 64), (0.8, 0.5)),
    Case(4096, 4096, (384, 384, 384), (0.7, 1.0, -0.35)),
    Case(4096, 4096, (384,), (0.8,), torch.float32),
)


def misrounded(got_OI: Tensor, before_OI: Tensor, factors: Sequence[Factor]) -> float:
    """Share of the elements that differ from the formula in float64, rounded once."""
    wrong, num_rows = 0, 512
    for begin in range(0, len(got_OI), num_rows):
        rows = slice(begin, begin + num_rows)
        want = before_OI[rows].double()
        for f in factors:
            want += f.scale * (f.up_OR[rows].double() @ f.down_RI.double())
        wrong += int((got_OI[rows] != want.to(got_OI.dtype)).sum())
    return wrong / got_OI.numel()


def peak_growth(case: Case, name: str) -> float:
    """MiB by which the resident size of this process peaks above what it is before the merge. Blocks the host."""
    small = Case(64, 64, (4,), (0.5,)).make()
    WAYS[name](*small)  # loads what every merge needs
    weight, factors = case.make()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    WAYS[name](weight, factors)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _fresh_growth(case: int, name: str, num_threads: int) -> float:
    command = [sys.executable, __file__, "--memory-of", str(case), name, "--threads", str(num_threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(case: Case, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Median milliseconds, median ratio to naive, and share misrounded, by way."""
    weight, factors = case.make()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    shares: dict[str, float] = {}
    order = list(WAYS)
    for round_index in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            own = weight.clone()
            began = time.perf_counter()
            result = WAYS[name](own, factors)
            if round_index:
                seconds[name].append(time.perf_counter() - began)
            else:
                shares[name] = misrounded(result, weight, factors)
    return {
        name: (
            statistics.median(values) * 1e3,
            statistics.median(a / b for a, b in zip(values, seconds["naive"], strict=True)),
            shares[name],
        )
        for name, values in seconds.items()
    }


def same_bits(case: Case, threads: Sequence[int]) -> bool:
    """Whether our result is the same with every number of threads."""
    weight, factors = case.make()
    results = []
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        results.append(ours(weight.clone(), factors))
    return all(torch.equal(result, results[0]) for result in results)


def main() -> int:
    """Print the tables; return 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds per table (default 7)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default 1 2")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        torch.set_num_threads(arguments.threads[0])
        print(peak_growth(CASES[int(arguments.memory_of[0])], arguments.memory_of[1]))
        return 0
    able = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    print(f"hardware:  {os.cpu_count()} cores, {platform.machine()}, {able} bf16 products")
    print(f"versions:  Python {platform.python_version()}, torch {torch.__version__}")
    broken = []
    for number, case in enumerate(CASES):
        if not same_bits(case, (*arguments.threads, 3)):
            broken.append(f"{case}: bits depend on the number of threads")
        for num_threads in arguments.threads:
            torch.set_num_threads(num_threads)
            print(f"\n{case}; {num_threads} threads, {arguments.rounds} rounds")
            print(f"    {'':12} {'ms':>8} {'/ naive':>8} {'misrounded':>11} {'extra MiB':>10}")
            for name, (milliseconds, ratio, share) in measure(case, arguments.rounds).items():
                growth = _fresh_growth(number, name, num_threads)
                print(f"    {name:12} {milliseconds:8.1f} {ratio:8.3f} {share:11.2e} {growth:10.1f}")
                if name != "ours":
                    continue
                limits = [("misrounded", share, MAX_MISROUNDED)]
                if case.is_limited:
                    limits += [("ratio", ratio, MAX_RATIO), ("extra MiB", growth, MAX_MIB)]
                broken += [f"{case}; {num_threads} threads: {what} {value:.3g} is over {limit:.3g}"
                           for what, value, limit in limits if value > limit]  # fmt: skip
    print("\n" + ("\n".join(broken) or "all limits hold"))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
