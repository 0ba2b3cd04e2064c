"""Merging LoRA factors on a CUDA device. Oracle: the formula in float64, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ltx_sp.weights.merge import Factor, merge, use_full_precision

CUDA = torch.device("cuda")
MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True, params=["legacy", "fp32_precision"])
def full_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """As Runtime.load sets it, whatever the application has set before, in the old way or in the new."""
    before = MATMUL.allow_bf16_reduced_precision_reduction
    MATMUL.allow_bf16_reduced_precision_reduction = True
    if request.param == "legacy":
        MATMUL.allow_tf32 = True
    else:
        MATMUL.fp32_precision = "tf32"
    use_full_precision()
    yield
    assert not MATMUL.allow_tf32, "and both ways to ask can be read"
    MATMUL.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize(("out", "features"), [(4096, 4096), (16384, 4096), (4096, 16384), (32, 4096), (33, 1001)])
@pytest.mark.parametrize(
    ("ranks", "scales"), [([384], [0.7]), ([384, 384, 384], [0.7, 1.0, -0.35]), ([384, 64], [0.8, 0.8])]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(out: int, features: int, ranks: list[int], scales: list[float], dtype: torch.dtype) -> None:
    weight = (torch.randn(out, features, device=CUDA) * 0.02).bfloat16()
    size = 0.005 / sum(scale**2 for scale in scales) ** 0.5
    before = weight.double()
    want, factors = before.clone(), list[Factor]()
    for rank, scale in zip(ranks, scales, strict=True):
        down = (torch.randn(rank, features, device=CUDA) / rank**0.5).to(dtype)
        up = (torch.randn(out, rank, device=CUDA) * size).to(dtype)
        want += scale * (up.double() @ down.double())
        factors.append(Factor(down, up, scale))
    merge(weight, factors)
    rounded = want.bfloat16()
    apart = weight != rounded
    assert float(apart.double().mean()) <= 1e-4
    step = torch.nextafter(rounded, torch.where(weight > rounded, torch.inf, -torch.inf).bfloat16())
    # What is left of a weight that is all but cancelled may be off by float32's own error on the usual weight.
    is_near = (weight == step) | ((weight.double() - want).abs() < 2**-20 * before.abs().mean())
    assert bool(is_near[apart].all())


def test_float32_weight() -> None:
    weight = torch.randn(1000, 500, device=CUDA) * 0.02
    down, up = torch.randn(64, 500, device=CUDA), torch.randn(1000, 64, device=CUDA) * 0.001
    want = weight.double() + 0.7 * (up.double() @ down.double())
    merge(weight, [Factor(down, up, 0.7)])
    assert float((weight.double() - want).abs().max() / want.abs().max()) < 1e-6


def test_no_second_weight_is_allocated() -> None:
    weight = torch.randn(16384, 4096, device=CUDA).bfloat16()
    factor = Factor(
        torch.randn(384, 4096, device=CUDA).bfloat16(), torch.randn(16384, 384, device=CUDA).bfloat16(), 0.5
    )
    merge(weight, [factor])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    merge(weight, [factor])
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20
    merge(weight, [factor, Factor(factor.down_RI, factor.up_OR, 0.25)])
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
