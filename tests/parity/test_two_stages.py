"""Oracles: the reference's two-stage pipelines on the same tiny checkpoint; for HQ, which it has no run of, its tested
parts put together by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from ltx_sp import GuidanceRequest, Image, Lora, Request, Runtime, Settings, make_plan
from ltx_sp.components import Components
from ltx_sp.denoise import Denoiser, make_sampler, make_walk, run, steps_of
from ltx_sp.encode import encode_prompts
from ltx_sp.handoff import Conditioning, Latents
from ltx_sp.model import upstream
from ltx_sp.model.attention import SdpaBackend
from ltx_sp.model.dit import Transformer
from ltx_sp.model.streams import Streams
from ltx_sp.observe import Observer
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.recipes import Guidance, deal_passes, ltx2_sigmas
from ltx_sp.spec import LatentShape, ModelSpec
from ltx_sp.start import StreamStart, audio_positions, unpatchify, video_positions
from ltx_sp.upsample import upsample
from ltx_sp.weights.checkpoint import open_checkpoint
from profiling.models import full_size
from tests.parity.test_one_stage import ROBOT
from tests.support.ranks import run_cli, run_ranks

# The cases' names for what each stage gave.
_STAGES = {"two_stage": ("s1_2", "s2_6"), "two_stage_i2v": ("s1_2", "s2_6"), "distilled": ("s2", "s6")}
_UNGUIDED = GuidanceRequest()
SPEC = ModelSpec((2, 3), "published", full_size(), {})


def settings(folder: Path, pipeline: str, residency: str = "auto") -> Settings:
    lora = None if pipeline == "distilled" else Lora(folder / "distilled_lora.safetensors")
    return Settings(
        folder / "ltx-2.3.safetensors",
        folder / "gemma",
        device="cpu",
        dtype="float32",
        pipeline=pipeline,
        spatial_upsampler_path=folder / "upsampler.safetensors",
        distilled_lora=lora,
        residency=residency,
    )


def request(folder: Path, case: str) -> Request:
    if case == "distilled":
        return dataclasses.replace(ROBOT, num_inference_steps=None, video=_UNGUIDED, audio=_UNGUIDED)
    if case == "two_stage_i2v":
        picture = folder / "image.png"
        return dataclasses.replace(ROBOT, images=(Image(picture), Image(picture, 8, 0.8)))
    return ROBOT


def _run(rank: int, num_ranks: int, folder: Path, case: str) -> dict[str, Tensor]:
    pipeline = "distilled" if case == "distilled" else "two-stages"
    with Runtime.load(settings(folder, pipeline)) as runtime:
        result = runtime.generate(request(folder, case))
        tensors = {"video": result.latents.video, "audio": result.latents.audio}
        for number, latents in enumerate(result.stages):
            tensors |= {f"{number}.video": latents.video, f"{number}.audio": latents.audio}
        if result.clip is not None:
            tensors |= {"frames": torch.cat(list(result.clip.frames)), "waveform": result.clip.waveform}
    return tensors


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("case", ["two_stage", "two_stage_i2v", "distilled"])
def test_both_stages_equal_the_reference(golden: Path, case: str, num_ranks: int) -> None:
    folder = golden / "pipeline-2.3"
    want = load_file(folder / f"{case}_io.safetensors")
    # The reference compresses the pictures by H.264, whose encoders differ from build to build.
    tolerance = 2e-2 if case == "two_stage_i2v" else 5e-4
    by_rank = run_ranks(_run, num_ranks, folder, case, timeout=200)
    for tensors in by_rank:
        for number, stage in enumerate(_STAGES[case]):
            for stream in ("video", "audio"):
                ours, theirs = tensors[f"{number}.{stream}"], want[f"{stage}.{stream}_latent"]
                torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
        assert torch.equal(tensors["video"], tensors["1.video"])
        kept = "1.audio" if case == "distilled" else "0.audio"
        assert torch.equal(tensors["audio"], tensors[kept])
        assert torch.equal(tensors["audio"], by_rank[0]["audio"])
    assert (by_rank[0]["frames"] - want["frames"]).abs().mean() < (5e-3 if case == "two_stage_i2v" else 1e-4)
    assert by_rank[0]["waveform"].shape == want["waveform"].shape


def _arguments(folder: Path, out: Path, pipeline: str, *more: str) -> list[str | Path]:
    return [
        "--checkpoint-path", folder / "ltx-2.3.safetensors", "--gemma-root", folder / "gemma",
        "--pipeline", pipeline, "--spatial-upsampler-path", folder / "upsampler.safetensors",
        "--prompt", ROBOT.prompt, "--negative-prompt", "blurry", "--seed", "42", "--height", "128", "--width", "128",
        "--num-frames", "9", "--dtype", "float32", "--device", "cpu", "--output-path", out / "out.mp4",
        "--save-latents", out / "latents.safetensors", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_from_the_command_line(golden: Path, tmp_path: Path, num_ranks: int) -> None:
    folder = golden / "pipeline-2.3"
    lora = ("--distilled-lora", str(folder / "distilled_lora.safetensors"))
    blocks = ("--video-stg-blocks", "1", "--audio-stg-blocks", "1", "--num-inference-steps", "4")
    images = ("--image", str(folder / "image.png"), "--image", str(folder / "image.png"), "8", "0.8")
    report = ("--report", str(tmp_path / "report.json"))
    result = run_cli(
        _arguments(folder, tmp_path, "two-stages", *lora, *blocks, *images, *report), num_ranks, timeout=200
    )
    assert result.returncode == 0, result.stderr
    want = load_file(folder / "two_stage_i2v_io.safetensors")
    latents = load_file(tmp_path / "latents.safetensors")
    torch.testing.assert_close(latents["video_latent"], want["s2_6.video_latent"], atol=2e-2, rtol=0)
    torch.testing.assert_close(latents["audio_latent"], want["s1_2.audio_latent"], atol=2e-2, rtol=0)
    for phase in ("validate input", "encode text", "encode images", "denoise", "upsample", "refine", "decode", "mux"):
        assert phase in result.stderr, phase
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.safetensors", "out.mp4", "report.json"]


def test_the_sigmas_of_the_reference_are_the_defaults(golden: Path) -> None:
    want = load_file(golden / "pipeline-2.3" / "distilled_io.safetensors")
    plan = make_plan(request(golden / "pipeline-2.3", "distilled"), SPEC, settings(golden, "distilled"))
    for stage, name in zip(plan.stages, ("s0", "s4"), strict=True):
        torch.testing.assert_close(torch.tensor(stage.sigmas), want[f"{name}.sigmas"], atol=0, rtol=0)


def _by_hand(folder: Path) -> tuple[Latents, Latents]:
    """The HQ pipeline's two stages: res_2s as the golden loops have it, and weights merged as LoRAs of the user's."""
    mesh, device = Mesh.alone(), torch.device("cpu")
    hq = settings(folder, "two-stages-hq")
    plain = Settings(hq.checkpoint_path, hq.gemma_root, device="cpu", dtype="float32")
    checkpoint = open_checkpoint(hq.checkpoint_path, hq.gemma_root, hq.spatial_upsampler_path)

    def load(strength: float, *names: str) -> Components:
        lora = Lora(folder / "distilled_lora.safetensors", strength)
        components = Components(checkpoint, dataclasses.replace(plain, loras=(lora,)), mesh, Observer(0, device))
        components.check()
        with components.loading(names):
            pass
        return components

    first = load(0.25, "text_encoder", "connectors", "transformer", "video_vae")
    texts = encode_prompts(
        [ROBOT.prompt, ROBOT.negative_prompt],
        tokenizer=upstream.load_tokenizer(checkpoint.tokenizer_root),
        text_encoder=first["text_encoder"],
        connectors=first["connectors"],
        device=device,
    )
    conditioning = Conditioning(texts[0], texts[1])
    generator = torch.Generator().manual_seed(ROBOT.seed)
    shape = LatentShape(frames=2, height=2, width=2, audio_frames=9)

    def noised(video: Tensor, audio: Tensor, sigma: float, shape: LatentShape) -> tuple[StreamStart, StreamStart]:
        starts = []
        for clean, positions in (
            (video, video_positions(shape, 24.0, device)),
            (audio, audio_positions(shape.audio_frames, checkpoint.spec, device)),
        ):
            noise = torch.randn(clean.shape, generator=generator)
            x = torch.lerp(clean, noise, sigma) if sigma < 1 else noise
            starts.append(StreamStart(x, clean, torch.ones(1, 1, 1), positions))
        return starts[0], starts[1]

    def walk(
        components: Components, start: tuple[StreamStart, StreamStart], sigmas: Sequence[float], guided: bool
    ) -> Streams:
        video = Guidance(cfg_scale=3.0, rescale_scale=0.45, modality_scale=3.0) if guided else Guidance()
        audio = Guidance(cfg_scale=7.0, rescale_scale=1.0, modality_scale=3.0) if guided else Guidance()
        transformer = components["transformer"]
        assert isinstance(transformer, Transformer)
        with torch.no_grad():
            denoiser = Denoiser(
                transformer, SdpaBackend(), mesh, *start, conditioning,
                segments=deal_passes(video, audio, transformer.spec.num_layers, num_hands=1, max_batch_size=1),
                video_guidance=video, audio_guidance=audio, video_to_audio="partial",
            )  # fmt: skip
            sampler, noises = make_sampler("res_2s", ROBOT.seed, Streams(start[0].x_1TC, start[1].x_1TC))
            return run(steps_of(denoiser, sampler), make_walk(sampler, sigmas, noises, device), *start, mesh)

    start = noised(torch.zeros(1, 8, 128), torch.zeros(1, 9, 128), 1.0, shape)
    small = unpatchify(walk(first, start, ltx2_sigmas(3, num_tokens=8), guided=True), shape)
    upsampler = upstream.build_upsampler(checkpoint.upsampler_config)
    upsampler.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(folder / "upsampler.safetensors").items()}, assign=True
    )
    large = upsample(small.video, upsampler=upsampler, video_vae=first["video_vae"])
    shape = dataclasses.replace(shape, height=4, width=4)
    tokens = rearrange(large, "b c f h w -> b (f h w) c"), rearrange(small.audio, "b c a m -> b a (c m)")
    start = noised(*tokens, 0.909375, shape)
    second = load(0.5, "transformer")
    return small, unpatchify(walk(second, start, (0.909375, 0.725, 0.421875, 0.0), guided=False), shape)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_hq_from_the_command_line(golden: Path, tmp_path: Path, num_ranks: int) -> None:
    """31 predictions more or less: rounding grows with every step, and with guidance."""
    folder = golden / "pipeline-2.3"
    lora = ("--distilled-lora", str(folder / "distilled_lora.safetensors"))
    arguments = _arguments(folder, tmp_path, "two-stages-hq", *lora, "--num-inference-steps", "3")
    result = run_cli(arguments, num_ranks, timeout=200)
    assert result.returncode == 0, result.stderr
    small, large = _by_hand(folder)
    latents = load_file(tmp_path / "latents.safetensors")
    torch.testing.assert_close(latents["video_latent"], large.video, atol=5e-4, rtol=0)
    torch.testing.assert_close(latents["audio_latent"], small.audio, atol=5e-4, rtol=0)
