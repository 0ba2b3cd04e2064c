"""Oracles: the reference's published numbers, the golden checkpoints' headers, and arithmetic done by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from ltx_sp.errors import PlanError, RequestError, UnsupportedError, WeightsError
from ltx_sp.plan import (
    CONDITIONAL,
    ISOLATED,
    PERTURBED,
    UNCONDITIONAL,
    Guidance,
    guidance_passes,
    ltx2_sigmas,
    make_plan,
    num_parameters,
    shares,
    version_defaults,
)
from ltx_sp.request import DISTILLED_SIGMAS, GuidanceRequest, Request, Settings
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
    assert version_defaults(SPEC).video.stg_blocks == (28,)
    assert version_defaults(SPEC).num_inference_steps == 30
    older = dataclasses.replace(SPEC, version=())
    assert version_defaults(older).video.stg_blocks == (29,)
    assert version_defaults(older).num_inference_steps == 40


def test_passes_follow_what_either_stream_wants() -> None:
    off = Guidance()
    assert guidance_passes(off, off) == (CONDITIONAL,)
    assert guidance_passes(Guidance(cfg_scale=3), off) == (CONDITIONAL, UNCONDITIONAL)
    assert guidance_passes(off, Guidance(stg_scale=1)) == (CONDITIONAL, PERTURBED)
    full = Guidance(cfg_scale=3, stg_scale=1, modality_scale=3)
    assert guidance_passes(full, off) == (CONDITIONAL, UNCONDITIONAL, PERTURBED, ISOLATED)


def test_a_plan_is_decided_in_full() -> None:
    plan = make_plan(Request("a robot", height=768, width=1280), SPEC, SETTINGS, 3)
    assert plan.layout == (1, 3)
    assert plan.token_shares == (5120, 5120, 5120)
    assert plan.head_shares == (11, 11, 10)
    assert plan.num_steps == 30
    assert plan.video_guidance == version_defaults(SPEC).video
    assert plan.batches == ((0,), (1,), (2,), (3,))
    assert plan.prediction.collectives == 3 * 48
    assert plan.prediction.weight_bytes == num_parameters(full_size()) * 2
    text = plan.describe()
    for fact in ("1280x768", "121 frames", "15360 video tokens", "126 audio tokens", "5120", "10 to 11 heads"):
        assert fact in text


def test_batches_hold_as_many_passes_as_allowed() -> None:
    settings = dataclasses.replace(SETTINGS, max_batch_size=3)
    assert make_plan(Request("a robot"), SPEC, settings).batches == ((0, 1, 2), (3,))


def test_predicted_work_is_that_of_the_published_figures() -> None:
    """About 594 TFLOP for one forward of 15 360 tokens, and 59 MB per block and rank on eight ranks."""
    request = Request("a robot", height=768, width=1280)
    alone, eight = (make_plan(request, SPEC, SETTINGS, ranks).prediction for ranks in (1, 8))
    assert 550e12 < alone.flops < 640e12
    assert round(eight.received_bytes / 48 / 1e6) == 59
    assert alone.collectives == 0


def test_equal_requests_have_equal_digests_and_others_do_not() -> None:
    request = Request("a robot")
    digest = make_plan(request, SPEC, SETTINGS, 2).digest()
    assert make_plan(Request("a robot"), SPEC, SETTINGS, 2).digest() == digest
    for other in (dataclasses.replace(request, seed=11), dataclasses.replace(request, prompt="a fox")):
        assert make_plan(other, SPEC, SETTINGS, 2).digest() != digest
    assert make_plan(request, SPEC, dataclasses.replace(SETTINGS, dtype="float32"), 2).digest() != digest


def test_distilled_sigmas_run_unguided_unless_asked() -> None:
    request = Request("a robot", sigmas=DISTILLED_SIGMAS)
    assert make_plan(request, SPEC, SETTINGS).passes == (CONDITIONAL,)
    guided = dataclasses.replace(request, video=GuidanceRequest(cfg_guidance_scale=3.0))
    assert make_plan(guided, SPEC, SETTINGS).passes == (CONDITIONAL, UNCONDITIONAL)


def test_a_decoder_that_reflects_needs_two_cells() -> None:
    request = Request("a robot", height=32, width=64)
    assert make_plan(request, SPEC, SETTINGS).shape.height == 1
    for section in ({"_class_name": "x"}, {"decoder_spatial_padding_mode": "reflect"}):
        older = dataclasses.replace(SPEC, sections={"vae": section})
        with pytest.raises(PlanError, match=r"height = 32 is too small .* Nearest: 64"):
            make_plan(request, older, SETTINGS)
    newer = dataclasses.replace(SPEC, sections={"vae": {"spatial_padding_mode": "zeros"}})
    assert make_plan(request, newer, SETTINGS).shape.height == 1


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
    with pytest.raises(PlanError, match="33 ranks are more than the model's 32 attention heads"):
        make_plan(Request("a robot"), SPEC, SETTINGS, 33)


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
