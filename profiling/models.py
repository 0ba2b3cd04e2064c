"""Transformers of chosen size with random weights, and inputs for them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ltx_sp.model.args import StreamInput, TransformerArgs
from ltx_sp.model.dit import Transformer
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.ulysses import shard_args, shard_tokens
from ltx_sp.spec import LatentShape, ModelSpec, StreamSpec, TransformerSpec
from ltx_sp.start import audio_positions, video_positions


def transformer_spec(*, num_heads: int, head_dim: int, audio_head_dim: int, num_layers: int) -> TransformerSpec:
    """LTX-2.3 of another size."""
    width, audio_width = num_heads * head_dim, num_heads * audio_head_dim
    return TransformerSpec(
        num_layers=num_layers,
        video=StreamSpec(num_heads, head_dim, 128, 128, width, (20, 2048, 2048)),
        audio=StreamSpec(num_heads, audio_head_dim, 128, 128, audio_width, (20,)),
        rope_theta=10000.0,
        norm_eps=1e-6,
        timestep_scale=1000.0,
        gate_timestep_scale=1000.0,
        gated_attention=True,
        prompt_modulation=True,
        prompt_adaln=True,
        caption_channels=None,
        keyframes_embedding=False,
    )


def full_size(num_layers: int = 48) -> TransformerSpec:
    """LTX-2.3 22B as published."""
    return transformer_spec(num_heads=32, head_dim=128, audio_head_dim=64, num_layers=num_layers)


def random_transformer(
    spec: TransformerSpec, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Transformer:
    """A transformer whose weights keep activations at unit scale; on meta they are left as they are."""
    with torch.device("meta"):
        model = Transformer(spec)
    model = model.to(dtype)
    if device.type == "meta":
        return model
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                scale = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.02
                parameter.normal_(0.0, scale, generator=generator)
    return model.requires_grad_(requires_grad=False)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One forward's inputs, whole."""

    shape: LatentShape
    video: Tensor
    audio: Tensor
    video_context: Tensor
    audio_context: Tensor
    video_positions: Tensor
    audio_positions: Tensor
    sigma: float = 0.725


def random_inputs(
    spec: TransformerSpec,
    shape: LatentShape,
    *,
    num_text: int,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
) -> Inputs:
    """Normal latents and contexts for a clip of ``shape`` at 24 frames per second."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return torch.randn(size, generator=generator).to(device, dtype)

    model_spec = ModelSpec((2, 3), "published", spec, {})
    return Inputs(
        shape,
        normal(batch, shape.video_tokens, spec.video.in_channels),
        normal(batch, shape.audio_frames, spec.audio.in_channels),
        normal(batch, num_text, spec.video.context_dim),
        normal(batch, num_text, spec.audio.context_dim),
        video_positions(shape, 24.0, device),
        audio_positions(shape.audio_frames, model_spec, device),
    )


def stream_inputs(model: Transformer, inputs: Inputs, axis: Axis) -> tuple[StreamInput, StreamInput]:
    """Text-to-video inputs of one forward on this rank of ``axis``."""
    mask = torch.ones((1, 1, 1), device=inputs.video.device)
    sigma = torch.full((inputs.video.shape[0],), inputs.sigma, device=inputs.video.device)

    def stream(x: Tensor, args: TransformerArgs, context: Tensor, audio: bool) -> StreamInput:
        return StreamInput(x, sigma, dataclasses.replace(args, text=model.make_text(context, audio=audio)))

    video_args = shard_args(model.make_args(inputs.video_positions, mask), axis)
    return (
        stream(shard_tokens(inputs.video, axis), video_args, inputs.video_context, audio=False),
        stream(inputs.audio, model.make_args(inputs.audio_positions, mask), inputs.audio_context, audio=True),
    )
