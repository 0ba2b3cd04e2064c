"""Video latents -> the same with twice the rows and columns, between two stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def upsample(video: Tensor, *, upsampler: nn.Module, video_vae: nn.Module) -> Tensor:
    """Double rows and columns of normalised video latents: ``[1, 128, F, H, W] -> [1, 128, F, 2H, 2W]``.

    The upsampler was trained on latents as the video VAE makes them: they are un-normalised before and normalised
    after, all in the upsampler's type, as the reference does it. The result has the type of ``video``.

    Args:
        video: on the upsampler's device.
        video_vae: on any device; only its statistics are read.
    """
    dtype = upsampler.get_parameter("final_conv.weight").dtype
    mean, std = (
        video_vae.get_buffer(name).to(video.device, dtype).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        upsampled: Tensor = upsampler(video.to(dtype) * std + mean)
        return ((upsampled - mean) / std).to(video.dtype)
