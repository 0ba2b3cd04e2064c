"""What one forward of the transformer needs beside the latents: built once per generation.

Shapes: B batch (1 where all passes share it), T all tokens of a stream, s this rank's, u different values among
their masks, U different prompts, C text tokens, D the stream's width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ltx_sp.model.rope import Rotation
from ltx_sp.recipes import Perturbation


@dataclasses.dataclass(frozen=True)
class TextArgs:
    """Encoded prompts as one stream's text attentions want them.

    Args:
        context_UCD: where keys and values depend on sigma and are not made yet.
        keys_values: (k_UCHK, v_UCHK) of every block, where they are.
        places: which prompt each entry of the batch has; None where they are one to one, or all share one.
    """

    context_UCD: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None
    places: tuple[int, ...] | None = None

    def of_block(self, index: int) -> tuple[Tensor, Tensor]:
        """Give ``k_BCHK, v_BCHK`` of a block."""
        assert self.keys_values is not None, "keys and values are made before the blocks run"
        k_UCHK, v_UCHK = self.keys_values[index]
        if self.places is None:
            return k_UCHK, v_UCHK
        return pick(k_UCHK, self.places), pick(v_UCHK, self.places)


def pick(x: Tensor, places: Sequence[int]) -> Tensor:
    """The entries of a batch at these places; a copy only where several of them move."""
    if list(places) == list(range(x.shape[0])):
        return x
    if len(places) == 1:
        return x[places[0] : places[0] + 1]
    return torch.stack([x[place] for place in places])


@dataclasses.dataclass(frozen=True)
class TransformerArgs:
    """One stream's constants: nothing in it changes from step to step.

    Args:
        denoise_mask_Bt1: 1 to generate, 0 for clean tokens; t may be 1 where all tokens share the value.
        levels_u: the different values in the mask: modulation is computed for each of them, not for each token.
        level_s: which of them a token has; None where all share the one.
        positional_embeddings: self-attention rotations of the tokens at hand.
        cross_positional_embeddings_local: cross-modal rotations of the tokens at hand.
        cross_positional_embeddings_full: cross-modal rotations of all tokens, whoever holds them. The same
            object as the local one where the stream is not sharded.
        keyframes_mask_Bs1: above 0 where a token belongs to a single-frame keyframe; None where no model asks.
        text: the prompt, where the whole of a forward runs at once.
    """

    denoise_mask_Bt1: Tensor
    levels_u: Tensor
    level_s: Tensor | None
    positional_embeddings: Rotation
    cross_positional_embeddings_local: Rotation
    cross_positional_embeddings_full: Rotation
    keyframes_mask_Bs1: Tensor | None = None
    text: TextArgs = TextArgs()

    @property
    def num_tokens(self) -> int:
        """All tokens of the stream, on every rank together."""
        return self.cross_positional_embeddings_full.cos_BTHk.shape[1]


@dataclasses.dataclass(frozen=True)
class StreamInput:
    """One stream of one forward.

    Args:
        x_BsC: latent tokens, C = 128 channels.
        sigma_B: noise level in 0..1, float32; 0 for a stream that is given, not generated.
    """

    x_BsC: Tensor
    sigma_B: Tensor
    args: TransformerArgs


Skip = bool | Tensor
"""False: compute. True: skip for the whole batch. A bool tensor ``[B, 1, 1]``: skip where True."""


@dataclasses.dataclass(frozen=True)
class BlockSkips:
    """What one block leaves out."""

    video_self: Skip = False
    audio_self: Skip = False
    audio_to_video: Skip = False
    video_to_audio: Skip = False


def make_skips(passes: Sequence[Perturbation], num_layers: int, device: torch.device) -> tuple[BlockSkips, ...]:
    """Turn the perturbations of a batch's passes into each block's skips, decided on the host."""

    def skip(blocks_by_pass: Sequence[tuple[int, ...]], block: int) -> Skip:
        flags = [block in blocks for blocks in blocks_by_pass]
        if all(flags) or not any(flags):
            return flags[0]
        return torch.tensor(flags, device=device)[:, None, None]

    return tuple(
        BlockSkips(
            video_self=skip([p.video_self_blocks for p in passes], block),
            audio_self=skip([p.audio_self_blocks for p in passes], block),
            audio_to_video=skip([p.audio_to_video_blocks for p in passes], block),
            video_to_audio=skip([p.video_to_audio_blocks for p in passes], block),
        )
        for block in range(num_layers)
    )
