"""Where a stage's denoising starts: both streams' tokens, positions and masks, whole, the same on every rank.

T tokens of one stream, C channels, N position axes. Video tokens are the latent cells, row-major, and behind them those
of each appended picture; audio tokens are latent frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ltx_sp.handoff import Conditioning, Latents
from ltx_sp.model.samplers import normalise_noise
from ltx_sp.model.streams import Streams
from ltx_sp.plan import Plan
from ltx_sp.spec import (
    AUDIO_LATENT_CHANNELS,
    AUDIO_LATENT_SCALE,
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    LatentShape,
    ModelSpec,
    audio_sampling,
)


@dataclasses.dataclass(frozen=True)
class StreamStart:
    """Where one stream's denoising starts: whole, on every rank.

    Args:
        x_1TC: noised tokens, in the latents' type.
        clean_1TC: what tokens of mask 0 hold.
        denoise_mask_1T1: 1 to generate, 0 to keep; between, a picture of partial strength. T may be 1 where all
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


def video_positions(
    shape: LatentShape, frame_rate: float, device: torch.device, appended: Sequence[int] = ()
) -> Tensor:
    """Extents of the video tokens: ``[1, 3, T, 2]``, seconds, pixel rows, pixel columns, float32.

    The first latent frame is one pixel frame, every other eight (the VAE is causal); an appended picture is one.
    """
    axes = [
        torch.arange(size, dtype=torch.float32, device=device) for size in (shape.frames, shape.height, shape.width)
    ]
    grid_3T = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
    bounds_3T2 = torch.stack([grid_3T, grid_3T + 1], dim=-1)
    scale = torch.tensor([TEMPORAL_SCALE, SPATIAL_SCALE, SPATIAL_SCALE], dtype=torch.float32, device=device)
    bounds_3T2 = bounds_3T2 * scale[:, None, None]
    bounds_3T2[0] = (bounds_3T2[0] + 1 - TEMPORAL_SCALE).clamp(min=0) / frame_rate
    first_3T2 = bounds_3T2[:, : shape.height * shape.width]
    pictures = []
    for frame in appended:
        picture = first_3T2.clone()
        picture[0] = torch.tensor([frame, frame + 1], dtype=torch.float32, device=device) / frame_rate
        pictures.append(picture)
    return torch.cat([bounds_3T2, *pictures], dim=1).unsqueeze(0)


def audio_positions(num_frames: int, spec: ModelSpec, device: torch.device) -> Tensor:
    """Extents of the audio tokens: ``[1, 1, T, 2]``, seconds, float32."""
    sampling_rate, hop_length = audio_sampling(spec)
    start = torch.arange(num_frames, dtype=torch.float32, device=device)
    bounds = torch.stack([start, start + 1], dim=-1) * AUDIO_LATENT_SCALE + 1 - AUDIO_LATENT_SCALE
    return bounds.clamp(min=0)[None, None] * hop_length / sampling_rate


def start_streams(
    plan: Plan,
    number: int,
    spec: ModelSpec,
    conditioning: Conditioning,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
    initial: Latents | None = None,
) -> tuple[StreamStart, StreamStart]:
    """Draw the first noise of video and audio and mix it with what is there already.

    Drawn whole, on the host, in the latents' type, video first: the same on any device and any number of ranks.

    Args:
        number: of the stage.
        generator: seeded once per clip; each stage goes on drawing from it.
        initial: what the stage refines, of its size; None where it starts from noise alone.
    """
    stage = plan.stages[number]
    noise_scale = stage.sigmas[0] if initial is not None else 1.0

    def start(clean: Tensor, mask: Tensor | None, positions: Tensor, given: bool) -> StreamStart:
        x = torch.randn(clean.shape, generator=generator, dtype=dtype).to(device)
        if noise_scale != 1:
            x = torch.lerp(clean, x, noise_scale)
        if mask is not None:
            x = torch.lerp(clean, x, mask.to(dtype))
        if mask is None:
            mask = torch.ones((1, 1, 1), device=device)
        return StreamStart(x, clean, mask, positions, given=given)

    nothing = torch.zeros((1, 1, 1), device=device)
    clean, mask = _video(plan, number, conditioning, initial, spec.transformer.video.in_channels, dtype, device)
    positions = video_positions(stage.shape, plan.request.frame_rate, device, stage.appended)
    has_video = conditioning.video is not None
    video = start(clean, nothing if has_video else mask, positions, has_video)
    if spec.transformer.keyframes_embedding:
        first = torch.zeros((1, clean.shape[1], 1), device=device)
        first[:, : stage.shape.height * stage.shape.width] = 1
        video = dataclasses.replace(video, keyframes_mask_1T1=first)

    num_frames = stage.shape.audio_frames
    has_audio = conditioning.audio is not None
    known = conditioning.audio if has_audio or initial is None else initial.audio
    if known is None:
        clean = torch.zeros((1, num_frames, spec.transformer.audio.in_channels), dtype=dtype, device=device)
    else:
        clean = rearrange(known, "b c a m -> b a (c m)").to(device, dtype)
    audio = start(clean, nothing if has_audio else None, audio_positions(num_frames, spec, device), has_audio)
    return video, audio


def _video(
    plan: Plan,
    number: int,
    conditioning: Conditioning,
    initial: Latents | None,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """The video tokens before any noise, pictures in their places, and the mask; None where all is generated."""
    shape = plan.stages[number].shape
    known = conditioning.video
    if known is None and initial is not None:
        known = initial.video
    if known is None:
        clean = torch.zeros((1, shape.video_tokens, channels), dtype=dtype, device=device)
    else:
        clean = _tokens(known, dtype, device)
    if not plan.request.images:
        return clean, None
    mask = torch.ones((1, clean.shape[1], 1), device=device)
    appended: list[tuple[Tensor, Tensor]] = []
    for image, latent in zip(plan.request.images, conditioning.images[number], strict=True):
        picture = _tokens(latent, dtype, device)
        kept = torch.full((1, picture.shape[1], 1), 1 - image.strength, device=device)
        if image.frame == 0:
            clean = torch.cat([picture, clean[:, picture.shape[1] :]], dim=1)
            mask = torch.cat([kept, mask[:, picture.shape[1] :]], dim=1)
        else:
            appended.append((picture, kept))
    return (
        torch.cat([clean, *(picture for picture, _ in appended)], dim=1),
        torch.cat([mask, *(kept for _, kept in appended)], dim=1),
    )


def _tokens(latent: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return rearrange(latent, "b c f h w -> b (f h w) c").to(device, dtype)


def unpatchify(tokens: Streams, shape: LatentShape) -> Latents:
    """Fold tokens back into the latent grids; appended pictures go."""
    assert tokens.audio is not None
    return Latents(
        video=rearrange(
            tokens.video[:, : shape.video_tokens], "b (f h w) c -> b c f h w", f=shape.frames, h=shape.height
        ).contiguous(),
        audio=rearrange(tokens.audio, "b a (c m) -> b c a m", c=AUDIO_LATENT_CHANNELS).contiguous(),
    )


def draws(seed: int, like: Streams, *, normalised: bool) -> Callable[[], Streams]:
    """Noise for samplers that want more of it: one generator, video before audio at every draw, whole.

    Args:
        like: tokens of the shape, type and device to draw for.
        normalised: in float64, each draw brought to mean 0 and deviation 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        if not normalised:
            return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return normalise_noise(torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(x.device)

    return lambda: like.map(draw)
