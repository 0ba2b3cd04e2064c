"""Text encoder, connectors, VAEs and vocoder against the reference implementation's golden files: a whole tiny 2.3 in
the published layout, opened and loaded as any checkpoint is. The upsampler against diffusers' module called by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ltx_sp.decode import Tiling, decode, decode_frames
from ltx_sp.encode import encode_prompts
from ltx_sp.handoff import Clip, Latents
from ltx_sp.model import upstream
from ltx_sp.upsample import upsample
from ltx_sp.weights.checkpoint import Checkpoint, open_checkpoint
from ltx_sp.weights.load import load

FLOAT32_CASES = ("one_stage", "one_stage_odd")
CPU = torch.device("cpu")


class Reference:
    """One run of the reference's one-stage pipeline."""

    def __init__(self, folder: Path, case: str):
        with safe_open(folder / f"{case}_io.safetensors", "pt") as file:
            self.prompt: str = json.loads(file.metadata()["args"])["prompt"]
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "pipeline-2.3"


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / "ltx-2.3.safetensors", folder / "gemma", folder / "upsampler.safetensors")


def _loaded(checkpoint: Checkpoint, module: nn.Module, component: str, dtype: torch.dtype) -> nn.Module:
    names = checkpoint.keymap(component)
    report = load(module, checkpoint.index(component), names, device=CPU, dtype=dtype, component=component)
    assert report.unexpected == ()
    return module


def _context(checkpoint: Checkpoint, prompt: str, dtype: torch.dtype) -> Tensor:
    gemma, spec = checkpoint.gemma_config, checkpoint.spec
    (context,) = encode_prompts(
        [prompt],
        tokenizer=upstream.load_tokenizer(checkpoint.tokenizer_root),
        text_encoder=_loaded(checkpoint, upstream.build_text_encoder(gemma), "text_encoder", dtype),
        connectors=_loaded(checkpoint, upstream.build_connectors(spec, gemma), "connectors", dtype),
        device=CPU,
    )
    assert context.video.dtype == context.audio.dtype == dtype
    assert context.audio.shape == (1, 1024, spec.transformer.audio.context_dim)
    return context.video


def _decoders(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    spec = checkpoint.spec
    return {
        "video_vae": _loaded(checkpoint, upstream.build_video_vae(spec), "video_vae", dtype),
        "audio_vae": _loaded(checkpoint, upstream.build_audio_vae(spec), "audio_vae", dtype),
        "vocoder": _loaded(checkpoint, upstream.build_vocoder(spec), "vocoder", torch.float32),
    }


@pytest.fixture(scope="module")
def decoders(checkpoint: Checkpoint) -> dict[str, Any]:
    return _decoders(checkpoint, torch.float32)


def _clip(reference: Reference, decoders: dict[str, Any], **options: Any) -> Clip:
    latents = Latents(video=reference["s2.video_latent"], audio=reference["s2.audio_latent"])
    return decode(latents, frame_rate=24.0, **decoders, **options)


@pytest.mark.parametrize("case", FLOAT32_CASES)
def test_text_context(case: str, folder: Path, checkpoint: Checkpoint) -> None:
    reference = Reference(folder, case)
    context = _context(checkpoint, reference.prompt, torch.float32)
    torch.testing.assert_close(context, reference["s0.video_context"], rtol=0, atol=1e-5)


def test_text_context_in_bf16_is_as_good_as_the_reference(folder: Path, checkpoint: Checkpoint) -> None:
    """Where the two round differently they differ by no more than either differs from float32."""
    reference = Reference(folder, "one_stage_bf16")
    exact, theirs = Reference(folder, "one_stage")["s0.video_context"], reference["s0.video_context"].float()
    ours = _context(checkpoint, reference.prompt, torch.bfloat16).float()
    rounding = (theirs - exact).norm()
    assert (ours - exact).norm() < 1.1 * rounding
    assert (ours - theirs).norm() < 1.5 * rounding
    assert rounding < 0.02 * exact.norm()


@pytest.mark.parametrize("case", FLOAT32_CASES)
def test_frames_and_waveform(case: str, folder: Path, decoders: dict[str, Any]) -> None:
    reference = Reference(folder, case)
    clip = _clip(reference, decoders)
    frames = torch.cat(list(clip.frames))
    assert (clip.num_frames, clip.height, clip.width, 3) == tuple(frames.shape)
    assert clip.sample_rate == 48000
    torch.testing.assert_close(frames, reference["frames"], rtol=0, atol=1e-4)
    torch.testing.assert_close(clip.waveform, reference["waveform"], rtol=0, atol=1e-3)


def test_frames_and_waveform_in_bf16(folder: Path, checkpoint: Checkpoint) -> None:
    reference = Reference(folder, "one_stage_bf16")
    clip = _clip(reference, _decoders(checkpoint, torch.bfloat16))
    frames = torch.cat(list(clip.frames))
    assert frames.dtype == clip.waveform.dtype == torch.float32
    # bf16 has steps of 1/256 below 1.
    assert (frames - reference["frames"].float()).abs().max() < 3 / 256
    assert (clip.waveform - reference["waveform"].float()).abs().max() < 5e-3


def test_one_tile_changes_nothing(folder: Path, decoders: dict[str, Any]) -> None:
    reference = Reference(folder, "one_stage_odd")
    tiled = torch.cat(list(_clip(reference, decoders, tiling=Tiling(side=192, overlap=64)).frames))
    whole = torch.cat(list(_clip(reference, decoders, tiling=None).frames))
    assert torch.equal(tiled, whole)


# The decoder sees less than eight latent cells far: in a tile, what is further than that from a cut is exact.
REACH = 8


def test_tiles_in_space_agree_with_the_whole(decoders: dict[str, Any]) -> None:
    vae, latent = decoders["video_vae"], torch.randn(1, 128, 2, 3, 30)
    (whole,) = decode_frames(latent, vae, None)
    (tiled,) = decode_frames(latent, vae, Tiling(side=32 * 17, overlap=128))
    same = 32 * (17 - REACH)
    for part in (slice(0, same), slice(whole.shape[2] - same, None)):
        torch.testing.assert_close(tiled[:, :, part], whole[:, :, part], rtol=0, atol=1e-5)
    assert not torch.equal(tiled, whole)


def test_tiles_in_time_agree_with_the_whole(decoders: dict[str, Any]) -> None:
    vae, latent = decoders["video_vae"], torch.randn(1, 128, 21, 2, 2)
    (whole,) = decode_frames(latent, vae, None)
    chunks = list(decode_frames(latent, vae, Tiling(frames=96, frame_overlap=24)))
    assert len(chunks) == 2
    tiled = torch.cat(chunks)
    same = 8 * (12 - REACH)
    for part in (slice(0, same - 7), slice(len(whole) - same, None)):
        torch.testing.assert_close(tiled[part], whole[part], rtol=0, atol=1e-5)
    assert not torch.equal(tiled, whole)


def test_upsampler(folder: Path, checkpoint: Checkpoint, decoders: dict[str, Any]) -> None:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    stored = {name: tensor.float() for name, tensor in load_file(folder / "upsampler.safetensors").items()}
    theirs = LTX2LatentUpsamplerModel(mid_channels=32, num_blocks_per_stage=1, use_rational_resampler=False)
    theirs.load_state_dict(stored)
    statistics = load_file(folder / "ltx-2.3.safetensors")
    mean, std = (
        statistics[f"vae.per_channel_statistics.{name}-of-means"].float().view(1, -1, 1, 1, 1)
        for name in ("mean", "std")
    )
    video = Reference(folder, "two_stage")["s1_2.video_latent"]
    with torch.no_grad():
        expected = (theirs(video * std + mean) - mean) / std
    ours = _loaded(checkpoint, upstream.build_upsampler(checkpoint.upsampler_config), "upsampler", torch.float32)
    result = upsample(video, upsampler=ours, video_vae=decoders["video_vae"])
    assert result.shape == (1, 128, 2, 4, 4)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("component", "prefix"), [("video_vae", "vae."), ("audio_vae", "audio_vae.")])
def test_autoencoders_have_the_encoder_of_the_file(
    component: str, prefix: str, folder: Path, checkpoint: Checkpoint, decoders: dict[str, Any]
) -> None:
    names = checkpoint.keymap(component)
    loaded = {f"encoder.{name}": tensor for name, tensor in decoders[component].encoder.named_parameters()}
    with safe_open(folder / "ltx-2.3.safetensors", "pt") as file:
        stored = [name for name in file.keys() if name.startswith(f"{prefix}encoder.")]  # noqa: SIM118
        assert len(stored) > 20
        assert {names.to_parameter(name) for name in stored} == set(loaded)
        for name, parameter in loaded.items():
            assert torch.equal(parameter, file.get_tensor(names.to_checkpoint(name)).float())
