"""The audio-video block, and the layers it is made of. Module names are the published checkpoint's.

Shapes: B batch, s this rank's tokens of a stream, t = s or 1 (1 where all tokens share a timestep), C text
tokens, D the stream's width, H heads, K head width, n rows of a modulation table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ltx_sp.model.args import BlockSkips, Skip, TransformerArgs, pick
from ltx_sp.model.attention import Attend, Attends, Pending
from ltx_sp.model.rope import Rotation, rotate
from ltx_sp.spec import TransformerSpec

_SINUSOID_WIDTH = 256


def rms_norm(x_BsD: Tensor, eps: float, weight_D: Tensor | None = None) -> Tensor:
    """Divide by the root mean square over D, then multiply by the weight, if there is one."""
    width = x_BsD.shape[-1]
    if x_BsD.device.type != "cpu" or x_BsD.dtype != torch.float32:
        fused: Tensor = functional.rms_norm(x_BsD, (width,), weight_D, eps)
        return fused
    # PyTorch has a fused kernel for CUDA alone; on a CPU it squares into a tensor of its own. This takes a third.
    normed: Tensor = x_BsD * (torch.linalg.vector_norm(x_BsD, dim=-1, keepdim=True).square() / width + eps).rsqrt()
    return normed if weight_D is None else normed.mul_(weight_D)


# The next three round after the product and again after the sum, as the reference does: so bfloat16 gives its bits.


def modulate(x_BsD: Tensor, shift_BtD: Tensor, scale_BtD: Tensor) -> Tensor:
    """``x (1 + scale) + shift``."""
    return (x_BsD * (1 + scale_BtD)).add_(shift_BtD)


def norm_modulate(x_BsD: Tensor, eps: float, shift_BtD: Tensor, scale_BtD: Tensor) -> Tensor:
    """``rms_norm(x) (1 + scale) + shift``."""
    return rms_norm(x_BsD, eps).mul_(1 + scale_BtD).add_(shift_BtD)


def add_gated(x_BsD: Tensor, gate_BtD: Tensor, update_BsD: Tensor) -> Tensor:
    """``x + gate update``. In place on ``update_BsD``."""
    return update_BsD.mul_(gate_BtD).add_(x_BsD)


class TimestepEmbedder(nn.Module):
    """A two-layer perceptron on a sinusoid of the timestep."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(_SINUSOID_WIDTH, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep_Bt: Tensor) -> Tensor:
        """``[B, t] -> [B, t, D]``; the timestep in 0..1000, float32."""
        half = _SINUSOID_WIDTH // 2
        index = torch.arange(half, dtype=torch.float32, device=timestep_Bt.device)
        angles = timestep_Bt.unsqueeze(-1) * torch.exp(index * (-math.log(10000.0) / half))
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        embedded: Tensor = self.linear_2(functional.silu(self.linear_1(sinusoid)))
        return embedded


class _CombinedEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)


class AdaLayerNormSingle(nn.Module):
    """Modulation of a whole stream from its timesteps (PixArt-alpha, section 2.3)."""

    def __init__(self, width: int, num_rows: int):
        super().__init__()
        self.num_rows = num_rows
        self.emb = _CombinedEmbedder(width)
        self.linear = nn.Linear(width, num_rows * width)

    def forward(self, timestep_Bt: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, t] -> modulation [B, t, n, D], embedded timestep [B, t, D]``."""
        embedded_BtD = self.emb.timestep_embedder(timestep_Bt)
        modulation = self.linear(functional.silu(embedded_BtD))
        return rearrange(modulation, "b t (n d) -> b t n d", n=self.num_rows), embedded_BtD


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the whole inner width, with a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)


class Attention(nn.Module):
    """Projections, norms and gate of one attention; what lies between is called from outside."""

    def __init__(self, query_width: int, context_width: int, num_heads: int, head_dim: int, *, gated: bool, eps: float):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.q_norm = RMSNorm(inner, eps)
        self.k_norm = RMSNorm(inner, eps)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_width)])
        self.to_gate_logits = nn.Linear(query_width, num_heads) if gated else None

    def _heads(self, x_BsD: Tensor) -> Tensor:
        heads: Tensor = x_BsD.unflatten(-1, (self.num_heads, -1))
        return heads

    def query(self, x_BsD: Tensor) -> Tensor:
        """``-> q_BsHK``, normalised."""
        return self._heads(self.q_norm(self.to_q(x_BsD)))

    def key(self, context_BCD: Tensor) -> Tensor:
        """``-> k_BCHK``, normalised."""
        return self._heads(self.k_norm(self.to_k(context_BCD)))

    def value(self, context_BCD: Tensor) -> Tensor:
        """``-> v_BCHK``."""
        return self._heads(self.to_v(context_BCD))

    def project_out(self, out_BsHK: Tensor, x_BsD: Tensor) -> Tensor:
        """Gate each head by the query's input, then project: ``-> [B, s, D]``. In place on ``out_BsHK``."""
        if self.to_gate_logits is not None:
            out_BsHK = out_BsHK.mul_((2 * torch.sigmoid(self.to_gate_logits(x_BsD))).unsqueeze(-1))
        projected: Tensor = self.to_out[0](out_BsHK.flatten(2))
        return projected


class _GeluProjection(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(width, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # In place: the widest tensor of a block would otherwise be written twice, a fifth of the layer's time on a CPU.
        activated: Tensor = torch.ops.aten.gelu_(self.proj(x), approximate="tanh")
        return activated


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (tanh), linear back. Index 1 is a dropout in the published names."""

    def __init__(self, width: int, *, bias: bool):
        super().__init__()
        inner = 4 * width
        self.net = nn.ModuleList([_GeluProjection(width, inner, bias), nn.Identity(), nn.Linear(inner, width, bias)])

    def forward(self, x_BsD: Tensor) -> Tensor:
        projected: Tensor = self.net[2](self.net[0](x_BsD))
        return projected


@dataclasses.dataclass(frozen=True)
class StreamState:
    """One stream inside the block loop: its hidden tokens and everything that modulates them.

    Args:
        modulation_BunD: 6 or 9 rows: shift, scale, gate of self-attention, of the feed-forward, of text attention.
        cross_modulation_Bu4D: scale, shift of audio-to-video, then of video-to-audio; from the stream's own
            timesteps.
        cross_gate_B11D: gate of the cross-modal attention into this stream; from the other stream's sigma.
    """

    x_BsD: Tensor
    modulation_BunD: Tensor
    cross_modulation_Bu4D: Tensor
    cross_gate_B11D: Tensor
    args: TransformerArgs

    def spread(self, *rows_BuD: Tensor) -> tuple[Tensor, ...]:
        """Give each token its own of the rows; as they are where all tokens share one."""
        level = self.args.level_s
        return rows_BuD if level is None else tuple(row.index_select(1, level) for row in rows_BuD)

    def pick(self, places: Sequence[int]) -> StreamState:
        """The batch entries at these places, whose modulation is shared by all."""
        return dataclasses.replace(self, x_BsD=pick(self.x_BsD, places))

    def add(self, update_BsD: Tensor) -> StreamState:
        """The same with ``update_BsD`` added to the tokens."""
        return dataclasses.replace(self, x_BsD=self.x_BsD + update_BsD)

    def add_gated(self, gate_BtD: Tensor, update_BsD: Tensor) -> StreamState:
        """The same with ``gate * update`` added to the tokens."""
        return dataclasses.replace(self, x_BsD=add_gated(self.x_BsD, gate_BtD, update_BsD))


def self_attention(attn: Attention, x_BsD: Tensor, rotation: Rotation, attend: Attend, skip: Skip) -> Tensor:
    """Attend within a stream; where skipped, the values pass through in place of the attention's result."""
    v = attn.value(x_BsD)
    if skip is True:
        return attn.project_out(v, x_BsD)
    out = attend(rotate(attn.query(x_BsD), rotation), rotate(attn.key(x_BsD), rotation), v)
    if isinstance(skip, Tensor):
        out = torch.where(skip.unsqueeze(-1), v, out)
    return attn.project_out(out, x_BsD)


KeysValues = tuple[Tensor, Tensor]
"""``k_BCHK, v_BCHK``."""


class Block(nn.Module):
    """One of the transformer's layers: both streams, and the attentions between them."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        video, audio, eps = spec.video, spec.audio, spec.norm_eps
        self.eps = eps
        self.num_rows = 9 if spec.prompt_modulation else 6

        def attention(query_width: int, context_width: int, head_dim: int) -> Attention:
            return Attention(query_width, context_width, video.num_heads, head_dim, gated=spec.gated_attention, eps=eps)

        self.attn1 = attention(video.width, video.width, video.head_dim)
        self.attn2 = attention(video.width, video.context_dim, video.head_dim)
        self.ff = FeedForward(video.width, bias=video.ff_bias)
        self.scale_shift_table = nn.Parameter(torch.zeros(self.num_rows, video.width))

        self.audio_attn1 = attention(audio.width, audio.width, audio.head_dim)
        self.audio_attn2 = attention(audio.width, audio.context_dim, audio.head_dim)
        self.audio_ff = FeedForward(audio.width, bias=audio.ff_bias)
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(self.num_rows, audio.width))

        self.audio_to_video_attn = attention(video.width, audio.width, audio.head_dim)
        self.video_to_audio_attn = attention(audio.width, video.width, audio.head_dim)
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video.width))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio.width))

        self.prompt_scale_shift_table: nn.Parameter | None = None
        self.audio_prompt_scale_shift_table: nn.Parameter | None = None
        if spec.prompt_modulation:
            self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, video.width))
            self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, audio.width))

    def text_keys_values(
        self, context_UCD: Tensor, modulation_B12D: Tensor | None, *, audio: bool
    ) -> tuple[Tensor, Tensor]:
        """Project prompts to keys and values: ``-> k_UCHK, v_UCHK``.

        Args:
            modulation_B12D: shift and scale from the stream's sigma; None where they do not depend on it.
        """
        attn = self.audio_attn2 if audio else self.attn2
        table = self.audio_prompt_scale_shift_table if audio else self.prompt_scale_shift_table
        if table is not None:
            rows = table if modulation_B12D is None else table + modulation_B12D
            context_UCD = modulate(context_UCD, *rows.unbind(-2))
        return attn.key(context_UCD), attn.value(context_UCD)

    def forward(
        self, video: StreamState, audio: StreamState | None, texts: tuple[KeysValues, KeysValues | None],
        attends: Attends, skips: BlockSkips,
    ) -> tuple[StreamState, StreamState | None]:  # fmt: skip
        """Update both streams. Capturable. Collective where ``attends`` is.

        Args:
            texts: this block's text keys and values, of video and audio.
        """
        video_rows = (self.scale_shift_table + video.modulation_BunD).unbind(2)
        attend_within_video = partial(
            self._attend_within, video, video_rows, self.attn1, self.attn2, texts[0], attends.video_self, attends.local,
            skips.video_self,
        )  # fmt: skip
        if audio is None or texts[1] is None:
            return self._feed_forward(attend_within_video(), video_rows, self.ff), None
        audio_rows = (self.audio_scale_shift_table + audio.modulation_BunD).unbind(2)
        attended_audio = attends.beside(
            partial(
                self._attend_within, audio, audio_rows, self.audio_attn1, self.audio_attn2, texts[1], attends.local,
                attends.local, skips.audio_self,
            )
        )  # fmt: skip
        video, audio = attend_within_video(), attended_audio()

        video_cross = (self.scale_shift_table_a2v_ca_video[:4] + video.cross_modulation_Bu4D).unbind(2)
        audio_cross = (self.scale_shift_table_a2v_ca_audio[:4] + audio.cross_modulation_Bu4D).unbind(2)
        video_normed, audio_normed = rms_norm(video.x_BsD, self.eps), rms_norm(audio.x_BsD, self.eps)

        finish_audio = partial(self._feed_forward, audio, audio_rows, self.audio_ff)
        if skips.video_to_audio is not True:
            attn = self.video_to_audio_attn
            queries = modulate(audio_normed, *audio.spread(audio_cross[3], audio_cross[2]))
            keys = modulate(video_normed, *video.spread(video_cross[3], video_cross[2]))
            rotations = video.args.cross_positional_embeddings_local, video.args.cross_positional_embeddings_full
            pending = attends.video_to_audio(
                rotate(attn.query(queries), audio.args.cross_positional_embeddings_local),
                attn.key(keys),
                attn.value(keys),
                local=rotations[0],
                full=rotations[1],
            )
            finish_audio = partial(self._finish_audio, audio, audio_rows, queries, pending, skips.video_to_audio)
        if skips.audio_to_video is not True:
            video = self._audio_to_video(
                video, audio, modulate(video_normed, *video.spread(video_cross[1], video_cross[0])),
                modulate(audio_normed, *audio.spread(audio_cross[1], audio_cross[0])), attends.local,
                skips.audio_to_video,
            )  # fmt: skip

        # The exchange behind `pending` runs under the video feed-forward, which does not depend on it.
        finished_audio = attends.beside(finish_audio)
        video = self._feed_forward(video, video_rows, self.ff)
        return video, finished_audio()

    def _finish_audio(
        self, audio: StreamState, rows: tuple[Tensor, ...], queries: Tensor, pending: Pending, skip: Skip
    ) -> StreamState:
        update = self.video_to_audio_attn.project_out(pending(), queries)
        gate = self.scale_shift_table_a2v_ca_audio[4] + audio.cross_gate_B11D.squeeze(2)
        return self._feed_forward(audio.add_gated(_masked(gate, skip), update), rows, self.audio_ff)

    def _attend_within(
        self, stream: StreamState, rows: tuple[Tensor, ...], attn1: Attention, attn2: Attention, text: KeysValues,
        attend_self: Attend, attend_text: Attend, skip: Skip,
    ) -> StreamState:  # fmt: skip
        x = norm_modulate(stream.x_BsD, self.eps, *stream.spread(*rows[:2]))
        (gate,) = stream.spread(rows[2])
        stream = stream.add_gated(gate, self_attention(attn1, x, stream.args.positional_embeddings, attend_self, skip))

        is_modulated = self.num_rows > 6
        if is_modulated:
            x = norm_modulate(stream.x_BsD, self.eps, *stream.spread(*rows[6:8]))
        else:
            x = rms_norm(stream.x_BsD, self.eps)
        update = attn2.project_out(attend_text(attn2.query(x), *text), x)
        if not is_modulated:
            return stream.add(update)
        (gate,) = stream.spread(rows[8])
        return stream.add_gated(gate, update)

    def _audio_to_video(
        self, video: StreamState, audio: StreamState, queries: Tensor, keys: Tensor, attend: Attend, skip: Skip
    ) -> StreamState:
        attn = self.audio_to_video_attn
        out = attend(
            rotate(attn.query(queries), video.args.cross_positional_embeddings_local),
            rotate(attn.key(keys), audio.args.cross_positional_embeddings_full),
            attn.value(keys),
        )
        gate = self.scale_shift_table_a2v_ca_video[4] + video.cross_gate_B11D.squeeze(2)
        return video.add_gated(_masked(gate, skip), attn.project_out(out, queries))

    def _feed_forward(self, stream: StreamState, rows: tuple[Tensor, ...], ff: FeedForward) -> StreamState:
        x = norm_modulate(stream.x_BsD, self.eps, *stream.spread(*rows[3:5]))
        (gate,) = stream.spread(rows[5])
        return stream.add_gated(gate, ff(x))


def _masked(gate_B1D: Tensor, skip: Skip) -> Tensor:
    return gate_B1D.masked_fill(skip, 0.0) if isinstance(skip, Tensor) else gate_B1D
