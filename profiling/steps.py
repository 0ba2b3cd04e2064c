"""Denoising steps of random clips: what the measurements and the tests of a step have in common."""

from __future__ import annotations

from ltx_sp.denoise import Denoiser
from ltx_sp.handoff import Conditioning, TextContext
from ltx_sp.model.attention import Backend, Beside, SdpaBackend, in_turn
from ltx_sp.model.dit import Transformer
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.recipes import Guidance, deal_passes
from ltx_sp.start import StreamStart
from profiling.models import Inputs

UNGUIDED = Guidance()
SIGMAS = (1.0, 0.95, 0.8, 0.55, 0.3, 0.0)


def guided(stg_block: int = 1) -> Guidance:
    """The published strengths: all four passes, and rescaling."""
    return Guidance(cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=(stg_block,), modality_scale=3.0)


def start_of(inputs: Inputs) -> tuple[StreamStart, StreamStart]:
    """Text-to-video: both streams from noise alone."""
    mask = inputs.video.new_ones((1, 1, 1)).float()
    return (
        StreamStart(inputs.video, inputs.video.new_zeros(inputs.video.shape), mask, inputs.video_positions),
        StreamStart(inputs.audio, inputs.audio.new_zeros(inputs.audio.shape), mask, inputs.audio_positions),
    )


def prompts_of(inputs: Inputs) -> Conditioning:
    """The clip's contexts, and their opposites as the negative prompt."""
    return Conditioning(
        TextContext(inputs.video_context, inputs.audio_context),
        TextContext(-inputs.video_context, -inputs.audio_context),
    )


def make_denoiser(
    model: Transformer,
    inputs: Inputs,
    mesh: Mesh,
    guidance: Guidance,
    *,
    max_batch_size: int = 1,
    backend: Backend | None = None,
    video_to_audio: str = "partial",
    beside: Beside = in_turn,
) -> Denoiser:
    """The guided prediction for a random clip, its passes dealt as a plan deals them. Collective.

    Args:
        backend: None for PyTorch's own attention.
    """
    video, audio = start_of(inputs)
    return Denoiser(
        model,
        backend or SdpaBackend(),
        mesh,
        video,
        audio,
        prompts_of(inputs),
        segments=deal_passes(
            guidance, guidance, model.spec.num_layers, num_hands=mesh.guidance.size, max_batch_size=max_batch_size
        ),
        video_guidance=guidance,
        audio_guidance=guidance,
        video_to_audio=video_to_audio,
        beside=beside,
    )
