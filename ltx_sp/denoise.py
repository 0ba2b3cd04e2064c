"""The sigma loop: noise in, latents out, sharded from the first step to the last.

Shapes: T all tokens of a stream, s this rank's, C = 128 channels, N position axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ltx_sp.handoff import Conditioning, Latents
from ltx_sp.model.args import BlockSkips, Perturbation, StreamInput, TextArgs, TransformerArgs, make_skips
from ltx_sp.model.attention import Backend
from ltx_sp.model.dit import Transformer
from ltx_sp.model.guidance import guide
from ltx_sp.model.samplers import Sampler, euler
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.parallelize import parallelize
from ltx_sp.parallel.ulysses import gather_tokens, shard_args, shard_tokens
from ltx_sp.plan import ISOLATED, PERTURBED, UNCONDITIONAL, Guidance, Plan
from ltx_sp.spec import (
    AUDIO_LATENT_CHANNELS,
    AUDIO_LATENT_SCALE,
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    LatentShape,
    ModelSpec,
    audio_sampling,
)

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each denoising."""


@dataclasses.dataclass(frozen=True)
class StreamStart:
    """Where one stream's denoising starts: whole, on every rank.

    Args:
        x_1TC: noised tokens, in the latents' type.
        clean_1TC: what tokens of mask 0 hold.
        denoise_mask_1T1: 1 to generate, 0 to keep; between, an image of partial strength. T may be 1 where all
            tokens share the value.
        positions_1NT2: (start, end) per token and axis.
        given: the stream is not generated at all: its sigma is 0 for itself and for the other stream's gate.
    """

    x_1TC: Tensor
    clean_1TC: Tensor
    denoise_mask_1T1: Tensor
    positions_1NT2: Tensor
    keyframes_mask_1T1: Tensor | None = None
    given: bool = False


def video_positions(shape: LatentShape, frame_rate: float, device: torch.device) -> Tensor:
    """Extents of the video tokens: ``[1, 3, T, 2]``, seconds, pixel rows, pixel columns, float32.

    The first latent frame is one pixel frame, every other eight (the VAE is causal).
    """
    axes = [
        torch.arange(size, dtype=torch.float32, device=device) for size in (shape.frames, shape.height, shape.width)
    ]
    grid_3T = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
    bounds_3T2 = torch.stack([grid_3T, grid_3T + 1], dim=-1)
    scale = torch.tensor([TEMPORAL_SCALE, SPATIAL_SCALE, SPATIAL_SCALE], dtype=torch.float32, device=device)
    bounds_3T2 = bounds_3T2 * scale[:, None, None]
    bounds_3T2[0] = (bounds_3T2[0] + 1 - TEMPORAL_SCALE).clamp(min=0) / frame_rate
    return bounds_3T2.unsqueeze(0)


def audio_positions(num_frames: int, spec: ModelSpec, device: torch.device) -> Tensor:
    """Extents of the audio tokens: ``[1, 1, T, 2]``, seconds, float32."""
    sampling_rate, hop_length = audio_sampling(spec)
    start = torch.arange(num_frames, dtype=torch.float32, device=device)
    bounds = torch.stack([start, start + 1], dim=-1) * AUDIO_LATENT_SCALE + 1 - AUDIO_LATENT_SCALE
    return bounds.clamp(min=0)[None, None] * hop_length / sampling_rate


def noise_start(
    plan: Plan, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> tuple[StreamStart, StreamStart]:
    """Draw both streams' first noise from the plan's seed.

    Whole, on the host, in the latents' type, video first: the same on any device and any number of ranks.
    """
    generator = torch.Generator().manual_seed(plan.request.seed)

    def start(num_tokens: int, channels: int, positions: Tensor) -> StreamStart:
        noise = torch.randn((1, num_tokens, channels), generator=generator, dtype=dtype).to(device)
        return StreamStart(noise, torch.zeros_like(noise), noise.new_ones((1, 1, 1), dtype=torch.float32), positions)

    shape = plan.shape
    video = start(
        shape.video_tokens, spec.transformer.video.in_channels, video_positions(shape, plan.request.frame_rate, device)
    )
    audio = start(
        shape.audio_frames, spec.transformer.audio.in_channels, audio_positions(shape.audio_frames, spec, device)
    )
    if spec.transformer.keyframes_embedding:
        first = torch.zeros((1, shape.video_tokens, 1), device=device)
        first[:, : shape.height * shape.width] = 1
        video = dataclasses.replace(video, keyframes_mask_1T1=first)
    return video, audio


def unpatchify(tokens: Streams, shape: LatentShape) -> Latents:
    """Fold tokens back into the latent grids."""
    assert tokens.audio is not None
    return Latents(
        video=rearrange(
            tokens.video[:, : shape.video_tokens], "b (f h w) c -> b c f h w", f=shape.frames, h=shape.height
        ).contiguous(),
        audio=rearrange(tokens.audio, "b a (c m) -> b c a m", c=AUDIO_LATENT_CHANNELS).contiguous(),
    )


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The passes of one forward, and what they need of it."""

    names: tuple[str, ...]
    video: TransformerArgs
    audio: TransformerArgs | None
    skips: tuple[BlockSkips, ...]


class Denoiser:
    """The guided prediction of the clean latents, for one generation: ``x, sigma -> x0``. Collective.

    Everything that does not change from step to step is made here, once: position tables, text keys, skips.
    """

    def __init__(
        self,
        model: Transformer,
        backend: Backend,
        mesh: Mesh,
        video: StreamStart,
        audio: StreamStart | None,
        conditioning: Conditioning,
        *,
        passes: Sequence[str],
        batches: Sequence[Sequence[int]],
        video_guidance: Guidance,
        audio_guidance: Guidance,
        video_to_audio: str,
    ):
        self._model, self._axis = model, mesh.tokens
        self._guidance = video_guidance, audio_guidance
        self._given = video.given, audio is not None and audio.given
        self._attends = parallelize(
            backend,
            mesh.tokens,
            num_tokens=video.positions_1NT2.shape[2],
            num_heads=model.spec.video.num_heads,
            video_to_audio=video_to_audio,
        )
        video_args = model.make_args(video.positions_1NT2, video.denoise_mask_1T1, video.keyframes_mask_1T1)
        self._video_args = shard_args(video_args, mesh.tokens)
        self._video_clean = shard_tokens(video.clean_1TC, mesh.tokens)
        self._audio_args: TransformerArgs | None = None
        if audio is not None:
            self._audio_args = model.make_args(audio.positions_1NT2, audio.denoise_mask_1T1)
            self._audio_clean = audio.clean_1TC
        texts = self._texts(conditioning)
        self._batches = [self._make_batch([passes[index] for index in batch], texts) for batch in batches]

    def _texts(self, conditioning: Conditioning) -> dict[str, tuple[TextArgs, TextArgs]]:
        texts = {"positive": conditioning.positive}
        if conditioning.negative is not None:
            texts["negative"] = conditioning.negative
        return {
            name: (self._model.make_text(text.video, audio=False), self._model.make_text(text.audio, audio=True))
            for name, text in texts.items()
        }

    def _make_batch(self, names: Sequence[str], texts: dict[str, tuple[TextArgs, TextArgs]]) -> _Batch:
        chosen = [texts["negative" if name == UNCONDITIONAL else "positive"] for name in names]
        num_layers = self._model.spec.num_layers
        everywhere = tuple(range(num_layers))
        video_guidance, audio_guidance = self._guidance
        perturbations = {
            PERTURBED: Perturbation(
                video_self_blocks=video_guidance.stg_blocks if video_guidance.stg_scale != 0 else (),
                audio_self_blocks=audio_guidance.stg_blocks if audio_guidance.stg_scale != 0 else (),
            ),
            ISOLATED: Perturbation(audio_to_video_blocks=everywhere, video_to_audio_blocks=everywhere),
        }
        return _Batch(
            names=tuple(names),
            video=dataclasses.replace(self._video_args, text=_concatenate([video for video, _ in chosen])),
            audio=self._audio_args
            and dataclasses.replace(self._audio_args, text=_concatenate([audio for _, audio in chosen])),
            skips=make_skips(
                [perturbations.get(name, Perturbation()) for name in names], num_layers, self._video_clean.device
            ),
        )

    def __call__(self, x: Streams, sigma: Tensor) -> Streams:
        """Predict the clean latents, in x's type, tokens of mask 0 put back. Collective. Capturable.

        Args:
            sigma: 0-d float32 on the device: a captured step reads it anew at every replay.
        """
        video_0: dict[str, Tensor] = {}
        audio_0: dict[str, Tensor] = {}
        for batch in self._batches:
            video, audio = self._forward(batch, x, sigma)
            video_0.update(zip(batch.names, video.split(1), strict=True))
            if audio is not None:
                audio_0.update(zip(batch.names, audio.split(1), strict=True))
        video_guidance, audio_guidance = self._guidance
        guided = guide(video_0, video_guidance, lambda moments: self._axis.sum(moments, label="guidance: moments"))
        clean_video = _keep(guided, self._video_clean, self._video_args.denoise_mask_Bt1)
        if self._audio_args is None:
            return Streams(clean_video, None)
        guided = guide(audio_0, audio_guidance, lambda moments: moments)
        return Streams(clean_video, _keep(guided, self._audio_clean, self._audio_args.denoise_mask_Bt1))

    def _forward(self, batch: _Batch, x: Streams, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        size = len(batch.names)

        def stream(tokens: Tensor, args: TransformerArgs, given: bool) -> StreamInput:
            level = (torch.zeros_like(sigma) if given else sigma).expand(size)
            return StreamInput(tokens.expand(size, -1, -1), level, args)

        video = stream(x.video, batch.video, self._given[0])
        audio = None
        if batch.audio is not None:
            assert x.audio is not None
            audio = stream(x.audio, batch.audio, self._given[1])
        velocity_video, velocity_audio = self._model(video, audio, self._attends, batch.skips)
        if audio is None or velocity_audio is None:
            return _clean(video, velocity_video), None
        return _clean(video, velocity_video), _clean(audio, velocity_audio)


def _clean(stream: StreamInput, velocity: Tensor) -> Tensor:
    timestep = stream.args.denoise_mask_Bt1 * stream.sigma_B[:, None, None]
    return (stream.x_BsC.float() - timestep * velocity.float()).to(stream.x_BsC.dtype)


def _keep(x0: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    mixed = x0 * mask + clean.float() * (1 - mask)
    return torch.where(mask == 0, clean.float(), mixed).to(clean.dtype)


def _concatenate(texts: Sequence[TextArgs]) -> TextArgs:
    """One batch of prompts out of several; a prompt that all passes share is stored once."""
    if all(text is texts[0] for text in texts):
        return _expand(texts[0], len(texts))
    contexts = [text.context_BCD for text in texts if text.context_BCD is not None]
    if contexts:
        return TextArgs(context_BCD=torch.cat(contexts))
    per_block = zip(*(text.keys_values or () for text in texts), strict=True)
    return TextArgs(
        keys_values=tuple((torch.cat([k for k, _ in kv]), torch.cat([v for _, v in kv])) for kv in per_block)
    )


def _expand(text: TextArgs, size: int) -> TextArgs:
    if text.context_BCD is not None:
        return TextArgs(context_BCD=text.context_BCD.expand(size, -1, -1))
    return TextArgs(
        keys_values=tuple((k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in text.keys_values or ())
    )


def run(
    denoiser: Denoiser,
    video: StreamStart,
    audio: StreamStart | None,
    sigmas: Sequence[float],
    mesh: Mesh,
    *,
    sampler: Sampler = euler,
    noise: Callable[[], Streams] | None = None,
    on_step: OnStep | None = None,
) -> Streams:
    """Walk down the sigmas and gather the result: whole tokens on every rank.

    Collective. The latents stay sharded in between.
    """
    axis, done, total = mesh.tokens, 0, len(sigmas) - 1

    def denoise(x: Streams, sigma: float) -> Streams:
        nonlocal done
        x0 = denoiser(x, torch.full((), sigma, device=mesh.device))
        done += 1
        if on_step is not None:
            on_step(done, total)
        return x0

    def draw() -> Streams:
        assert noise is not None, "this sampler needs noise"
        fresh = noise()
        return Streams(shard_tokens(fresh.video, axis), fresh.audio)

    x = Streams(shard_tokens(video.x_1TC, axis), None if audio is None else audio.x_1TC)
    x = sampler(denoise, x, sigmas, draw)
    num_tokens = video.x_1TC.shape[1]
    return Streams(gather_tokens(x.video, axis, num_tokens=num_tokens, label="latents"), x.audio)


def denoise(
    plan: Plan,
    spec: ModelSpec,
    model: Transformer,
    backend: Backend,
    mesh: Mesh,
    conditioning: Conditioning,
    *,
    dtype: torch.dtype,
    on_step: OnStep | None = None,
) -> Latents:
    """Carry out the plan's denoising: equal latents on every rank, whatever their number. Collective."""
    with torch.no_grad():  # inference tensors could not be changed by whoever gets the latents
        video, audio = noise_start(plan, spec, dtype=dtype, device=mesh.device)
        denoiser = Denoiser(
            model,
            backend,
            mesh,
            video,
            audio,
            conditioning,
            passes=plan.passes,
            batches=plan.batches,
            video_guidance=plan.video_guidance,
            audio_guidance=plan.audio_guidance,
            video_to_audio=plan.video_to_audio,
        )
        return unpatchify(run(denoiser, video, audio, plan.sigmas, mesh, on_step=on_step), plan.shape)
