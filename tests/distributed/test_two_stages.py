"""Two stages on one Runtime, in every residency. Oracles: self, and the checkpoint."""

from __future__ import annotations

import dataclasses
import wave
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_sp import GuidanceRequest, Image, Lora, PlanError, Request, Runtime, Settings, write_clip
from ltx_sp.demo import write_demo
from ltx_sp.read import read_video
from ltx_sp.request import CHOICES
from tests.support.ranks import run_ranks

STG = GuidanceRequest(stg_blocks=(1,))
# 2 x 4 x 6 cells and 24 more tokens for the picture, at half size 2 x 2 x 3 and 6: 72 and 18 tokens.
REQUEST = Request(
    "a robot dancing", "blurry", height=128, width=192, num_frames=9, num_inference_steps=2, video=STG, audio=STG
)
MODES = tuple(mode for mode in CHOICES["residency"] if mode != "auto")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    checkpoint = write_demo(tmp_path_factory.mktemp("demo") / "2.3")
    folder = checkpoint.parent
    factors = load_file(folder / "distilled_lora.safetensors")
    some = {name: tensor * 3 for name, tensor in factors.items() if ".attn1." in name}
    save_file(some, folder / "style.safetensors")
    save_file({name: tensor * -2 for name, tensor in factors.items() if ".ff." in name}, folder / "other.safetensors")
    return Settings(
        checkpoint,
        folder / "gemma",
        device="cpu",
        pipeline="two-stages",
        spatial_upsampler_path=folder / "upsampler.safetensors",
        distilled_lora=Lora(folder / "distilled_lora.safetensors"),
    )


def _tensors(runtime: Runtime, request: Request) -> list[Tensor]:
    result = runtime.generate(request)
    return [tensor for latents in result.stages for tensor in (latents.video, latents.audio)]


def _in_all_modes(rank: int, num_ranks: int, settings: Settings, modes: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """What three equal requests gave, by mode."""
    given = {}
    for mode in modes:
        with Runtime.load(dataclasses.replace(settings, residency=mode)) as runtime:
            for number in range(3):
                given[f"{mode} {number}"] = _tensors(runtime, REQUEST)
    return given


def test_all_modes_and_all_requests_give_the_same_bits(settings: Settings) -> None:
    for given in run_ranks(_in_all_modes, 3, settings, MODES, timeout=300):
        first = given.pop("legacy 0")
        assert len(given) == 3 * len(MODES) - 1
        for name, tensors in given.items():
            assert all(map(torch.equal, tensors, first)), name


def _weights(runtime: Runtime) -> dict[str, Tensor]:
    runtime._components.enter(0)  # where it is after a request, or on its way to
    transformer = runtime._components["transformer"]
    return {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}


def _alternating(rank: int, num_ranks: int, settings: Settings, mode: str) -> tuple[list[bool], list[list[Tensor]]]:
    """Whether the weights were the checkpoint's after each request, and what the requests gave."""
    folder = settings.checkpoint_path.parent
    style, other = (Lora(folder / f"{name}.safetensors", 0.7) for name in ("style", "other"))
    clean = {
        name.removeprefix("model.diffusion_model."): tensor
        for name, tensor in load_file(settings.checkpoint_path).items()
    }
    is_clean, given = [], []
    with Runtime.load(dataclasses.replace(settings, residency=mode)) as runtime:
        for loras in ((), (style,), (other,), (style, other), (style,), ()):
            given.append(_tensors(runtime, dataclasses.replace(REQUEST, loras=loras)))
            weights = _weights(runtime)
            is_clean.append(all(torch.equal(tensor, clean[name]) for name, tensor in weights.items()))
    return is_clean, given


@pytest.mark.parametrize(
    ("mode", "num_ranks"), [("resident", 1), ("legacy", 2), ("snapshot", 2), ("snapshot-low-vram", 1), ("sharded", 2)]
)
def test_loras_of_single_requests_leave_no_trace(settings: Settings, mode: str, num_ranks: int) -> None:
    for is_clean, given in run_ranks(_alternating, num_ranks, settings, mode, timeout=300):
        assert all(is_clean), is_clean
        plain, style, other, both, style_again, plain_again = given
        assert all(map(torch.equal, plain, plain_again))
        assert all(map(torch.equal, style, style_again))
        for one, another in ((plain, style), (plain, other), (style, other), (style, both), (other, both)):
            assert not torch.equal(one[0], another[0])
            assert not torch.equal(one[2], another[2])


def test_a_request_s_lora_is_that_of_all_requests(settings: Settings) -> None:
    style = Lora(settings.checkpoint_path.parent / "style.safetensors", 0.7)
    with Runtime.load(settings) as runtime:
        own = _tensors(runtime, dataclasses.replace(REQUEST, loras=(style,)))
    with Runtime.load(dataclasses.replace(settings, loras=(style,))) as runtime:
        assert all(map(torch.equal, _tensors(runtime, REQUEST), own))


def _with_pictures(rank: int, num_ranks: int, settings: Settings) -> list[Tensor]:
    picture = settings.checkpoint_path.parent / "image.png"
    request = dataclasses.replace(REQUEST, images=(Image(picture), Image(picture, 5, 0.5)))
    layout = f"1x{num_ranks}"
    with Runtime.load(dataclasses.replace(settings, dtype="float32", parallel=layout)) as runtime:
        result = runtime.generate(request)
        assert [sum(stage.token_shares) for stage in result.plan.stages] == [18, 72]
    return [tensor for latents in result.stages for tensor in (latents.video, latents.audio)]


def test_tokens_of_pictures_are_shared_by_any_number_of_ranks(settings: Settings) -> None:
    (alone,) = run_ranks(_with_pictures, 1, settings, timeout=120)
    by_rank = run_ranks(_with_pictures, 4, settings, timeout=120)  # 18 tokens over four ranks: 5, 5, 4 and 4
    for tensors in by_rank:
        for ours, theirs in zip(tensors, alone, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert all(map(torch.equal, tensors[1::2], by_rank[0][1::2]))


def test_sharded_wants_several_ranks(settings: Settings) -> None:
    with pytest.raises(PlanError, match="sharded"):
        Runtime.load(dataclasses.replace(settings, residency="sharded"))


def _write_sound(path: Path) -> Tensor:
    """Half a second of two tones, 24 kHz, 16 bits."""
    seconds = torch.arange(12_000) / 24_000
    tones = torch.stack([torch.sin(2 * torch.pi * hertz * seconds) for hertz in (440, 660)]) * 0.5
    samples = (tones * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(samples.T.contiguous().numpy().tobytes())
    return samples.float() / 32768


def _given_sound(rank: int, num_ranks: int, settings: Settings, path: Path) -> tuple[list[Tensor], Tensor | None]:
    audio = Request(REQUEST.prompt, "blurry", height=128, width=128, num_frames=9, num_inference_steps=2, video=STG)
    with Runtime.load(dataclasses.replace(settings, dtype="float32")) as runtime:
        result = runtime.generate(dataclasses.replace(audio, audio_path=path))
    latents = [tensor for stage in result.stages for tensor in (stage.video, stage.audio)]
    if result.clip is None:
        return latents, None
    return latents, torch.cat([result.clip.waveform, torch.full((2, 1), result.clip.sample_rate)], dim=1)


def test_a_given_sound_is_kept_through_both_stages(settings: Settings, tmp_path: Path) -> None:
    samples = _write_sound(tmp_path / "tones.wav")
    by_rank = run_ranks(_given_sound, 2, settings, tmp_path / "tones.wav", timeout=120)
    (_, small, _, large), sound = by_rank[0]
    assert torch.equal(small, large), "both stages have the sound's own latents"
    assert all(map(torch.equal, by_rank[1][0][1::2], by_rank[0][0][1::2]))
    assert sound is not None
    assert sound[0, -1] == 24_000
    torch.testing.assert_close(sound[:, :-1], samples[:, : round(9 / 24 * 24_000)], atol=1e-4, rtol=0)


def test_given_frames_are_the_clip_s(settings: Settings, tmp_path: Path) -> None:
    one_stage = Settings(settings.checkpoint_path, settings.gemma_root, device="cpu", dtype="float32")
    request = Request(REQUEST.prompt, "blurry", height=64, width=64, num_frames=9, num_inference_steps=2, audio=STG)
    with Runtime.load(one_stage) as runtime:
        made = runtime.generate(dataclasses.replace(request, video=STG)).clip
        assert made is not None
        write_clip(made, tmp_path / "made.mp4")
        result = runtime.generate(dataclasses.replace(request, video_path=tmp_path / "made.mp4"))
    assert result.clip is not None
    frames = torch.cat(list(result.clip.frames))
    read = read_video(tmp_path / "made.mp4", height=64, width=64, num_frames=9, frame_rate=24)
    assert torch.equal(frames, ((read[0] + 1) / 2).permute(1, 2, 3, 0))
    assert result.clip.waveform.abs().max() > 0
    assert not torch.equal(result.clip.waveform, made.waveform)


def _with_little_memory(rank: int, num_ranks: int, settings: Settings, limit: int) -> list[Tensor]:
    """A device that has so many bytes, of which components have what they hold."""
    picture = settings.checkpoint_path.parent / "image.png"
    with pytest.MonkeyPatch.context() as patch, Runtime.load(settings) as runtime:
        components = runtime._components

        def free(device: torch.device) -> int:
            held = sum(components._num_bytes(name) for name in components.names if name in components)
            return max(0, limit - held)

        patch.setattr("ltx_sp.components.free_bytes", free)
        return _tensors(runtime, dataclasses.replace(REQUEST, images=(Image(picture),)))


@pytest.mark.parametrize(("num_ranks", "limit"), [(1, 0), (1, 18 * 2**20), (2, 12 * 2**20)])
def test_what_gives_way_comes_back(settings: Settings, num_ranks: int, limit: int) -> None:
    plenty, *_ = run_ranks(_with_little_memory, num_ranks, settings, 2**40, timeout=120)
    for tensors in run_ranks(_with_little_memory, num_ranks, settings, limit, timeout=120):
        assert all(map(torch.equal, tensors, plenty))
