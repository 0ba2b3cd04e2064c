"""The transformer: latents in, velocities out. Module names are the published checkpoint's.

Shapes: B batch, s this rank's video tokens (or the audio tokens), t = s or 1, C channels of a latent token,
D a stream's width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ltx_sp.model.args import BlockSkips, StreamInput, TextArgs, TransformerArgs
from ltx_sp.model.attention import Attends
from ltx_sp.model.blocks import AdaLayerNormSingle, Block, StreamState, modulate
from ltx_sp.model.rope import make_rotation
from ltx_sp.spec import StreamSpec, TransformerSpec
from ltx_sp.window import mark


class CaptionProjection(nn.Module):
    """2.0's own projection of the connectors' output to the streams' widths."""

    def __init__(self, caption_channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, context_BCD: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(functional.gelu(self.linear_1(context_BCD), approximate="tanh"))
        return projected


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Both streams between two blocks, and what leaving the last one takes."""

    video: StreamState
    video_embedded_BuD: Tensor
    audio: StreamState | None = None
    audio_embedded_BuD: Tensor | None = None

    def pick(self, places: Sequence[int]) -> Hidden:
        """The batch entries at these places, whose noise levels are shared by all."""
        video = self.video.pick(places)
        return dataclasses.replace(self, video=video, audio=None if self.audio is None else self.audio.pick(places))


class Transformer(nn.Module):
    """LTX-2's audio-video diffusion transformer. It knows nothing of ranks: ``attends`` does.

    Formulas: the published reference implementation; see docs/numerics.md for them in one place.
    """

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.spec = spec
        video, audio = spec.video, spec.audio
        num_rows = 9 if spec.prompt_modulation else 6

        self.patchify_proj = nn.Linear(video.in_channels, video.width)
        self.adaln_single = AdaLayerNormSingle(video.width, num_rows)
        self.audio_patchify_proj = nn.Linear(audio.in_channels, audio.width)
        self.audio_adaln_single = AdaLayerNormSingle(audio.width, num_rows)

        self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(video.width, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(audio.width, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(video.width, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(audio.width, 1)

        self.prompt_adaln_single: AdaLayerNormSingle | None = None
        self.audio_prompt_adaln_single: AdaLayerNormSingle | None = None
        if spec.prompt_adaln:
            self.prompt_adaln_single = AdaLayerNormSingle(video.width, 2)
            self.audio_prompt_adaln_single = AdaLayerNormSingle(audio.width, 2)

        self.caption_projection: CaptionProjection | None = None
        self.audio_caption_projection: CaptionProjection | None = None
        if spec.caption_channels is not None:
            self.caption_projection = CaptionProjection(spec.caption_channels, video.width)
            self.audio_caption_projection = CaptionProjection(spec.caption_channels, audio.width)

        self.keyframes_abs_pos_embedding: nn.Parameter | None = None
        if spec.keyframes_embedding:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, video.width))

        self.transformer_blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))

        self.scale_shift_table = nn.Parameter(torch.zeros(2, video.width))
        self.proj_out = nn.Linear(video.width, video.out_channels)
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio.width))
        self.audio_proj_out = nn.Linear(audio.width, audio.out_channels)

    def make_args(
        self, positions_BNT2: Tensor, denoise_mask_Bt1: Tensor, keyframes_mask_BT1: Tensor | None = None
    ) -> TransformerArgs:
        """Build one stream's constants for a generation: all tokens, not sharded, no prompt yet.

        Blocks the host where tokens differ in their masks.

        Args:
            positions_BNT2: (start, end) of each token: 3 axes for video (seconds, pixel rows, pixel columns),
                1 for audio (seconds).
            denoise_mask_Bt1: t may be 1 where all tokens share the value.
        """
        stream = self._stream_of(positions_BNT2.shape[1])
        spec, dtype = self.spec, self.patchify_proj.weight.dtype
        own = make_rotation(
            positions_BNT2,
            width=stream.width,
            num_heads=stream.num_heads,
            max_pos=stream.max_pos,
            theta=spec.rope_theta,
            dtype=dtype,
        )
        cross = make_rotation(
            positions_BNT2[:, :1],
            width=spec.cross_width,
            num_heads=spec.audio.num_heads,
            max_pos=(spec.cross_max_pos,),
            theta=spec.rope_theta,
            dtype=dtype,
        )
        mask = denoise_mask_Bt1.float()
        levels_u, level_T = mask.flatten(), None
        if mask.shape[1] > 1:
            levels_u, level_T = levels_u.unique(return_inverse=True)
        return TransformerArgs(mask, levels_u, level_T, own, cross, cross, keyframes_mask_BT1)

    def _stream_of(self, num_axes: int) -> StreamSpec:
        return self.spec.audio if num_axes == 1 else self.spec.video

    def make_text(self, context_UCD: Tensor, *, audio: bool) -> TextArgs:
        """Prepare prompts for one stream, once per generation.

        Keys and values of all blocks are made here unless they depend on sigma (2.3 and later).
        """
        projection = self.audio_caption_projection if audio else self.caption_projection
        context_UCD = context_UCD.to(self.patchify_proj.weight.dtype)
        if projection is not None:
            context_UCD = projection(context_UCD)
        if self.spec.prompt_adaln:
            return TextArgs(context_UCD=context_UCD)
        return TextArgs(keys_values=self._keys_values(context_UCD, None, audio=audio))

    def text_at(self, text: TextArgs, sigma_B: Tensor, *, audio: bool) -> TextArgs:
        """Make keys and values of all blocks at a noise level, unless they are there already. Capturable.

        All passes of a step can share them; the forward makes them by itself where they are not there.
        """
        if text.keys_values is not None or text.context_UCD is None:
            return text
        adaln = self.audio_prompt_adaln_single if audio else self.prompt_adaln_single
        assert adaln is not None
        modulation_B12D, _ = adaln((sigma_B * self.spec.timestep_scale).unsqueeze(-1))
        keys_values = self._keys_values(text.context_UCD, modulation_B12D, audio=audio)
        return dataclasses.replace(text, context_UCD=None, keys_values=keys_values)

    def _keys_values(
        self, context_UCD: Tensor, modulation_B12D: Tensor | None, *, audio: bool
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(block.text_keys_values(context_UCD, modulation_B12D, audio=audio) for block in self._blocks())

    def forward(
        self, video: StreamInput, audio: StreamInput | None, attends: Attends, skips: Sequence[BlockSkips]
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the velocities: ``x0 = x - denoise_mask * sigma * v``.

        Capturable. Collective where ``attends`` is.

        Args:
            audio: None for video alone.
            skips: one per block.

        Returns:
            ``video [B, s, C]`` and ``audio [B, A, C]`` (or None), in the weights' type.
        """
        texts = (
            self.text_at(video.args.text, video.sigma_B, audio=False),
            TextArgs() if audio is None else self.text_at(audio.args.text, audio.sigma_B, audio=True),
        )
        return self.leave(self.through(self.enter(video, audio), texts, attends, skips))

    def enter(self, video: StreamInput, audio: StreamInput | None) -> Hidden:
        """Bring the latents to the blocks' width, and the noise levels to what modulates them. Capturable."""
        return Hidden(
            *self._enter(
                video, audio, self.patchify_proj, self.adaln_single,
                self.av_ca_video_scale_shift_adaln_single, self.av_ca_a2v_gate_adaln_single,
            ),
            *(None, None) if audio is None else self._enter(
                audio, video, self.audio_patchify_proj, self.audio_adaln_single,
                self.av_ca_audio_scale_shift_adaln_single, self.av_ca_v2a_gate_adaln_single,
            ),
        )  # fmt: skip

    def through(
        self, hidden: Hidden, texts: tuple[TextArgs, TextArgs], attends: Attends, skips: Sequence[BlockSkips],
        start: int = 0,
    ) -> Hidden:  # fmt: skip
        """Run some of the blocks. Capturable. Collective where ``attends`` is.

        Args:
            texts: of video and audio, with keys and values.
            skips: one per block that runs.
            start: the first of them.
        """
        video, audio = hidden.video, hidden.audio
        for index, skip in enumerate(skips, start):
            block = self.transformer_blocks[index]
            with mark(f"block {index}"):
                keys_values = texts[0].of_block(index), None if audio is None else texts[1].of_block(index)
                video, audio = block(video, audio, keys_values, attends, skip)
        return dataclasses.replace(hidden, video=video, audio=audio)

    def leave(self, hidden: Hidden) -> tuple[Tensor, Tensor | None]:
        """Turn what the last block gave into velocities. Capturable."""
        video = self._leave(hidden.video, hidden.video_embedded_BuD, self.scale_shift_table, self.proj_out)
        if hidden.audio is None or hidden.audio_embedded_BuD is None:
            return video, None
        table, proj_out = self.audio_scale_shift_table, self.audio_proj_out
        return video, self._leave(hidden.audio, hidden.audio_embedded_BuD, table, proj_out)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks, all of which share the result; it happens when the first one runs."""
        for block in self._blocks():
            block.compile(backend=backend)

    def _blocks(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.transformer_blocks)

    def _enter(
        self, stream: StreamInput, other: StreamInput | None, patchify: nn.Linear, adaln: AdaLayerNormSingle,
        cross_adaln: AdaLayerNormSingle, gate_adaln: AdaLayerNormSingle,
    ) -> tuple[StreamState, Tensor]:  # fmt: skip
        spec, args = self.spec, stream.args
        x = patchify(stream.x_BsC.to(patchify.weight.dtype))
        if self.keyframes_abs_pos_embedding is not None and args.keyframes_mask_Bs1 is not None:
            x = x + self.keyframes_abs_pos_embedding * (args.keyframes_mask_Bs1 > 0)

        timestep_Bu = args.levels_u * (stream.sigma_B * spec.timestep_scale).unsqueeze(-1)
        modulation, embedded = adaln(timestep_Bu)
        cross_modulation, _ = cross_adaln(timestep_Bu)
        # The gate listens to how noisy the other stream still is, not to this one's timesteps.
        other_sigma_B = stream.sigma_B if other is None else other.sigma_B
        gate, _ = gate_adaln((other_sigma_B * spec.gate_timestep_scale).unsqueeze(-1))
        return StreamState(x, modulation, cross_modulation, gate, args), embedded

    def _leave(self, state: StreamState, embedded_BuD: Tensor, table: Tensor, proj_out: nn.Linear) -> Tensor:
        shift, scale = state.spread(*(table + embedded_BuD.unsqueeze(2)).unbind(2))
        normed = functional.layer_norm(state.x_BsD, (state.x_BsD.shape[-1],), eps=self.spec.norm_eps)
        velocity: Tensor = proj_out(modulate(normed, shift, scale))
        return velocity


def build_transformer(spec: TransformerSpec) -> Transformer:
    """Build a transformer with its parameters on meta."""
    with torch.device("meta"):
        return Transformer(spec)
