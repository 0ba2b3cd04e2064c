"""Latents x2. Oracles: diffusers' own module, called by hand between the statistics; a resampling whose result is
known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ltx_sp.demo_models import upsampler_config
from ltx_sp.model import upstream
from ltx_sp.upsample import upsample

KERNEL = "upsampler.blur_down.kernel"


class Statistics(nn.Module):
    """As much of a video VAE as is needed."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latents_mean", 0.3 * torch.randn(128))
        self.register_buffer("latents_std", 0.5 + torch.rand(128))


class Repeat(nn.Module):
    """The nearest neighbour, in the place of an upsampler."""

    def __init__(self) -> None:
        super().__init__()
        self.final_conv = nn.Conv3d(1, 1, 1)

    def forward(self, video: Tensor) -> Tensor:
        return video.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)


def _pair(version: str) -> tuple[nn.Module, nn.Module]:
    """Our module and diffusers', with equal random weights; the resampler of 2.0 is rational, that of 2.3 plain."""
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    config = upsampler_config(version) | {"mid_channels": 64, "num_blocks_per_stage": 2}
    theirs = LTX2LatentUpsamplerModel(mid_channels=64, num_blocks_per_stage=2, use_rational_resampler=version == "2.0")
    ours = upstream.build_upsampler(config).to_empty(device="cpu")
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != KERNEL}
    ours.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_equals_diffusers_between_the_statistics(version: str, dtype: torch.dtype) -> None:
    ours, theirs = (module.to(dtype).requires_grad_() for module in _pair(version))
    vae, video = Statistics(), torch.randn(1, 128, 3, 4, 5).to(dtype)
    before = video.clone()
    mean, std = (x.view(1, -1, 1, 1, 1).to(dtype) for x in (vae.latents_mean, vae.latents_std))
    with torch.no_grad():
        expected = (theirs(video * std + mean) - mean) / std
    result = upsample(video, upsampler=ours, video_vae=vae)
    assert result.shape == (1, 128, 3, 8, 10)
    assert result.dtype == dtype
    assert not result.requires_grad
    assert torch.equal(result, expected)
    assert torch.equal(video, before)


def test_normalises_by_what_it_un_normalised_by() -> None:
    video = torch.randn(1, 128, 2, 3, 4)
    result = upsample(video, upsampler=Repeat(), video_vae=Statistics())
    torch.testing.assert_close(result, Repeat()(video))


def test_the_upsampler_sees_its_own_type_and_the_caller_gets_theirs() -> None:
    seen: list[torch.dtype] = []
    upsampler, vae = Repeat().bfloat16(), Statistics()
    upsampler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    result = upsample(torch.randn(1, 128, 1, 2, 2), upsampler=upsampler, video_vae=vae)
    assert seen == [torch.bfloat16]
    assert result.dtype == torch.float32
    assert vae.latents_mean.dtype == torch.float32
