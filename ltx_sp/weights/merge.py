"""Weights + pairs of factors -> the same weights with ``scale * up @ down`` added, in place.

Each weight is rounded once, however many pairs it gets, and nothing of its size is held besides it.
The result has the same bits whatever the number of threads, since ranks may differ in that.

O out-features, I in-features, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["Factor", "merge", "use_full_precision"]

_NUM_SUMMANDS = 3
# Of which several factors are laid side by side at a time; enough that the product runs at full speed.
_STACKED_ROWS = 1024
# Of one block in float32: 4 MiB.
_BLOCK_ELEMENTS = 2**20
# Added up by themselves: fewer results misrounded than with a large rank in one go, at no cost.
_RANK_SPAN = 64


@dataclasses.dataclass(frozen=True)
class Factor:
    """One pair of factors: what it adds is ``scale * up_OR @ down_RI``.

    Args:
        scale: finite, not 0.
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float


@torch.inference_mode()
def merge(weight_OI: Tensor, factors: Sequence[Factor]) -> None:
    """Add every ``scale * up @ down`` to the weight, computed in float32 and rounded once. In place.

    On CUDA only after ``use_full_precision``.
    """
    fuses = all(tensor.dtype == torch.bfloat16 for f in factors for tensor in (weight_OI, f.down_RI, f.up_OR))
    if fuses and _multiplies_bfloat16(weight_OI.device):
        _merge_fused(weight_OI, factors)
    else:
        _merge_by_blocks(weight_OI, factors)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products take less time than float32 ones; where not, up to 300 times more."""
    if device.type != "cpu":
        return True
    # What the processor can do, not how fast it is just now: ranks must come to the same answer. AMX comes with it.
    return bool(torch.backends.mkldnn.enabled) and torch.cpu._is_avx512_bf16_supported()


def _merge_fused(weight_OI: Tensor, factors: Sequence[Factor]) -> None:
    """Add bf16 factors to a bf16 weight in one product, that of all factors side by side. In place.

    A product has one scale, and only that is exact. The scales of other factors go into ``up``, as three summands of
    8 bits each: as good as float32, and added up before the rest, because small numbers are lost beside large ones.
    """
    if len(factors) == 1:
        weight_OI.addmm_(factors[0].up_OR, factors[0].down_RI, alpha=factors[0].scale)
        return
    scale = max(factors, key=lambda f: abs(f.scale) * len(f.down_RI)).scale
    alike, others = [f for f in factors if f.scale == scale], [f for f in factors if f.scale != scale]
    down_RI = torch.cat([f.down_RI for f in others * _NUM_SUMMANDS + alike])
    for begin in range(0, len(weight_OI), _STACKED_ROWS):
        rows = slice(begin, begin + _STACKED_ROWS)
        split = [_summands(f.up_OR[rows], f.scale / scale) for f in others]
        ups = [summands[i] for i in reversed(range(_NUM_SUMMANDS)) for summands in split]
        weight_OI[rows].addmm_(torch.cat(ups + [f.up_OR[rows] for f in alike], 1), down_RI, alpha=scale)


def _summands(up_OR: Tensor, scale: float) -> list[Tensor]:
    """Bf16 tensors that add up to ``scale * up``, the largest first."""
    rest = up_OR.float().mul_(scale)
    summands = []
    for _ in range(_NUM_SUMMANDS):
        summands.append(rest.bfloat16())
        rest.sub_(summands[-1])
    return summands


def _merge_by_blocks(weight_OI: Tensor, factors: Sequence[Factor]) -> None:
    """Add the factors in float32, some rows of the weight at a time. In place."""
    downs = [f.down_RI.float() for f in factors]
    num_rows = max(1, _BLOCK_ELEMENTS // weight_OI.shape[1])

    def add(begin: int) -> None:
        rows = slice(begin, begin + num_rows)
        with torch.inference_mode():  # which threads do not inherit
            total = torch.zeros(weight_OI[rows].shape, dtype=torch.float32, device=weight_OI.device)
            for f, down_RI in zip(factors, downs, strict=True):
                up_OR = f.up_OR[rows].float()
                for up, down in zip(up_OR.split(_RANK_SPAN, 1), down_RI.split(_RANK_SPAN), strict=True):
                    total.addmm_(up, down, alpha=f.scale)
            weight_OI[rows] = total.add_(weight_OI[rows])

    begins = range(0, len(weight_OI), num_rows)
    if weight_OI.device.type == "cpu":
        _each_on_one_thread(add, begins)
    else:
        for begin in begins:
            add(begin)


def _each_on_one_thread(work: Callable[[int], None], items: Sequence[int]) -> None:
    """Call ``work`` on every item, several at a time, none of them on more than one thread.

    Float32 products of odd shapes come out otherwise with another number of threads. Blocks the host.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(num_threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, items):
                pass
    finally:
        torch.set_num_threads(num_threads)  # new threads start with what was set last anywhere


def use_full_precision() -> None:
    """Let CUDA add up bf16 products in float32, and take float32 factors as they are, in the whole process.

    The vocoder's convolutions, which run in float32 because it distorts in less, are then in float32 too.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # By the older of PyTorch's two ways to say it, which puts both right; the newer would leave the older unreadable.
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = False
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        torch.backends.cudnn.allow_tf32 = False
