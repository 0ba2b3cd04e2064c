"""What a request is steered by: files read on rank 0, encoded there, and given to every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from ltx_sp.encode import encode_audio, encode_image, encode_video
from ltx_sp.handoff import Conditioning, Given, TextContext
from ltx_sp.parallel.collectives import Axis
from ltx_sp.plan import Plan
from ltx_sp.read import read_audio, read_image, read_video
from ltx_sp.spec import AUDIO_LATENT_CHANNELS, AUDIO_MEL_BINS, LATENT_CHANNELS, TEXT_TOKENS, ModelSpec, StreamSpec


@dataclasses.dataclass(frozen=True)
class Media:
    """The files of a request, read, on the host.

    Args:
        images: of each stage, the request's pictures at its size, ``[1, 3, 1, height, width]`` each.
        waveform: ``[2, samples]``, float32; None where sound is made.
        sample_rate: of the waveform, Hz.
        video: ``[1, 3, F, height, width]``, float32 in -1..1; None where frames are made.
    """

    images: tuple[tuple[Tensor, ...], ...] = ()
    waveform: Tensor | None = None
    sample_rate: int = 0
    video: Tensor | None = None

    def given(self) -> Given:
        """What of it the clip gets as it is."""
        frames = None
        if self.video is not None:
            frames = rearrange((self.video[0] + 1) / 2, "c f y x -> f y x c").contiguous()
        return Given(self.waveform, self.sample_rate, frames)


def read_media(plan: Plan) -> Media:
    """Read the files that a request names. Blocks the host. Rank 0 only.

    Raises:
        RequestError: one of them cannot be read, or does not hold what it must.
    """
    request = plan.request
    images = tuple(
        tuple(
            read_image(image.path, height=stage.height, width=stage.width, crf=plan.image_crf)
            for image in request.images
        )
        for stage in plan.stages
    )
    waveform, sample_rate, video = None, 0, None
    if request.audio_path is not None:
        waveform, sample_rate = read_audio(request.audio_path, seconds=request.num_frames / request.frame_rate)
    if request.video_path is not None:
        video = read_video(
            request.video_path,
            height=plan.height,
            width=plan.width,
            num_frames=request.num_frames,
            frame_rate=request.frame_rate,
        )
    return Media(images, waveform, sample_rate, video)


@dataclasses.dataclass(frozen=True)
class MediaLatents:
    """The files of a request as latents; see ``Conditioning``."""

    images: tuple[tuple[Tensor, ...], ...] = ()
    audio: Tensor | None = None
    video: Tensor | None = None


def encode_media(media: Media, plan: Plan, module: Callable[[str], nn.Module]) -> MediaLatents:
    """Encode what was read. Rank 0 only.

    Args:
        module: gives the loaded component of a name.
    """
    audio = video = None
    if media.waveform is not None:
        audio = encode_audio(
            media.waveform,
            media.sample_rate,
            audio_vae=module("audio_vae"),
            num_latents=plan.stages[0].shape.audio_frames,
        )
    if media.video is not None:
        video = encode_video(media.video, video_vae=module("video_vae"))
    images = tuple(
        tuple(encode_image(picture, video_vae=module("video_vae")) for picture in pictures) for pictures in media.images
    )
    return MediaLatents(images, audio, video)


def empty_media_latents(plan: Plan, dtype: torch.dtype, device: torch.device) -> MediaLatents:
    """Where the latents of rank 0 are received."""

    def video(frames: int, height: int, width: int) -> Tensor:
        return torch.empty((1, LATENT_CHANNELS, frames, height, width), dtype=dtype, device=device)

    shape, request = plan.stages[0].shape, plan.request
    audio_shape = (1, AUDIO_LATENT_CHANNELS, shape.audio_frames, AUDIO_MEL_BINS)
    return MediaLatents(
        images=tuple(
            tuple(video(1, stage.shape.height, stage.shape.width) for _ in request.images) for stage in plan.stages
        ),
        audio=None if request.audio_path is None else torch.empty(audio_shape, dtype=dtype, device=device),
        video=None if request.video_path is None else video(shape.frames, shape.height, shape.width),
    )


def empty_context(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> TextContext:
    """Where one of rank 0's contexts is received."""

    def empty(stream: StreamSpec) -> Tensor:
        width = spec.transformer.caption_channels or stream.context_dim
        return torch.empty((1, TEXT_TOKENS, width), dtype=dtype, device=device)

    return TextContext(empty(spec.transformer.video), empty(spec.transformer.audio))


def share_text(context: TextContext, world: Axis) -> TextContext:
    """Give every rank what rank 0 has encoded. Collective."""
    return TextContext(
        world.broadcast(context.video.contiguous(), label="text context"),
        world.broadcast(context.audio.contiguous(), label="text context"),
    )


def share_media(latents: MediaLatents, world: Axis) -> MediaLatents:
    """Give every rank what rank 0 has encoded. Collective."""

    def share(latent: Tensor | None) -> Tensor | None:
        return latent if latent is None else world.broadcast(latent.contiguous(), label="media")

    images = tuple(
        tuple(world.broadcast(picture.contiguous(), label="media") for picture in pictures)
        for pictures in latents.images
    )
    return MediaLatents(images, share(latents.audio), share(latents.video))


def make_conditioning(texts: list[TextContext], media: MediaLatents) -> Conditioning:
    """Put together what the denoising is steered by."""
    return Conditioning(texts[0], texts[1] if len(texts) > 1 else None, media.images, media.audio, media.video)
