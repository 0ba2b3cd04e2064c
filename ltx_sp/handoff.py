"""The values handed from stage to stage: frozen, and complete when made.

Shapes: F, H, W latent video frames, rows and columns; A audio latent frames; C text tokens;
D and E the context widths of video and audio.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from ltx_sp.plan import Plan


@dataclasses.dataclass(frozen=True)
class TextContext:
    """One prompt, encoded for both streams: ``video [1, C, D]``, ``audio [1, C, E]``."""

    video: Tensor
    audio: Tensor


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Everything that steers the denoising.

    Args:
        negative: None where no pass needs it.
        images: of each stage, the request's pictures as latents of its size, ``[1, 128, 1, H, W]`` each.
        audio, video: what is given and not made, as latents.
    """

    positive: TextContext
    negative: TextContext | None
    images: tuple[tuple[Tensor, ...], ...] = ()
    audio: Tensor | None = None
    video: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """What a clip gets as it is, on the rank that decodes.

    Args:
        waveform: ``[2, samples]`` on the host, float32 in -1..1; None where sound is made.
        sample_rate: of the waveform, Hz.
        frames: ``[F, height, width, 3]`` on the host, float32 in 0..1; None where frames are made.
    """

    waveform: Tensor | None = None
    sample_rate: int = 0
    frames: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Latents:
    """A denoised clip, normalised: ``video [1, 128, F, H, W]``, ``audio [1, 8, A, 16]``."""

    video: Tensor
    audio: Tensor


@dataclasses.dataclass(frozen=True)
class Clip:
    """A decoded clip.

    Args:
        frames: chunks ``[n, height, width, 3]`` on the host, float32 in 0..1, in order of time. Iterating decodes;
            it can be done once.
        num_frames: frames that the chunks add up to.
        frame_rate: per second.
        waveform: ``[2, samples]`` on the host, float32 in -1..1.
        sample_rate: of the waveform, Hz.
    """

    frames: Iterator[Tensor]
    num_frames: int
    height: int
    width: int
    frame_rate: float
    waveform: Tensor
    sample_rate: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What one request came to.

    Args:
        latents: of the clip, the same on every rank.
        stages: what each stage came to, the same on every rank.
        clip: on rank 0, and None elsewhere; its frames are decoded while it is iterated.
    """

    plan: Plan
    latents: Latents
    stages: tuple[Latents, ...]
    clip: Clip | None
