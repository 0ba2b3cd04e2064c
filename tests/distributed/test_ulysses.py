"""Oracles: identity (there and back), and self (any number of ranks equals one)."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor

from ltx_sp.cost import shares
from ltx_sp.model.args import TransformerArgs
from ltx_sp.model.attention import SdpaBackend, local_attends, merge_partials
from ltx_sp.model.rope import Rotation
from ltx_sp.parallel import collectives
from ltx_sp.parallel.collectives import Axis, Ledger
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.parallelize import parallelize
from ltx_sp.parallel.ulysses import gather_tokens, shard_args, shard_tokens
from tests.support.ranks import run_ranks


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rotation(num_tokens: int, heads: int, half: int, seed: int) -> Rotation:
    angles = _normal(1, num_tokens, heads, half, seed=seed)
    return Rotation(angles.cos(), angles.sin())


def _attend_on_ranks(
    rank: int, num_ranks: int, num_tokens: int, num_heads: int, batch: int, strategy: str
) -> dict[str, Tensor]:
    axis = Mesh.of_group(None, torch.device("cpu")).tokens
    q, k, v = (_normal(batch, num_tokens, num_heads, 8, seed=seed) for seed in range(3))
    audio_q = _normal(batch, 5, num_heads, 4, seed=3)
    cross_k, cross_v = (_normal(batch, num_tokens, num_heads, 4, seed=seed) for seed in (4, 5))
    table = _rotation(num_tokens, num_heads, 2, seed=6)
    attends = parallelize(SdpaBackend(), axis, num_tokens=num_tokens, num_heads=num_heads, video_to_audio=strategy)

    def own(x: Tensor) -> Tensor:
        return shard_tokens(x, axis)

    out = attends.video_self(own(q), own(k), own(v))
    start = sum(shares(num_tokens, num_ranks)[:rank])
    local = table.narrow(start, own(q).shape[1])
    audio = attends.video_to_audio(audio_q, own(cross_k), own(cross_v), local=local, full=table)()
    return {
        "video": gather_tokens(out.flatten(2), axis, num_tokens=num_tokens, label="test"),
        "audio": audio,
        "there and back": gather_tokens(own(q).flatten(2), axis, num_tokens=num_tokens, label="test"),
    }


@pytest.mark.parametrize("strategy", ["partial", "gather"])
@pytest.mark.parametrize(
    ("num_ranks", "num_tokens", "num_heads", "batch"),
    [(2, 16, 4, 1), (3, 16, 4, 2), (3, 7, 5, 1), (5, 23, 5, 1), (4, 2, 4, 1), (5, 3, 7, 2), (2, 1, 3, 1)],
)
def test_ranks_equal_one(num_ranks: int, num_tokens: int, num_heads: int, batch: int, strategy: str) -> None:
    q, k, v = (_normal(batch, num_tokens, num_heads, 8, seed=seed) for seed in range(3))
    cross_k, cross_v = (_normal(batch, num_tokens, num_heads, 4, seed=seed) for seed in (4, 5))
    table = _rotation(num_tokens, num_heads, 2, seed=6)
    alone = local_attends(SdpaBackend())
    video = alone.video_self(q, k, v).flatten(2)
    audio = alone.video_to_audio(_normal(batch, 5, num_heads, 4, seed=3), cross_k, cross_v, local=table, full=table)()

    results = run_ranks(_attend_on_ranks, num_ranks, num_tokens, num_heads, batch, strategy)
    for result in results:
        assert torch.equal(result["there and back"], q.flatten(2))
        torch.testing.assert_close(result["video"], video, atol=1e-6, rtol=0)
        torch.testing.assert_close(result["audio"], audio, atol=1e-6, rtol=0)
        assert torch.equal(result["audio"], results[0]["audio"])


def test_merging_partials_is_attention_over_the_union() -> None:
    backend = SdpaBackend()
    q, k, v = _normal(2, 5, 3, 8, seed=0), _normal(2, 11, 3, 8, seed=1), _normal(2, 11, 3, 8, seed=2)
    parts = [backend.attend_lse(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 4), (4, 4), (4, 11))]
    assert torch.isneginf(parts[1][1]).all(), "a rank without keys has weight 0"
    merged = merge_partials(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    torch.testing.assert_close(merged, backend.attend(q, k, v), atol=1e-6, rtol=0)


def test_log_sum_exp_is_that_of_the_scaled_scores() -> None:
    q, k, v = _normal(2, 5, 3, 8, seed=0), _normal(2, 70, 3, 8, seed=1), _normal(2, 70, 3, 8, seed=2)
    out, lse = SdpaBackend().attend_lse(q, k, v)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v))


def _args(num_tokens: int) -> TransformerArgs:
    own, cross = _rotation(num_tokens, 2, 4, seed=0), _rotation(num_tokens, 2, 2, seed=1)
    mask = torch.arange(num_tokens, dtype=torch.float32).view(1, -1, 1)
    return TransformerArgs(mask, mask.flatten(), torch.arange(num_tokens), own, cross, cross, mask)


def test_sharding_arguments_twice_keeps_the_full_table() -> None:
    args = _args(10)
    axis = Axis(1, 3, None, Ledger())
    once = shard_args(args, axis)
    twice = shard_args(once, axis)
    assert twice is once
    assert once.cross_positional_embeddings_full is args.cross_positional_embeddings_full
    assert once.num_tokens == 10
    assert once.denoise_mask_Bt1.flatten().tolist() == [4, 5, 6]
    assert once.level_s is not None
    assert once.level_s.tolist() == [4, 5, 6]
    assert once.keyframes_mask_Bs1 is not None
    assert once.keyframes_mask_Bs1.flatten().tolist() == [4, 5, 6]
    full = args.cross_positional_embeddings_full.cos_BTHk
    assert torch.equal(once.cross_positional_embeddings_local.cos_BTHk, full[:, 4:7])
    assert torch.equal(once.positional_embeddings.sin_BTHk, args.positional_embeddings.sin_BTHk[:, 4:7])


def test_one_rank_shares_one_table() -> None:
    args = shard_args(_args(10), Mesh.alone().tokens)
    assert args.cross_positional_embeddings_local is args.cross_positional_embeddings_full


def test_a_shared_mask_stays_shared() -> None:
    args = dataclasses.replace(_args(10), denoise_mask_Bt1=torch.ones(1, 1, 1))
    assert shard_args(args, Axis(2, 3, None, Ledger())).denoise_mask_Bt1.shape == (1, 1, 1)


class LettingGo:
    """An exchange that holds what it sends until somebody waits, as NCCL's does."""

    def __init__(self, sent: Tensor):
        self._sent: list[Tensor] = [sent]

    def wait(self) -> None:
        self._sent.clear()


@pytest.mark.parametrize("strategy", ["partial", "gather"])
def test_what_is_sent_stays_while_a_stream_may_still_be_joined(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """On CUDA the wait may be another stream's; the memory is then free for the stream that has not waited."""
    sent = list[weakref.ref[Tensor]]()

    def gather(received: Tensor, x: Tensor, **_: object) -> LettingGo:
        received.view(2, -1).copy_(x.expand(2, -1))
        whole = x if x._base is None else x._base
        sent.append(weakref.ref(whole))
        return LettingGo(whole)

    monkeypatch.setattr(collectives, "_all_gather", gather)
    axis = Axis(0, 2, None, Ledger())
    attends = parallelize(SdpaBackend(), axis, num_tokens=8, num_heads=2, video_to_audio=strategy)
    q, k, v = _normal(1, 3, 2, 8, seed=0), _normal(1, 4, 2, 8, seed=1), _normal(1, 4, 2, 8, seed=2)
    pending = attends.video_to_audio(q, k, v, local=_rotation(4, 2, 4, seed=3), full=_rotation(8, 2, 4, seed=3))
    pending()
    (ref,) = sent
    assert ref() is not None
    del pending
    assert ref() is None, "and not for longer"
