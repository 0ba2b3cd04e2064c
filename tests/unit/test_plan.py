"""Oracles: the reference's published numbers, the golden checkpoints' headers, and arithmetic done by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ltx_sp.cost import DEFAULT_MACHINE, Machine, Run, machine_of, num_parameters, predict, read_machine, shares
from ltx_sp.errors import PlanError, RequestError, UnsupportedError, WeightsError
from ltx_sp.model.blocks import Block
from ltx_sp.plan import make_plan
from ltx_sp.recipes import (
    CONDITIONAL,
    ISOLATED,
    PERTURBED,
    UNCONDITIONAL,
    Guidance,
    Segment,
    deal_passes,
    guidance_passes,
    ltx2_sigmas,
    pipeline_defaults,
)
from ltx_sp.request import DISTILLED_SIGMAS, GuidanceRequest, Image, Lora, Request, Settings
from ltx_sp.spec import (
    LatentShape,
    ModelSpec,
    latent_shape,
    nearest_valid,
    parse_version,
    transformer_spec,
    transformer_spec_from_diffusers,
)
from profiling.models import full_size

SPEC = ModelSpec((2, 3), "published", full_size(), {})
SETTINGS = Settings(Path("model.safetensors"))


def on_tokens(num_ranks: int) -> Settings:
    """All ranks on the token axis."""
    return dataclasses.replace(SETTINGS, parallel=f"1x{num_ranks}")


def test_shares_add_up_and_differ_by_one_at_most() -> None:
    for total in range(12):
        for parts in range(1, 8):
            sizes = shares(total, parts)
            assert sum(sizes) == total
            assert len(sizes) == parts
            assert max(sizes) - min(sizes) <= 1
            assert list(sizes) == sorted(sizes, reverse=True)


def test_the_schedule_has_the_reference_values(golden: Path) -> None:
    with safe_open(golden / "transformer" / "ltx-2.3-sampling_io.safetensors", "pt") as file:
        assert ltx2_sigmas(30) == tuple(file.get_tensor("sigmas.ltx2_30").tolist())
    with safe_open(golden / "pipeline-2.3" / "one_stage_odd_io.safetensors", "pt") as file:
        assert ltx2_sigmas(3) == tuple(file.get_tensor("s0.sigmas").tolist())
    assert [round(sigma, 5) for sigma in ltx2_sigmas(40)[:3]] == [1.0, 0.99645, 0.99274]
    assert [round(sigma, 5) for sigma in ltx2_sigmas(40)[-5:-1]] == [0.42072, 0.33781, 0.23394, 0.1]
    # HQ, 15 steps, shifted by the clip's 8160 tokens.
    assert [round(sigma, 5) for sigma in ltx2_sigmas(15, 8160)[-4:]] == [0.6739, 0.50338, 0.1, 0.0]
    assert ltx2_sigmas(1) == (1.0, 0.0)


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_parameters_are_counted_as_the_checkpoint_has_them(golden: Path, version: str) -> None:
    with safe_open(golden / "transformer" / f"ltx-{version}-tiny.safetensors", "pt") as file:
        spec = transformer_spec(json.loads(file.metadata()["config"])["transformer"])
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert num_parameters(spec) == stored


def test_the_published_model_has_its_published_size() -> None:
    assert 18e9 < num_parameters(full_size()) < 22e9


def test_latent_sizes() -> None:
    assert latent_shape(121, 768, 1280, 24.0, SPEC) == LatentShape(16, 24, 40, 126)
    assert latent_shape(9, 128, 128, 24.0, SPEC) == LatentShape(2, 4, 4, 9)
    assert latent_shape(17, 96, 160, 24.0, SPEC) == LatentShape(3, 3, 5, 18)
    assert latent_shape(121, 768, 1280, 24.0, SPEC).video_tokens == 15360


@pytest.mark.parametrize(
    ("value", "step", "offset", "nearest"), [(100, 32, 0, 96), (1, 32, 0, 32), (120, 8, 1, 121), (2, 8, 1, 1)]
)
def test_nearest_valid(value: int, step: int, offset: int, nearest: int) -> None:
    assert nearest_valid(value, step, offset) == nearest


def test_versions() -> None:
    assert parse_version("2.3.0") == (2, 3, 0)
    assert parse_version("2.5.0-rc1") == (2, 5, 0)
    assert parse_version(None) == ()
    assert parse_version("unknown") == ()
    assert pipeline_defaults(SPEC, "one-stage").video.stg_blocks == (28,)
    assert pipeline_defaults(SPEC, "one-stage").num_inference_steps == 30
    older = dataclasses.replace(SPEC, version=())
    assert pipeline_defaults(older, "one-stage").video.stg_blocks == (29,)
    assert pipeline_defaults(older, "one-stage").num_inference_steps == 40


def test_passes_follow_what_either_stream_wants() -> None:
    off = Guidance()
    assert guidance_passes(off, off) == (CONDITIONAL,)
    assert guidance_passes(Guidance(cfg_scale=3), off) == (CONDITIONAL, UNCONDITIONAL)
    assert guidance_passes(off, Guidance(stg_scale=1)) == (CONDITIONAL, PERTURBED)
    full = Guidance(cfg_scale=3, stg_scale=1, modality_scale=3)
    assert guidance_passes(full, off) == (CONDITIONAL, PERTURBED, UNCONDITIONAL, ISOLATED)


def test_a_plan_is_decided_in_full() -> None:
    plan = make_plan(Request("a robot", height=768, width=1280), SPEC, on_tokens(3), 3)
    (stage,) = plan.stages
    assert stage.layout == (1, 3)
    assert stage.token_shares == (5120, 5120, 5120)
    assert stage.head_shares == (11, 11, 10)
    assert plan.num_steps == 30
    assert stage.video_guidance == pipeline_defaults(SPEC, "one-stage").video
    assert stage.layout == (1, 3)
    assert stage.prediction.weight_bytes == num_parameters(full_size()) * 2
    text = plan.describe()
    facts = ["1280x768", "121 frames", "15360 video tokens", "126 audio tokens", "5120", "10 to 11 heads"]
    for fact in [*facts, "conditional, unconditional, perturbed from block 28, isolated"]:
        assert fact in text


C, P, U, M = CONDITIONAL, PERTURBED, UNCONDITIONAL, ISOLATED


@pytest.mark.parametrize(
    ("max_batch_size", "segments"),
    [
        (1, [((C,), 0, 28), ((C,), 28, 48, 0), ((U,), 0, 48), ((P,), 28, 48, 0), ((M,), 0, 48)]),
        (2, [((C, U), 0, 28), ((C, U), 28, 48, 0), ((P,), 28, 48, 0), ((M,), 0, 48)]),
        (3, [((C, U), 0, 28), ((C, U, P), 28, 48, 0), ((M,), 0, 48)]),
        (9, [((C, U), 0, 28), ((C, U, P), 28, 48, 0), ((M,), 0, 48)]),
    ],
)
def test_batches_hold_as_many_passes_as_allowed(max_batch_size: int, segments: list[tuple[Any, ...]]) -> None:
    settings = dataclasses.replace(SETTINGS, max_batch_size=max_batch_size)
    (stage,) = make_plan(Request("a robot"), SPEC, settings).stages
    assert stage.segments == (tuple(Segment(*segment) for segment in segments),)


def test_the_perturbed_pass_parts_where_either_stream_is_perturbed_first() -> None:
    video, audio = Guidance(stg_scale=1, stg_blocks=(7, 5)), Guidance(stg_scale=1, stg_blocks=(9, 3))
    silent = dataclasses.replace(audio, stg_scale=0)

    def parting(video: Guidance, audio: Guidance) -> list[int]:
        ((*segments,),) = deal_passes(video, audio, 12, num_hands=1, max_batch_size=1)
        return [segment.start for segment in segments if segment.passes == (P,)]

    assert parting(video, audio) == [3]
    assert parting(video, silent) == [5]
    assert parting(dataclasses.replace(video, stg_blocks=(0, 5)), audio) == [0]


def test_passes_share_a_batch_where_that_saves_time_and_memory_allows() -> None:
    request = Request("a robot", height=768, width=1280)

    def batch(machine: Machine, settings: Settings = SETTINGS) -> int:
        (stage,) = make_plan(request, SPEC, settings, 1, machine).stages
        return max(len(segment.passes) for segment in stage.segments[0])

    slow = dataclasses.replace(DEFAULT_MACHINE, read_bytes_per_second=2e11)
    assert batch(slow) == 3
    assert batch(dataclasses.replace(slow, memory_bytes=40e9)) == 2
    assert batch(dataclasses.replace(slow, memory_bytes=1e9)) == 1
    assert batch(machine_of("cpu")) == 1
    # Where reading weights costs little, a batch saves little, and skips of single passes do.
    assert batch(DEFAULT_MACHINE) == 1
    assert batch(slow, dataclasses.replace(SETTINGS, max_batch_size=1)) == 1


def test_the_memory_is_that_of_the_rank_which_needs_most() -> None:
    """Of two hands the first has a batch of two, the second more to do."""
    request = Request("a robot", height=768, width=1280)
    one, two = (
        make_plan(request, SPEC, dataclasses.replace(SETTINGS, parallel="2x1", max_batch_size=size), 2)
        for size in (1, 2)
    )
    first, second = two.stages[0].predictions
    assert first.flops < second.flops
    assert two.working_bytes == first.activation_bytes > second.activation_bytes == one.working_bytes


def test_what_replicated_audio_costs_is_counted_whole() -> None:
    """Its weights from the model itself; with ``gather`` every rank attends from it over all video keys."""
    spec = full_size(num_layers=2)
    with torch.device("meta"):
        block = Block(spec)
    own = {"audio_attn1", "audio_ff"} | {f"audio_attn2.{name}" for name in ("to_q", "to_out")}
    own |= {f"audio_to_video_attn.{name}" for name in ("to_k", "to_v")}
    own |= {f"video_to_audio_attn.{name}" for name in ("to_q", "to_out")}
    matrices = [
        value.numel()
        for name, value in block.named_parameters()
        if name.startswith(tuple(own)) and name.endswith("weight") and value.dim() == 2 and "gate" not in name
    ]
    counts = {
        strategy: predict(
            spec, 15_360, 126, [Run(1, 2, 2, 2, 2, 2)], num_ranks=2, prompts=1, element_size=2, video_to_audio=strategy
        )
        for strategy in ("partial", "gather")
    }
    assert {cost.audio_bytes for cost in counts.values()} == {2 * 2 * sum(matrices)}
    more = 2 * 2 * 2 * 126 * (15_360 - 7_680) * spec.cross_width
    assert counts["gather"].flops - counts["partial"].flops == more


def test_predicted_work_is_that_of_the_published_figures() -> None:
    """About 594 TFLOP for one forward of 15 360 tokens, and 59 MB per block and rank on eight ranks."""
    request = Request("a robot", height=768, width=1280, sigmas=DISTILLED_SIGMAS)
    alone, eight = (make_plan(request, SPEC, on_tokens(ranks), ranks).stages[0].prediction for ranks in (1, 8))
    assert 550e12 < alone.flops < 640e12
    assert round(eight.received_bytes / 48 / 1e6) == 59
    assert alone.collectives == 0
    assert eight.collectives == 3 * 48


def test_blocks_that_passes_share_are_predicted_once() -> None:
    """20 of 48 blocks of the perturbed pass, one without self-attention; about a tenth less for the isolated one."""
    request = Request("a robot", height=768, width=1280)
    unguided = dataclasses.replace(request, sigmas=DISTILLED_SIGMAS)
    settings = dataclasses.replace(SETTINGS, max_batch_size=1)
    guided, one = (make_plan(asked, SPEC, settings).stages[0].prediction for asked in (request, unguided))
    assert guided.flops / one.flops == pytest.approx(1 + 1 + 20 / 48 + 0.9, abs=0.01)
    assert guided.attention_flops == pytest.approx(one.attention_flops * (3 + 19 / 48), rel=1e-9)


def test_equal_requests_have_equal_digests_and_others_do_not() -> None:
    request = Request("a robot")
    digest = make_plan(request, SPEC, SETTINGS, 2).digest()
    assert make_plan(Request("a robot"), SPEC, SETTINGS, 2).digest() == digest
    for other in (dataclasses.replace(request, seed=11), dataclasses.replace(request, prompt="a fox")):
        assert make_plan(other, SPEC, SETTINGS, 2).digest() != digest
    assert make_plan(request, SPEC, dataclasses.replace(SETTINGS, dtype="float32"), 2).digest() != digest


def test_distilled_sigmas_run_unguided_unless_asked() -> None:
    request = Request("a robot", sigmas=DISTILLED_SIGMAS)
    assert make_plan(request, SPEC, SETTINGS).stages[0].passes == (CONDITIONAL,)
    guided = dataclasses.replace(request, video=GuidanceRequest(cfg_guidance_scale=3.0))
    assert make_plan(guided, SPEC, SETTINGS).stages[0].passes == (CONDITIONAL, UNCONDITIONAL)


def test_a_decoder_that_reflects_needs_two_cells() -> None:
    request = Request("a robot", height=32, width=64)
    assert make_plan(request, SPEC, SETTINGS).stages[0].shape.height == 1
    for section in ({"_class_name": "x"}, {"decoder_spatial_padding_mode": "reflect"}):
        older = dataclasses.replace(SPEC, sections={"vae": section})
        with pytest.raises(PlanError, match=r"height = 32 is too small .* Nearest: 64"):
            make_plan(request, older, SETTINGS)
    newer = dataclasses.replace(SPEC, sections={"vae": {"spatial_padding_mode": "zeros"}})
    assert make_plan(request, newer, SETTINGS).stages[0].shape.height == 1


@pytest.mark.parametrize(
    ("parallel", "num_ranks", "layout", "dealt"),
    [
        ("2x4", 8, (2, 4), [{C, P}, {U, M}]),
        ("4x2", 8, (4, 2), [{C}, {P}, {U}, {M}]),
        ("3x1", 3, (3, 1), [{C, P}, {U}, {M}]),
    ],
)
def test_passes_are_dealt_over_the_guidance_axis(
    parallel: str, num_ranks: int, layout: tuple[int, int], dealt: list[set[str]]
) -> None:
    plan = make_plan(Request("a robot"), SPEC, dataclasses.replace(TWO_STAGES, parallel=parallel), num_ranks)
    first, second = plan.stages
    assert first.layout == layout
    assert [{name for segment in hand for name in segment.passes} for hand in first.segments] == dealt
    assert len(first.token_shares) == layout[1]
    assert second.layout == (1, num_ranks), "without guidance all ranks share the tokens"


@pytest.mark.parametrize(
    ("device", "layouts"),
    [
        # Blocks that two passes share are split by tokens alone, so these come first while exchanges are cheap.
        ("NVIDIA H200", {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (1, 4), 5: (1, 5), 8: (1, 8), 16: (4, 4)}),
        ("NVIDIA L40S", {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (4, 1), 5: (1, 5), 8: (4, 2), 16: (4, 4)}),
    ],
)
def test_links_decide_between_passes_and_tokens(device: str, layouts: dict[int, tuple[int, int]]) -> None:
    for num_ranks, layout in layouts.items():
        (stage,) = make_plan(Request("a robot"), SPEC, SETTINGS, num_ranks, machine_of(device)).stages
        assert stage.layout == layout


@pytest.mark.parametrize(
    ("parallel", "num_ranks", "words"),
    [
        ("2x2", 8, "which is 4 ranks, and there are 8"),
        ("8x1", 8, "would leave some idle. Use at most 4"),
        ("1x40", 40, "40 ranks are more than the model's 32 attention heads"),
    ],
)
def test_layouts_that_do_not_work_are_refused(parallel: str, num_ranks: int, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_plan(Request("a robot"), SPEC, dataclasses.replace(SETTINGS, parallel=parallel), num_ranks)


UPSAMPLER = Path("upsampler.safetensors")
TWO_STAGES = dataclasses.replace(
    SETTINGS, pipeline="two-stages", spatial_upsampler_path=UPSAMPLER, distilled_lora=Lora(Path("lora.safetensors"))
)
HQ = dataclasses.replace(TWO_STAGES, pipeline="two-stages-hq")
DISTILLED = dataclasses.replace(SETTINGS, pipeline="distilled", spatial_upsampler_path=UPSAMPLER)


def test_two_stages_start_at_half_size_and_refine_unguided() -> None:
    plan = make_plan(Request("a robot"), SPEC, TWO_STAGES, 4)
    first, second = plan.stages
    assert (plan.height, plan.width) == (1024, 1536)
    assert (first.height, first.width, second.height, second.width) == (512, 768, 1024, 1536)
    assert first.sigmas == ltx2_sigmas(30)
    assert second.sigmas == (0.909375, 0.725, 0.421875, 0.0)
    assert (len(first.passes), len(second.passes)) == (4, 1)
    assert plan.num_steps == 33
    assert plan.lora_strengths == (0.0, 1.0)
    assert plan.kept_audio == 0


def test_the_hq_pipeline_shifts_its_schedule_by_the_first_stage() -> None:
    plan = make_plan(Request("a robot"), SPEC, HQ)
    assert (plan.height, plan.width) == (1088, 1920)
    first, second = plan.stages
    assert [round(sigma, 5) for sigma in first.sigmas] == [
        1, 0.99349, 0.98601, 0.97734, 0.96715, 0.95501, 0.94031, 0.92214, 0.89910, 0.86892, 0.82771, 0.76803, 0.67390,
        0.50338, 0.1, 0,
    ]  # fmt: skip
    assert first.sampler == second.sampler == "res_2s"
    assert (first.num_steps, second.num_steps) == (31, 7)
    assert first.passes == (CONDITIONAL, UNCONDITIONAL, ISOLATED)
    assert plan.lora_strengths == (0.25, 0.5)
    halved = dataclasses.replace(HQ, distilled_lora=Lora(Path("lora.safetensors"), 0.5))
    assert make_plan(Request("a robot"), SPEC, halved).lora_strengths == (0.125, 0.25)


def test_the_distilled_pipeline_is_unguided_and_keeps_the_second_sound() -> None:
    plan = make_plan(Request("a robot"), SPEC, DISTILLED)
    assert [stage.sigmas for stage in plan.stages] == [DISTILLED_SIGMAS, (0.909375, 0.725, 0.421875, 0.0)]
    assert [stage.passes for stage in plan.stages] == [(CONDITIONAL,)] * 2
    assert [stage.sampler for stage in plan.stages] == ["euler", "euler"]
    assert plan.kept_audio == 1
    newest = dataclasses.replace(SPEC, version=(2, 5))
    assert [stage.sampler for stage in make_plan(Request("a robot"), newest, DISTILLED).stages] == [
        "euler_ancestral",
        "euler",
    ]
    with pytest.raises(PlanError, match="has its own noise levels"):
        make_plan(Request("a robot", num_inference_steps=4), SPEC, DISTILLED)


def test_pictures_but_the_first_frames_are_more_tokens() -> None:
    images = (Image(Path("a.png")), Image(Path("b.png"), 40, 0.5), Image(Path("c.png"), 120))
    plan = make_plan(Request("a robot", images=images), SPEC, TWO_STAGES, 5)
    for stage in plan.stages:
        assert stage.appended == (40, 120)
        assert sum(stage.token_shares) == stage.shape.video_tokens + 2 * stage.shape.height * stage.shape.width
    assert plan.image_crf == 33
    assert "3 pictures" not in plan.describe()
    assert "+ 2 pictures" in plan.describe()


def test_equal_plans_may_have_their_files_elsewhere() -> None:
    def digest(folder: str, strength: float = 1.0) -> str:
        images = (Image(Path(folder, "a.png"), 0, strength),)
        request = Request("a robot", images=images, audio_path=Path(folder, "a.wav"))
        return make_plan(request, SPEC, SETTINGS).digest()

    assert digest("here") == digest("there")
    assert digest("here") != digest("here", 0.5)


def test_what_is_given_is_not_guided() -> None:
    (stage,) = make_plan(Request("a robot", audio_path=Path("a.wav")), SPEC, SETTINGS).stages
    assert stage.audio_guidance == Guidance()
    assert stage.video_guidance == pipeline_defaults(SPEC, "one-stage").video
    (stage,) = make_plan(Request("a robot", video_path=Path("a.mp4")), SPEC, SETTINGS).stages
    assert stage.video_guidance == Guidance()
    assert stage.audio_guidance == pipeline_defaults(SPEC, "one-stage").audio
    with pytest.raises(PlanError, match="Use --pipeline one-stage"):
        make_plan(Request("a robot", video_path=Path("a.mp4")), SPEC, TWO_STAGES)


@pytest.mark.parametrize(("height", "nearest"), [(96, 128), (1000, 1024)])
def test_two_stages_need_multiples_of_64(height: int, nearest: int) -> None:
    with pytest.raises(PlanError, match=rf"height = {height} does not fit .* half size .* Nearest: {nearest}"):
        make_plan(Request("a robot", height=height, width=128), SPEC, TWO_STAGES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline": "two-stages", "distilled_lora": Lora(Path("x"))}, "needs a latent upsampler"),
        ({"pipeline": "distilled"}, "needs a latent upsampler"),
        ({"pipeline": "two-stages-hq", "spatial_upsampler_path": UPSAMPLER}, "needs a distilled LoRA"),
        ({"spatial_upsampler_path": UPSAMPLER}, "has no use for a latent upsampler"),
        ({"distilled_lora": Lora(Path("x"))}, "has no use for a distilled LoRA"),
        ({"pipeline": "three-stages"}, "must be one of one-stage"),
        ({"residency": "nowhere"}, "must be one of auto"),
        ({"parallel": "2by4"}, "such as 2x4"),
        ({"parallel": "0x4"}, "such as 2x4"),
    ],
)
def test_settings_that_do_not_fit_the_pipeline_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Image(Path("a.png"), -1), "frames count from 0"),
        (lambda: Image(Path("a.png"), 0, 1.5), r"must lie in 0\.\.1"),
        (lambda: Image(Path("a.png"), 0, math.nan), r"must lie in 0\.\.1"),
        (lambda: Request("a", images=(Image(Path("a.png"), 121),)), "the clip has the frames 0 to 120"),
        (lambda: Request("a", images=(Image(Path("a.png")), Image(Path("b.png")))), "frame of its own"),
        (lambda: Request("a", image_crf=20), "there is no image"),
        (lambda: Request("a", images=(Image(Path("a.png")),), image_crf=52), r"must lie in 0\.\.51"),
        (lambda: Request("a", video_path=Path("a.mp4"), audio_path=Path("a.wav")), "an audio file too"),
        (lambda: Request("a", video_path=Path("a.mp4"), images=(Image(Path("a.png")),)), "an image too"),
    ],
)
def test_media_that_cannot_be_meant_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make()


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        (GuidanceRequest(stg_guidance_scale=0, stg_blocks=(3,)), "so they do nothing"),
        (GuidanceRequest(stg_guidance_scale=0, stg_blocks=(77,)), "STG block 77 is not in the model"),
        (GuidanceRequest(1.0, 0.0, 0.5, None, 1.0), "so it does nothing"),
    ],
)
def test_options_without_effect_are_refused(guidance: GuidanceRequest, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_plan(Request("a robot", video=guidance), SPEC, SETTINGS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 100}, "height = 100 .* Nearest: 96"),
        ({"width": 1290}, "width = 1290 .* Nearest: 1280"),
        ({"num_frames": 120}, "num_frames = 120 .* Nearest: 121"),
        ({"video": GuidanceRequest(stg_blocks=(48,))}, "STG block 48 .* 0 to 47"),
        ({"audio": GuidanceRequest(stg_blocks=())}, "no STG block"),
        ({"num_frames": 1, "frame_rate": 240.0}, "less than one audio frame"),
    ],
)
def test_what_the_model_cannot_do_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_plan(dataclasses.replace(Request("a robot"), **change), SPEC, SETTINGS)  # type: ignore[arg-type]


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(PlanError, match="37 ranks are more than the model's 32 attention heads"):
        make_plan(Request("a robot"), SPEC, SETTINGS, 37)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"height": 0}, "height is 0"),
        ({"frame_rate": float("nan")}, "frame_rate is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"sigmas": (1.0, 0.5)}, "fall strictly"),
        ({"sigmas": (0.5, 0.5, 0.0)}, "fall strictly"),
        ({"sigmas": (1.5, 0.0)}, "fall strictly"),
        ({"sigmas": (0.4, 0.0)}, "must start at 1"),
        ({"sigmas": (1.0, 0.0), "num_inference_steps": 1}, "Both sigmas and num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"video": GuidanceRequest(cfg_guidance_scale=float("nan"))}, "video cfg_guidance_scale is nan"),
        ({"audio": GuidanceRequest(rescale_scale=1.5)}, "audio rescale_scale is 1.5"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Request(**{"prompt": "a robot", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"attention": "magic"}, {"max_batch_size": 0}])
def test_settings_that_cannot_be_meant_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        dataclasses.replace(SETTINGS, **fields)  # type: ignore[arg-type]


def _published(golden: Path) -> dict[str, object]:
    with safe_open(golden / "transformer" / "ltx-2.3-tiny.safetensors", "pt") as file:
        section: dict[str, object] = json.loads(file.metadata()["config"])["transformer"]
    return section


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_type", "interleaved"), ("frequencies_precision", "float32"), ("qk_norm", "layer_norm")],
)
def test_values_that_are_not_implemented_are_refused_by_name(golden: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=key):
        transformer_spec(_published(golden) | {key: value})


@pytest.mark.parametrize(
    "key", ["av_ca_timestep_scale_multiplier", "rope_type", "frequencies_precision", "num_layers", "norm_eps"]
)
def test_keys_without_a_safe_default_must_be_there(golden: Path, key: str) -> None:
    section = _published(golden)
    del section[key]
    with pytest.raises(WeightsError, match=key):
        transformer_spec(section)


def test_unknown_keys_are_tolerated(golden: Path) -> None:
    section = _published(golden)
    assert transformer_spec(section | {"new_in_2031": 7}) == transformer_spec(section)


def test_the_gate_scale_is_read_and_not_assumed(golden: Path) -> None:
    changed = _published(golden) | {"av_ca_timestep_scale_multiplier": 1.0}
    assert transformer_spec(changed).gate_timestep_scale == 1.0


def test_both_layouts_describe_the_same_model(golden: Path) -> None:
    published = transformer_spec(_published(golden))
    section = {
        "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 128, "out_channels": 128,
        "cross_attention_dim": 64, "audio_num_attention_heads": 4, "audio_attention_head_dim": 8,
        "audio_in_channels": 128, "audio_out_channels": 128, "audio_cross_attention_dim": 32,
        "pos_embed_max_pos": 20, "base_height": 2048, "base_width": 2048, "audio_pos_embed_max_pos": 20,
        "rope_theta": 10000.0, "norm_eps": 1e-6, "timestep_scale_multiplier": 1000,
        "cross_attn_timestep_scale_multiplier": 1000, "rope_type": "split", "rope_double_precision": True,
        "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
    }  # fmt: skip
    assert transformer_spec_from_diffusers(section) == published
    with pytest.raises(UnsupportedError, match="gated_attn"):
        transformer_spec_from_diffusers(section | {"audio_gated_attn": False})


def test_planning_needs_no_torch() -> None:
    code = "import sys, ltx_sp; ltx_sp.make_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_measured_rates_decide_over_data_sheets(tmp_path: Path) -> None:
    """With links that cost nothing, tokens come first."""
    file = tmp_path / "calibration.json"
    link = {"latency": 1e-12, "bytes_per_second": 1e18}
    rates = {"product_flops": 1e14, "read_bytes_per_second": 2e12, "memory_bytes": 48e9}
    file.write_text(json.dumps(rates | {"links": {"all_to_all": link}}))
    assert read_machine(file, DEFAULT_MACHINE) == Machine(1e14, 1e18, 1e-12, 2e12, 48e9)
    file.write_text(json.dumps(rates | {"links": {}}))
    alone = read_machine(file, DEFAULT_MACHINE)
    assert alone == dataclasses.replace(DEFAULT_MACHINE, flops=1e14, read_bytes_per_second=2e12, memory_bytes=48e9)

    slow_links = Machine(1e15, 1e6, 1.0, 1e12, 0)
    (stage,) = make_plan(Request("a robot"), SPEC, SETTINGS, 2, slow_links).stages
    assert stage.layout == (2, 1)
    off = GuidanceRequest(stg_guidance_scale=0, modality_scale=1)
    three = Request("a robot", video=off, audio=dataclasses.replace(off, modality_scale=3))
    (stage,) = make_plan(three, SPEC, SETTINGS, 2, Machine(1e15, 1e18, 1e-12, 1e12, 0)).stages
    assert stage.layout == (1, 2), "three passes on two ranks would leave one idle for a third of the time"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"product_flops": -1, "read_bytes_per_second": 1, "links": {}}',
        '{"links": {}}',
        '{"product_flops": 1, "read_bytes_per_second": 1, "links": {"all_to_all": {"speed": 1}}}',
    ],
)
def test_a_calibration_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "calibration.json"
    with pytest.raises(RequestError, match="cannot be read"):
        read_machine(file, DEFAULT_MACHINE)
    file.write_text(content)
    with pytest.raises(RequestError, match="is not what profiling/calibrate"):
        read_machine(file, DEFAULT_MACHINE)


def test_devices_are_known_by_their_names() -> None:
    assert machine_of("NVIDIA H100 PCIe") != machine_of("NVIDIA H100 80GB HBM3")
    assert machine_of("something new") == DEFAULT_MACHINE == machine_of("NVIDIA H200")
