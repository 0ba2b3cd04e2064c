"""Oracle: the design's own formula. Three exchanges per block, nothing positional, and no more bytes than it says."""

from __future__ import annotations

import pytest
import torch

from ltx_sp.parallel.mesh import Mesh
from ltx_sp.spec import LatentShape
from profiling.comm import (
    FULL_SHAPE,
    SMALL_SHAPE,
    Count,
    bound,
    count_forward,
    count_on_fake,
    count_on_gloo,
    small_spec,
)
from profiling.models import full_size, random_transformer
from tests.support.ranks import run_ranks

_SELF = {"video self-attention: q, k, v": "all_to_all", "video self-attention: out": "all_to_all"}
_STRATEGIES = {
    "partial": _SELF | {"video-to-audio: partial, log-sum-exp": "all_gather"},
    "gather": _SELF | {"video-to-audio: k, v": "all_gather"},
}


def _check_operations(counts: list[Count], strategy: str) -> None:
    for count in counts:
        assert count.per_block == 3
        assert {exchange.label: exchange.operation for exchange in count.exchanges} == _STRATEGIES[strategy]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_measured_bytes_equal_the_formula(num_ranks: int, dtype: str) -> None:
    counts = run_ranks(count_on_gloo, num_ranks, "partial", dtype, 8)
    _check_operations(counts, "partial")
    limit = bound(small_spec(), SMALL_SHAPE, num_ranks, 4 if dtype == "float32" else 2)
    assert [count.bytes_per_block for count in counts] == [limit] * num_ranks


def test_shares_that_differ_keep_to_the_formula_on_the_mean() -> None:
    counts = run_ranks(count_on_gloo, 3, "partial", "bfloat16", 8)
    _check_operations(counts, "partial")
    mean = sum(count.bytes_per_block for count in counts) / 3
    assert mean <= bound(small_spec(), SMALL_SHAPE, 3, 2) * (1 + 1e-9)


def test_the_gather_strategy_moves_keys_and_values_once() -> None:
    counts = run_ranks(count_on_gloo, 2, "gather", "bfloat16", 8)
    _check_operations(counts, "gather")


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_full_size_in_the_fake_group(num_ranks: int) -> None:
    model = random_transformer(full_size(num_layers=2), dtype=torch.bfloat16, device=torch.device("meta"))
    counts = [count_on_fake(rank, num_ranks, "partial", model) for rank in (0, num_ranks - 1)]
    _check_operations(counts, "partial")
    for count in counts:
        assert count.bytes_per_block == bound(full_size(), FULL_SHAPE, num_ranks, 2)
        if num_ranks == 8:
            assert round(count.bytes_per_block / 1e6) == 59


def test_one_rank_exchanges_nothing() -> None:
    model = random_transformer(small_spec(), dtype=torch.float32, device=torch.device("cpu"))
    shape = LatentShape(frames=1, height=2, width=3, audio_frames=4)
    assert count_forward(Mesh.alone(), model, shape, strategy="partial").exchanges == ()
