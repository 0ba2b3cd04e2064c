"""Sequence parallelism: shard the arguments, exchange tokens for heads, merge what each rank attended.

No token is ever padded inside a block: shards and head shares may differ by one, their sizes are known on the
host, and the inner attention sees exactly the real tokens.

Shapes: B batch, S all video tokens, s this rank's, A audio tokens, H heads, h this rank's, K head width, P ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ltx_sp.cost import shares
from ltx_sp.model.args import TransformerArgs
from ltx_sp.model.attention import Attend, Backend, CrossAttend, Pending, merge_partials
from ltx_sp.model.rope import Rotation, rotate
from ltx_sp.parallel.collectives import Axis


def shard_tokens(x_BSD: Tensor, axis: Axis) -> Tensor:
    """Take this rank's tokens: ``BSD -> BsD``."""
    sizes = shares(x_BSD.shape[1], axis.size)
    return x_BSD.narrow(1, sum(sizes[: axis.rank]), sizes[axis.rank])


def gather_tokens(x_BsD: Tensor, axis: Axis, *, num_tokens: int, label: str) -> Tensor:
    """Rebuild the whole sequence on every rank: ``BsD -> BSD``.

    Collective. Capturable.

    Args:
        num_tokens: S.
    """
    sizes = shares(num_tokens, axis.size)
    # all_gather wants equal shapes: the shorter shards get one row more, which is dropped on arrival.
    padded = torch.nn.functional.pad(x_BsD, (0, 0, 0, sizes[0] - x_BsD.shape[1]))
    gathered = axis.gather(padded, label=label)
    return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1)


def shard_args(args: TransformerArgs, axis: Axis) -> TransformerArgs:
    """Cut one stream's constants down to this rank's tokens; the full cross-modal table stays whole.

    Every local table is cut from its own full length, so arguments that are sharded already come back unchanged.
    """
    if args.cross_positional_embeddings_local is not args.cross_positional_embeddings_full:
        return args
    sizes = shares(args.num_tokens, axis.size)
    start, length = sum(sizes[: axis.rank]), sizes[axis.rank]
    mask, level, keyframes = args.denoise_mask_Bt1, args.level_s, args.keyframes_mask_Bs1
    if axis.size == 1:
        return args
    return dataclasses.replace(
        args,
        denoise_mask_Bt1=mask if mask.shape[1] == 1 else mask.narrow(1, start, length),
        level_s=None if level is None else level.narrow(0, start, length),
        positional_embeddings=args.positional_embeddings.narrow(start, length),
        cross_positional_embeddings_local=args.cross_positional_embeddings_full.narrow(start, length),
        keyframes_mask_Bs1=None if keyframes is None else keyframes.narrow(1, start, length),
    )


def ulysses(attend: Attend, axis: Axis, *, num_tokens: int, num_heads: int) -> Attend:
    """Self-attention over all tokens, called with this rank's: two exchanges around ``attend``.

    ``BsHK -> BShK -> BsHK``, queries, keys and values in one exchange (DeepSpeed-Ulysses, Jacobs et al. 2023).

    Args:
        num_tokens: S.
        num_heads: H; any number that is at least the number of ranks.
    """
    tokens, heads = shares(num_tokens, axis.size), shares(num_heads, axis.size)
    own_tokens, own_heads = tokens[axis.rank], heads[axis.rank]

    def sequence_parallel(q_BsHK: Tensor, k_BsHK: Tensor, v_BsHK: Tensor, /) -> Tensor:
        batch, _, _, head_width = q_BsHK.shape
        send = split_heads(torch.stack([q_BsHK, k_BsHK, v_BsHK]), heads)
        per_token = 3 * batch * head_width
        received = axis.exchange(
            send,
            send_sizes=[own_tokens * share * per_token for share in heads],
            receive_sizes=[share * own_heads * per_token for share in tokens],
            label="video self-attention: q, k, v",
        )
        # Tokens stand first, so the ranks' pieces are the whole sequence as they arrive.
        qkv_SnBhK = received.view(num_tokens, 3, batch, own_heads, head_width)
        out_BShK = attend(*rearrange(qkv_SnBhK, "S n B h K -> n B S h K").unbind(0))

        per_token = batch * head_width
        received = axis.exchange(
            rearrange(out_BShK, "B S h K -> (S B h K)"),
            send_sizes=[share * own_heads * per_token for share in tokens],
            receive_sizes=[own_tokens * share * per_token for share in heads],
            label="video self-attention: out",
        )
        pieces = received.split([own_tokens * share * per_token for share in heads])
        return torch.cat(
            [
                rearrange(piece.view(own_tokens, batch, share, head_width), "s B h K -> B s h K")
                for piece, share in zip(pieces, heads, strict=True)
            ],
            dim=2,
        )

    return sequence_parallel


def split_heads(qkv_nBsHK: Tensor, heads: Sequence[int]) -> Tensor:
    """Lay out what each rank gets one after the other, tokens first: ``-> P pieces of (s n B h K)``, flat."""
    return torch.cat([rearrange(piece, "n B s h K -> (s n B h K)") for piece in qkv_nBsHK.split(list(heads), dim=3)])


def video_to_audio_partial(backend: Backend, axis: Axis) -> CrossAttend:
    """Attend over this rank's video keys only, gather the partial results, merge them by log-sum-exp.

    One exchange of ``A (H K b + 4 H)`` bytes per rank, under way while the caller computes; every rank gets equal
    bits. A rank without video tokens contributes a log-sum-exp of -inf.
    """

    def attend(q_BAHK: Tensor, k_BsHK: Tensor, v_BsHK: Tensor, /, *, local: Rotation, full: Rotation) -> Pending:
        out_BAHK, lse_BHA = backend.attend_lse(q_BAHK, rotate(k_BsHK, local), v_BsHK)
        out_bytes = out_BAHK.contiguous().view(-1).view(torch.uint8)
        lse_bytes = lse_BHA.contiguous().view(-1).view(torch.uint8)
        pending = axis.start_gather(torch.cat([out_bytes, lse_bytes]), label="video-to-audio: partial, log-sum-exp")

        def merge() -> Tensor:
            gathered = pending()
            out = gathered[:, : out_bytes.numel()].view(out_BAHK.dtype).unflatten(1, out_BAHK.shape)
            lse = gathered[:, out_bytes.numel() :].view(torch.float32).unflatten(1, lse_BHA.shape)
            return merge_partials(out, lse)

        return merge

    return attend


def video_to_audio_gather(attend: Attend, axis: Axis, *, num_tokens: int) -> CrossAttend:
    """Gather all video keys and values once, then rotate the keys with the full table and attend.

    The plain form, which any attention kernel can serve: one exchange of ``2 s H K b`` bytes per rank.

    Args:
        num_tokens: S.
    """

    def start(q_BAHK: Tensor, k_BsHK: Tensor, v_BsHK: Tensor, /, *, local: Rotation, full: Rotation) -> Pending:
        sizes = shares(num_tokens, axis.size)
        padding = sizes[0] - k_BsHK.shape[1]
        kv = torch.nn.functional.pad(torch.stack([k_BsHK, v_BsHK]), (0, 0, 0, 0, 0, padding))
        pending = axis.start_gather(kv, label="video-to-audio: k, v")

        def finish() -> Tensor:
            parts = [part[:, :, :size] for part, size in zip(pending(), sizes, strict=True)]
            k_BSHK, v_BSHK = torch.cat(parts, dim=2).unbind(0)
            return attend(q_BAHK, rotate(k_BSHK, full), v_BSHK)

        return finish

    return start
