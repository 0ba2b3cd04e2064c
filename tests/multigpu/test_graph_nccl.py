"""Captured steps over NCCL, each rank on a device of its own. Oracles: as in tests/gpu/test_graph_nccl.py."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_graph_nccl import Answer, answers_of, count, walk


def on_its_own(rank: int) -> None:
    """As torchrun places them."""


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "res_2s"])
@pytest.mark.parametrize(("num_ranks", "hands"), [(2, 1), (2, 2), (4, 2)], ids=["1x2", "2x1", "2x2"])
def test_replayed_steps_are_the_steps(num_ranks: int, hands: int, sampler: str) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    for answer in answers_of(walk, num_ranks, on_its_own, hands, sampler):
        assert answer == Answer(is_equal=True, is_finite=True)


@pytest.mark.parametrize("hands", [1, 2], ids=["1x2", "2x1"])
def test_a_replay_exchanges_what_the_step_does(hands: int) -> None:
    for answer in answers_of(count, 2, on_its_own, hands):
        assert answer.ledger.total() > 0
        assert answer.replayed == answer.ledger
