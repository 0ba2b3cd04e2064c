"""Checkpoint names <-> parameter names. Oracles: the headers of golden files in the published layout (identity of the
round trip, every name in exactly one component), diffusers' transformer, and single names that are known."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.model.dit import Transformer
from ltx_sp.spec import transformer_spec
from ltx_sp.weights.keymap import COMPONENTS, keymap

MONOLITH = [component for component in COMPONENTS if component not in ("text_encoder", "upsampler")]


def _blocks(count: int) -> list[list[Any]]:
    return [["res_x", {}] if place % 2 == 0 else ["compress", {}] for place in range(count)]


SECTIONS: Mapping[str, Mapping[str, Any]] = {"vae": {"encoder_blocks": _blocks(9), "decoder_blocks": _blocks(7)}}


def _header(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", {})
    return json.loads(metadata.get("config", "{}")), list(header)


@pytest.fixture(scope="module")
def published(golden: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    return _header(golden / "pipeline-2.3" / "ltx-2.3.safetensors")


def test_every_published_name_belongs_to_one_component(published: tuple[dict[str, Any], list[str]]) -> None:
    sections, names = published
    maps = [keymap("published", component, sections) for component in (*MONOLITH, "upsampler")]
    assert len(names) > 800
    for name in names:
        owners = [m.component for m in maps if m.to_parameter(name) is not None]
        assert len(owners) == 1, (name, owners)


@pytest.mark.parametrize("component", MONOLITH)
def test_published_round_trip(component: str, published: tuple[dict[str, Any], list[str]]) -> None:
    sections, names = published
    names_of = keymap("published", component, sections)
    parameters = {name: names_of.to_parameter(name) for name in names}
    own = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    assert own
    assert len(set(own.values())) == len(own)
    assert [names_of.to_checkpoint(parameter) for parameter in own.values()] == list(own)


@pytest.mark.parametrize("layout", ["published", "diffusers"])
def test_an_upsampler_has_one_spelling(layout: str, golden: pathlib.Path) -> None:
    _, names = _header(golden / "pipeline-2.3" / "upsampler.safetensors")
    maps = {component: keymap("published", component, SECTIONS) for component in MONOLITH}
    maps["upsampler"] = keymap(layout, "upsampler", {})
    assert len(names) > 20
    for name in names:
        assert [component for component, names_of in maps.items() if names_of.to_parameter(name)] == ["upsampler"]
        assert maps["upsampler"].to_parameter(name) == maps["upsampler"].to_checkpoint(name) == name


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_diffusers_transformer_names(version: str, published: tuple[dict[str, Any], list[str]]) -> None:
    """Every parameter of our transformer has its place in diffusers', and the other way round."""
    from diffusers import LTX2VideoTransformer3DModel

    section = dict(published[0]["transformer"])
    arguments: dict[str, Any] = {"num_layers": 2}
    if version == "2.0":
        for key in ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector"):
            section.pop(key)
    else:
        for key in ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"):
            arguments[key] = True
        arguments["use_prompt_embeddings"] = False
    if version == "2.5":
        section |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
        arguments |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    with torch.device("meta"):
        ours = Transformer(transformer_spec(section)).state_dict()
        theirs = LTX2VideoTransformer3DModel(**arguments).state_dict()
    names_of = keymap("diffusers", "transformer", {})
    assert {names_of.to_checkpoint(name) for name in ours} == set(theirs)
    assert {names_of.to_parameter(name) for name in theirs} == set(ours)


KNOWN = [
    ("transformer", "model.diffusion_model.adaln_single.linear.bias", "adaln_single.linear.bias"),
    (
        "transformer",
        "model.diffusion_model.transformer_blocks.47.audio_to_video_attn.q_norm.weight",
        "transformer_blocks.47.audio_to_video_attn.q_norm.weight",
    ),
    (
        "connectors",
        "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.7.attn1.k_norm.weight",
        "audio_connector.transformer_blocks.7.attn1.norm_k.weight",
    ),
    ("connectors", "text_embedding_projection.aggregate_embed.weight", "text_proj_in.weight"),
    ("connectors", "text_embedding_projection.video_aggregate_embed.bias", "video_text_proj_in.bias"),
    (
        "video_vae",
        "vae.encoder.down_blocks.0.res_blocks.3.conv1.conv.weight",
        "encoder.down_blocks.0.resnets.3.conv1.conv.weight",
    ),
    ("video_vae", "vae.encoder.down_blocks.7.conv.conv.bias", "encoder.down_blocks.3.downsamplers.0.conv.conv.bias"),
    (
        "video_vae",
        "vae.encoder.down_blocks.8.res_blocks.1.conv2.conv.bias",
        "encoder.mid_block.resnets.1.conv2.conv.bias",
    ),
    (
        "video_vae",
        "vae.decoder.up_blocks.0.res_blocks.4.conv1.conv.weight",
        "decoder.mid_block.resnets.4.conv1.conv.weight",
    ),
    ("video_vae", "vae.decoder.up_blocks.1.conv.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.conv.weight"),
    (
        "video_vae",
        "vae.decoder.up_blocks.6.res_blocks.0.conv1.conv.weight",
        "decoder.up_blocks.2.resnets.0.conv1.conv.weight",
    ),
    ("video_vae", "vae.decoder.conv_in.conv.weight", "decoder.conv_in.conv.weight"),
    ("video_vae", "vae.per_channel_statistics.std-of-means", "latents_std"),
    ("audio_vae", "audio_vae.per_channel_statistics.mean-of-means", "latents_mean"),
    ("audio_vae", "audio_vae.decoder.up.2.upsample.conv.conv.bias", "decoder.up.2.upsample.conv.conv.bias"),
    ("vocoder", "vocoder.conv_pre.weight", "conv_in.weight"),
    ("vocoder", "vocoder.ups.3.bias", "upsamplers.3.bias"),
    ("vocoder", "vocoder.resblocks.14.convs2.1.weight", "resnets.14.convs2.1.weight"),
    (
        "vocoder",
        "vocoder.bwe_generator.resblocks.0.acts1.2.downsample.lowpass.filter",
        "bwe_generator.resnets.0.acts1.2.downsample.filter",
    ),
    ("vocoder", "vocoder.vocoder.act_post.act.alpha", "vocoder.act_out.act.alpha"),
    ("vocoder", "vocoder.vocoder.act_post.upsample.filter", "vocoder.act_out.upsample.filter"),
    ("vocoder", "vocoder.mel_stft.stft_fn.forward_basis", "mel_stft.stft_fn.forward_basis"),
    ("text_encoder", "language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
]


@pytest.mark.parametrize(("component", "name", "parameter"), KNOWN)
def test_known_published_names(component: str, name: str, parameter: str) -> None:
    names_of = keymap("published", component, SECTIONS)
    assert names_of.to_parameter(name) == parameter
    assert names_of.to_checkpoint(parameter) == name


FOREIGN = [
    ("transformer", "model.diffusion_model.video_embeddings_connector.learnable_registers"),
    ("transformer", "text_embedding_projection.aggregate_embed.weight"),
    ("transformer", "vae.decoder.conv_in.conv.weight"),
    ("connectors", "model.diffusion_model.patchify_proj.weight"),
    ("connectors", "text_embedding_projection.other_embed.weight"),
    ("video_vae", "vae.per_channel_statistics.channel"),
    ("video_vae", "vae.per_channel_statistics.mean-of-stds"),
    ("video_vae", "vae.decoder.mid_block.resnets.0.conv1.conv.weight"),
    ("video_vae", "audio_vae.decoder.conv_in.conv.weight"),
    ("audio_vae", "audio_vae.per_channel_statistics.mean-of-stds_over_std-of-means"),
    ("audio_vae", "audio_vae.latents_mean"),
    ("vocoder", "vocoder.conv_in.weight"),
    ("vocoder", "vocoder.vocoder.act_post.downsample.filter"),
    ("upsampler", "upsampler.blur_down.kernel"),
    ("upsampler", "res_blocks_of_another.weight"),
    ("upsampler", "vae.decoder.conv_in.conv.weight"),
    ("text_encoder", "language_model.lm_head.weight"),
    ("text_encoder", "lm_head.weight"),
    ("text_encoder", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
    ("text_encoder", "model.vision_tower.vision_model.embeddings.patch_embedding.weight"),
    ("text_encoder", "model.multi_modal_projector.mm_soft_emb_norm.weight"),
]


@pytest.mark.parametrize(("component", "name"), FOREIGN)
def test_names_of_nobody_here_give_none(component: str, name: str) -> None:
    assert keymap("published", component, SECTIONS).to_parameter(name) is None


@pytest.mark.parametrize("component", ["connectors", "video_vae", "audio_vae", "vocoder"])
def test_diffusers_layout_keeps_the_names_of_diffusers_modules(component: str) -> None:
    names_of = keymap("diffusers", component, {})
    assert names_of.to_parameter("decoder.mid_block.resnets.0.conv1.conv.weight") == (
        "decoder.mid_block.resnets.0.conv1.conv.weight"
    )
    assert names_of.to_checkpoint("latents_mean") == "latents_mean"


def test_published_names_are_foreign_in_the_diffusers_layout() -> None:
    assert keymap("diffusers", "transformer", {}).to_parameter("patchify_proj.weight") is None


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
@pytest.mark.parametrize("layout", ["published", "diffusers"])
def test_text_encoder_follows_the_spelling_of_the_file(layout: str, prefix: str) -> None:
    names = ["lm_head.weight", "vision_tower.x", "model.vision_tower.x", f"{prefix}embed_tokens.weight"]
    names_of = keymap(layout, "text_encoder", {}, names)
    assert [names_of.to_parameter(name) for name in names] == [None, None, None, "embed_tokens.weight"]
    assert names_of.to_checkpoint("norm.weight") == f"{prefix}norm.weight"
    # Without a look into the file all spellings are read.
    assert keymap(layout, "text_encoder", {}).to_parameter(f"{prefix}norm.weight") == "norm.weight"


def test_video_vae_table_follows_the_list_of_blocks() -> None:
    nine = keymap("published", "video_vae", {"vae": {"encoder_blocks": _blocks(9), "decoder_blocks": _blocks(9)}})
    seven = keymap("published", "video_vae", {"vae": {"encoder_blocks": _blocks(7), "decoder_blocks": _blocks(7)}})
    name = "vae.encoder.down_blocks.6.res_blocks.0.conv1.conv.weight"
    assert nine.to_parameter(name) == "encoder.down_blocks.3.resnets.0.conv1.conv.weight"
    assert seven.to_parameter(name) == "encoder.mid_block.resnets.0.conv1.conv.weight"
    assert nine.to_parameter("vae.decoder.up_blocks.8.res_blocks.0.conv1.conv.weight") == (
        "decoder.up_blocks.3.resnets.0.conv1.conv.weight"
    )
    # The seven-block decoder has no such block: the name stays as it is, and fits no parameter.
    assert seven.to_parameter("vae.decoder.up_blocks.8.res_blocks.0.conv1.conv.weight") == (
        "decoder.up_blocks.8.res_blocks.0.conv1.conv.weight"
    )


def test_video_vae_without_its_blocks_is_refused() -> None:
    with pytest.raises(WeightsError, match="encoder_blocks"):
        keymap("published", "video_vae", {"vae": {}})
    with pytest.raises(UnsupportedError, match="8 decoder_blocks"):
        keymap("published", "video_vae", {"vae": {"encoder_blocks": _blocks(9), "decoder_blocks": _blocks(8)}})


def test_unknown_components_and_layouts_are_faults_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no component 'vae'"):
        keymap("published", "vae", {})
    with pytest.raises(ValueError, match="no layout 'comfy'"):
        keymap("comfy", "vocoder", {})
