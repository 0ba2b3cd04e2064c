"""Published and diffusers configurations -> modules. Oracles: diffusers' default arguments, which are those of the
published 2.0 (autoencoder, connectors, vocoder, upsampler) and 2.3 (vocoder); figures of the published 2.3; the
header of a golden upsampler; formulas."""

from __future__ import annotations

import copy
import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ltx_sp.demo import GEMMA_CONFIG, demo_config, write_demo
from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.model import upstream
from ltx_sp.model.published import video_vae_arguments
from ltx_sp.spec import ModelSpec, transformer_spec, transformer_spec_from_diffusers

GEMMA: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def _chain(*blocks: Any) -> list[list[Any]]:
    return [["res_x", {"num_layers": b}] if isinstance(b, int) else [b[0], dict(b[1])] for b in blocks]


def _times(name: str, multiplier: int, **options: Any) -> tuple[str, dict[str, Any]]:
    return name, {"multiplier": multiplier, **options}


COMMON: dict[str, Any] = {
    "num_layers": 48, "num_attention_heads": 32, "attention_head_dim": 128, "in_channels": 128, "out_channels": 128,
    "cross_attention_dim": 4096, "caption_channels": 3840, "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048, "audio_out_channels": 128,
    "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20], "rope_type": "split", "frequencies_precision": "float64",
    "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000.0, "norm_eps": 1e-6,
    "connector_positional_embedding_max_pos": [4096], "connector_num_learnable_registers": 128,
    "connector_norm_output": True,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform", "use_quant_conv": False,
    "causal_decoder": False, "timestep_conditioning": False,
}  # fmt: skip
RESIDUAL_UP = _times("compress_all", 2, residual=True)
AUDIO_VAE: dict[str, Any] = {
    "model": {"params": {"sampling_rate": 16000, "ddconfig": {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False,
        "in_channels": 2, "out_ch": 2, "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0, "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
    }}},
    "preprocessing": {"stft": {"hop_length": 160, "causal": True}, "mel": {"n_mel_channels": 64}},
}  # fmt: skip
GENERATOR: dict[str, Any] = {
    "stereo": True, "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
}  # fmt: skip
AMP = GENERATOR | {
    "resblock": "AMP1", "activation": "snakebeta", "use_tanh_at_final": False, "use_bias_at_final": False,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "2.0": {
        "transformer": COMMON | {
            "connector_num_attention_heads": 30, "connector_attention_head_dim": 128, "connector_num_layers": 2,
        },
        "vae": VAE | {
            "encoder_blocks": _chain(
                4, _times("compress_space_res", 2), 6, _times("compress_time_res", 2), 6,
                _times("compress_all_res", 2), 2, _times("compress_all_res", 2), 2,
            ),
            "decoder_blocks": _chain(5, RESIDUAL_UP, 5, RESIDUAL_UP, 5, RESIDUAL_UP, 5),
        },
        "audio_vae": AUDIO_VAE,
        "vocoder": GENERATOR | {
            "resblock": "1", "upsample_initial_channel": 1024,
            "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        },
    },
    "2.3": {
        "transformer": COMMON | {
            "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
            "text_encoder_norm_type": "per_token_rms", "connector_num_attention_heads": 32,
            "connector_attention_head_dim": 128, "connector_num_layers": 8, "connector_apply_gated_attention": True,
            "audio_connector_num_attention_heads": 32, "audio_connector_attention_head_dim": 64,
        },
        "vae": VAE | {
            "decoder_base_channels": 128, "spatial_padding_mode": "zeros",
            "encoder_blocks": _chain(
                4, _times("compress_space_res", 2), 6, _times("compress_time_res", 2), 4,
                _times("compress_all_res", 2), 2, _times("compress_all_res", 1), 2,
            ),
            "decoder_blocks": _chain(
                4, _times("compress_space", 2), 6, _times("compress_time", 2), 4,
                _times("compress_all", 1), 2, _times("compress_all", 2), 2,
            ),
        },
        "audio_vae": AUDIO_VAE,
        "vocoder": {
            "vocoder": AMP | {
                "upsample_initial_channel": 1536,
                "upsample_rates": [5, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            },
            "bwe": AMP | {
                "upsample_initial_channel": 512, "apply_final_activation": False,
                "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4],
                "input_sampling_rate": 16000, "output_sampling_rate": 48000,
                "hop_length": 80, "n_fft": 512, "win_size": 512, "num_mels": 64,
            },
        },
    },
}  # fmt: skip


def _spec(version: str, **changes: dict[str, Any]) -> ModelSpec:
    """The published model, with keys of its sections changed."""
    sections = copy.deepcopy(PUBLISHED[version])
    for name, values in changes.items():
        sections[name].update(values)
    return ModelSpec((), "published", transformer_spec(COMMON), sections)


def _on_meta(cls: Any, **arguments: Any) -> Any:
    with torch.device("meta"):
        return cls(**arguments)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _same_but(ours: Any, theirs: Any, **different: Any) -> None:
    """The two modules have one configuration, but for the keys named, which have these values in ours."""
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            expected = different.get(key, value)
            assert json.loads(json.dumps(ours.config[key])) == json.loads(json.dumps(expected)), key
    assert _shapes(ours) == _shapes(theirs)


def test_video_vae_of_2_0_is_diffusers_default() -> None:
    from diffusers import AutoencoderKLLTX2Video

    _same_but(
        upstream.build_video_vae(_spec("2.0")), _on_meta(AutoencoderKLLTX2Video),
        decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip


def test_video_vae_of_2_3_has_the_published_figures() -> None:
    arguments = video_vae_arguments(PUBLISHED["2.3"]["vae"])
    assert {
        "block_out_channels": (256, 512, 1024, 1024),
        "layers_per_block": (4, 6, 4, 2, 2),
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "decoder_block_out_channels": (256, 512, 512, 1024),
        "decoder_layers_per_block": (4, 6, 4, 2, 2),
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_factor": (2, 2, 1, 2),
        "upsample_residual": (False, False, False, False),
        "encoder_spatial_padding_mode": "zeros",
        "decoder_spatial_padding_mode": "zeros",
        "decoder_causal": False,
    }.items() <= arguments.items()


def test_connectors_of_2_0_are_diffusers_default() -> None:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    ours: Any = upstream.build_connectors(_spec("2.0"), GEMMA)
    _same_but(
        ours, _on_meta(LTX2TextConnectors), rope_type="split", video_hidden_dim=3840, audio_hidden_dim=3840
    )  # fmt: skip


def test_connectors_of_2_3() -> None:
    ours = upstream.build_connectors(_spec("2.3"), GEMMA)
    shapes = _shapes(ours)
    assert shapes["video_text_proj_in.weight"] == (4096, 188160)
    assert shapes["audio_text_proj_in.bias"] == (2048,)
    assert shapes["video_connector.transformer_blocks.7.attn1.to_gate_logits.weight"] == (32, 4096)
    assert shapes["audio_connector.learnable_registers"] == (128, 2048)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_audio_vae_is_diffusers_default(version: str) -> None:
    from diffusers import AutoencoderKLLTX2Audio

    _same_but(upstream.build_audio_vae(_spec(version)), _on_meta(AutoencoderKLLTX2Audio), attn_resolutions=[])


def test_audio_statistics_are_as_wide_as_a_latent_frame() -> None:
    section = copy.deepcopy(AUDIO_VAE["model"])
    section["params"]["ddconfig"]["ch"] = 32
    module = upstream.build_audio_vae(_spec("2.0", audio_vae={"model": section}))
    assert module.get_buffer("latents_std").shape == (128,)
    assert module.get_parameter("decoder.conv_out.conv.weight").shape[1] == 32


def test_vocoder_of_2_0_is_diffusers_default() -> None:
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    ours = upstream.build_vocoder(_spec("2.0"))
    _same_but(ours, _on_meta(LTX2Vocoder))
    assert upstream.output_sampling_rate(ours) == 24000


def test_vocoder_of_2_3_is_diffusers_default_with_a_clamp_before_the_extension() -> None:
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    ours = upstream.build_vocoder(_spec("2.3"))
    _same_but(ours, _on_meta(LTX2VocoderWithBWE), final_act_fn="clamp")
    assert upstream.output_sampling_rate(ours) == 48000


def test_the_extension_is_clamped_only_with_what_it_extends() -> None:
    bwe = {key: value for key, value in PUBLISHED["2.3"]["vocoder"]["bwe"].items() if key != "apply_final_activation"}
    module: Any = upstream.build_vocoder(_spec("2.3", vocoder={"bwe": bwe}))
    assert module.config.bwe_final_act_fn is None


@pytest.mark.parametrize(
    ("keys", "encoder", "decoder"),
    [
        ({}, "zeros", "reflect"),
        ({"spatial_padding_mode": "zeros"}, "zeros", "zeros"),
        ({"decoder_spatial_padding_mode": "zeros"}, "zeros", "zeros"),
        ({"encoder_spatial_padding_mode": "reflect"}, "reflect", "reflect"),
    ],
)
def test_padding_mode(keys: dict[str, str], encoder: str, decoder: str) -> None:
    arguments = video_vae_arguments(PUBLISHED["2.0"]["vae"] | keys)
    assert (arguments["encoder_spatial_padding_mode"], arguments["decoder_spatial_padding_mode"]) == (encoder, decoder)


@pytest.fixture
def _two_gigabytes() -> Iterator[None]:
    """Let no more than that be allocated: a failure is then a failed test, and not a dead machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("_two_gigabytes")
def test_a_text_encoder_of_12_billion_costs_nothing_to_build() -> None:
    module = upstream.build_text_encoder(GEMMA)
    assert sum(parameter.numel() for parameter in module.parameters()) > 11e9
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in module.parameters())
    assert not module.training
    assert not [name for name in module.state_dict() if not name.startswith(("embed_tokens.", "layers.", "norm."))]


def test_rotary_frequencies_are_real_and_right() -> None:
    small = {"num_hidden_layers": 6, "intermediate_size": 8, "vocab_size": 8}
    module = upstream.build_text_encoder(GEMMA | {"text_config": GEMMA["text_config"] | small})
    exponents = torch.arange(0, 256, 2) / 256
    torch.testing.assert_close(module.get_buffer("rotary_emb.sliding_attention_inv_freq"), 10000.0**-exponents)
    torch.testing.assert_close(module.get_buffer("rotary_emb.full_attention_inv_freq"), 1e6**-exponents / 8)
    assert module.get_buffer("embed_tokens.embed_scale").item() == pytest.approx(math.sqrt(3840))


def test_filters_are_real() -> None:
    from diffusers.pipelines.ltx2.vocoder import UpSample1d

    module = upstream.build_vocoder(_spec("2.3"))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module.get_buffer("resampler.filter"), UpSample1d(3, window_type="hann").filter)
    assert torch.equal(module.get_buffer("vocoder.act_out.upsample.filter"), UpSample1d(2, kernel_size=12).filter)
    assert "resampler.filter" not in module.state_dict()


BUILDERS = {
    "connectors": lambda spec: upstream.build_connectors(spec, GEMMA),
    "vae": upstream.build_video_vae,
    "audio_vae": upstream.build_audio_vae,
    "vocoder": upstream.build_vocoder,
}
DDCONFIG = AUDIO_VAE["model"]["params"]["ddconfig"]


def _ddconfig(**changes: Any) -> dict[str, Any]:
    return {"model": {"params": {"ddconfig": DDCONFIG | changes, "sampling_rate": 16000}}}


REFUSED = [
    ("vae", {"_class_name": "CausalDiffusionVAE"}, UnsupportedError, "2.5 diffusion decoder.*conv VAE file"),
    ("vae", {"_class_name": "AutoencoderKLWan"}, UnsupportedError, "AutoencoderKLWan"),
    ("vae", {"timestep_conditioning": True}, UnsupportedError, "timestep_conditioning = True"),
    ("vae", {"timestep_conditioning": None}, UnsupportedError, "timestep_conditioning = None"),
    ("vae", {"norm_layer": "group_norm"}, UnsupportedError, "norm_layer = 'group_norm'"),
    ("vae", {"latent_channels": 16}, UnsupportedError, "latent_channels = 16"),
    ("vae", {"decoder_blocks": _chain(1, ("attn_res_x", {}), 1)}, UnsupportedError, "'attn_res_x' at place 1"),
    ("vae", {"encoder_blocks": _chain(1, _times("compress_all", 2), 1)}, UnsupportedError, "'compress_all' at place 1"),
    ("vae", {"encoder_blocks": [["res_x", {"num_layers": 1}]] * 3}, UnsupportedError, "'res_x' at place 1"),
    ("vae", {"decoder_blocks": _chain(1, RESIDUAL_UP)}, UnsupportedError, "ends its decoder_blocks"),
    ("vae", {"decoder_blocks": _chain(1, RESIDUAL_UP, 1)}, UnsupportedError, "by 8 in space and 2 in time"),
    (
        "vae",
        {"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]},
        UnsupportedError,
        "'inject_noise' in block 0",
    ),
    ("vae", {"decoder_blocks": None}, WeightsError, "lacks 'decoder_blocks'"),
    ("vae", {"patch_size": None}, WeightsError, "lacks 'patch_size'"),
    ("audio_vae", _ddconfig(norm_type="group"), UnsupportedError, "norm_type = 'group'"),
    ("audio_vae", _ddconfig(causality_axis="width"), UnsupportedError, "causality_axis = 'width'"),
    ("audio_vae", _ddconfig(mel_bins=80), UnsupportedError, "80 mel bins"),
    ("audio_vae", _ddconfig(ch=None), WeightsError, "lacks 'ch'"),
    ("vocoder", {"vocoder": AMP | {"stereo": False}}, UnsupportedError, "stereo = False"),
    ("vocoder", {"vocoder": AMP | {"resblock": "2"}}, UnsupportedError, "resblock = '2'"),
    ("vocoder", {"vocoder": AMP | {"activation": "snake"}}, UnsupportedError, "activation = 'snake'"),
    ("vocoder", {"vocoder": AMP}, WeightsError, "lacks 'upsample_initial_channel'"),
    ("connectors", {"text_encoder_norm_type": "masked_mean"}, UnsupportedError, "text_encoder_norm_type"),
    ("connectors", {"caption_proj_before_connector": False}, UnsupportedError, "text_encoder_norm_type"),
    ("connectors", {"rope_type": "interleaved"}, UnsupportedError, "rope_type = 'interleaved'"),
    ("connectors", {"connector_ff_bias": False}, UnsupportedError, "connector_ff_bias = False"),
    ("connectors", {"connector_norm_output": False}, UnsupportedError, "connector_norm_output = False"),
    ("connectors", {"caption_channels": 2560}, WeightsError, "width 2560; the text encoder gives 3840"),
    ("connectors", {"connector_num_layers": None}, WeightsError, "lacks 'connector_num_layers'"),
]


@pytest.mark.parametrize(("section", "values", "error", "message"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(
    section: str, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    name = "transformer" if section == "connectors" else section
    with pytest.raises(error, match=message):
        BUILDERS[section](_spec("2.3", **{name: values}))


UPSAMPLER: dict[str, Any] = {
    "_class_name": "LatentUpsampler", "in_channels": 128, "mid_channels": 1024, "num_blocks_per_stage": 4, "dims": 3,
    "spatial_upsample": True, "temporal_upsample": False, "spatial_scale": 2.0, "rational_resampler": True,
}  # fmt: skip


def test_upsampler_of_2_0_is_diffusers_default() -> None:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    theirs: Any = _on_meta(LTX2LatentUpsamplerModel)
    published: Any = upstream.build_upsampler(UPSAMPLER)
    assert _shapes(published) == {
        name: shape for name, shape in _shapes(theirs).items() if name != "upsampler.blur_down.kernel"
    }
    from_folder: Any = upstream.build_upsampler(json.loads(theirs.to_json_string()))
    _same_but(from_folder, published)
    for module in (published, from_folder):
        assert {key: module.config[key] for key in theirs.config if not key.startswith("_")} == {
            key: value for key, value in theirs.config.items() if not key.startswith("_")
        }
        assert all(parameter.is_meta and not parameter.requires_grad for parameter in module.parameters())
        assert not module.training


def test_upsampler_of_2_3_has_the_names_of_its_file(golden: Path) -> None:
    with (golden / "pipeline-2.3" / "upsampler.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    config = json.loads(header.pop("__metadata__")["config"])
    module = upstream.build_upsampler(config)
    assert _shapes(module) == {name: tuple(entry["shape"]) for name, entry in header.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"temporal_upsample": True, "spatial_upsample": False},
            UnsupportedError,
            "temporal_upsample = True; .* False",
        ),
        ({"spatial_upsample": False}, UnsupportedError, "spatial_upsample = False"),
        ({"spatial_scale": 1.5}, UnsupportedError, r"spatial_scale = 1\.5; ltx_sp implements 2\.0"),
        ({"rational_spatial_scale": 4.0}, UnsupportedError, r"rational_spatial_scale = 4\.0"),
        ({"dims": 2}, UnsupportedError, "dims = 2"),
        ({"in_channels": 16}, UnsupportedError, "in_channels = 16"),
        ({"rational_resampler": "no\x1b[2J"}, UnsupportedError, r"rational_resampler = 'no\\x1b\[2J'"),
        ({"dims": "3" * 10_000}, UnsupportedError, r"dims = '3{5,20}\.\.\.3{5,20}'; "),
        ({"mid_channels": None}, WeightsError, "lacks 'mid_channels'"),
        ({"num_blocks_per_stage": None}, WeightsError, "lacks 'num_blocks_per_stage'"),
        ({"mid_channels": 40}, WeightsError, "mid_channels = 40; it must be a multiple of 32"),
        ({"mid_channels": -32}, WeightsError, "mid_channels = -32"),
        ({"mid_channels": 32 * 10**9}, WeightsError, "mid_channels = 32000000000"),
        ({"mid_channels": "1024"}, WeightsError, "mid_channels = '1024'"),
        ({"mid_channels": [1024]}, WeightsError, r"mid_channels = \[1024\]"),
        ({"num_blocks_per_stage": 10**9}, WeightsError, "num_blocks_per_stage = 1000000000; .* from 1 to 256"),
        ({"num_blocks_per_stage": True}, WeightsError, "num_blocks_per_stage = True"),
        ({"num_blocks_per_stage": 4.0}, WeightsError, r"num_blocks_per_stage = 4\.0"),
    ],
)
def test_upsamplers_of_another_kind_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        upstream.build_upsampler(UPSAMPLER | changes)


def test_another_text_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'gemma4_unified'"):
        upstream.build_text_encoder({"model_type": "gemma4_unified", "text_config": {}})


def test_an_absent_section_is_an_error_of_the_weights() -> None:
    spec = ModelSpec((), "published", transformer_spec(COMMON), {"transformer": COMMON})
    with pytest.raises(WeightsError, match="no configuration for its vocoder"):
        upstream.build_vocoder(spec)


@pytest.fixture(scope="module")
def diffusers_spec() -> ModelSpec:
    """The 2.3 model as a diffusers folder describes it: what its modules say of themselves, through JSON."""
    from diffusers import LTX2VideoTransformer3DModel

    spec = _spec("2.3")
    modules: dict[str, Any] = {name: build(spec) for name, build in BUILDERS.items()}
    modules["transformer"] = _on_meta(LTX2VideoTransformer3DModel, num_layers=1, rope_type="split")
    sections = {name: json.loads(module.to_json_string()) for name, module in modules.items()}
    sections["vocoder"]["final_act_fn"] = None  # as diffusers' own conversion leaves it
    return ModelSpec((2, 3), "diffusers", transformer_spec_from_diffusers(sections["transformer"]), sections)


@pytest.mark.parametrize("name", BUILDERS)
def test_both_layouts_build_the_same_module(name: str, diffusers_spec: ModelSpec) -> None:
    ours: Any = BUILDERS[name](diffusers_spec)
    published: Any = BUILDERS[name](_spec("2.3"))
    assert all(parameter.is_meta for parameter in ours.parameters())
    _same_but(ours, published)


def test_diffusers_classes_that_are_not_implemented(diffusers_spec: ModelSpec) -> None:
    sections: dict[str, Any] = dict(diffusers_spec.sections)
    sections["vae"] = sections["vae"] | {"_class_name": "AutoencoderKLWan"}
    with pytest.raises(UnsupportedError, match="AutoencoderKLWan"):
        upstream.build_video_vae(ModelSpec((), "diffusers", diffusers_spec.transformer, sections))
    sections["connectors"] = sections["connectors"] | {"text_proj_in_factor": 27}
    with pytest.raises(WeightsError, match="take 27 states of width 3840; the text encoder gives 49"):
        upstream.build_connectors(ModelSpec((), "diffusers", diffusers_spec.transformer, sections), GEMMA)


def test_projection_of_2_0_normalises_each_layer_over_the_prompt() -> None:
    """8 * (x - mean) / (max - min) per layer, over the valid tokens and all channels; padding is zero."""
    config = demo_config("2.0")
    spec = ModelSpec((), "published", transformer_spec(config["transformer"]), config)
    module = upstream.build_connectors(spec, GEMMA_CONFIG).to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    seen: list[torch.Tensor] = []
    module.get_submodule("text_proj_in").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    states = torch.randn(1, 128, 48, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2.0
    valid = 7
    mask = (torch.arange(128) >= 128 - valid).long()[None]
    with torch.no_grad():
        module(states, mask, padding_side="left")
    expected = torch.zeros(1, 128, 48, 3)
    for layer in range(3):
        x = states[0, -valid:, :, layer]
        expected[0, -valid:, :, layer] = 8 * (x - x.mean()) / (x.max() - x.min() + 1e-6)
    torch.testing.assert_close(seen[0], expected.flatten(2), rtol=1e-4, atol=1e-5)


def test_tokenizer_is_the_one_of_the_file(tmp_path: Path) -> None:
    """The demo's tokenizer.json spells UTF-8 bytes; a pipeline rebuilt for Gemma would not."""
    write_demo(tmp_path / "demo")
    tokenizer = upstream.load_tokenizer(tmp_path / "demo" / "gemma")
    assert tokenizer("ab é")["input_ids"] == [2, *(4 + byte for byte in "ab é".encode())]
    (tmp_path / "demo" / "gemma" / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        upstream.load_tokenizer(tmp_path / "demo" / "gemma")
